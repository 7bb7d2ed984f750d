"""The report is built from invented run directories, written here as a run writes them."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from icmoe.config import parse_run_config
from icmoe.errors import RunError
from icmoe.report import write_report, write_tensorboard
from icmoe.report.figures import HEIGHT, LABEL_GAP, line_chart, nice_ticks, site_series, spread_labels, whole_ticks
from icmoe.report.formats import DASH, MINUS, format_difference, format_score, format_seconds
from icmoe.report.pages import PAGE_LIMIT, _picture_budget
from icmoe.report.pictures import load_gallery, read_example
from icmoe.report.records import Run, read_run
from icmoe.report.tables import incidents, participation, score_table

NOTE = "one averaged brain, deformed and re-scanned by simulation; these Dice values say nothing about patients"
EXPERTS = ("basic.0", "semantic.0", "adaptive.0", "adaptive.1")
CLASSES = {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}
SITES = ("alder", "birch", "cedar", "dogwood")


def make_config(run_dir: Path, **task: Any) -> None:
    task = {"name": "cardiac", "classes": CLASSES, "note": NOTE} | task
    config = parse_run_config({"task": task, "federation": {"num_rounds": 6}}, source="test")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (run_dir / "config.sha256").write_text(config.digest() + "\n")


def make_round(number: int, sites: tuple[str, ...], rng: np.random.Generator) -> dict[str, Any]:
    level = 0.88 - 0.75 * 0.45**number
    shares = rng.dirichlet((3, 2, 4, 4), size=len(sites))
    return {
        "round": number + 1,
        "asked": list(sites),
        "answered": list(sites),
        "failed": {},
        "quarantined": {},
        "scored_round": number,
        "val_dice": {site: round(level + float(rng.normal(0, 0.012)), 4) for site in sites},
        "train_loss": {site: round(1.6 * 0.8**number + float(rng.normal(0, 0.03)), 4) for site in sites},
        "num_examples": dict.fromkeys(sites, 52),
        "found": dict.fromkeys(sites, 80),
        "used": dict.fromkeys(sites, 79),
        "skipped": dict.fromkeys(sites, 1),
        "bytes_up": dict.fromkeys(sites, 5_912_344),
        "bytes_down": dict.fromkeys(sites, 5_912_344),
        "expert_shares": {
            site: dict(zip(EXPERTS, map(float, row), strict=True)) for site, row in zip(sites, shares, strict=True)
        },
        "epsilon": dict.fromkeys(sites),
        "seconds": 81.5,
    }


def lose_site(line: dict[str, Any], site: str, state: str, reason: str) -> None:
    line["answered"].remove(site)
    line[state] = {site: reason}
    for key in ("val_dice", "train_loss", "expert_shares"):
        del line[key][site]


def make_scores(sites: tuple[str, ...], level: float, rng: np.random.Generator) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {}
    for site in sites:
        per_class = {name: round(level + float(rng.normal(0, 0.03)), 4) for name in CLASSES}
        dice = round(float(np.mean(list(per_class.values()))), 4)
        hd95 = round(float(rng.uniform(3, 7)), 3)
        scores[site] = {"dice": dice, "dice_per_class": per_class, "hd95": hd95, "hd95_unit": "mm", "num_test": 16}
    worst = min(scores, key=lambda name: scores[name]["dice"])
    mean = float(np.mean([score["dice"] for score in scores.values()]))
    return {"mean_dice": mean, "worst_site": {"name": worst, "dice": scores[worst]["dice"]}, "sites": scores}


def make_run(
    run_dir: Path, *, sites: tuple[str, ...] = SITES, reference: bool = True, num_rounds: int = 6, **task: Any
) -> Path:
    """A finished run with believable values, one lost and one quarantined update."""
    rng = np.random.default_rng(7)
    make_config(run_dir, **task)
    lines = [make_round(number, sites, rng) for number in range(num_rounds)]
    if len(sites) > 2 and num_rounds > 3:
        lose_site(lines[1], sites[1], "failed", "no reply within 3600 s")
        lose_site(lines[2], sites[1], "failed", "no reply within 3600 s")
        lose_site(lines[3], sites[2], "quarantined", "update norm 5210.3 is above 1000.0")
    last = make_round(num_rounds, sites, rng)
    final = {key: last[key] for key in ("val_dice", "answered", "failed", "scored_round")}
    lines.append(final | {"round": num_rounds + 1, "evaluate_only": True})
    (run_dir / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = hashlib.sha256(b"backbone").hexdigest()
    results = make_scores(sites, 0.875, rng) | {
        "task": "cardiac",
        "backbone": "lite_medsam",
        "trainable_params": 1_478_086,
        "bytes_up_per_round_per_site": 5_912_344,
        "backbone_sha256_before": digest,
        "backbone_sha256_after": digest,
        "best_round": num_rounds - 1,
        "num_rounds": num_rounds,
        "seconds": 1312.4,
        "cpu_seconds": 2410.0,
        "epsilon": dict.fromkeys(sites),
        "empty_masks": dict.fromkeys(sites, 2),
    }
    if reference:
        results["reference"] = {"local": make_scores(sites, 0.85, rng), "pooled": make_scores(sites, 0.88, rng)}
    (run_dir / "results.json").write_text(json.dumps(results))
    return run_dir


def edit_results(run_dir: Path, **values: Any) -> None:
    path = run_dir / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_example(
    run_dir: Path, number: int, *, site: str = "alder", side: int = 64, noise: bool = False, **arrays: Any
) -> Path:
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side] / side - 0.5
    radius = np.hypot(x, y * 1.2)
    truth = np.select([radius < 0.16, radius < 0.25, (x > 0.24) & (radius < 0.4)], [3, 2, 1], 0).astype(np.uint8)
    image = np.repeat((60 + 40 * truth)[..., None], 3, axis=-1) + rng.integers(0, 20, size=(side, side, 3))
    winner = (np.abs(x * 7 + np.sin(y * 20)).astype(np.uint8) % len(EXPERTS)).astype(np.uint8)
    if noise:
        image = rng.integers(0, 256, size=(side, side, 3))
        truth, winner = (rng.integers(0, 4, size=(side, side), dtype=np.uint8) for _ in range(2))
    values = {
        "image": image.astype(np.uint8),
        "truth": truth,
        "prediction": np.roll(truth, 2, axis=1),
        "winner": winner,
        "expert_names": np.array(EXPERTS),
        "site": np.array(site),
        "dice": np.array(0.873),
    }
    folder = run_dir / "examples"
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{number:02d}.npz", **(values | arrays))
    return folder / f"{number:02d}.npz"


def make_seeds(run_dir: Path) -> Path:
    for seed in (0, 1):
        make_run(run_dir / f"seed_{seed}")
    spread = {"mean": 0.8712, "std": 0.0041}
    scores = {"mean_dice": spread, "worst_site": spread, "sites": {site: {"dice": spread} for site in SITES}}
    local = {"mean": 0.8500, "std": 0.0030}
    reference = {"mean_dice": local, "worst_site": local, "sites": {site: {"dice": local} for site in SITES}}
    summary = {"seeds": [0, 1], "runs": ["seed_0", "seed_1"], **scores, "reference": {"local": reference}}
    (run_dir / "results.json").write_text(json.dumps(summary))
    return run_dir


def text_of(page: Path) -> str:
    """What a reader sees: no head, no tags, single spaces."""
    body = page.read_text().split("<body>")[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).strip()


def loaded_addresses(page: Path) -> list[str]:
    html = page.read_text()
    return re.findall(r"""(?:src|href|srcset|action|poster|data)\s*=\s*["']([^"']*)""", html) + re.findall(
        r"url\(([^)]*)\)|@import", html
    )


def test_first_line_is_the_note(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path))
    assert page == tmp_path / "report.html"
    assert text_of(page).startswith(NOTE)


def test_without_note_the_title_comes_first(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, note=""))
    assert text_of(page).startswith("cardiac: federated segmentation")


def test_page_loads_nothing(tmp_path: Path) -> None:
    make_example(make_run(tmp_path), 0)
    page = write_report(tmp_path)
    addresses = loaded_addresses(page)
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    assert "<script" not in page.read_text()
    assert "default-src 'none'" in page.read_text()


def test_twelve_large_examples_fit(tmp_path: Path) -> None:
    make_run(tmp_path)
    for number in range(12):
        make_example(tmp_path, number, site=SITES[number % 4], side=512)
    page = write_report(tmp_path)
    assert page.stat().st_size < PAGE_LIMIT
    assert page.read_text().count('class="example"') == 12


def test_many_sites_and_rounds_leave_less_room_for_pictures(tmp_path: Path) -> None:
    names = tuple(f"hospital_{number:02d}" for number in range(32))
    run = read_run(make_run(tmp_path, sites=names, num_rounds=40))
    assert isinstance(run, Run)
    page = write_report(tmp_path)
    assert PAGE_LIMIT - _picture_budget(run) > page.stat().st_size


def test_incompressible_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    make_run(tmp_path)
    for number in range(4):
        make_example(tmp_path, number, site=SITES[number % 2], side=64, noise=True)
    size = read_example(tmp_path / "examples" / "00.npz").characters
    gallery = load_gallery(tmp_path / "examples", budget=round(2.5 * size))
    assert gallery.left_out == 2
    assert [len(examples) for examples in gallery.by_site.values()] == [1, 1]


def test_large_images_are_shrunk(tmp_path: Path) -> None:
    make_run(tmp_path)
    example = read_example(make_example(tmp_path, 0, side=1300))
    assert (example.width, example.height) == (434, 434)


def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    sites = ("<b>alder</b>", 'bir"ch', "<script>alert(1)</script>", "d&d")
    make_run(tmp_path, sites=sites, note="<i>caution</i>")
    make_example(tmp_path, 0, site=sites[0])
    html = write_report(tmp_path).read_text()
    assert "<b>" not in html
    assert "<script" not in html
    assert "<i>caution" not in html
    assert "&lt;b&gt;alder&lt;/b&gt;" in html


def test_unknown_values_are_dashes(tmp_path: Path) -> None:
    make_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["sites"]["alder"] |= {"dice": None, "hd95": None, "num_test": None}
    results["sites"]["alder"]["dice_per_class"]["myocardium"] = None
    results["sites"]["birch"]["hd95"] = float("nan")
    del results["reference"]["local"]["sites"]["alder"]
    edit_results(tmp_path, sites=results["sites"], reference=results["reference"], seconds=None, best_round=None)
    html = write_report(tmp_path).read_text()
    row = html[html.index('<th scope="row">alder') :].split("</tr>")[0]
    assert row.count(f">{DASH}</td>") == 6
    visible = text_of(tmp_path / "report.html")
    assert not re.search(r"\b(nan|None|null)\b", visible.split("Configuration of the run")[0])


@pytest.mark.parametrize("sites", [("only",), tuple(f"hospital_{number:02d}" for number in range(64))])
def test_one_and_many_sites_without_reference(tmp_path: Path, sites: tuple[str, ...]) -> None:
    page = write_report(make_run(tmp_path, sites=sites, reference=False))
    assert text_of(page).count("each site alone") == 0
    assert all(site in page.read_text() for site in sites)


def test_run_without_rounds_is_still_shown(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "rounds.jsonl").write_text("")
    assert "No round was recorded" in text_of(write_report(tmp_path))


def test_changed_backbone_is_shouted(tmp_path: Path) -> None:
    make_run(tmp_path)
    edit_results(tmp_path, backbone_sha256_after="0" * 64)
    assert "NO the digests before and after differ" in text_of(write_report(tmp_path))


def test_epsilon_is_shown_where_it_was_kept(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert "No differential privacy" in text_of(write_report(tmp_path))
    edit_results(tmp_path, epsilon=dict.fromkeys(SITES, 2.5))
    text = text_of(write_report(tmp_path))
    assert "No differential privacy" not in text
    assert "2.500" in text


def test_same_run_gives_the_same_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = set(tmp_path.iterdir())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report.html"}


def test_summary_of_seeds_links_to_each_page(tmp_path: Path) -> None:
    page = write_report(make_seeds(tmp_path))
    links = re.findall(r'href="([^"]*)"', page.read_text())
    assert links == ["seed_0/report.html", "seed_1/report.html"]
    assert all((tmp_path / link).is_file() for link in links)
    assert text_of(page).startswith(NOTE)
    assert "0.871 ± 0.004" in text_of(page)
    assert "+0.021" in text_of(page)


def test_seed_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    (tmp_path / "seed_1" / "results.json").unlink()
    assert "seed_1: folder not found" in text_of(write_report(tmp_path))
    (tmp_path / "seed_0" / "results.json").unlink()
    with pytest.raises(RunError, match="none of the runs seed_0, seed_1 is left"):
        write_report(tmp_path)


@pytest.mark.parametrize("write", [write_report, write_tensorboard])
def test_missing_results_say_what_to_do(tmp_path: Path, write: Any) -> None:
    make_config(tmp_path)
    with pytest.raises(RunError, match=r"no results\.json.*--resume"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rounds.jsonl", '{"round": 1}\n{"rou', r"rounds\.jsonl, line 2 is not valid JSON"),
        ("rounds.jsonl", '{"round": "one"}\n', r"line 1 is not what a run writes"),
        ("results.json", "{}", r"sites: Field required"),
        ("results.json", "[]", r"not what a run writes"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    make_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        write_report(tmp_path)


def test_damaged_examples_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_example(tmp_path, 0, winner=np.zeros((3, 3), np.uint8))
    with pytest.raises(RunError, match=r"00\.npz holds arrays of shapes"):
        write_report(tmp_path)
    (tmp_path / "examples" / "00.npz").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"cannot read the example"):
        write_report(tmp_path)


def test_rounds_written_again_after_a_resume_count_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / "rounds.jsonl"
    lines = path.read_text().splitlines()
    again = json.loads(lines[2]) | {"seconds": 9.0}
    path.write_text("\n".join([*lines[:3], json.dumps(again), *lines[3:]]))
    run = read_run(tmp_path)
    assert isinstance(run, Run)
    assert [line.round for line in run.training_rounds] == [1, 2, 3, 4, 5, 6]
    assert run.rounds[2].seconds == 9.0
    assert run.rounds[-1].evaluate_only


def test_participation_tells_every_state(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    assert isinstance(run, Run)
    states = {site: [cell.state for cell in cells] for site, cells in participation(run)}
    assert states["birch"] == ["answered", "failed", "failed", "answered", "answered", "answered", "answered"]
    assert states["cedar"][3] == "quarantined"
    assert [(one.site, one.rounds) for one in incidents(run)] == [("birch", f"2{DASH}3"), ("cedar", "4")]


def test_scores_stand_beside_their_references(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    assert isinstance(run, Run)
    table = score_table(run.results)
    assert table.references == ("local", "pooled")
    assert table.hd95_unit == "mm"
    assert [row.name for row in table.rows if row.worst] == [run.results.worst_site.name]
    local = run.results.reference["local"]
    assert run.results.mean_dice is not None
    assert local.mean_dice is not None
    assert table.rows[0].references[0] == local.sites["alder"].dice
    assert table.mean.difference == pytest.approx(run.results.mean_dice - local.mean_dice)
    assert table.mean.score.num_test == 64


def test_tensorboard_holds_the_values(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    assert isinstance(run, Run)
    events = EventAccumulator(str(write_tensorboard(tmp_path)))
    events.Reload()
    dice = {event.step: event.value for event in events.Scalars("val_dice/birch")}
    assert sorted(dice) == [0, 3, 4, 5, 6]
    assert dice[3] == pytest.approx(run.rounds[3].val_dice["birch"])
    mean = {event.step: event.value for event in events.Scalars("val_dice/mean")}
    assert mean[6] == pytest.approx(np.mean(list(run.rounds[-1].val_dice.values())))
    assert [event.step for event in events.Scalars("train_loss/alder")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("bytes_up/alder")[0].value == 5_912_344
    share = events.Scalars("expert_share/alder/adaptive.1")[0].value
    assert share == pytest.approx(run.rounds[0].expert_shares["alder"]["adaptive.1"])
    assert events.Scalars("test_dice/mean")[0].step == run.results.best_round
    assert events.Scalars("test_dice_local/mean")[0].value == pytest.approx(run.results.reference["local"].mean_dice)


def test_tensorboard_replaces_what_was_there(tmp_path: Path) -> None:
    make_run(tmp_path)
    folder = write_tensorboard(tmp_path)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "events.out.tfevents.1.old").write_bytes(b"old")
    assert {path.name: path.read_bytes() for path in write_tensorboard(tmp_path).iterdir()} == first
    assert not list(tmp_path.glob(".tensorboard*"))


def test_tensorboard_of_seeds_has_a_folder_each(tmp_path: Path) -> None:
    folder = write_tensorboard(make_seeds(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["seed_0", "seed_1"]


def test_ticks_are_round_and_enclose() -> None:
    assert nice_ticks([0.131, 0.879]) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(nice_ticks([0.5])) >= 2
    assert len(nice_ticks([0.0, 0.0])) >= 2
    assert whole_ticks(0, 200)[:3] == [0, 25, 50]


def test_labels_do_not_overlap_and_stay_inside() -> None:
    placed = spread_labels(dict.fromkeys(range(8), float(HEIGHT - 45)))
    ys = sorted(placed.values())
    assert all(after - before >= LABEL_GAP for before, after in itertools.pairwise(ys))
    assert 0 <= ys[0] <= ys[-1] <= HEIGHT - 40


def test_line_breaks_where_a_value_is_missing() -> None:
    values: dict[str, list[tuple[float, float | None]]] = {
        "alder": [(0.0, 0.1), (1.0, None), (2.0, 0.3)],
        "birch": [(0.0, None)],
    }
    chart = line_chart(
        site_series(values), title="t", description="d", x_label="x", y_label="y", marker=(2.0, "chosen")
    )
    assert chart is not None
    assert [curve.path.count("M") for curve in chart.curves] == [2]
    assert chart.marker is not None
    assert line_chart(site_series({}), title="t", description="d", x_label="x", y_label="y") is None


def test_numbers_are_written_for_people() -> None:
    assert (format_score(0.87351), format_score(None), format_score(float("nan"))) == ("0.874", DASH, DASH)
    assert (format_difference(0.0214), format_difference(-0.0214)) == ("+0.021", f"{MINUS}0.021")
    assert [format_seconds(value) for value in (4.2, 61, 3725, None)] == ["4.2 s", "1 min 1 s", "1 h 2 min", DASH]
