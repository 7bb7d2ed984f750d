import logging
from pathlib import Path

import pytest

from icmoe.errors import RunError
from icmoe_server.deployed import logged

rounds = logging.getLogger("icmoe_server.rounds")


def test_what_the_rounds_say_is_in_the_log_and_only_while_they_run(tmp_path: Path) -> None:
    path = tmp_path / "serverapp.log"
    with logged(path):
        rounds.warning("quarantined the reply of b")
    rounds.warning("said later")
    text = path.read_text()
    assert "WARNING quarantined the reply of b" in text
    assert "said later" not in text


def test_a_known_error_is_one_line_and_an_unknown_one_has_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "serverapp.log"
    with pytest.raises(RunError), logged(path):
        raise RunError("round 3: 0 of the 1 sites")
    assert path.read_text().rstrip().endswith("ERROR round 3: 0 of the 1 sites")
    assert "Traceback" not in path.read_text()
    with pytest.raises(ZeroDivisionError), logged(path):
        _ = 1 / 0
    assert "the run broke\nTraceback" in path.read_text()
