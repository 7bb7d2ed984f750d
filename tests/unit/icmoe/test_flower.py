import math
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import save

from icmoe.errors import ExchangeError
from icmoe.exchange import Instruction, Job, SiteReport
from icmoe.flower import (
    ABOUT,
    ARRAYS,
    METRICS,
    pack_arrays,
    pack_instruction,
    pack_report,
    unpack_arrays,
    unpack_instruction,
    unpack_report,
    unpack_update,
)
from icmoe.types import Array

INSTRUCTION = Instruction(
    job="train", run_json='{"task": {}}', config_digest="c" * 64, server_round=7, site="hospitalA"
)
REPORT = SiteReport(
    site="oslo",
    server_round=7,
    config_digest="c" * 64,
    backbone_digest="b" * 64,
    numbers={"num_examples": 12.0, "train_loss": 0.25, "dice": math.nan},
    expert_shares={"basic.0": 0.25, "adaptive.1": 0.75},
    dice_per_class=[0.5, math.nan, 1.0],
)
TENSORS: dict[str, Array] = {
    "router.gate.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "experts.basic.0.up.bias": np.array([0.5, -1.0], dtype=np.float16),
    "experts.basic.0.up.weight": np.zeros((0, 3), dtype=np.float32),
}


def same(one: SiteReport, other: SiteReport) -> None:
    """Equal, where NaN equals NaN."""
    for name in ("site", "server_round", "config_digest", "backbone_digest", "expert_shares"):
        assert getattr(one, name) == getattr(other, name)
    assert one.numbers == pytest.approx(dict(other.numbers), nan_ok=True, rel=0.0, abs=0.0)
    np.testing.assert_array_equal(list(one.dice_per_class), list(other.dice_per_class))


@pytest.mark.parametrize("job", ["train", "validate", "test"])
def test_an_instruction_comes_back(job: Job) -> None:
    sent = Instruction(job=job, run_json=INSTRUCTION.run_json, config_digest="c" * 64, server_round=7, site="hospitalA")
    instruction, arrays = unpack_instruction(pack_instruction(sent, TENSORS))
    assert instruction == sent
    assert set(arrays) == set(TENSORS)


def test_tensors_come_back_bit_for_bit() -> None:
    update = unpack_update(pack_report(REPORT, TENSORS))
    assert set(update.arrays) == set(TENSORS)
    for name, array in TENSORS.items():
        assert update.arrays[name].dtype == array.dtype
        assert np.array_equal(update.arrays[name], array)
    same(update.report, REPORT)


def test_a_tensor_that_is_not_contiguous_travels() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    back = unpack_update(pack_report(REPORT, {"router.x": array})).arrays["router.x"]
    assert np.array_equal(back, array)


def test_a_report_comes_back_with_nan_for_absent_classes() -> None:
    same(unpack_report(pack_report(REPORT)), REPORT)


def test_an_empty_report_comes_back() -> None:
    report = SiteReport(site="s", server_round=1, config_digest="", backbone_digest="", numbers={})
    same(unpack_report(pack_report(report)), report)


def test_a_report_without_tensors_is_no_update() -> None:
    with pytest.raises(ExchangeError, match="no tensors"):
        unpack_update(pack_report(REPORT))


def broken_reply(change: Callable[[RecordDict], object]) -> RecordDict:
    content = pack_report(REPORT, TENSORS)
    change(content)
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop(ABOUT),
        lambda c: c.pop(METRICS),
        lambda c: c[ABOUT].pop("site"),
        lambda c: c[ABOUT].pop("server-round"),
        lambda c: c[ABOUT].pop("experts"),
        lambda c: c[METRICS].pop("expert-shares"),
        lambda c: c[METRICS].pop("dice-per-class"),
        lambda c: c[METRICS].update({"expert-shares": [0.5]}),
        lambda c: c[METRICS].update({"expert-shares": 0.5}),
        lambda c: c[METRICS].update({"dice-per-class": 0.5}),
        lambda c: c[ABOUT].update({"server-round": "seven"}),
        lambda c: c[ABOUT].update({"server-round": [7]}),
        lambda c: c[ABOUT].update({"experts": 3}),
    ],
)
def test_a_malformed_reply_is_an_exchange_error(change: Callable[[RecordDict], object]) -> None:
    with pytest.raises(ExchangeError, match="reply"):
        unpack_update(broken_reply(change))


@pytest.mark.parametrize(
    "array",
    [
        FlowerArray(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"not an array"),
        FlowerArray(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b""),
        FlowerArray(dtype="float32", shape=(2,), stype="something.else", data=b"\0" * 8),
        FlowerArray(np.frombuffer(save(TENSORS)[:-1], np.uint8)),
        FlowerArray(np.ones(3, np.float32)),
        FlowerArray(np.frombuffer(b'{"x": {"dtype": "F77", "shape": [1], "data_offsets": [0, 4]}}', np.uint8)),
    ],
    ids=["garbage", "empty", "foreign", "cut", "no bundle", "no safetensors"],
)
def test_tensors_that_cannot_be_read_are_an_exchange_error(array: FlowerArray) -> None:
    """One site's damaged bytes must end in its quarantine, not in the end of the round."""
    content = pack_report(REPORT, TENSORS)
    content.array_records[ARRAYS]["router"] = array
    with pytest.raises(ExchangeError, match="tensors of 'router'"):
        unpack_update(content)


def test_a_tensor_in_the_bundle_of_another_expert_is_an_exchange_error() -> None:
    content = pack_report(REPORT, TENSORS)
    smuggled = save({"experts.basic.0.up.weight": np.ones(2, np.float32)})
    content.array_records[ARRAYS]["router"] = FlowerArray(np.frombuffer(smuggled, np.uint8))
    with pytest.raises(ExchangeError, match="does not belong"):
        unpack_update(content)


def test_a_message_carries_one_array_per_expert_however_many_tensors_it_has() -> None:
    names = [f"experts.{expert}.{index}.weight" for expert in ("basic.0", "adaptive.1") for index in range(50)]
    tensors: dict[str, Array] = {name: np.ones(2, np.float32) for name in names}
    record = pack_arrays({**tensors, "router.gate.bias": np.zeros(1, np.float16)})
    assert list(record) == ["experts.basic.0", "experts.adaptive.1", "router"]
    back = unpack_arrays(record)
    assert back["router.gate.bias"].dtype == np.float16
    assert set(back) == {*names, "router.gate.bias"}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop(ABOUT),
        lambda c: c.pop(ARRAYS),
        lambda c: c[ABOUT].pop("job"),
        lambda c: c[ABOUT].update({"job": "delete"}),
        lambda c: c[ABOUT].pop("run-config"),
        lambda c: c[ABOUT].pop("config-sha256"),
        lambda c: c[ABOUT].pop("server-round"),
        lambda c: c[ABOUT].update({"server-round": "seven"}),
        lambda c: c[ABOUT].update({"server-round": [7]}),
    ],
)
def test_a_malformed_instruction_is_an_exchange_error(change: Callable[[RecordDict], object]) -> None:
    content = pack_instruction(INSTRUCTION, TENSORS)
    change(content)
    with pytest.raises(ExchangeError, match="run the same icmoe-fl everywhere"):
        unpack_instruction(content)


def test_wire_keys_are_kebab_case() -> None:
    sent, reply = pack_instruction(INSTRUCTION, TENSORS), pack_report(REPORT, TENSORS)
    keys = [key for content in (sent, reply) for record in content.config_records.values() for key in record]
    keys += [key for record in reply.metric_records.values() for key in record]
    assert not [key for key in keys if "_" in key or key != key.lower()]
    assert isinstance(sent[ABOUT], ConfigRecord)
