"""The composition around Flower; whole simulations are in tests/integration."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icmoe import first_checkpoint, simulation
from icmoe.checkpoint import holds_run, latest_checkpoint
from icmoe.config import RunConfig
from icmoe.data.checked import write_checked
from icmoe.data.checking import check_data
from icmoe.errors import ConfigError, DataError, ManifestError
from icmoe.simulation import SimulationRequest, make_sites, num_cpus

ROW = "{0}.png,{0}_mask.png,{1},{2},{3}"


def run_config(**more: Any) -> RunConfig:
    return RunConfig.model_validate({"task": {"name": "discs", "classes": {"disc": 1}}, **more})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = ["image,mask,patient,split,site"]
    for site in ("oslo", "bergen", "narvik"):
        for index, split in enumerate(["train", "train", "val", "test"]):
            lines.append(ROW.format(f"{site}{index}", index, split, site))
            for name in (f"{site}{index}.png", f"{site}{index}_mask.png"):
                (folder / name).touch()
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder


def request(data: Path, **more: Any) -> SimulationRequest:
    fields: dict[str, Any] = {"run": run_config(), "data": data, "out": data.parent / "run", **more}
    return SimulationRequest(**fields)


class TestSites:
    def test_are_those_of_the_manifest(self, data: Path) -> None:
        sites = make_sites(request(data, checkpoint=Path("sam.pth"), verify_checkpoint=False))
        assert [site.name for site in sites] == ["bergen", "narvik", "oslo"]
        assert {len(site.samples) for site in sites} == {4}
        assert {site.checkpoint for site in sites} == {Path("sam.pth")}
        assert not any(site.verify_checkpoint for site in sites)
        assert len({site.state_dir for site in sites}) == 3
        assert all(site.state_dir.is_relative_to(data.parent / "run") for site in sites)

    def test_of_a_partition(self, data: Path) -> None:
        run = run_config(simulation={"partition": "iid", "num_sites": 2})
        sites = make_sites(request(data, run=run))
        assert [site.name for site in sites] == ["site_00", "site_01"]
        assert sum(len(site.samples) for site in sites) == 12

    def test_share_the_cpus(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(simulation, "num_cpus", lambda: 8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert {site.num_threads for site in make_sites(request(data))} == {2}
        monkeypatch.setattr(simulation, "num_cpus", lambda: 2)
        assert {site.num_threads for site in make_sites(request(data))} == {1}

    def test_leave_out_what_the_check_left_out(self, data: Path) -> None:
        rng = np.random.default_rng(0)
        for path in data.glob("*.png"):
            shape = (12, 12)
            pixels = rng.integers(0, 2, shape) if "mask" in path.name else rng.integers(0, 255, shape)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        (data / "oslo1.png").write_bytes((data / "oslo1.png").read_bytes()[:40])
        report = check_data(data, max_bad_share=0.1)
        assert not report.stopping
        write_checked(report, data)
        sites = {site.name: site for site in make_sites(request(data))}
        assert {name: (len(site.samples), site.num_left_out) for name, site in sites.items()} == {
            "bergen": (4, 0),
            "narvik": (4, 0),
            "oslo": (3, 1),
        }
        (data / "manifest.csv").write_text((data / "manifest.csv").read_text() + "\n")
        with pytest.raises(DataError, match="changed since its check"):
            make_sites(request(data))

    def test_need_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match=r"manifest\.csv"):
            make_sites(request(tmp_path))

    def test_can_be_sent_to_a_worker_and_told_apart_there(self, data: Path) -> None:
        resolve = pickle.loads(pickle.dumps(simulation._ByPartition(make_sites(request(data)))))
        context: Any = SimpleNamespace(node_config={"partition-id": 1})
        assert resolve(context).name == "narvik"


def test_cpus_are_those_this_process_may_use() -> None:
    assert num_cpus() == len(os.sched_getaffinity(0))


def open_run(asked: SimulationRequest, bench: Any) -> None:
    first_checkpoint.open_run_directory(asked.out, asked.run, bench.backbone, bench.model)


class TestOpenRun:
    """A model of two tensors, one of which is shared, stands for the workbench."""

    @pytest.fixture
    def bench(self) -> Any:
        model: Any = torch.nn.Module()
        model.router = torch.nn.Linear(2, 1, bias=False)
        model.kept = torch.nn.Linear(2, 1, bias=False)
        model.adapter_params = lambda: ("router.weight",)
        return SimpleNamespace(model=model, backbone=SimpleNamespace(digest=lambda: "b" * 64))

    def test_writes_config_and_the_shared_tensors(self, data: Path, bench: Any) -> None:
        asked = request(data)
        open_run(asked, bench)
        start = latest_checkpoint(asked.out)
        assert start.server_round == 0
        assert list(start.arrays) == ["router.weight"]
        assert start.backbone_digest == "b" * 64
        assert (asked.out / "config.sha256").read_text().strip() == start.config_digest == asked.run.digest()

    def test_resuming_keeps_the_checkpoint(self, data: Path, bench: Any) -> None:
        open_run(request(data), bench)
        before = latest_checkpoint(data.parent / "run").arrays["router.weight"].copy()
        torch.nn.init.zeros_(bench.model.router.weight)
        open_run(request(data, resume=True), bench)
        assert np.array_equal(latest_checkpoint(data.parent / "run").arrays["router.weight"], before)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({}, "already holds a run"),
            ({"resume": True, "run": run_config(train={"seed": 5})}, "another config"),
            ({"run": run_config(federation={"quorum": 4}), "out": Path("elsewhere")}, "quorum"),
            (
                {
                    "run": run_config(federation={"quorum": 2}, simulation={"fraction_train": 0.4}),
                    "out": Path("elsewhere"),
                },
                "asks 1 of",
            ),
        ],
        ids=["run there", "another config", "replies", "replies of those asked"],
    )
    def test_refuses_before_any_encoding(
        self, data: Path, bench: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
    ) -> None:
        def encode(*_: Any) -> None:
            raise AssertionError("encoded first")

        open_run(request(data), bench)
        monkeypatch.setattr(simulation, "encode_everything", encode)
        watcher: Any = SimpleNamespace(stage=print, advance=print, round_done=print)
        with pytest.raises(ConfigError, match=told):
            simulation.simulate(request(data, **changes), watcher)

    @pytest.mark.parametrize("writes", [1, 2])
    def test_killed_between_its_first_files_a_run_can_be_resumed(
        self, data: Path, bench: Any, monkeypatch: pytest.MonkeyPatch, writes: int
    ) -> None:
        """Else neither --resume nor --overwrite would take the folder, and the user had to remove it by hand."""
        done: list[str] = []

        def then_die(write: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                result = write(*args, **kwargs)
                done.append(write.__name__)
                if len(done) == writes:
                    raise KeyboardInterrupt
                return result

            return wrapped

        with monkeypatch.context() as patched:
            for name in ("save_checkpoint", "write_text"):
                patched.setattr(first_checkpoint, name, then_die(getattr(first_checkpoint, name)))
            with pytest.raises(KeyboardInterrupt):
                open_run(request(data), bench)
        out = data.parent / "run"
        assert holds_run(out)
        open_run(request(data, resume=True), bench)
        assert latest_checkpoint(out).server_round == 0
        assert (out / "config.yaml").exists()
        assert (out / "config.sha256").exists()


def test_cpu_seconds_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"mean_dice": 0.5}))
    simulation._add_to_results(tmp_path, cpu_seconds=3.0)
    simulation._add_to_results(tmp_path, cpu_seconds=4.0)
    simulation._add_to_results(tmp_path, reference={"local": {}})
    assert simulation.read_results(tmp_path) == {"mean_dice": 0.5, "cpu_seconds": 7.0, "reference": {"local": {}}}
