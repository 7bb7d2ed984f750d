"""Names that users and other code hang on: the version, the error tree, what the packages export."""

import importlib
import inspect
import pkgutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import icmoe
import icmoe.errors
import icmoe_client
import icmoe_server
from icmoe.errors import EXIT_INTERRUPTED, IcmoeError

ROOT = Path(__file__).parents[2]

ERROR_TREE = {
    "ConfigError": ("IcmoeError", 2),
    "BackboneError": ("IcmoeError", 2),
    "DataError": ("IcmoeError", 3),
    "ManifestError": ("DataError", 3),
    "MaskError": ("DataError", 3),
    "PrivacyError": ("IcmoeError", 4),
    "PolicyError": ("PrivacyError", 4),
    "BudgetExhaustedError": ("PrivacyError", 4),
    "NetworkError": ("IcmoeError", 5),
    "ConnectError": ("NetworkError", 5),
    "AuthError": ("NetworkError", 5),
    "TlsError": ("NetworkError", 5),
    "ExchangeError": ("IcmoeError", 6),
    "IncompatibleUpdateError": ("ExchangeError", 6),
    "CheckpointError": ("IcmoeError", 6),
    "RunError": ("IcmoeError", 6),
}


def all_modules() -> list[str]:
    return [
        module.name
        for package in (icmoe, icmoe_server, icmoe_client)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def test_errors_form_the_agreed_tree() -> None:
    tree = {
        name: (cls.__base__.__name__, cls.exit_code)
        for name, cls in inspect.getmembers(icmoe.errors, inspect.isclass)
        if issubclass(cls, IcmoeError) and cls is not IcmoeError and cls.__base__ is not None
    }
    assert tree == ERROR_TREE
    assert EXIT_INTERRUPTED == 130


def test_every_error_lives_in_the_tree() -> None:
    """No module makes an error of its own that the command line would not turn into a message."""
    for name in all_modules():
        module = importlib.import_module(name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == name and issubclass(cls, IcmoeError):
                assert name == "icmoe.errors", f"{name}.{cls.__name__} belongs into icmoe/errors.py"


@pytest.mark.parametrize("name", all_modules())
def test_exports_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert [export for export in getattr(module, "__all__", ()) if not hasattr(module, export)] == []


def test_version_stands_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert icmoe.__version__ == project["version"] == version("icmoe-fl")
