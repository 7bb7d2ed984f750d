"""The study centre: ServerApp, strategies, books of the run. Never imports torch nor icmoe_client."""
