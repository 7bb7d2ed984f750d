"""``icmoe-fl``: the one composition root. Heavy imports happen inside commands, so that ``--help`` is quick."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import psutil
import typer
from rich.console import Console

from icmoe import __version__
from icmoe.commands.audit import audit_app
from icmoe.commands.client import client
from icmoe.commands.data import data_app
from icmoe.commands.evaluate import evaluate
from icmoe.commands.export import export
from icmoe.commands.operator import status, stop, watch
from icmoe.commands.predict import predict
from icmoe.commands.privacy import privacy_app
from icmoe.commands.server_init import init
from icmoe.commands.server_start import start
from icmoe.commands.site import site_app
from icmoe.commands.sites import sites_app
from icmoe.errors import EXIT_FAULT, EXIT_INTERRUPTED, ConfigError, IcmoeError, RunError

REFERENCES = ("local", "pooled")

app = typer.Typer(
    name="icmoe-fl",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hospitals train one segmentation model together without sharing images: IC-MoE experts on a frozen SAM.",
)
cache_app = typer.Typer(no_args_is_help=True, help="The cache of frozen features (folder: $ICMOE_CACHE_DIR).")
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")
app.add_typer(privacy_app, name="privacy")
app.add_typer(audit_app, name="audit")
app.add_typer(site_app, name="site")
app.add_typer(sites_app, name="sites")
server_app = typer.Typer(no_args_is_help=True, help="The study centre (folder: $ICMOE_CENTRE_DIR).")
for command in (init, start, status, watch, stop):
    server_app.command()(command)
app.add_typer(server_app, name="server")
console = Console(stderr=True)


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="Run config, such as configs/run/cardiac.yaml.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with manifest.csv. The demo config brings its own data.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<name of the config>.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a config value, may be repeated.")
    ] = None,
    reference: Annotated[str, typer.Option(help="Also train 'local', 'pooled' or 'local,pooled'.")] = "",
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2: one run per seed, then mean and deviation.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run in --out first.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with pretrained weights, for sam_vit_* and medsam_vit_b.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Accept weights that differ from the published ones.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's and Ray's own logs.")] = False,
) -> None:
    """Train a whole federation on this machine and write a report.

    Every site of the manifest becomes a virtual hospital in Flower's simulation engine. The run directory ends with
    results.json, report.html, TensorBoard events and a checkpoint per round.

    Example: icmoe-fl simulate configs/run/cardiac.yaml --data ../shared/data/cardiac_mri --out runs/cardiac
    """
    from icmoe.config import load_run_config
    from icmoe.progress import ConsoleWatcher, print_results
    from icmoe.seeds import simulate_seeds
    from icmoe.simulation import SimulationRequest
    from icmoe.simulation import simulate as run_simulation

    run = load_run_config(config, override or [])
    folder = out or Path("runs") / config.stem
    references = _choices(reference, REFERENCES, option="--reference")
    _check_folder(folder, resume=resume, overwrite=overwrite, with_seeds=bool(seeds))
    request = SimulationRequest(
        run=run,
        data=_find_data(data, embedded=run.simulation.embedded_data, task=run.task.name),
        out=folder,
        references=references,
        resume=resume,
        checkpoint=checkpoint,
        verify_checkpoint=not trust_checkpoint,
        verbose=verbose,
        replaces=folder if overwrite else None,
    )
    # At once, and not as an exception: Ray's own way out races with Flower's threads, and may end this process first.
    signal.signal(signal.SIGINT, _stop)
    with ConsoleWatcher(console) as watcher:
        results = simulate_seeds(request, _seed_list(seeds), watcher) if seeds else run_simulation(request, watcher)
    print_results(Console(), results)
    if run.privacy is not None:
        typer.echo(
            "epsilon not valid: seeded noise. Only at a real site does the noise come from where nobody can know it."
        )
    typer.echo(f"Report: {folder / 'report.html'}")


app.command()(client)
app.command()(evaluate)
app.command()(export)
app.command()(predict)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory with results.json.")]) -> None:
    """Write report.html and TensorBoard events again from what is in a run directory."""
    from icmoe.report import write_report, write_tensorboard

    write_tensorboard(run_dir)
    typer.echo(f"Report: {write_report(run_dir)}")


@cache_app.command("info")
def cache_info(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Show where the feature cache is, how much it holds and how much it may hold."""
    from icmoe.data.cache import open_cache

    _show_cache(open_cache().info(), as_json=as_json, verb="holds")


@cache_app.command("purge")
def cache_purge(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Remove all cached features. They are computed again when needed."""
    from icmoe.data.cache import open_cache

    _show_cache(open_cache().purge(), as_json=as_json, verb="lost")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line: errors of our tree become a message and an exit code, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        # Typer turns Ctrl-C into an exit code, and in its own mode leaves with it, waiting for Flower's threads.
        exit_code = app(standalone_mode=False)
        if exit_code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except IcmoeError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        _leave(error.exit_code)
    except OSError as error:
        console.print(f"RunError: {error}. Free some space or choose another folder.", markup=False, soft_wrap=True)
        _leave(RunError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _stop()
    except Exception:
        # Not an error of our tree, so a fault of ours: say so, and do not wait for Flower's threads.
        console.print_exception()
        console.print("This is a fault in icmoe-fl: please report it with the lines above.")
        _leave(EXIT_FAULT)


def _stop(*_: object) -> None:
    """End on Ctrl-C."""
    console.print(
        "\nStopped. Finished rounds are kept: go on with --resume in place of --overwrite, if that was given."
    )
    _leave(EXIT_INTERRUPTED)


def _leave(exit_code: int) -> None:
    """End this process and all it started, now: Flower's threads would wait for replies that never come."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    _, alive = psutil.wait_procs(children, timeout=3)
    for child in alive:
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _check_folder(folder: Path, *, resume: bool, overwrite: bool, with_seeds: bool) -> None:
    from icmoe.checkpoint import holds_run

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; --out takes a folder.")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give one of them.")
    if overwrite and folder.exists():
        if any(folder.iterdir()) and not holds_run(folder):
            raise ConfigError(f"{folder} holds no run of ours, so --overwrite leaves it alone; choose another --out.")
        return
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty; use --resume to continue the run in it or --overwrite to start anew."
        )
    if resume and not holds_run(folder):
        raise ConfigError(f"{folder} holds no run to resume; start it without --resume.")
    if resume and any(folder.glob("seed_*/config.sha256")) != with_seeds:
        raise ConfigError(
            f"{folder} was started {'without' if with_seeds else 'with'} --seeds; resume it the same way."
        )


def _find_data(data: Path | None, *, embedded: bool, task: str) -> Path:
    if data is not None:
        return data
    if not embedded:
        raise ConfigError(f"the task {task!r} needs images: give --data DIR, a folder with manifest.csv.")

    from icmoe.data.cache import default_cache_dir
    from icmoe.data.demo import write_demo_data

    console.print("Writing the embedded demo images")
    return write_demo_data(default_cache_dir().parent / "demo")


def _choices(text: str, allowed: tuple[str, ...], *, option: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in chosen if part not in allowed]
    if unknown:
        raise ConfigError(f"{option} takes {' and '.join(allowed)}, separated by a comma; got {unknown[0]!r}.")
    return tuple(kind for kind in allowed if kind in chosen)


def _seed_list(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds takes whole numbers such as 0,1,2; got {text!r}.") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds takes different numbers from 0; got {text!r}.")
    return seeds


def _show_cache(info: Any, *, as_json: bool, verb: str) -> None:
    if as_json:
        fields = {"entries": info.entries, "bytes": info.bytes, "limit_bytes": info.limit_bytes, "root": str(info.root)}
        typer.echo(json.dumps(fields))
    else:
        amount = f"{info.entries} entries, {info.bytes / 1e9:.2f} GB"
        typer.echo(f"{info.root} {verb} {amount}; limit {info.limit_bytes / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
