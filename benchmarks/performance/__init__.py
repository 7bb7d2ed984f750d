"""Parts of ``benchmarks/bench.py``; each measures one thing and writes one table."""
