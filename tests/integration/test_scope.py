"""A site's share of a round on the real backbone, without Flower: what stays, what leaves, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from icmoe.config import RunConfig, load_run_config
from icmoe.data.manifest import load_manifest
from icmoe.errors import BackboneError, DataError, ExchangeError
from icmoe.exchange import Instruction, Job, SiteReport, expert_of
from icmoe.training import dump_arrays, train_local
from icmoe.types import Array
from icmoe_client import trainer
from icmoe_client.app import describe_for_centre
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench

pytestmark = pytest.mark.slow

Answer = tuple[SiteReport, dict[str, Array] | None]


@pytest.fixture
def site(discs: Path, tmp_path: Path, icmoe_fl: object, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(icmoe_fl.cache))  # type: ignore[attr-defined]
    samples = load_manifest(discs).select(site="a")[1:]  # two images to train on are one step
    return Site(name="a", samples=samples, state_dir=tmp_path / "state")


@pytest.fixture
def configured(config: Path) -> Callable[..., RunConfig]:
    return lambda *changes: load_run_config(config, changes)


def ask(site: Site, run: RunConfig, arrays: dict[str, Array], server_round: int, job: Job = "train") -> Answer:
    instruction = Instruction(job, run.model_dump_json(), run.digest(), server_round, site.name)
    outgoing = trainer.carry_out(site, instruction, arrays)
    return outgoing.report, outgoing.arrays


def local_file(site: Site, server_round: str) -> Path:
    (found,) = site.state_dir.glob(f"local/*/round_{server_round}.safetensors")
    return found


def initial(site: Site, run: RunConfig) -> tuple[dict[str, Array], dict[str, Array]]:
    """Global and local tensors at the start."""
    bench = Workbench.prepare(site, run)
    every, shared = dump_arrays(bench.model), set(bench.shared())
    return {n: a for n, a in every.items() if n in shared}, {n: a for n, a in every.items() if n not in shared}


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Array]]:
    """All tensors of the model at the moment each local training began."""
    seen: list[dict[str, Array]] = []

    def spy(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        seen.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
        return train_local(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_local", spy)
    return seen


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.array_equal(one[name], array) for name, array in other.items())


@pytest.mark.parametrize("scope", ["norm", "basic"])
def test_local_tensors_stay_and_come_back(
    scope: str, site: Site, configured: Callable[..., RunConfig], started_with: list[dict[str, Array]]
) -> None:
    run = configured(f"federation.scope.{scope}=local")
    arrays, local = initial(site, run)
    assert local
    if scope == "basic":
        assert {expert_of(name) for name in local} == {"basic.0"}
    else:
        assert all(name.endswith(("weight", "bias")) and array.ndim == 1 for name, array in local.items())

    report, update = ask(site, run, arrays, 1)
    assert update is not None
    assert set(update) == set(arrays)
    kept = load_file(local_file(site, "001"))
    assert set(kept) == set(local)
    assert not same(kept, local), "the local tensors did not learn"
    assert same(started_with[0], local)

    ask(site, run, update, 2)
    assert same(started_with[1], {**update, **kept})
    assert local_file(site, "002").exists()
    assert report.numbers["trainable_params"] == sum(array.size for array in (*arrays.values(), *local.values()))


def test_a_site_that_missed_rounds_keeps_its_local_tensors(
    site: Site, configured: Callable[..., RunConfig], started_with: list[dict[str, Array]]
) -> None:
    run = configured("federation.scope.norm=local", "federation.num_rounds=5")
    arrays, _ = initial(site, run)
    ask(site, run, arrays, 1)
    kept = load_file(local_file(site, "001"))
    ask(site, run, arrays, 4)
    assert same(started_with[1], kept)


def test_scores_use_the_local_tensors_of_the_scored_round(site: Site, configured: Callable[..., RunConfig]) -> None:
    """Also where the site did not train in that round: its latest ones before it count."""
    run = configured("federation.scope.semantic=local", "federation.scope.router=local", "federation.num_rounds=5")
    arrays, _ = initial(site, run)
    untrained, _ = ask(site, run, arrays, 0, "validate")
    _, update = ask(site, run, arrays, 1)
    assert update is not None
    first, _ = ask(site, run, update, 1, "validate")
    assert first.numbers["dice"] != untrained.numbers["dice"]
    ask(site, run, update, 4)
    again, _ = ask(site, run, update, 1, "validate")
    assert again.numbers == first.numbers
    between, _ = ask(site, run, update, 3, "validate")
    assert between.numbers == first.numbers


def test_experts_with_a_small_share_are_left_out(site: Site, configured: Callable[..., RunConfig]) -> None:
    run = configured("federation.communication.min_expert_share=0.2501", "federation.communication.dtype=float16")
    arrays, _ = initial(site, run)
    report, update = ask(site, run, arrays, 1)
    assert update is not None
    enough = {expert for expert, share in report.expert_shares.items() if share >= 0.2501}
    assert 0 < len(enough) < 4
    assert {expert_of(name) for name in update} == {*enough, None}
    assert {array.dtype for array in update.values()} == {np.dtype(np.float16)}


def test_a_backbone_that_changed_is_noticed(
    site: Site, configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = configured()
    arrays, _ = initial(site, run)
    bench = Workbench.prepare(site, run)
    weight = next(bench.backbone.image_encoder.parameters())

    def spoil(*args: object, **kwargs: object) -> object:
        weight.data[0] += 1e-3
        return train_local(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_local", spoil)
    before = weight.data.clone()
    try:
        with pytest.raises(BackboneError, match="nothing was sent"):
            ask(site, run, arrays, 1)
    finally:
        weight.data.copy_(before)


def test_another_config_than_announced_is_refused(site: Site, configured: Callable[..., RunConfig]) -> None:
    run = configured()
    with pytest.raises(ExchangeError, match="digest"):
        trainer.carry_out(site, Instruction("train", run.model_dump_json(), "0" * 64, 1, site.name), {})


def test_other_tensors_than_the_models_are_refused(site: Site, configured: Callable[..., RunConfig]) -> None:
    run = configured()
    arrays, _ = initial(site, run)
    name = min(arrays)
    for wrong in (
        {n: a for n, a in arrays.items() if n != name},
        {**arrays, "experts.basic.9.up.weight": np.zeros(2, np.float32)},
        {**arrays, name: np.zeros((3, 3, 3), np.float32)},
    ):
        with pytest.raises(ExchangeError, match="tensor"):
            ask(site, run, wrong, 1)


def test_a_file_name_does_not_leave_the_site(site: Site, configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = configured()
    arrays, _ = initial(site, run)
    secret = tmp_path / "Mustermann_Erika.png"
    secret.write_bytes(b"no image")
    spoilt = replace(site, samples=(replace(site.samples[0], image=secret), *site.samples[1:]))
    with pytest.raises(DataError, match="Mustermann") as caught:
        ask(spoilt, run, arrays, 1)
    assert "Mustermann" not in describe_for_centre(caught.value)
    assert "DataError" in describe_for_centre(caught.value)


def test_images_without_foreground_are_allowed_and_counted(
    site: Site, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from PIL import Image

    run = configured()
    arrays, _ = initial(site, run)
    empty = tmp_path / "empty.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(empty)
    samples = tuple(replace(s, mask=empty) if s.split != "train" or i == 0 else s for i, s in enumerate(site.samples))
    report, update = ask(replace(site, samples=samples), run, arrays, 1)
    assert update is not None
    assert report.numbers["empty_masks"] == 1
    assert "dice" not in report.numbers  # the only validation image has no foreground to score
    tested, _ = ask(replace(site, samples=samples), run, arrays, 1, "test")
    assert "dice" not in tested.numbers
    assert np.isnan(tested.dice_per_class).all()
