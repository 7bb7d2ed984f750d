"""Tables of ``icmoe-fl evaluate``: means with intervals that respect patients, and two models in pairs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from icmoe.errors import DataError
from icmoe.evaluation_cases import Case, Geometry, Item, Unit, VolumeCase
from icmoe.statistics import bootstrap_means, interval, paired_p_value

DISTANCES = ("hd95", "surface_dice")
VOLUMES = ("volume_difference", "absolute_volume_difference")

Measured = TypeVar("Measured", Case, VolumeCase)


def summarise(cases: Sequence[Case], volumes: Sequence[VolumeCase], *, geometry: Geometry, seed: int) -> dict[str, Any]:
    """Means with 95 % intervals per site, per class and over sites; the means of each patient; each volume.

    Args:
        cases: of all images.
        volumes: of all volumes.
        geometry: HD95 and surface Dice are those of the cases, or in ``3-D`` those of the volumes.
        seed: of the bootstrap.
    """

    def table(chosen: Callable[[Case | VolumeCase], bool]) -> dict[str, Any]:
        return _summary(list(filter(chosen, cases)), list(filter(chosen, volumes)), geometry=geometry, seed=seed)

    sites = sorted({case.site for case in cases})
    classes = list(dict.fromkeys(case.class_name for case in cases))
    per_site = {site: table(lambda one, site=site: one.site == site) for site in sites}  # type: ignore[misc]
    return {
        "mean_over_sites": _over_sites(cases, per_site, seed=seed),
        "sites": per_site,
        "classes": {name: table(lambda one, name=name: one.class_name == name) for name in classes},  # type: ignore[misc]
        "patients": _patients(cases, volumes, geometry=geometry),
        "volumes": [asdict(volume) for volume in volumes],
    }


def compare(cases: Sequence[Case], others: Sequence[Case], *, seed: int) -> dict[str, Any]:
    """Paired difference of Dice, this model minus the other: the mean over patients of their images' mean difference.

    Raises:
        DataError: if both were not scored on the same images and classes, or no image has a foreground.
    """
    mine, theirs = ({(case.item, case.class_name) for case in one if case.is_present} for one in (cases, others))
    if mine != theirs or not mine:
        raise DataError(
            "the two models cannot be compared in pairs: they were not scored on the same images and classes, or no "
            "image has a foreground."
        )
    first, second = _per_item(cases, "dice"), _per_item(others, "dice")
    by_patient: dict[str, list[float]] = {}
    for item in first:
        by_patient.setdefault(f"{item[0]}/{item[1]}", []).append(first[item] - second[item])
    means = [fmean(values) for values in by_patient.values()]
    return {
        "difference": fmean(means),
        "ci95": interval(bootstrap_means(means, list(by_patient), seed=seed)) if len(means) > 1 else None,
        "p_value": paired_p_value(means, [0.0] * len(means)),
        "test": "Wilcoxon signed-rank over patients' mean differences, two-sided",
        "num_patients": len(means),
        "num_better": sum(mean > 0 for mean in means),
    }


def _over_sites(cases: Sequence[Case], per_site: dict[str, Any], *, seed: int) -> dict[str, Any] | None:
    draws = [
        _draws([case for case in cases if case.site == site], "dice", seed=seed + number)
        for number, site in enumerate(per_site)
    ]
    known = [one for one in draws if one is not None]
    if not known:
        return None
    dice = [summary["dice"]["mean"] for summary in per_site.values() if summary["dice"] is not None]
    return {"dice": {"mean": fmean(dice), "ci95": interval(np.mean(known, axis=0))}}


def _summary(cases: Sequence[Case], volumes: Sequence[VolumeCase], *, geometry: Geometry, seed: int) -> dict[str, Any]:
    scored = [case for case in cases if case.is_present]
    num_patients = len({case.item[:2] for case in scored})

    def estimate(of: Sequence[Case] | Sequence[VolumeCase], metric: str) -> dict[str, Any] | None:
        draws = _draws(of, metric, seed=seed)
        if draws is None:
            return None
        # A single patient says nothing about the next one.
        bounds = interval(draws) if num_patients > 1 else None
        return {"mean": fmean(_per_item(of, metric).values()), "ci95": bounds}

    surfaces, about = _surfaces(cases, volumes, geometry)
    return {
        "num_images": len({case.item for case in scored}),
        "num_patients": num_patients,
        "dice": estimate(cases, "dice"),
        **about,
        **{metric: estimate(surfaces, metric) for metric in DISTANCES},
        **{metric: estimate(volumes, metric) for metric in VOLUMES},
    }


def _surfaces(
    cases: Sequence[Case], volumes: Sequence[VolumeCase], geometry: Geometry
) -> tuple[Sequence[Case] | Sequence[VolumeCase], dict[str, Any]]:
    """Those whose distances may be averaged, and what a reader has to know of them."""
    return _in_one_unit(volumes) if geometry == "3-D" else _in_one_unit(cases)


def _in_one_unit(measured: Sequence[Measured]) -> tuple[Sequence[Measured], dict[str, Any]]:
    """All that is in mm, or where nothing is, all that is in pixels: a mean of both would mean nothing."""
    present = [one for one in measured if one.is_present]
    units: tuple[Unit, ...] = ("mm", "px")
    unit = next((unit for unit in units if any(one.unit == unit for one in present)), None)
    chosen = [one for one in present if unit is not None and one.unit == unit]
    items = {one.item for one in chosen}
    left_out = {one.item for one in present} - items
    return chosen, {"unit": unit, "num_surfaces": len(items), "num_surfaces_left_out": len(left_out)}


def _draws(measured: Sequence[Case] | Sequence[VolumeCase], metric: str, *, seed: int) -> Any:
    values = _per_item(measured, metric)
    if not values:
        return None
    return bootstrap_means(list(values.values()), [f"{site}/{patient}" for site, patient, _ in values], seed=seed)


def _per_item(measured: Sequence[Case] | Sequence[VolumeCase], metric: str) -> dict[Item, float]:
    """Mean over the classes present, by image or volume."""
    items: dict[Item, list[float]] = {}
    for one in measured:
        value = getattr(one, metric)
        if value is not None:
            items.setdefault(one.item, []).append(value)
    return {item: fmean(values) for item, values in items.items()}


def _patients(cases: Sequence[Case], volumes: Sequence[VolumeCase], *, geometry: Geometry) -> list[dict[str, Any]]:
    """A row per patient with one per class inside; lowest Dice first."""
    own_cases: dict[tuple[str, str], list[Case]] = {}
    own_volumes: dict[tuple[str, str], list[VolumeCase]] = {}
    for case in cases:
        own_cases.setdefault((case.site, case.patient), []).append(case)
    for volume in volumes:
        own_volumes.setdefault((volume.site, volume.patient), []).append(volume)
    rows = []
    for (site, patient), mine in own_cases.items():
        theirs = own_volumes.get((site, patient), [])
        names = dict.fromkeys(case.class_name for case in mine)
        rows.append(
            {
                "site": site,
                "patient": patient,
                "num_images": len({case.image for case in mine}),
                **_means(mine, theirs, geometry),
                "classes": {
                    name: _means(
                        [case for case in mine if case.class_name == name],
                        [volume for volume in theirs if volume.class_name == name],
                        geometry,
                    )
                    for name in names
                },
            }
        )
    return sorted(rows, key=lambda row: (row["dice"] is None, row["dice"] or 0.0))


def _means(cases: Sequence[Case], volumes: Sequence[VolumeCase], geometry: Geometry) -> dict[str, Any]:
    surfaces, about = _surfaces(cases, volumes, geometry)

    def mean(of: Sequence[Case] | Sequence[VolumeCase], metric: str) -> float | None:
        values = _per_item(of, metric).values()
        return fmean(values) if values else None

    return {
        "dice": mean(cases, "dice"),
        **about,
        **{metric: mean(surfaces, metric) for metric in DISTANCES},
        **{metric: mean(volumes, metric) for metric in VOLUMES},
    }
