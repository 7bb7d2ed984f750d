"""What the frozen backbone says about each image, computed once and kept in a ``FeatureCache``.

Letters: B batch, h = w embedding grid, S side of the image the backbone sees, D side of the detail image.
"""

import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.data.cache import CacheInfo, FeatureCache, default_cache_dir, open_cache
from icmoe.data.manifest import Sample
from icmoe.data.sources import image_digest, load_pixels, source_digest
from icmoe.data.transforms import FINGERPRINT, PixelNorm, apply_view, check_view, fit_to_square
from icmoe.errors import DataError, RunError

__all__ = [
    "CacheInfo",
    "EncodeReport",
    "Encoder",
    "FeatureCache",
    "FeatureSpec",
    "Precision",
    "default_cache_dir",
    "draw_squares",
    "embed",
    "encode_samples",
    "open_cache",
]

Precision = Literal["fp32", "bf16"]

EMBEDDING_CHANNELS = 256
_HEADER_BYTES = 512  # safetensors' own header, rounded up
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What this module needs of a backbone."""

    @property
    def image_size(self) -> int:
        """Side S in pixels."""

    @property
    def embedding_size(self) -> int:
        """Grid side h."""

    @property
    def pixel_norm(self) -> PixelNorm:
        """See ``transforms.normalise``."""

    def digest(self) -> str:
        """Sha256 over all weights."""

    def parameters(self) -> Iterator[Tensor]:
        """All weights; the first says which device is used."""

    def __call__(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, 256, h, w)."""


@dataclass(frozen=True)
class FeatureSpec:
    """Everything but the image and the view that an entry's content depends on."""

    backbone_digest: str
    image_size: int
    embedding_size: int
    pixel_norm: PixelNorm
    detail_size: int
    precision: Precision

    @classmethod
    def of(cls, backbone: Encoder, *, detail_size: int, precision: Precision) -> Self:
        """Describe the features a backbone gives."""
        return cls(
            backbone_digest=backbone.digest(),
            image_size=backbone.image_size,
            embedding_size=backbone.embedding_size,
            pixel_norm=backbone.pixel_norm,
            detail_size=detail_size,
            precision=precision,
        )

    @property
    def entry_bytes(self) -> int:
        """Size of one entry on disk, at most."""
        return EMBEDDING_CHANNELS * self.embedding_size**2 * 2 + 3 * self.detail_size**2 + _HEADER_BYTES

    def key(self, image_digest: str, view: str) -> str:
        """Name of the entry for an image (by its digest) in a view."""
        parts = [FINGERPRINT, "float16", image_digest, view, *(str(value) for value in asdict(self).values())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class EncodeReport:
    """What ``encode_samples`` did.

    Attributes:
        found: samples asked for.
        used: samples that have features now.
        skipped: number of samples left out, by reason.
        views: the views that have features now; fewer than asked for where the cache limit did not allow them.
        encoded: entries computed.
        reused: entries that were there.
        seconds: wall time.
    """

    found: int
    used: int
    views: tuple[str, ...]
    encoded: int
    reused: int
    seconds: float
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One entry to compute."""

    key: str
    sample: Sample
    image_digest: str
    view: str


def encode_samples(
    backbone: Encoder,
    samples: Sequence[Sample],
    *,
    views: Sequence[str],
    cache: FeatureCache,
    detail_size: int,
    precision: Precision,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeReport:
    """Make sure that each sample has features in each view; compute only what is missing.

    Args:
        backbone: the frozen encoder; runs where its weights are.
        samples: whose images are encoded; masks are not read.
        views: see ``transforms.apply_view``. Where they exceed the cache limit, only ``identity`` is made and a
            warning is logged.
        cache: where the features go.
        detail_size: side D of the image kept beside the embeddings, in pixels.
        precision: bf16 runs the encoder under autocast.
        batch_size: images per pass. One is fastest on a CPU, where larger blocks of memory come from the system afresh
            for each layer. Every pass has exactly this many, so that a resumed run gets the same bits.
        progress: called after each pass with the number of entries computed and to compute.

    Returns:
        Counts, time and the views that exist now.

    Raises:
        ConfigError: if a view is unknown.
        DataError: if an image cannot be read or the features exceed the cache limit.
        RunError: if the disk is full. What was computed so far stays in the cache.
    """
    start = time.perf_counter()
    spec = FeatureSpec.of(backbone, detail_size=detail_size, precision=precision)
    cache.remove_stale()
    digests = {sample: image_digest(sample) for sample in samples}
    views = tuple(dict.fromkeys(views))
    jobs = _missing(spec, digests, views=views, cache=cache)
    if not _fits(jobs, spec=spec, cache=cache) and views != ("identity",):
        _logger.warning(
            "%d views of %d images need %s more, but %s of the feature cache are free: using the identity view only. "
            "For all views raise ICMOE_CACHE_LIMIT_GB or run 'icmoe-fl cache purge'.",
            *(len(views), len(digests), _gb(len(jobs) * spec.entry_bytes), _gb(_free_bytes(cache))),
        )
        views = ("identity",)
        jobs = _missing(spec, digests, views=views, cache=cache)
    _require_room(jobs, spec=spec, cache=cache)
    encoded = 0
    for first in range(0, len(jobs), batch_size):
        # Another process may have been here since.
        batch = [job for job in jobs[first : first + batch_size] if job.key not in cache]
        if batch:
            _encode_batch(backbone, batch, spec=spec, cache=cache, batch_size=batch_size, num_left=len(jobs) - first)
        encoded += len(batch)
        if progress is not None:
            progress(min(first + batch_size, len(jobs)), len(jobs))
    return EncodeReport(
        found=len(samples),
        used=len(samples),
        views=views,
        encoded=encoded,
        reused=len(digests) * len(views) - encoded,
        seconds=time.perf_counter() - start,
    )


def _missing(
    spec: FeatureSpec, digests: Mapping[Sample, str], *, views: Sequence[str], cache: FeatureCache
) -> list[_Job]:
    for view in views:
        check_view(view)
    jobs = {}
    for sample, digest in digests.items():
        for view in views:
            key = spec.key(digest, view)
            if key not in cache:
                jobs[key] = _Job(key=key, sample=sample, image_digest=digest, view=view)
    return list(jobs.values())


def _fits(jobs: Sequence[_Job], *, spec: FeatureSpec, cache: FeatureCache) -> bool:
    return not jobs or len(jobs) * spec.entry_bytes <= _free_bytes(cache)


def _free_bytes(cache: FeatureCache) -> int:
    return max(0, cache.limit_bytes - cache.info().bytes)


def _require_room(jobs: Sequence[_Job], *, spec: FeatureSpec, cache: FeatureCache) -> None:
    """Refuse before the first encoding what could not be stored after the last."""
    needed = len(jobs) * spec.entry_bytes
    if not _fits(jobs, spec=spec, cache=cache):
        raise DataError(
            f"the features of {len(jobs)} images need {_gb(needed)}, but the feature cache in {cache.root} may hold "
            f"{_gb(cache.limit_bytes)} and has {_gb(_free_bytes(cache))} free. Set ICMOE_CACHE_LIMIT_GB to a larger "
            "number, or empty the cache with 'icmoe-fl cache purge'."
        )
    if needed > shutil.disk_usage(cache.root).free:
        raise _full_disk(needed, cache=cache)
    if jobs:
        _logger.info("encoding %d views of images into %s, %s", len(jobs), cache.root, _gb(needed))


def _encode_batch(
    backbone: Encoder, batch: Sequence[_Job], *, spec: FeatureSpec, cache: FeatureCache, batch_size: int, num_left: int
) -> None:
    squares = (draw_squares(load_pixels(j.sample), spec=spec, view=j.view, seed_text=j.image_digest) for j in batch)
    images, details = zip(*squares, strict=True)
    embeddings = embed(backbone, images, precision=spec.precision, batch_size=batch_size)
    for job, one, detail in zip(batch, embeddings, details, strict=True):
        if not torch.isfinite(one).all():
            raise DataError(
                f"the backbone's features of {job.sample.image} are not finite in half precision. "
                "Look at the image: an empty or broken one is the usual cause."
            )
        try:
            cache.store(job.key, image_digest=source_digest(job.sample), embeddings=one, detail=detail)
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise _full_disk(num_left * spec.entry_bytes, cache=cache) from error
            raise RunError(f"cannot write to the feature cache {cache.root}: {error.strerror}.") from error


def draw_squares(
    pixels: npt.NDArray[np.float32], *, spec: FeatureSpec, view: str = "identity", seed_text: str = ""
) -> tuple[Tensor, Tensor]:
    """Draw an image as backbone and experts see it; training and prediction both come through here.

    Returns:
        The backbone's image (3, S, S) and the detail image (3, D, D) uint8; see ``apply_view`` for view and seed text.
    """
    image = fit_to_square(pixels, spec.image_size, pixel_norm=spec.pixel_norm)
    detail = fit_to_square(pixels, spec.detail_size, pixel_norm="minmax")
    image, detail = (apply_view(square, view, seed_text=seed_text) for square in (image, detail))
    return image, (detail * 255).round().to(torch.uint8)


def embed(backbone: Encoder, images: Sequence[Tensor], *, precision: Precision, batch_size: int) -> Tensor:
    """Encode n <= ``batch_size`` squares (3, S, S) in one pass; (n, 256, h, w) float16, on the CPU."""
    # The pass is filled up: convolutions may round differently for another number of images.
    stacked = torch.stack([*images, *[images[-1]] * (batch_size - len(images))])
    device = next(iter(backbone.parameters())).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return backbone(stacked.to(device)).to("cpu", torch.float16)[: len(images)]


def _full_disk(needed: int, *, cache: FeatureCache) -> RunError:
    return RunError(
        f"the disk of the feature cache {cache.root} is full: {_gb(needed)} more are needed, "
        f"{_gb(shutil.disk_usage(cache.root).free)} are free. Free some space there, or set ICMOE_CACHE_DIR to a "
        "folder on a larger disk, then start again: what was computed so far is kept."
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 10**9:.3g} GB"
