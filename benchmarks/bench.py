"""Measure what docs/performance.md reports: ``make bench``, or ``python benchmarks/bench.py --help``."""

import typer
from performance.runner import main

if __name__ == "__main__":
    typer.run(main)
