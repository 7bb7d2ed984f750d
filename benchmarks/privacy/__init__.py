"""Parts of ``privacy_table.py`` and ``privacy_attack.py``: federations in one process, a U-Net, attacks."""
