"""The border to Flower: records to our types and back. The only core file that imports flwr.

Wire keys stand here and nowhere else, kebab-case as Flower's own. One message carries one ``ArrayRecord`` ("arrays"),
one ``ConfigRecord`` ("about") and, in replies, one ``MetricRecord`` ("metrics").
"""

import logging
import os

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app import Context as Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from safetensors import SafetensorError
from safetensors.numpy import load, save

from icmoe.errors import ExchangeError
from icmoe.exchange import Instruction, Job, SiteReport, Update
from icmoe.types import Array, Arrays

ARRAYS, ABOUT, METRICS = "arrays", "about", "metrics"
_JOBS: tuple[Job, ...] = ("train", "validate", "test")


def pack_instruction(instruction: Instruction, arrays: Arrays) -> RecordDict:
    """Instruction and global tensors as the content of a message."""
    about = ConfigRecord(
        {
            "job": instruction.job,
            "run-config": instruction.run_json,
            "config-sha256": instruction.config_digest,
            "server-round": instruction.server_round,
            "site": instruction.site,
            "countersigned": instruction.countersigned,
        }
    )
    return RecordDict({ARRAYS: pack_arrays(arrays), ABOUT: about})


def unpack_instruction(content: RecordDict) -> tuple[Instruction, dict[str, Array]]:
    """Read what ``pack_instruction`` wrote.

    Raises:
        ExchangeError: if a record or key is missing.
    """
    about = content.config_records.get(ABOUT)
    arrays = content.array_records.get(ARRAYS)
    if about is None or arrays is None or about.get("job") not in _JOBS:
        raise ExchangeError("the centre's message is not one of this version; run the same icmoe-fl everywhere")
    try:
        instruction = Instruction(
            job=next(job for job in _JOBS if job == about["job"]),
            run_json=str(about["run-config"]),
            config_digest=str(about["config-sha256"]),
            server_round=int(about["server-round"]),  # type: ignore[arg-type]
            site=str(about["site"]),
            countersigned=str(about["countersigned"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExchangeError(f"the centre's message is malformed ({error}); run the same icmoe-fl everywhere") from error
    return instruction, unpack_arrays(arrays)


def pack_report(report: SiteReport, arrays: Arrays | None = None, *, receipt: str = "") -> RecordDict:
    """A site's report, with tensors after training and its signed receipt, as the content of a reply."""
    about = ConfigRecord(
        {
            "site": report.site,
            "server-round": report.server_round,
            "config-sha256": report.config_digest,
            "backbone-sha256": report.backbone_digest,
            "experts": list(report.expert_shares),
            "receipt": receipt,
        }
    )
    numbers = {name.replace("_", "-"): float(value) for name, value in report.numbers.items()}
    metrics = MetricRecord(
        {
            **numbers,
            "expert-shares": [float(share) for share in report.expert_shares.values()],
            "dice-per-class": [float(dice) for dice in report.dice_per_class],
        }
    )
    content = RecordDict({ABOUT: about, METRICS: metrics})
    if arrays is not None:
        content[ARRAYS] = pack_arrays(arrays)
    return content


def unpack_report(content: RecordDict) -> SiteReport:
    """Read what ``pack_report`` wrote.

    Raises:
        ExchangeError: if a record or key is missing or of another type.
    """
    about, metrics = content.config_records.get(ABOUT), content.metric_records.get(METRICS)
    if about is None or metrics is None:
        raise ExchangeError("the reply lacks its about or metrics record")
    try:
        shares, per_class = metrics["expert-shares"], metrics["dice-per-class"]
        return SiteReport(
            site=str(about["site"]),
            server_round=int(about["server-round"]),  # type: ignore[arg-type]
            config_digest=str(about["config-sha256"]),
            backbone_digest=str(about["backbone-sha256"]),
            numbers={
                name.replace("-", "_"): float(value)
                for name, value in metrics.items()
                if isinstance(value, int | float)
            },
            expert_shares=dict(zip(about["experts"], shares, strict=True)),  # type: ignore[arg-type, misc]
            dice_per_class=[float(dice) for dice in per_class],  # type: ignore[union-attr]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExchangeError(f"the reply's report is malformed: {error}") from error


def unpack_receipt(content: RecordDict) -> str:
    """The receipt that came with a reply, unread; empty if none did."""
    about = content.config_records.get(ABOUT)
    return str(about.get("receipt", "")) if about is not None else ""


def unpack_update(content: RecordDict) -> Update:
    """Read a training reply.

    Raises:
        ExchangeError: if a record is missing.
    """
    arrays = content.array_records.get(ARRAYS)
    if arrays is None:
        raise ExchangeError("the reply carries no tensors")
    return Update(report=unpack_report(content), arrays=unpack_arrays(arrays))


def pack_site_name(name: str) -> RecordDict:
    """Answer to "who are you"."""
    return RecordDict({ABOUT: ConfigRecord({"site": name})})


def unpack_site_name(content: RecordDict) -> str:
    """Read what ``pack_site_name`` wrote.

    Raises:
        ExchangeError: if the reply is another one.
    """
    about = content.config_records.get(ABOUT)
    if about is None or not isinstance(about.get("site"), str):
        raise ExchangeError("the site did not give its name")
    return str(about["site"])


def pack_arrays(arrays: Arrays) -> ArrayRecord:
    """Named tensors as a record of one array per expert and one for the router: safetensors bytes, names inside.

    Flower moves every array as two objects of their own, each by a request at every hop. With a hundred tensors, most
    of them biases, the SuperLink of three sites took half a processor all through a run; one bundle per expert leaves a
    handful. A line that breaks costs the bundle under way and not the whole update.
    """
    bundles: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        bundles.setdefault(_bundle_of(name), {})[name] = np.ascontiguousarray(array)
    return ArrayRecord({key: FlowerArray(np.frombuffer(save(bundle), np.uint8)) for key, bundle in bundles.items()})


def unpack_arrays(record: ArrayRecord) -> dict[str, Array]:
    """Named tensors of a record.

    Raises:
        ExchangeError: if the bytes of one are damaged, or a bundle holds what does not belong there.
    """
    arrays: dict[str, Array] = {}
    for key, packed in record.items():
        try:
            bundle = load(packed.numpy().tobytes())
        except (ValueError, EOFError, TypeError, OSError, KeyError, SafetensorError) as error:
            raise ExchangeError(f"the tensors of {key!r} cannot be read: {error}") from error
        if wrong := [name for name in bundle if _bundle_of(name) != key]:
            raise ExchangeError(f"{wrong[0]!r} came among the tensors of {key!r}, where it does not belong")
        arrays |= bundle
    return arrays


def _bundle_of(name: str) -> str:
    """``experts.basic.0.up.weight`` -> ``experts.basic.0``, ``router.gate.bias`` -> ``router``."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[0] == "experts" else parts[0]


def reply(message: Message, content: RecordDict) -> Message:
    """Answer a message."""
    return Message(content, reply_to=message)


def run_in_simulation(
    server_app: ServerApp, client_app: ClientApp, *, num_sites: int, num_cpus: int, num_gpus: int, verbose: bool
) -> None:
    """Run both apps with Flower's simulation engine (Ray): one process per CPU, or one on the GPU where there is one.

    Raises:
        Exception: what the ServerApp raised.
    """
    # Costs seconds and is of no use to a site's process.
    from flwr.simulation import run_simulation

    # Flower announces every message and warns that this entry point will move to its own command line one day.
    # Ray runs its workers at niceness 15 otherwise: on a busy machine they would hardly start.
    os.environ.setdefault("RAY_worker_niceness", "0")
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.CRITICAL)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=num_sites,
        backend_config={
            "init_args": {
                "num_cpus": min(num_cpus, num_sites) if not num_gpus else 1,
                "num_gpus": num_gpus,
                "object_store_memory": 512 * 2**20,
                "include_dashboard": False,
                "log_to_driver": verbose,
                "logging_level": "INFO" if verbose else "ERROR",
            },
            "client_resources": {"num_cpus": 1, "num_gpus": float(num_gpus)},
        },
    )
