"""The ClientApp with a site's work replaced: what leaves when it goes well, and when it does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.app.user_config import UserConfig
from flwr.supercore.task_identity import TaskIdentity

from icmoe.config import RunConfig
from icmoe.errors import (
    BackboneError,
    ConfigError,
    DataError,
    ExchangeError,
    IcmoeError,
    ManifestError,
    MaskError,
    PolicyError,
    RunError,
)
from icmoe.exchange import Instruction, Job, SiteReport
from icmoe.flower import pack_instruction, unpack_report, unpack_site_name, unpack_update
from icmoe.types import Array
from icmoe_client import app as client_app
from icmoe_client.app import SITE_ERROR, describe_for_centre, make_client_app
from icmoe_client.site import Site
from icmoe_client.trainer import Outgoing

SECRET = "/data/Mustermann_Erika.png"
ARRAYS: dict[str, Array] = {"router.gate.weight": np.ones(2, np.float32)}


@pytest.fixture(autouse=True)
def _inside_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can only be made where Flower has said which task this is."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def run_config(**simulation: float) -> RunConfig:
    task = {"name": "discs", "classes": {"disc": 1}}
    return RunConfig.model_validate({"task": task, "simulation": simulation, "federation": {"quorum": 1}})


def ask(
    work: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    job: Job = "train",
    run: RunConfig | None = None,
    content: RecordDict | None = None,
    simulated: bool = False,
) -> Message:
    run = run or run_config()

    def carry_out(*given: Any) -> Outgoing:
        said, arrays = work(*given)
        return Outgoing(said, arrays, receipt="signed")

    monkeypatch.setattr(client_app, "carry_out", carry_out)
    if content is None:
        content = pack_instruction(Instruction(job, run.model_dump_json(), run.digest(), 2, "oslo"), ARRAYS)
    message_type = MessageType.TRAIN if job == "train" else MessageType.EVALUATE
    return send(Message(content, dst_node_id=5, message_type=message_type), simulated=simulated)


def send(message: Message, *, simulated: bool = False) -> Message:
    message.metadata.__dict__["_message_id"] = "asked"
    site = Site(name="oslo", samples=(), state_dir=Path("nowhere"))
    context = Context(run_id=1, node_id=5, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig())
    answer = make_client_app(lambda _: site, simulated=simulated)(message, context)
    assert answer.metadata.reply_to_message_id == "asked"
    return answer


def report(instruction: Instruction) -> SiteReport:
    return SiteReport("oslo", instruction.server_round, instruction.config_digest, "b" * 64, {"dice": 0.5})


def test_says_its_name() -> None:
    asked = Message(RecordDict(), dst_node_id=5, message_type=MessageType.QUERY)
    assert unpack_site_name(send(asked, simulated=True).content) == "oslo"


def test_says_nothing_on_a_query_of_a_real_centre() -> None:
    with pytest.raises(ValueError, match="query"):
        send(Message(RecordDict(), dst_node_id=5, message_type=MessageType.QUERY))


def test_training_gives_report_and_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(site: Site, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        assert (site.name, instruction.job, instruction.server_round) == ("oslo", "train", 2)
        return report(instruction), {name: array + 1 for name, array in arrays.items()}

    update = unpack_update(ask(work, monkeypatch).content)
    assert update.report.site == "oslo"
    assert np.array_equal(update.arrays["router.gate.weight"], [2.0, 2.0])


@pytest.mark.parametrize("job", ["validate", "test"])
def test_scoring_sends_no_tensors(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    answer = ask(lambda site, instruction, arrays: (report(instruction), None), monkeypatch, job=job)
    assert unpack_report(answer.content).numbers["dice"] == 0.5
    assert list(answer.content.array_records) == []


def failing(error: Exception) -> Callable[..., Any]:
    def work(*_: Any) -> Any:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(SECRET),
        DataError(SECRET),
        MaskError(SECRET),
        ManifestError(SECRET),
        RunError(SECRET),
        IcmoeError(SECRET),
        ValueError(SECRET),
        FileNotFoundError(2, "No such file", SECRET),
        KeyError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_name_stays_in_the_sites_log(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(failing(error), monkeypatch)
    assert answer.has_error()
    assert answer.error.code == SITE_ERROR
    reason = str(answer.error.reason)
    assert "Mustermann" not in reason
    assert type(error).__name__ in reason
    assert "Mustermann" in caplog.text


@pytest.mark.parametrize("kind", [ExchangeError, PolicyError])
def test_reasons_without_secrets_reach_the_centre(kind: type[IcmoeError], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(failing(kind("epsilon would pass 3.0")), monkeypatch).error.reason == (
        f"{kind.__name__}: epsilon would pass 3.0"
    )


def test_the_path_of_a_checkpoint_does_not_leave() -> None:
    """A backbone's message names a file of the hospital: where it keeps its weights is its own business."""
    error = BackboneError("/home/dr_mustermann/sam.pth is not a file. Give the path of Meta's sam_vit_b_01ec64.pth")
    assert "mustermann" not in describe_for_centre(error)


def test_a_message_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(failing(AssertionError("no work")), monkeypatch, content=RecordDict())
    assert "run the same icmoe-fl everywhere" in str(answer.error.reason)


class TestDropout:
    def test_fails_training_only_in_a_simulation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = run_config(dropout=0.999)

        def work(site: Site, instruction: Instruction, arrays: dict[str, Array]) -> Any:
            return report(instruction), arrays

        assert ask(work, monkeypatch, run=run, simulated=True).error.reason == "simulated dropout"
        assert not ask(work, monkeypatch, run=run, simulated=False).has_error()
        assert not ask(work, monkeypatch, run=run, simulated=True, job="validate").has_error()
