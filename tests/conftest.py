"""What all tests share: one thread per process, the real images, and one slow test at a time."""

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# Two workers on two cores: more threads only get in each other's way. Torch reads this when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

DATA_VARIABLE = "ICMOE_TEST_DATA"
REQUIRE_VARIABLE = "ICMOE_REQUIRE_TEST_DATA"
SKIP_REASON = f"needs {DATA_VARIABLE}"

# A busy machine is no reason for a red test.
settings.register_profile("icmoe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("icmoe")


def _data_folder() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder).resolve() if folder else None


def _data_required() -> bool:
    return os.environ.get(REQUIRE_VARIABLE) == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start with a data folder that is not there: a typo must not look like a skip."""
    folder = _data_folder()
    if folder is None and _data_required():
        raise pytest.UsageError(
            f"{REQUIRE_VARIABLE}=1, but {DATA_VARIABLE} is unset; set it to the folder of task folders"
        )
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"{DATA_VARIABLE}={folder} is no folder; unset it to skip the tests on real images")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs absent images."""
    for item in items:
        if "test_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared_data)
        if item.get_closest_marker("shared_data") and _data_folder() is None:
            item.add_marker(pytest.mark.skip(reason=SKIP_REASON))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where the images are required, a ``shared_data`` test that skips has failed, but for want of a foreign tool."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    no_tool = "is not installed" in str(report.longrepr)
    if skipped and not no_tool and _data_required() and item.get_closest_marker("shared_data"):
        report.outcome = "failed"
        report.longrepr = f"{REQUIRE_VARIABLE}=1 and this test skipped: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the tests that ran without their images."""
    skipped = sum(SKIP_REASON in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests need {DATA_VARIABLE} and were skipped", yellow=True)


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """Give the folder of a task with real images, such as ``test_data("cardiac_mri")``."""

    def folder_of(name: str) -> Path:
        root = _data_folder()
        assert root is not None
        folder = root / name
        if not folder.is_dir():
            pytest.fail(
                f"{DATA_VARIABLE} holds no folder {name!r}; it has {sorted(entry.name for entry in root.iterdir())}"
            )
        return folder

    return folder_of
