"""Make the sites of a simulation out of one manifest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from icmoe.data.manifest import Manifest, Sample
from icmoe.errors import ConfigError
from icmoe.types import SPLITS, Split

Partition = Literal["manifest", "iid", "dirichlet"]

_Patient = tuple[str, str]  # site in the manifest, patient there


def partition_sites(
    manifest: Manifest, *, partition: Partition, num_sites: int | None, alpha: float, seed: int
) -> Manifest:
    """Give every sample a new site. Patients stay together and keep their split.

    ``iid`` deals the shuffled patients of each split out in turn. ``dirichlet`` takes the manifest's sites as labels:
    the patients of a label are spread over the new sites in proportions drawn from Dirichlet(alpha), the same for each
    split. With a single label the new sites differ in size alone. After that, a site without a patient in a split gets
    one from the site that has most there, as long as there are enough.

    Args:
        manifest: all samples.
        partition: ``manifest`` keeps the sites as they are.
        num_sites: number of new sites, for ``iid`` and ``dirichlet``.
        alpha: evenness of ``dirichlet``; small is uneven.
        seed: the same seed gives the same sites.

    Returns:
        A manifest with the sites ``site_00``, ``site_01``, ...; patients of the same name at different old sites are
        told apart by a prefix.

    Raises:
        ConfigError: if there are fewer training patients than sites.
    """
    if partition == "manifest":
        return manifest
    patients = {split: _patients(manifest, split) for split in SPLITS}
    if num_sites is None or not 1 <= num_sites <= len(patients["train"]):
        raise ConfigError(
            f"simulation.num_sites is {num_sites}, but {manifest.root} has {len(patients['train'])} training "
            f"patients and each site needs one. Choose 1 to {len(patients['train'])}."
        )
    rng = np.random.default_rng(seed)
    if partition == "iid":
        dealt = {split: _deal(patients[split], num_sites, rng) for split in SPLITS}
    else:
        dealt = _deal_unevenly(patients, num_sites, alpha=alpha, rng=rng)
    new_site: dict[_Patient, int] = {}
    for hands in dealt.values():
        _fill_empty(hands)
        new_site |= {patient: index for index, hand in enumerate(hands) for patient in hand}
    return Manifest(root=manifest.root, samples=_relabel(manifest, new_site, num_sites))


def _patients(manifest: Manifest, split: Split) -> list[_Patient]:
    return sorted({(sample.site, sample.patient) for sample in manifest.select(split=split)})


def _deal(patients: Sequence[_Patient], num_sites: int, rng: np.random.Generator) -> list[list[_Patient]]:
    order = [patients[index] for index in rng.permutation(len(patients))]
    return [order[site::num_sites] for site in range(num_sites)]


def _deal_unevenly(
    patients: dict[Split, list[_Patient]], num_sites: int, *, alpha: float, rng: np.random.Generator
) -> dict[Split, list[list[_Patient]]]:
    dealt: dict[Split, list[list[_Patient]]] = {split: [[] for _ in range(num_sites)] for split in SPLITS}
    for label in sorted({site for group in patients.values() for site, _ in group}):
        proportions = rng.dirichlet(np.full(num_sites, alpha))
        for split in SPLITS:
            group = [patient for patient in patients[split] if patient[0] == label]
            order = [group[index] for index in rng.permutation(len(group))]
            cuts = np.rint(np.cumsum(proportions)[:-1] * len(group)).astype(int).tolist()
            for hand, first, last in zip(dealt[split], [0, *cuts], [*cuts, len(group)], strict=True):
                hand += order[first:last]
    return dealt


def _fill_empty(hands: list[list[_Patient]]) -> None:
    """Move single patients from the fullest hands to the empty ones, in place."""
    for hand in hands:
        fullest = max(hands, key=len)
        if not hand and len(fullest) > 1:
            hand.append(fullest.pop())


def _relabel(manifest: Manifest, new_site: dict[_Patient, int], num_sites: int) -> tuple[Sample, ...]:
    homes: dict[str, set[str]] = {}
    for site, patient in new_site:
        homes.setdefault(patient, set()).add(site)
    digits = max(2, len(str(num_sites - 1)))
    return tuple(
        replace(
            sample,
            site=f"site_{new_site[sample.site, sample.patient]:0{digits}d}",
            patient=sample.patient if len(homes[sample.patient]) == 1 else f"{sample.site}/{sample.patient}",
        )
        for sample in manifest.samples
    )
