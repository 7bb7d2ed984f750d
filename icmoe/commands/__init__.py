"""What `icmoe-fl` can do, one file per command or group. Heavy imports happen inside, so that ``--help`` is quick."""
