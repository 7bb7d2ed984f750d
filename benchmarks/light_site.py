"""A hospital that does not train: its ClientApp answers in milliseconds, so that all that is left is the way there.

A SuperNode finds ``flwr-clientapp`` of ``write_command`` first in its PATH. Everything else, from the keys to the
messages, is real.
"""

import os
import sys
import time
from pathlib import Path

from flwr.app import Context, Message  # noqa: TID251  # a site speaks Flower
from flwr.clientapp import ClientApp  # noqa: TID251

from icmoe.exchange import SiteReport, expert_of
from icmoe.flower import pack_report, reply, unpack_instruction
from icmoe.flower_engine import CLIENT_APP_COMMAND, app_digest, run_local_client_app
from icmoe_client.egress_log import EgressLog

BACKBONE_VARIABLE, WORK_VARIABLE, KEY_VARIABLE = "LIGHT_SITE_BACKBONE", "LIGHT_SITE_WORK", "LIGHT_SITE_KEY"


def write_command(folder: Path) -> Path:
    """Write the script; returns the folder to put first into PATH."""
    folder.mkdir(parents=True)
    script = folder / CLIENT_APP_COMMAND
    here = Path(__file__).parent
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(here)!r})\nimport light_site\nlight_site.main()\n",
        encoding="utf-8",
    )
    script.chmod(0o700)
    return folder


def main() -> None:
    """What the script does."""
    run_local_client_app(make_app, allowed={app_digest(): "this version"})


def make_app() -> ClientApp:
    """An app that sends back what came, a little changed."""
    app = ClientApp()

    def work(message: Message, context: Context) -> Message:
        began = time.perf_counter()
        instruction, arrays = unpack_instruction(message.content)
        experts = sorted({expert for name in arrays if (expert := expert_of(name))})
        report = SiteReport(
            site=instruction.site,
            server_round=instruction.server_round,
            config_digest=instruction.config_digest,
            backbone_digest=os.environ[BACKBONE_VARIABLE],
            numbers={"dice": 0.5, "num_scored": 1, "num_examples": 4, "train_loss": 1.0, "trainable_params": 1},
            expert_shares=dict.fromkeys(experts, 1 / len(experts)),
            dice_per_class=[0.5],
        )
        changed = {name: array + array.dtype.type(1e-3) for name, array in arrays.items()}
        update = changed if instruction.job == "train" else None
        work_file = Path(os.environ[WORK_VARIABLE])
        log = EgressLog(work_file.with_suffix(".jsonl"), key=Path(os.environ[KEY_VARIABLE]), site=instruction.site)
        receipt = log.append(
            report, update, run=instruction.config_digest, job=instruction.job, patients=4, images=4, epsilon=None
        )
        answer = reply(message, pack_report(report, update, receipt=receipt.to_json()))
        if instruction.job == "train":
            with work_file.open("a", encoding="utf-8") as file:
                file.write(f"{instruction.server_round} {time.perf_counter() - began:.4f}\n")
        return answer

    app.train()(work)
    app.evaluate()(work)
    return app
