"""New sites keep patients whole, keep their split, and are never empty."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from icmoe.data.manifest import Manifest, Sample
from icmoe.data.partition import partition_sites
from icmoe.errors import ConfigError
from icmoe.types import Split

SPLIT_SIZES: dict[Split, int] = {"train": 12, "val": 4, "test": 5}


def make_manifest(*, labels: int = 3, shared_names: bool = False) -> Manifest:
    samples = []
    for label in range(labels):
        number = 0
        for split, count in SPLIT_SIZES.items():
            for _ in range(count):
                number += 1
                patient = f"p{number}" if shared_names else f"p{label}_{number}"
                for view in range(2):
                    path = Path(f"{label}_{number}_{view}.png")
                    samples.append(Sample(image=path, mask=path, patient=patient, split=split, site=f"old{label}"))
    return Manifest(root=Path("data"), samples=tuple(samples))


def divide(
    manifest: Manifest, kind: Literal["iid", "dirichlet"], *, num_sites: int = 5, alpha: float = 0.5, seed: int = 0
) -> Manifest:
    return partition_sites(manifest, partition=kind, num_sites=num_sites, alpha=alpha, seed=seed)


def test_manifest_keeps_its_sites() -> None:
    manifest = make_manifest()
    assert partition_sites(manifest, partition="manifest", num_sites=None, alpha=0.5, seed=0) is manifest


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@pytest.mark.parametrize("seed", range(5))
def test_patients_stay_whole_and_every_site_can_train(kind: Literal["iid", "dirichlet"], seed: int) -> None:
    manifest = make_manifest()
    divided = divide(manifest, kind, seed=seed, alpha=0.05)
    assert divided.sites == ("site_00", "site_01", "site_02", "site_03", "site_04")
    assert [s.image for s in divided.samples] == [s.image for s in manifest.samples]
    assert [s.split for s in divided.samples] == [s.split for s in manifest.samples]
    homes = defaultdict(set)
    for sample in divided.samples:
        homes[sample.patient].add(sample.site)
    assert {len(sites) for sites in homes.values()} == {1}
    for split in SPLIT_SIZES:
        assert {s.site for s in divided.select(split=split)} == set(divided.sites)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_the_seed_decides(kind: Literal["iid", "dirichlet"]) -> None:
    manifest = make_manifest()
    assert divide(manifest, kind) == divide(manifest, kind)
    assert divide(manifest, kind) != divide(manifest, kind, seed=1)


def test_iid_is_even() -> None:
    divided = divide(make_manifest(), "iid", num_sites=4)
    assert set(Counter(s.site for s in divided.select(split="train")).values()) == {18}


def unevenness(manifest: Manifest) -> float:
    """Mean over sites of the largest share of one old site."""
    old = {s.image: s.image.name[0] for s in manifest.samples}
    shares = []
    for site in manifest.sites:
        counts = Counter(old[s.image] for s in manifest.select(site=site))
        shares.append(max(counts.values()) / counts.total())
    return float(np.mean(shares))


def test_small_alpha_is_more_uneven() -> None:
    manifest = make_manifest(labels=4)
    small, large = (
        np.mean([unevenness(divide(manifest, "dirichlet", alpha=alpha, seed=seed)) for seed in range(8)])
        for alpha in (0.1, 100.0)
    )
    assert small > large + 0.2


def test_with_one_label_the_sizes_differ() -> None:
    divided = divide(make_manifest(labels=1), "dirichlet", num_sites=3, alpha=0.2)
    assert len(set(Counter(s.site for s in divided.samples).values())) > 1


def test_patients_of_one_name_at_two_sites_stay_two_people() -> None:
    divided = divide(make_manifest(shared_names=True), "iid", num_sites=2)
    assert len({(s.site, s.patient) for s in divided.samples}) == 3 * sum(SPLIT_SIZES.values())
    assert {s.patient for s in divided.samples} >= {"old0/p1", "old2/p1"}


def test_fewer_test_patients_than_sites_leaves_some_without() -> None:
    divided = divide(make_manifest(labels=1), "iid", num_sites=12)
    assert len({s.site for s in divided.select(split="train")}) == 12
    assert len({s.site for s in divided.select(split="val")}) == 4


@pytest.mark.parametrize("num_sites", [0, 37])
def test_too_many_sites_are_refused(num_sites: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_sites is {num_sites}.* 36 training patients.*Choose 1 to 36"):
        divide(make_manifest(), "iid", num_sites=num_sites)
