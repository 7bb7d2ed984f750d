"""A hospital without images: a real SuperNode with a real key, whose ClientApp answers at once and as a plan says.

``python fake_hospital.py SITE_FILE PLAN`` connects. For every message the SuperNode starts the ``flwr-clientapp`` that
it finds first in its PATH, which is ``answer`` here. Numpy and Flower only, so that a round costs seconds.

PLAN is a JSON file: ``run_dir`` of the centre, ``step`` by which an honest update moves every number, ``claims`` (the
name it goes by), ``rounds`` (how it behaves by round of training, see ``_misbehave``), ``scores`` (how when it only
scores), ``go`` (a file that ``hold`` waits for).
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.supernode.runtime.run_clientapp as runtime
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from icmoe.checkpoint import load_checkpoint, round_folder
from icmoe.exchange import Instruction, Job, SiteReport
from icmoe.flower import pack_report, reply, unpack_instruction
from icmoe.flower_engine import flower_environment, supernode_command
from icmoe.types import Array
from icmoe_client.egress_log import LOG, EgressLog
from icmoe_client.site_file import load_site

PLAN_VARIABLE, SITE_VARIABLE = "FAKE_HOSPITAL_PLAN", "FAKE_HOSPITAL_SITE"
PATIENCE = 600.0

Arrays = dict[str, Array]
_ahead: list[Message] = []
"""Replies that go to the centre before the one that Flower sends."""


def connect(site_file: Path, plan: Path) -> None:
    """Become the SuperNode of a site."""
    site = load_site(site_file)
    assert site.ca_certificate is not None
    scripts = site.state_dir / "fake"
    scripts.mkdir(parents=True)
    script = scripts / "flwr-clientapp"
    here = str(Path(__file__).parent)
    code = f"import sys\nsys.path.insert(0, {here!r})\nfrom fake_hospital import answer\nanswer()\n"
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o700)
    variables = {PLAN_VARIABLE: str(plan), SITE_VARIABLE: str(site_file)}
    environment = flower_environment(site.state_dir / "flwr_home", **variables)
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = supernode_command(
        server=site.server,
        ca_certificate=site.ca_certificate,
        key=site.flower_key,
        site=json.loads(plan.read_text())["claims"],
        port=port,
    )
    os.execve(command[0], command, environment)


def answer() -> None:
    """Stand in for ``flwr-clientapp``: one message in, one reply out, or two to the same message."""
    plan = json.loads(Path(os.environ[PLAN_VARIABLE]).read_text())
    app = ClientApp()

    def work(message: Message, context: Context) -> Message:
        return _work(plan, message)

    app.train()(work)
    app.evaluate()(work)
    push = runtime.push_message

    def push_all(client: Any, message: Message, context: Context) -> None:
        for one in _ahead:
            with _fleet(context.node_id) as centre:
                push(centre, one, context)
        push(client, message, context)

    def load(*_: object, **__: object) -> Callable[..., ClientApp]:
        return lambda *_, **__: app

    replaced = {"install_from_fab": lambda *_, **__: None, "get_load_client_app_fn": load, "push_message": push_all}
    assert replaced.keys() <= vars(runtime).keys()
    vars(runtime).update(replaced)
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


@contextmanager
def _fleet(node_id: int) -> Iterator[Any]:
    """The centre itself, past the SuperNode, in the form in which a ClientApp speaks to its SuperNode."""
    site = load_site(Path(os.environ[SITE_VARIABLE]))
    key = serialization.load_ssh_private_key(site.flower_key.read_bytes(), password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    assert site.ca_certificate is not None
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    with FleetHttpClient.from_server_address(
        site.server, False, site.ca_certificate.read_bytes(), interceptors
    ) as client:

        def push_messages(request: Any) -> Any:
            same = {"messages_list": request.messages_list, "message_object_trees": request.message_object_trees}
            return client.PushMessages(
                PushMessagesRequest(node=Node(node_id=node_id), clientapp_runtime_list=[0.1], **same)
            )

        yield SimpleNamespace(PushMessages=push_messages, PushObject=client.PushObject)


def _work(plan: dict[str, Any], message: Message) -> Message:
    instruction, arrays = unpack_instruction(message.content)
    report = _report(plan, instruction)
    if instruction.job != "train":
        if plan["scores"] == "nan":
            report = replace(report, numbers={**report.numbers, "dice": math.nan})
        return reply(message, _signed(report, None, job=instruction.job))
    how = plan["rounds"].get(str(instruction.server_round), "honest")
    moved = _moved(arrays, plan["step"])
    if how == "twice":
        _ahead.append(reply(message, _signed(report, moved, job="train")))
        moved = _moved(arrays, 3 * plan["step"])
    report, moved = _misbehave(how, plan, report=report, arrays=arrays, moved=moved)
    return reply(message, _signed(report, moved, job="train"))


def _signed(report: SiteReport, arrays: Arrays | None, *, job: Job) -> RecordDict:
    """A reply with its receipt, where one can be written: none speaks of what is not a number."""
    site = load_site(Path(os.environ[SITE_VARIABLE]))
    log = EgressLog(site.state_dir / LOG, key=site.receipt_key, site=report.site)
    with suppress(ValueError):
        run = report.config_digest
        receipt = log.append(report, arrays, run=run, job=job, patients=4, images=4, epsilon=None)
        return pack_report(report, arrays, receipt=receipt.to_json())
    return pack_report(report, arrays)


def _report(plan: dict[str, Any], instruction: Instruction) -> SiteReport:
    """What a hospital with four images would say; its Dice rises, so that the last round is the best."""
    train = instruction.job == "train"
    numbers = dict.fromkeys(("num_examples", "used", "found"), 4.0) | {"train_loss": 0.5, "skipped": 0.0}
    scored_round = instruction.server_round - train
    numbers |= {"dice": 0.5 + 0.01 * scored_round, "num_scored": 1.0, "empty_masks": 0.0}
    return SiteReport(
        site=plan["claims"],
        server_round=instruction.server_round,
        config_digest=instruction.config_digest,
        backbone_digest=load_checkpoint(round_folder(Path(plan["run_dir"]), 0)).backbone_digest,
        numbers={**numbers, "num_steps": 2.0, "trainable_params": 1000.0},
        expert_shares={"basic.0": 0.5, "adaptive.0": 0.5} if train else {},
        dice_per_class=[0.5],
    )


def _moved(arrays: Arrays, step: float) -> Arrays:
    return {name: (array + step).astype(np.float32) for name, array in arrays.items()}


def _misbehave(
    how: str, plan: dict[str, Any], *, report: SiteReport, arrays: Arrays, moved: Arrays
) -> tuple[SiteReport, Arrays]:
    """Report and tensors as a site sends them that is broken, or wants to break the run."""
    first = min(arrays)
    match how:
        case "nan":
            moved = {**moved, first: np.full_like(moved[first], np.nan)}
        case "shape":
            moved = {**moved, first: np.stack([moved[first], moved[first]])}
        case "extra":
            moved = {**moved, "image_encoder.x": np.zeros(3, np.float32)}
        case "stale":
            report = replace(report, server_round=report.server_round - 1)
        case "config":
            report = replace(report, config_digest="0" * 64)
        case "norm":
            moved = _moved(arrays, 100 * plan["step"])
        case "late":
            _wait_for(lambda: _is_written(Path(plan["run_dir"]), report.server_round))
        case "hold":
            _wait_for(Path(plan["go"]).exists)
        case _:
            assert how in ("honest", "twice"), how
    return report, moved


def _is_written(run_dir: Path, server_round: int) -> bool:
    lines = run_dir / "rounds.jsonl"
    return lines.exists() and len(lines.read_text().splitlines()) >= server_round


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("the test gave no sign")
        time.sleep(0.1)


if __name__ == "__main__":
    connect(Path(sys.argv[1]), Path(sys.argv[2]))
