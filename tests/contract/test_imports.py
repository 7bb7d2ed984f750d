"""What is imported at run time. Who may import whom in the source is import-linter's, in pyproject.toml."""

import subprocess
import sys

import pytest

CENTRE = [
    "icmoe.aggregation",
    "icmoe.checkpoint",
    "icmoe.config",
    "icmoe.errors",
    "icmoe.exchange",
    "icmoe.flower",
    "icmoe.types",
    "icmoe_server.app",
]


def modules_after_importing(*names: str) -> set[str]:
    program = f"import sys\nimport {', '.join(names)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {module.partition(".")[0] for module in done.stdout.split()}


def test_the_centre_runs_without_torch() -> None:
    loaded = modules_after_importing(*CENTRE)
    assert "icmoe_server" in loaded
    assert not loaded & {"torch", "torchvision", "monai", "segment_anything", "ray", "icmoe_client"}


@pytest.mark.parametrize("name", ["icmoe.config", "icmoe.exchange", "icmoe.aggregation", "icmoe.checkpoint"])
def test_the_core_of_the_centre_runs_without_flower(name: str) -> None:
    assert not modules_after_importing(name) & {"torch", "flwr"}


def test_a_site_does_not_load_the_server() -> None:
    assert "icmoe_server" not in modules_after_importing("icmoe_client.app")
