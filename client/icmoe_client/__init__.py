"""A hospital: ClientApp, local trainer, site settings. Never imports icmoe_server."""
