"""Commands and options are a contract: scripts and documents hang on them. A change here needs a reason."""

from typing import Any

import click
import typer

from icmoe.cli import app

SURFACE = {
    "": {"--version", "--install-completion", "--show-completion", "--help", "-h"},
    "simulate": {
        "CONFIG",
        "--data",
        "--out",
        "--set",
        "--reference",
        "--seeds",
        "--resume",
        "--overwrite",
        "--checkpoint",
        "--trust-checkpoint",
        "--verbose",
        "--help",
        "-h",
    },
    "report": {"RUN_DIR", "--help", "-h"},
    "evaluate": {
        "RUN_DIR",
        "--data",
        "--out",
        "--split",
        "--checkpoint",
        "--against",
        "--against-checkpoint",
        "--tolerance",
        "--backbone-checkpoint",
        "--json",
        "--help",
        "-h",
    },
    "export": {
        "RUN_DIR",
        "--out",
        "--format",
        "--checkpoint",
        "--backbone-checkpoint",
        "--overwrite",
        "--help",
        "-h",
    },
    "predict": {
        "RUN_DIR",
        "INPUT",
        "--out",
        "--format",
        "--probability",
        "--uncertainty",
        "--votes",
        "--overlay",
        "--intensity",
        "--axis",
        "--frame",
        "--checkpoint",
        "--backbone-checkpoint",
        "--overwrite",
        "--help",
        "-h",
    },
    "client": {"--site", "--config", "--check", "--pause", "--resume", "--help", "-h"},
    "server": {"--help", "-h"},
    "server init": {"--dir", "--advertise", "--bind", "--san", "--renew", "--help", "-h"},
    "server start": {
        "--config",
        "--dir",
        "--name",
        "--set",
        "--checkpoint",
        "--trust-checkpoint",
        "--estimate",
        "--help",
        "-h",
    },
    "server status": {"--dir", "--address", "--ca", "--cert", "--key", "--json", "--help", "-h"},
    "server watch": {"--dir", "--address", "--ca", "--cert", "--key", "--json", "--help", "-h"},
    "server stop": {"--dir", "--address", "--ca", "--cert", "--key", "--now", "--yes", "-y", "--json", "--help", "-h"},
    "site": {"--help", "-h"},
    "site init": {"NAME", "--server", "--ca-sha256", "--ca-file", "--data", "--dir", "--help", "-h"},
    "sites": {"--help", "-h"},
    "sites add": {"ENROLMENT", "--dir", "--help", "-h"},
    "sites list": {"--dir", "--json", "--help", "-h"},
    "sites revoke": {"NAME", "--dir", "--yes", "--help", "-h"},
    "privacy": {"--help", "-h"},
    "privacy show": {"--site", "--config", "--json", "--html", "--help", "-h"},
    "privacy plan": {
        "--epsilon",
        "--site",
        "--config",
        "--patients",
        "--images",
        "--batch-size",
        "--local-epochs",
        "--noise-multiplier",
        "--delta",
        "--json",
        "--help",
        "-h",
    },
    "privacy confirm": {"--site", "--epsilon", "--reason", "--config", "--yes", "--help", "-h"},
    "audit": {"--help", "-h"},
    "audit verify": {"LOG", "--against", "--key", "--json", "--help", "-h"},
    "audit show": {"LOG", "--html", "--help", "-h"},
    "data": {"--help", "-h"},
    "data import": {
        "SOURCE",
        "--out",
        "--labels",
        "--site",
        "--axis",
        "--intensity",
        "--label-pattern",
        "--patient-pattern",
        "--split",
        "--seed",
        "--secret",
        "--roi",
        "--write-labels",
        "--json",
        "--help",
        "-h",
    },
    "data check": {
        "FOLDER",
        "--config",
        "--set",
        "--json",
        "--accept",
        "--out",
        "--workers",
        "--max-bad-share",
        "--step",
        "--no-step",
        "--checkpoint",
        "--help",
        "-h",
    },
    "data remove": {"FOLDER", "--patient", "--site", "--secret", "--json", "--help", "-h"},
    "cache": {"--help", "-h"},
    "cache info": {"--json", "--help", "-h"},
    "cache purge": {"--json", "--help", "-h"},
}


def surface(command: Any, path: tuple[str, ...] = ()) -> dict[str, set[str]]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    options: set[str] = set()
    for parameter in command.get_params(context):
        is_argument = parameter.param_type_name == "argument"
        options |= (
            {parameter.human_readable_name.upper()} if is_argument else {*parameter.opts, *parameter.secondary_opts}
        )
    found = {" ".join(path): options}
    for name, child in getattr(command, "commands", {}).items():
        found |= surface(child, (*path, name))
    return found


def test_commands_and_options() -> None:
    assert surface(typer.main.get_command(app)) == SURFACE


def test_every_command_and_option_explains_itself() -> None:
    def silent(command: Any, path: tuple[str, ...] = ()) -> list[str]:
        missing = [] if command.help else [" ".join(path)]
        for parameter in command.params:
            # typer 0.20 loses the help of arguments under click 8.5; the commands' own help names them
            if parameter.param_type_name == "option" and not parameter.help:
                missing.append(" ".join((*path, parameter.name)))
        return missing + [
            one for name, child in getattr(command, "commands", {}).items() for one in silent(child, (*path, name))
        ]

    assert silent(typer.main.get_command(app)) == []
