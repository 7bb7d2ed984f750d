"""The ClientApp of a real hospital, and the guard that Flower starts in place of its own ``flwr-clientapp``.

A SuperNode starts one process per message: ``main`` here, through the script that ``write_guard`` leaves first in its
PATH. Only the code that is installed here runs, whatever the centre sent.
"""

import logging
import os
import sys
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from icmoe import __version__
from icmoe.errors import IcmoeError
from icmoe.flower_engine import CLIENT_APP_COMMAND, app_digest, check_flower, run_local_client_app
from icmoe_client.site import Site
from icmoe_client.site_file import SiteConfig, load_site

SITE_VARIABLE = "ICMOE_SITE_FILE"


def write_guard(folder: Path) -> Path:
    """Write the script that a SuperNode finds as ``flwr-clientapp``.

    Returns:
        The folder to put first into PATH.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    script = folder / CLIENT_APP_COMMAND
    script.write_text(f"#!{sys.executable}\nfrom icmoe_client.deployed import main\nmain()\n", encoding="utf-8")
    script.chmod(0o700)
    return folder


def main() -> None:
    """Check the app that came with the run, then run the installed one."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # One line per call, twenty calls a message.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_flower()
        config = load_site(Path(os.environ[SITE_VARIABLE]))
    except IcmoeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    allowed = {app_digest(): f"icmoe-fl {__version__}", **dict.fromkeys(config.policy.allowed_apps, "site file")}
    run_local_client_app(lambda: _make_app(config), allowed=allowed)


def _make_app(config: SiteConfig) -> ClientApp:
    # torch and MONAI load here, after the app was allowed.
    from icmoe_client.app import make_client_app

    def resolve(context: Context) -> Site:
        return open_site(config)

    return make_client_app(resolve, admit=config.policy.admit)


def open_site(config: SiteConfig) -> Site:
    """Read the manifest of a hospital whose data were checked.

    Raises:
        DataError: if they were not, or changed since.
        PolicyError: if too few are usable.
    """
    from icmoe.data.check_opening import sample_name
    from icmoe.data.checked import require_checked
    from icmoe.data.manifest import load_manifest

    left_out = frozenset(one.name for one in require_checked(config.data).skipped)
    manifest = load_manifest(config.data)
    usable = tuple(sample for sample in manifest.samples if sample_name(sample, manifest.root) not in left_out)
    num_train = sum(sample.split == "train" for sample in usable)
    num_left_out = len(manifest.samples) - len(usable)
    config.policy.admit_data(num_train=num_train, num_usable=len(usable), num_skipped=num_left_out)
    return Site(
        name=config.name,
        samples=usable,
        state_dir=config.state_dir,
        checkpoint=config.checkpoint,
        verify_checkpoint=config.verify_checkpoint,
        device=config.device,
        max_physical_batch_size=config.max_physical_batch_size,
        num_threads=config.num_threads,
        num_left_out=sum(sample.split == "train" for sample in set(manifest.samples) - set(usable)),
    )
