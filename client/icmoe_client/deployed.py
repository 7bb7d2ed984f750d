"""The ClientApp of a real hospital, and the guard that Flower starts in place of its own ``flwr-clientapp``.

A SuperNode starts one process per message: the script that ``write_guard`` leaves first in its PATH, which lets the
process of ``warm_command`` fork one that runs ``main``. Only the code that is installed here runs, whatever the centre
sent.
"""

import logging
import math
import os
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from icmoe import __version__
from icmoe.errors import IcmoeError
from icmoe.flower_engine import CLIENT_APP_COMMAND, app_digest, check_flower, run_local_client_app
from icmoe.locks import hold
from icmoe_client.site import Site
from icmoe_client.site_file import SiteConfig, load_site
from icmoe_client.warm_start import serve

SITE_VARIABLE = "ICMOE_SITE_FILE"
logger = logging.getLogger(__name__)
_GUARD = """\
#!{python}
from pathlib import Path

from icmoe_client.warm_start import forward


def cold():
    from icmoe_client.deployed import main

    main()


forward(Path(__file__).parent, cold=cold)
"""


def write_guard(folder: Path) -> Path:
    """Write the script that a SuperNode finds as ``flwr-clientapp``.

    Returns:
        The folder to put first into PATH.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    script = folder / CLIENT_APP_COMMAND
    script.write_text(_GUARD.format(python=sys.executable), encoding="utf-8")
    script.chmod(0o700)
    return folder


def warm_command(folder: Path) -> list[str]:
    """The process that makes ClientApps start fast; needs the environment of the SuperNode.

    Args:
        folder: of ``write_guard``.
    """
    return [sys.executable, "-c", f"from icmoe_client.deployed import stay_warm; stay_warm({str(folder)!r})"]


def stay_warm(folder: str) -> None:
    """Load everything that a ClientApp imports and fork one for each message, for ever."""

    def preload() -> None:
        for name in ("flwr.supernode.runtime.run_clientapp", "icmoe_client.app"):
            import_module(name)

    serve(Path(folder), preload=preload, work=main)


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
    with ExitStack() as until_the_end:
        run_local_client_app(lambda: _make_app(config, until_the_end), allowed=allowed)


def _make_app(config: SiteConfig, until_the_end: ExitStack) -> ClientApp:
    """Load the installed app, once no other message of this site is at work.

    The centre may have lost its ServerApp and asked again while the answer to the first message is still being made;
    two at once would not fit into the memory of a GPU. Flower's heartbeat of this message goes on meanwhile.
    """
    try:
        lock = config.state_dir / "at_work.lock"
        until_the_end.enter_context(hold(lock, otherwise="another message is at work", patience=math.inf))
        from icmoe_client.app import make_client_app
    except Exception as error:
        logger.exception("the app cannot be loaded")
        # Flower sends the text of an exception to the centre; this one may hold a path.
        raise RuntimeError(f"internal error ({type(error).__name__}); the site's log has the details") from None

    def resolve(context: Context) -> Site:
        return open_site(config)

    return make_client_app(resolve, admit=config.policy.admit)


def open_site(config: SiteConfig) -> Site:
    """Read the manifest of a hospital whose data were checked.

    Raises:
        DataError: if they were not, or changed since.
        PolicyError: if too few are usable.
    """
    from icmoe.data.check_files import source_digests
    from icmoe.data.check_opening import sample_name
    from icmoe.data.checked import require_checked
    from icmoe.data.manifest import load_manifest

    checked = require_checked(config.data)
    left_out = frozenset(one.name for one in checked.skipped)
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
        source_digests=source_digests(usable, checked.files, root=manifest.root),
        num_examples=config.num_examples,
        policy=config.policy,
        ledger=config.ledger_path,
        receipt_key=config.receipt_key,
    )
