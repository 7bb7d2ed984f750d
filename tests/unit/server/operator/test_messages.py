"""Records to messages and back, and the generated code against ``operator.proto``."""

import importlib.resources
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.messages import ChildInfo, round_message, round_record, status_message, status_record

from .conftest import line, status

FOLDER = Path(str(importlib.resources.files("icmoe_server.operator")))
PROTO = FOLDER / "operator.proto"
GENERATED = ("operator_pb2.py", "operator_pb2.pyi", "operator_pb2_grpc.py")


def test_a_round_keeps_its_keys_and_values() -> None:
    record = line(3, failed={"hospitalC": "out of memory"}, missing={"hospitalB": "2026-01-01T00:00:00+00:00"}, late=2)
    again = round_record(pb.RoundRecord.FromString(round_message(record).SerializeToString()))
    # Not sent: how many images were used, found and skipped; a null epsilon is one that is not there.
    assert again == {
        **{name: value for name, value in record.items() if name != "num_examples"}, "epsilon": {},
        "evaluate_only": False,
    }  # fmt: skip
    assert json.loads(json.dumps(again)) == again


def test_a_status_keeps_its_keys_and_values() -> None:
    content = status("waiting", 2, hospitalA="online", hospitalB="missing")
    content["roll_call"]["hospitalB"]["reason"] = "offline"
    children = [ChildInfo("superlink", None, "restarting", 3)]
    again = status_record(status_message("cardiac", content, children, stop_asked=""))
    own = {"run": "cardiac", "stop_asked": None}
    assert again == {
        **content, **own, "children": [{"name": "superlink", "pid": None, "state": "restarting", "restarts": 3}]
    }  # fmt: skip


@pytest.mark.parametrize("record", [{}, dict.fromkeys(line(1)), {"round": "x", "val_dice": {"a": None}, "failed": [1]}])
def test_what_another_version_wrote_is_no_error(record: dict[str, object]) -> None:
    assert round_message(record) == pb.RoundRecord()
    assert status_message("r", record, [], stop_asked="").state == "starting"


def test_generated_code_is_that_of_the_proto() -> None:
    """Whatever the versions of the tools: messages, fields, numbers, types and calls are those of the text."""
    text = re.sub(r"//.*", "", PROTO.read_text())
    assert pb.DESCRIPTOR.package == "icmoe.operator.v1"
    written = {name: _fields_in_text(body) for name, body in _blocks(text, "message").items()}
    generated = {
        name: {field.name: field.number for field in message.fields}
        for name, message in pb.DESCRIPTOR.message_types_by_name.items()
    }
    assert written == generated
    calls = re.findall(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)", text)
    methods = pb.DESCRIPTOR.services_by_name["Operator"].methods
    assert calls == [
        (one.name, one.input_type.name, "stream " if one.server_streaming else "", one.output_type.name)
        for one in methods
    ]
    values = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+);", _blocks(text, "enum")["StopWhen"])}
    assert values == dict(pb.StopWhen.items())
    stub = (FOLDER / "operator_pb2_grpc.py").read_text()
    assert all(f"/icmoe.operator.v1.Operator/{name}" in stub for name, *_ in calls)


def _blocks(text: str, kind: str) -> dict[str, str]:
    return dict(re.findall(rf"{kind} (\w+) {{((?:[^{{}}]|{{[^{{}}]*}})*)}}", text))


def _fields_in_text(body: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+) = (\d+);", body)}


@pytest.mark.skipif(find_spec("grpc_tools") is None, reason="grpcio-tools is not installed; make proto brings its own")
def test_make_proto_gives_what_is_checked_in(tmp_path: Path) -> None:
    root = FOLDER.parent.parent
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", str(root), *outputs, str(PROTO)], check=True)
    for name in GENERATED:
        assert (tmp_path / "icmoe_server" / "operator" / name).read_text() == (FOLDER / name).read_text()


def test_generated_code_needs_no_newer_packages_than_flower() -> None:
    """protobuf code of major version 5 runs with 5 and 6; flwr 1.41 takes protobuf 5.28 to 6 and grpcio from 1.70."""
    code = (FOLDER / "operator_pb2.py").read_text()
    assert "# Protobuf Python Version: 5.29.0" in code
    assert "GRPC_GENERATED_VERSION = '1.70.0'" in (FOLDER / "operator_pb2_grpc.py").read_text()
    assert MessageToDict(pb.StopRequest(when=pb.NOW)) == {"when": "NOW"}
