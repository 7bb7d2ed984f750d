"""The cache: content addressed, atomic, shared, limited; and the encoder's way into it."""

import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from icmoe.data.features import (
    EncodeReport,
    FeatureCache,
    FeatureSpec,
    default_cache_dir,
    encode_samples,
    open_cache,
)
from icmoe.data.manifest import Sample
from icmoe.data.sources import image_digest
from icmoe.data.transforms import PixelNorm, apply_view, fit_to_square
from icmoe.errors import ConfigError, DataError, RunError

SIZE = 32
KEY = "ab" + "0" * 62


class TinyBackbone(nn.Module):
    """A strided convolution in the place of SAM's encoder."""

    name = "tiny"
    image_size = SIZE
    embedding_size = SIZE // 8
    pixel_norm: PixelNorm = "minmax"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 256, kernel_size=8, stride=8)
        self.num_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += 1
        embeddings: Tensor = self.encoder(images)
        return embeddings

    def digest(self) -> str:
        return "tiny-1"


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return make_samples(tmp_path)


def make_samples(folder: Path, *, count: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(image=path, mask=path, patient=str(index), split="train", site="s"))
    return samples


def encode(
    samples: list[Sample],
    cache: FeatureCache,
    *,
    backbone: TinyBackbone | None = None,
    views: tuple[str, ...] = ("identity",),
) -> EncodeReport:
    return encode_samples(
        backbone or TinyBackbone(), samples, views=views, cache=cache, detail_size=16, precision="fp32", batch_size=2
    )


def spec_of(backbone: TinyBackbone) -> FeatureSpec:
    return FeatureSpec.of(backbone, detail_size=16, precision="fp32")


def entry(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "embeddings": torch.full((256, 4, 4), value, dtype=torch.float16),
        "detail": torch.zeros(3, 16, 16, dtype=torch.uint8),
    }


def temporary_files(cache: FeatureCache) -> list[Path]:
    return list(cache.root.rglob("*.icmoe-tmp"))


def test_an_entry_holds_what_the_backbone_says_of_that_view(samples: list[Sample], cache: FeatureCache) -> None:
    backbone = TinyBackbone()
    encode(samples, cache, backbone=backbone, views=("identity", "hflip", "affine0"))
    digest = image_digest(samples[1])
    pixels = np.asarray(Image.open(samples[1].image)).astype(np.float32)
    for view in ("identity", "hflip", "affine0"):
        embeddings, detail = cache.load(spec_of(backbone).key(digest, view))
        expected = backbone(apply_view(fit_to_square(pixels, SIZE), view, seed_text=digest)[None])[0]
        assert embeddings.dtype == torch.float16
        torch.testing.assert_close(embeddings.float(), expected.detach(), rtol=1e-3, atol=1e-3)
        expected_detail = apply_view(fit_to_square(pixels, 16), view, seed_text=digest) * 255
        assert (detail.float() - expected_detail).abs().max() <= 0.51


def test_only_missing_entries_are_encoded(samples: list[Sample], cache: FeatureCache) -> None:
    backbone = TinyBackbone()
    seen: list[tuple[int, int]] = []
    first = encode_samples(
        backbone, samples, views=("identity",), cache=cache, detail_size=16, precision="fp32", batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (first.found, first.used, first.encoded, first.reused, first.skipped) == (3, 3, 3, 0, {})
    assert seen == [(2, 3), (3, 3)]
    assert backbone.num_calls == 2
    second = encode(samples, cache, backbone=backbone)
    assert (second.encoded, second.reused, backbone.num_calls) == (0, 3, 2)
    third = encode(samples, cache, backbone=backbone, views=("identity", "vflip", "vflip"))
    assert (third.encoded, third.reused, third.views) == (3, 3, ("identity", "vflip"))


def test_the_rest_of_an_interrupted_run_gets_the_same_bits(tmp_path: Path, samples: list[Sample]) -> None:
    whole, parts = FeatureCache(tmp_path / "whole"), FeatureCache(tmp_path / "parts")
    encode(samples, whole)
    encode(samples[:1], parts)
    encode(samples, parts)
    for sample in samples:
        key = spec_of(TinyBackbone()).key(image_digest(sample), "identity")
        assert whole.path(key).read_bytes() == parts.path(key).read_bytes()


def test_every_dependency_changes_the_key() -> None:
    spec = spec_of(TinyBackbone())
    keys = {spec.key("a", "identity"), spec.key("b", "identity"), spec.key("a", "hflip")}
    changes = {
        "backbone_digest": "x", "image_size": 64, "embedding_size": 8, "pixel_norm": "imagenet", "detail_size": 32,
        "precision": "bf16",
    }  # fmt: skip
    assert set(changes) == set(vars(spec))
    for name, value in changes.items():
        keys.add(FeatureSpec(**(vars(spec) | {name: value})).key("a", "identity"))
    assert len(keys) == 3 + len(changes)


def test_bf16_runs_under_autocast(samples: list[Sample], cache: FeatureCache) -> None:
    backbone = TinyBackbone()
    dtypes = []
    backbone.encoder.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    encode_samples(backbone, samples, views=("identity",), cache=cache, detail_size=16, precision="bf16")
    assert set(dtypes) == {torch.bfloat16}


def test_the_folder_is_private_and_foreign_modes_are_only_reported(
    tmp_path: Path, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store(KEY, image_digest="d", **entry())
    for path, mode in ((cache.root, 0o700), (cache.root / "ab", 0o700), (cache.path(KEY), 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with caplog.at_level(logging.WARNING):
        FeatureCache(tmp_path / "open")
    assert "chmod 700" in caplog.text
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make the cache folder.*ICMOE_CACHE_DIR"):
        FeatureCache(tmp_path / "file" / "cache")


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None], ids=["empty", "zeros", "truncated"])
def test_damaged_entries_are_computed_again(samples: list[Sample], cache: FeatureCache, damage: bytes | None) -> None:
    encode(samples, cache)
    key = spec_of(TinyBackbone()).key(image_digest(samples[0]), "identity")
    good = cache.path(key).read_bytes()
    cache.path(key).write_bytes(good[:-1] if damage is None else damage)
    with pytest.raises(DataError, match=r"missing or damaged.*Start again"):
        cache.load(key)
    assert encode(samples, cache).encoded == 1
    assert cache.path(key).read_bytes() == good


def test_info_and_purge_touch_nothing_but_entries(cache: FeatureCache) -> None:
    cache.store(KEY, image_digest="d", **entry())
    foreign = cache.root / "notes.txt"
    foreign.touch()
    (cache.root / "ab" / "x.icmoe-tmp").touch()
    size = cache.path(KEY).stat().st_size
    assert (cache.info().entries, cache.info().bytes, cache.info().root) == (1, size, cache.root)
    removed = cache.purge()
    assert (removed.entries, removed.bytes) == (1, size)
    assert cache.info().entries == 0
    assert temporary_files(cache) == []
    assert foreign.exists()
    cache.store(KEY, image_digest="d", **entry())
    assert KEY in cache


def test_old_temporary_files_go_and_young_ones_stay(samples: list[Sample], cache: FeatureCache) -> None:
    cache.store(KEY, image_digest="d", **entry())
    old, young = cache.root / "ab" / "old.icmoe-tmp", cache.root / "ab" / "young.icmoe-tmp"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    encode(samples, cache)
    assert temporary_files(cache) == [young]


def test_too_many_views_fall_back_to_identity(
    tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path / "cache", limit_bytes=spec_of(TinyBackbone()).entry_bytes * 4)
    with caplog.at_level(logging.WARNING):
        report = encode(samples, cache, views=("identity", "hflip"))
    assert (report.views, report.encoded) == (("identity",), 3)
    assert "identity view only" in caplog.text
    assert "icmoe-fl cache purge" in caplog.text
    assert cache.info().bytes <= cache.limit_bytes


def test_features_over_the_limit_are_refused_before_encoding(tmp_path: Path, samples: list[Sample]) -> None:
    cache = FeatureCache(tmp_path / "cache", limit_bytes=spec_of(TinyBackbone()).entry_bytes * 2)
    backbone = TinyBackbone()
    with pytest.raises(DataError, match=r"3 images need .* GB.*ICMOE_CACHE_LIMIT_GB.*icmoe-fl cache purge"):
        encode(samples, cache, backbone=backbone)
    assert backbone.num_calls == 0
    encode(samples[:2], cache)
    tight = FeatureCache(cache.root, limit_bytes=1)
    assert encode(samples[:2], tight).reused == 2


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Let the kernel fail writes past a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_explained_and_leaves_no_remains(samples: list[Sample], cache: FeatureCache) -> None:
    encode(samples[:1], cache)
    with (
        files_limited_to(4000),
        pytest.raises(RunError, match=r"disk of the feature cache .* is full: .* GB more are needed.*ICMOE_CACHE_DIR"),
    ):
        encode(samples, cache)
    assert temporary_files(cache) == []
    assert cache.info().entries == 1
    assert encode(samples, cache).encoded == 2


def test_a_broken_image_is_named(samples: list[Sample], cache: FeatureCache) -> None:
    samples[1].image.write_bytes(samples[1].image.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"1\.png is truncated or damaged"):
        encode(samples, cache)
    samples[1].image.unlink()
    with pytest.raises(DataError, match=r"cannot read .*1\.png"):
        encode(samples, cache)


def test_features_beyond_half_precision_are_refused(samples: list[Sample], cache: FeatureCache) -> None:
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.encoder.weight.mul_(1e6)
    with pytest.raises(DataError, match=r"features of .*0\.png are not finite"):
        encode(samples, cache, backbone=backbone)


def test_unknown_views_are_refused(samples: list[Sample], cache: FeatureCache) -> None:
    with pytest.raises(ConfigError, match="unknown view 'upside'"):
        encode(samples, cache, views=("upside",))


def test_places_and_limits_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ICMOE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ICMOE_CACHE_LIMIT_GB", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "icmoe-fl" / "features"
    assert open_cache().limit_bytes == 20 * 10**9
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "icmoe-fl" / "features"
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("ICMOE_CACHE_LIMIT_GB", "0.5")
    assert (open_cache().root, open_cache().limit_bytes) == (tmp_path / "mine" / "features", 5 * 10**8)
    for wrong in ("0", "-1", "many", "nan"):
        monkeypatch.setenv("ICMOE_CACHE_LIMIT_GB", wrong)
        with pytest.raises(ConfigError, match=f"ICMOE_CACHE_LIMIT_GB is '{wrong}'"):
            open_cache()


WRITER = """
import sys, torch
from pathlib import Path
from icmoe.data.cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]))
embeddings = torch.ones(256, 128, 128, dtype=torch.float16)
detail = torch.ones(3, 16, 16, dtype=torch.uint8)
number = 0
while True:
    cache.store("ab" + f"{number % 8:062d}", image_digest="d", embeddings=embeddings, detail=detail)
    number += 1
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_mid_write_leaves_only_whole_entries(samples: list[Sample], cache: FeatureCache) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(cache.root)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(10):
            assert writer.stdout.readline()
        # Not between two writes: wait until a temporary file is there.
        while not temporary_files(cache):
            pass
        writer.send_signal(signal.SIGKILL)
    assert cache.info().entries == 8
    for number in range(8):
        embeddings, _ = cache.load("ab" + f"{number:062d}")
        assert (embeddings == 1).all()
    for remains in temporary_files(cache):
        os.utime(remains, (time.time() - 4000,) * 2)
    assert encode(samples, cache).encoded == 3
    assert temporary_files(cache) == []


ENCODER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_features import FeatureCache, encode, make_samples
from icmoe.data.manifest import Sample
paths = sorted(Path(sys.argv[1]).glob("*.png"))
samples = [Sample(image=p, mask=p, patient=p.stem, split="train", site="s") for p in paths]
for _ in range(4):
    report = encode(samples, FeatureCache(Path(sys.argv[2])), views=("identity", "hflip", "rot90"))
    FeatureCache(Path(sys.argv[2])).purge()
report = encode(samples, FeatureCache(Path(sys.argv[2])), views=("identity", "hflip", "rot90"))
print(report.used)
"""


@pytest.mark.slow
def test_two_processes_fill_and_purge_one_cache(tmp_path: Path, cache: FeatureCache) -> None:
    samples = make_samples(tmp_path, count=6)
    command = [sys.executable, "-c", ENCODER, str(tmp_path), str(cache.root), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["6", "6"]
    assert [process.returncode for process in processes] == [0, 0]
    assert temporary_files(cache) == []
    encode(samples, cache, views=("identity", "hflip", "rot90"))
    assert cache.info().entries == 18
    reused = encode(samples, cache, views=("identity", "hflip", "rot90"))
    assert (reused.encoded, reused.reused) == (0, 18)
