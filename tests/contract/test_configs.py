"""Every shipped run config is valid, says what it costs, and follows its own rules."""

from pathlib import Path

import pytest

from icmoe.config import load_run_config, parse_run_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "run").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert "demo" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestShippedConfig:
    def test_is_valid(self, path: Path) -> None:
        assert load_run_config(path).task.name

    def test_travels_unchanged(self, path: Path) -> None:
        run = load_run_config(path)
        arrived = parse_run_config(run.model_dump_json(), source="the wire")
        assert arrived == run
        assert arrived.digest() == run.digest()

    def test_starts_with_a_comment(self, path: Path) -> None:
        assert path.read_text(encoding="utf-8").startswith("# ")
