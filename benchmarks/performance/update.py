"""What a site sends in a round: trainable parameters and bytes of one update, for every shipped config."""

from icmoe.config import RunConfig, load_run_config
from icmoe.exchange import extract_update
from icmoe.training import dump_arrays
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench

from .document import table
from .sites import CONFIGS, Setup
from .stopwatch import Figures

DTYPES = ("float32", "float16")
BARS = {"float32": 8_000_000, "float16": 4_000_000}


def measure(setup: Setup) -> Figures:
    """Build each model and extract an update as a site would."""
    results: Figures = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        runs = [load_run_config(path, [f"federation.communication.dtype={dtype}"]) for dtype in DTYPES]
        if runs[0].model.backbone != "lite_medsam":  # others need a file
            continue
        bench = Workbench.prepare(Site(name="bench", samples=(), state_dir=setup.work), runs[0])
        results[path.stem] = {
            "params": sum(parameter.numel() for parameter in bench.model.parameters()),
            "bytes": {dtype: _bytes_up(bench, run) for dtype, run in zip(DTYPES, runs, strict=True)},
        }
    return results


def _bytes_up(bench: Workbench, run: RunConfig) -> int:
    update = extract_update(
        dump_arrays(bench.model),
        bench.shared(),
        expert_shares=dict.fromkeys(bench.model.expert_names, 1.0),
        communication=run.federation.communication,
    )
    return sum(array.nbytes for array in update.values())


def render(figures: Figures) -> str:
    """One row per config."""
    rows = [
        [
            name,
            f"{entry['params']:,}",
            *(f"{entry['bytes'][dtype] / 1e6:.2f} MB" for dtype in DTYPES),
            "met" if all(entry["bytes"][dtype] <= BARS[dtype] for dtype in DTYPES) else "NOT met",
        ]
        for name, entry in figures.items()
    ]
    return table(["config", "trainable parameters", "up in float32", "up in float16", "bar 8 MB / 4 MB"], rows)
