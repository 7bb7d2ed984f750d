"""Measure what docs/performance.md reports: ``make bench``, or ``python benchmarks/bench.py --help``."""

import typer
from performance.runner import main

if __name__ == "__main__":
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(main)
    app()
