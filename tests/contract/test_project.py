"""The repository itself: nothing of one machine in it, dependencies pinned, two commands that exist."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Written in pieces, so that this file does not find itself.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"py" r"pi\.",
            r"py" r"pi\b.*(mirror|index|host)",
            r"pythonhosted" r"\.org",
            r"index" r"-url",
            r"find" r"-links",
            r"trusted" r"-host",
            r"(?<![\w.])/(work|Users)" r"/\w",
        ]
    )
)


def repository_files() -> list[Path]:
    """Tracked files, and untracked ones that are not ignored."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def canonical(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_no_registry_and_no_path_of_one_machine() -> None:
    findings = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert findings == []


def test_constraints_are_exact_versions() -> None:
    assert [pin for pin in pins() if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert len({canonical(pin) for pin in pins()}) == len(pins())


def test_constraints_leave_the_gpu_libraries_to_torch() -> None:
    assert [pin for pin in pins() if re.match(r"nvidia-|cuda-|triton", pin)] == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {canonical(one) for one in wanted} - {"icmoe-fl"}
    assert names - {canonical(pin) for pin in pins()} == set()


@pytest.mark.parametrize("target", ["install", "demo", "test", "lint", "types", "format", "unit", "bench", "ablation"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_gate_can_be_run() -> None:
    gate = ROOT / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    assert "make test" in gate.read_text(encoding="utf-8")
