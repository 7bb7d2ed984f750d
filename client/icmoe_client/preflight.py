"""``icmoe-fl client --check``: is this hospital ready? Each check gives one plain sentence, and a remedy if need be.

A check is a function that returns its sentence or raises an error of our tree. A line break in either divides what is
so from what to do about it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from icmoe import __version__
from icmoe.errors import ConfigError, ConnectError, DataError, IcmoeError, RunError
from icmoe.flower_engine import check_flower
from icmoe_client.connection import Connection, trust
from icmoe_client.network_checks import check_certificate, check_clock, check_connection, check_name
from icmoe_client.site_file import SiteConfig
from icmoe_client.site_keys import flower_public_key, receipt_public_key

MIN_FREE_DISK = 10**9
MIN_FREE_MEMORY = 2 * 10**9
"""Bytes. A training process with the default model takes about 1.5 GB (docs/performance.md)."""

Check = Callable[[], str]
Registration = Callable[[SiteConfig], str]
"""Ask the centre whether it knows this site's key: a sentence, or a ``NetworkError``."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        name: of the check.
        ok: ``None`` where it was not made.
        sentence: what is so.
        remedy: what to do; empty where nothing is.
        exit_code: that a failure asks for; 0 otherwise.
        may_pass: whether a failure may go away while one waits: the centre does not answer.
    """

    name: str
    ok: bool | None
    sentence: str
    remedy: str = ""
    exit_code: int = 0
    may_pass: bool = False


def run_checks(site: SiteConfig, *, quick: bool = False, registration: Registration | None = None) -> list[CheckResult]:
    """Check a site, from its own files to the centre.

    Args:
        site: its settings.
        quick: leave out what needs torch, which takes seconds and 500 MB to load.
        registration: asks the centre, last of all; without it that is left open.

    Returns:
        One result per check, always the same checks in the same order.
    """
    local: list[tuple[str, Check]] = [
        ("Site file and keys", partial(check_files, site)),
        ("Versions", check_versions),
        ("Data", partial(check_data, site)),
        ("Disk", partial(check_disk, site, quick=quick)),
    ]
    results = [_attempt(name, check) for name, check in local]
    memory = CheckResult("Memory", None, "Left out of the quick check.")
    results.append(memory if quick else _attempt("Memory", partial(check_memory, site)))
    return [*results, *_check_network(site, registration)]


def exit_code(results: list[CheckResult]) -> int:
    """Of the first check that failed: 2 config, 3 data, 5 network, 6 disk or memory; 0 where none did."""
    return next((result.exit_code for result in results if result.ok is False), 0)


def may_start(results: list[CheckResult]) -> bool:
    """Whether a client may begin: nothing failed but what it can wait for."""
    return all(result.ok is not False or result.may_pass for result in results)


def print_checks(results: list[CheckResult], console: Console | None = None) -> int:
    """Show results as a table, remedies under their sentences.

    Returns:
        The exit code.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for column in ("check", "outcome", "sentence"):
        table.add_column(column, no_wrap=column != "sentence")
    for result in results:
        style, outcome = {True: ("green", "ok"), False: ("bold red", "FAILED"), None: ("dim", "-")}[result.ok]
        sentence = Text(result.sentence)
        if result.remedy:
            sentence.append(f"\n{result.remedy}", style="yellow")
        table.add_row(Text(result.name), Text(outcome, style=style), sentence)
    (console or Console()).print(table)
    return exit_code(results)


def check_files(site: SiteConfig) -> str:
    """Keys, certificate and the site's own folder.

    Raises:
        ConfigError: if one of them is missing, of the wrong kind or open to others.
    """
    flower_public_key(site.flower_key)
    receipt_public_key(site.receipt_key)
    trust(site.ca_certificate)
    if not site.state_dir.is_dir():
        raise ConfigError(f"there is no folder {site.state_dir}.\nRun 'icmoe-fl site init {site.name}' again.")
    if not os.access(site.state_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"{site.state_dir} cannot be written to.\nRun this as the user who owns it.")
    if site.state_dir.stat().st_mode & 0o077:
        raise ConfigError(f"others on this machine can look into {site.state_dir}.\nRun 'chmod 700 {site.state_dir}'.")
    return f"The site file of {site.name} is complete and its keys have the right form."


def check_versions() -> str:
    """Flower's minor release, which all peers of a federation share.

    Raises:
        ConfigError: if it is another.
    """
    check_flower()
    return f"icmoe-fl {__version__} with flwr {version('flwr')}."


def check_data(site: SiteConfig) -> str:
    """The manifest passed ``data check`` and did not change since; the site's policy is content with it.

    Raises:
        DataError: if not.
        PolicyError: if too few images are usable.
    """
    from icmoe.data.checked import require_checked, usable_samples
    from icmoe.data.manifest import load_manifest

    checked = require_checked(site.data)
    usable = usable_samples(load_manifest(site.data, default_site=site.name), checked)
    training = sum(sample.split == "train" for sample in usable)
    site.policy.admit_data(num_train=training, num_usable=len(usable), num_skipped=len(checked.skipped))
    return f"{len(usable)} images passed the check of {checked.date[:10]}, {training} of them for training."


def check_disk(site: SiteConfig, *, quick: bool) -> str:
    """Room for the site's own folder and, unless ``quick``, for the feature cache to come.

    Raises:
        RunError: if there is too little.
        ConfigError: if the cache may not grow enough.
    """
    free = _free_disk(site.state_dir)
    if free < MIN_FREE_DISK:
        raise RunError(
            f"only {_size(free)} are free for {site.state_dir}.\n"
            f"Free some space: logs and updates need {_size(MIN_FREE_DISK)}."
        )
    if quick:
        return f"{_size(free)} are free for {site.state_dir}."
    return _check_cache(site)


def _check_cache(site: SiteConfig) -> str:
    from icmoe.data.cache import open_cache
    from icmoe.data.checked import require_checked
    from icmoe.data.features import FeatureSpec

    cache = open_cache().info()
    free = _free_disk(cache.root)
    try:
        num_images = len(require_checked(site.data).digests)
    except DataError:
        return f"{_size(free)} are free for the feature cache; its size is known once the data passed their check."
    # Of the default backbone, one view: what a run will really ask for is known when it comes.
    spec = FeatureSpec(
        backbone_digest="", image_size=256, embedding_size=64, pixel_norm="minmax", detail_size=256, precision="bf16"
    )
    to_come = num_images * spec.entry_bytes
    if to_come > cache.limit_bytes:
        raise ConfigError(
            f"the feature cache of {num_images} images needs {_size(to_come)}, but may hold "
            f"{_size(cache.limit_bytes)}.\nRaise ICMOE_CACHE_LIMIT_GB."
        )
    if to_come - cache.bytes > free:
        raise RunError(
            f"the feature cache of {num_images} images needs {_size(to_come)}, but only {_size(free)} are free for "
            f"{cache.root}.\nFree some space, or set ICMOE_CACHE_DIR to a larger disk."
        )
    return f"{_size(free)} are free for the feature cache, which will need {_size(to_come)}."


def check_memory(site: SiteConfig) -> str:
    """Main memory, and the GPU where the site wants one.

    Raises:
        RunError: if there is too little memory.
        ConfigError: if the wanted GPU is not there.
    """
    import torch

    available = psutil.virtual_memory().available
    if available < MIN_FREE_MEMORY:
        raise RunError(
            f"only {_size(available)} of memory are available, and training takes about {_size(MIN_FREE_MEMORY)}.\n"
            "End other programs, or set max_physical_batch_size: 1 in the site file."
        )
    if site.device == "cpu" or (site.device == "auto" and not torch.cuda.is_available()):
        return f"{_size(available)} of memory are available. Training uses the CPU."
    device = torch.device("cuda" if site.device == "auto" else site.device)
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"the site file says device: {site.device}, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs.\nCheck the driver with nvidia-smi, or set device: auto."
        )
    free, _ = torch.cuda.mem_get_info(device)
    if free < MIN_FREE_MEMORY:
        raise RunError(
            f"only {_size(free)} of memory are free on {torch.cuda.get_device_name(device)}.\n"
            "End other programs on it (nvidia-smi), or set device: cpu in the site file."
        )
    return f"{_size(available)} of memory are available, {_size(free)} on {torch.cuda.get_device_name(device)}."


def _check_network(site: SiteConfig, registration: Registration | None) -> Iterator[CheckResult]:
    """Each step needs the one before, so after a failure the rest is not tried."""
    names = ("Name look-up", "Connection", "Certificate", "Clock", "Registration")
    try:
        connection = Connection(*site.address)
    except IcmoeError as error:
        yield from _give_up(names, error)
        return
    with connection:
        steps: list[Check] = [
            partial(check_name, connection),
            partial(check_connection, connection),
            partial(check_certificate, connection, site.ca_certificate),
            partial(check_clock, connection),
            *([partial(registration, site)] if registration is not None else []),
        ]
        for place, step in enumerate(steps):
            result = _attempt(names[place], step)
            yield result
            if not result.ok:
                yield from (CheckResult(name, None, "Not tried after this failure.") for name in names[place + 1 :])
                return
    if registration is None:
        yield CheckResult(names[-1], None, "The centre says so when the client starts.")


def _give_up(names: tuple[str, ...], error: IcmoeError) -> Iterator[CheckResult]:
    yield _failure(names[0], error)
    yield from (CheckResult(name, None, "Not tried after this failure.") for name in names[1:])


def _attempt(name: str, check: Check) -> CheckResult:
    try:
        sentence, _, remedy = check().partition("\n")
    except IcmoeError as error:
        return _failure(name, error)
    except OSError as error:
        return _failure(name, RunError(f"{error}."))
    return CheckResult(name, True, sentence, remedy)


def _failure(name: str, error: IcmoeError) -> CheckResult:
    sentence, _, remedy = str(error).partition("\n")
    return CheckResult(
        name,
        False,
        sentence[:1].upper() + sentence[1:],
        remedy,
        exit_code=error.exit_code,
        may_pass=isinstance(error, ConnectError),
    )


def _free_disk(folder: Path) -> int:
    """Bytes free on the disk of a folder, which may not exist yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 10**9 else f"{number / 1e6:.1f} MB"
