"""The page of the pre-flight check, and the command around it."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from icmoe.commands.check import check
from icmoe.data.check_findings import Finding
from icmoe.data.checking import check_data
from icmoe.errors import ConfigError, DataError
from icmoe.report.check_page import describe_spread, group_findings, list_files, write_check_page

app = typer.Typer()
app.command()(check)


@app.callback()
def _root() -> None:
    """Keep ``check`` a command of its own."""


def make_folder(root: Path, *, spacing: str = "0.7") -> Path:
    """Ten pictures of ten patients, with a lesion each."""
    root.mkdir(exist_ok=True)
    lines = ["image,mask,patient,split,spacing"]
    for number in range(10):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 24), Image.Resampling.BICUBIC).save(root / f"{number}.png")
        mask = np.zeros((24, 40), dtype=np.uint8)
        mask[6:12, 10:20] = 1
        Image.fromarray(mask).save(root / f"{number}_mask.png")
        lines.append(
            f"{number}.png,{number}_mask.png,<b>{number}</b>,{('train', 'val', 'test')[number // 4]},{spacing}"
        )
    (root / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


def run(*arguments: object) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments), "--workers", "1"])
    return result.exit_code, result.stdout, result.exception


class Outline(HTMLParser):
    """Addresses that a page asks for, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "srcset")]


def test_page_is_self_contained(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", spacing="")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:100])
    page = write_check_page(check_data(folder, classes={"lesion": 1}), tmp_path / "check.html")
    text = page.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    assert outline.addresses
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    assert "http" not in re.sub(r'http-equiv="', "", text)
    assert "Image cannot be read" in text
    assert text.index("Error: Image cannot be read") < text.index("Warning: No spacing")
    assert "<b>" not in text
    assert text.count("<rect") == 32
    assert len(outline.addresses) == 2 * 9  # nine readable images, each with its outline


def test_groups_bound_what_is_listed() -> None:
    findings = [Finding("image-unreadable", (f"{n}.png",), f"bad {n}") for n in range(30)]
    findings.append(Finding("spacing-missing", tuple(f"{n}.png" for n in range(50)), "none"))
    first, second = group_findings(findings)
    assert (len(first.lines), first.left_out, first.num_files) == (20, 10, 30)
    assert list_files(second.lines[0].files).endswith("5.png and 44 more")


def test_spread_in_a_cell() -> None:
    assert describe_spread(None) == "\N{EN DASH}"
    assert describe_spread((2.0, 2.0, 2.0)) == "2"
    assert describe_spread((1.0, 2.0, 512.0)) == "1 / 2 / 512"


class TestCommand:
    def test_sound_folder_passes(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "data")
        code, output, _ = run(folder)
        assert code == 0
        assert "used 10 of 10 images" in output
        record = json.loads((folder / "check.json").read_text(encoding="utf-8"))
        assert len(record["digests"]) == 10
        assert (folder / "check.html").is_file()

    def test_warnings_need_accept(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "data", spacing="")
        page = tmp_path / "check.html"
        code, _, error = run(folder, "--out", page)
        assert code != 0
        assert isinstance(error, DataError)
        assert "run again with --accept" in str(error)
        assert not (tmp_path / "check.json").exists()
        code, output, _ = run(folder, "--out", page, "--accept", "--json")
        assert code == 0
        report = json.loads(output)
        assert (report["num_errors"], report["num_warnings"], report["usable"]) == (0, 1, 10)
        assert report["cache_bytes"] == pytest.approx(10 * (256 * 64 * 64 * 2 + 3 * 256 * 256), rel=1e-3)
        assert json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))["accepted"] == ["spacing-missing"]
        code, _, error = run(folder, "--out", page)
        assert not (tmp_path / "check.json").exists(), "the last check decides"

    def test_errors_stop_even_if_accepted(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "data")
        (folder / "4.png").write_bytes(b"nothing")
        _, output, error = run(folder, "--accept")
        assert isinstance(error, DataError)
        assert "10.0% of the images cannot be used" in str(error)
        assert "Remedy: Export the image again" in output
        assert (folder / "check.html").is_file()
        code, _, _ = run(folder, "--max-bad-share", "0.2")
        assert code == 0
        assert json.loads((folder / "check.json").read_text(encoding="utf-8"))["skipped"][0]["name"] == "4.png"

    def test_set_needs_a_config(self, tmp_path: Path) -> None:
        _, _, error = run(tmp_path, "--set", "train.batch_size=2")
        assert isinstance(error, ConfigError)

    def test_config_gives_the_classes(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "data")
        config = tmp_path / "run.yaml"
        config.write_text("task: {name: demo, classes: {lesion: 7}}\n", encoding="utf-8")
        _, output, error = run(folder, "--config", config, "--json")
        assert isinstance(error, DataError)
        report = json.loads(output)
        assert {finding["code"] for finding in report["findings"]} >= {"value-without-class"}
        assert report["step_bytes"] is None

    @pytest.mark.slow
    def test_tries_a_training_step(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "data")
        config = tmp_path / "run.yaml"
        config.write_text("{task: {name: demo, classes: {lesion: 1}}, train: {batch_size: 2}}", encoding="utf-8")
        before = os.environ.get("ICMOE_CACHE_DIR")
        code, output, _ = run(folder, "--config", config, "--json")
        assert code == 0
        assert 50e6 < json.loads(output)["step_bytes"] < 5e9
        assert os.environ.get("ICMOE_CACHE_DIR") == before
        assert sorted(path.name for path in folder.iterdir() if "png" not in path.name) == [
            "check.html",
            "check.json",
            "manifest.csv",
        ]
