"""``icmoe-fl evaluate`` on a finished run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_scores_equal_the_run_and_pages_stand_alone(icmoe_fl: Any, finished: Path, discs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    done = icmoe_fl.run("evaluate", run, "--data", discs, "--against", run, "--against-checkpoint", "round_000")
    assert done.process.returncode == 0, done.output
    out = run / "evaluation"
    result = json.loads((out / "evaluation.json").read_text())
    expected = json.loads((run / "results.json").read_text())
    for site, scores in expected["sites"].items():
        assert result["sites"][site]["dice"]["mean"] == pytest.approx(scores["dice"], abs=1e-6)
        assert result["sites"][site]["hd95"]["mean"] == pytest.approx(scores["hd95"], abs=1e-6)
    assert result["mean_over_sites"]["dice"]["mean"] == pytest.approx(expected["mean_dice"], abs=1e-6)
    assert result["against"]["difference"] > 0.1  # the untrained model knows nothing of discs
    assert result["against"]["p_value"] is None  # three patients are too few to tell
    assert len((out / "cases.csv").read_text().splitlines()) == 4
    page = (out / "evaluation.html").read_text()
    assert page.count('<figure class="example">') == 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--split", "all"], "train, val, test"),
        (["--checkpoint", "round_099"], "round_099"),
        (["--against", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use(run_main: Any, finished: Path, discs: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    code, output = run_main("evaluate", finished, "--data", discs, "--out", tmp_path / "out", *arguments)
    assert code in (2, 6)
    assert told in output
