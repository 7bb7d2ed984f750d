"""Cached features with their labels, as training and evaluation read them.

Letters: h = w embedding grid, D side of the detail image, L side of the label square, H x W the image's own size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from icmoe.data.cache import FeatureCache
from icmoe.data.features import FeatureSpec
from icmoe.data.manifest import Sample, list_findings
from icmoe.data.readers import map_classes
from icmoe.data.sources import image_digest, load_raw_labels, load_size
from icmoe.data.transforms import apply_view_to_mask, check_view, fit_mask, restore
from icmoe.errors import MaskError
from icmoe.types import IGNORE_INDEX


@dataclass(frozen=True)
class Item:
    """One image in one view.

    Attributes:
        embeddings: (256, h, h) float32.
        detail: (3, D, D) float32 in [0, 1].
        labels: (L, L) int64 class ids; ``IGNORE_INDEX`` counts nowhere.
    """

    embeddings: Tensor
    detail: Tensor
    labels: Tensor


class SegmentationDataset(Dataset[Item]):
    """Samples whose features ``encode_samples`` has put into the cache.

    Every mask is read and checked here, so that a bad one fails before training and not in the middle of it. An empty
    mask is allowed and counted.

    Args:
        samples: of one site, or of several.
        cache: holds the features.
        features: what the features were made with.
        classes: raw mask value of class 1, 2, ...
        ignore: raw mask values that count nowhere.
        label_size: side L of the labels.

    Attributes:
        samples: as given.
        num_empty_masks: masks without a pixel of any class.

    Raises:
        DataError: if a file cannot be read.
        MaskError: if a mask has another size than its image or a value without a class. One message holds all findings.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        cache: FeatureCache,
        features: FeatureSpec,
        classes: Sequence[int],
        ignore: Sequence[int] = (),
        label_size: int,
    ) -> None:
        self.samples = tuple(samples)
        self.num_empty_masks = 0
        self._cache = cache
        self._features = features
        self._classes = tuple(classes)
        self._ignore = tuple(ignore)
        self._digests = [image_digest(sample) for sample in self.samples]
        self._sizes: list[tuple[int, int]] = []
        # At label size a mask takes 16 to 260 kB, so that all views of a site fit into memory.
        self._labels: dict[tuple[int, str], Tensor] = {}
        self._check_masks(label_size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.load(index, "identity")

    def load(self, index: int, view: str) -> Item:
        """Read an image's features and labels in a view.

        Args:
            index: position in ``samples``.
            view: one that ``encode_samples`` was asked for.

        Raises:
            ConfigError: if the view is unknown.
            DataError: if the features are not in the cache.
        """
        check_view(view)
        embeddings, detail = self._cache.load(self._features.key(self._digests[index], view))
        return Item(
            embeddings=embeddings.float(),
            detail=detail.float().div_(255),
            labels=self._labels_in_view(index, view).long(),
        )

    def original_labels(self, index: int) -> npt.NDArray[np.uint8]:
        """Read the (H, W) class ids at the image's own resolution, for metrics."""
        return self._read_labels(self.samples[index])

    def original_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of the image in pixels."""
        return self._sizes[index]

    def spacing(self, index: int) -> tuple[float, float] | None:
        """Return (row, column) millimetres per pixel at the image's own resolution, None where unknown."""
        return self.samples[index].spacing

    def restore(self, index: int, probabilities: Tensor) -> Tensor:
        """Bring (K, G, G) probabilities of the identity view to the image's own pixels, (K, H, W)."""
        return restore(probabilities, original_size=self._sizes[index])

    def _labels_in_view(self, index: int, view: str) -> Tensor:
        if (index, view) not in self._labels:
            identity = self._labels[index, "identity"]
            self._labels[index, view] = apply_view_to_mask(identity, view, seed_text=self._digests[index])
        return self._labels[index, view]

    def _check_masks(self, label_size: int) -> None:
        findings = []
        for index, sample in enumerate(self.samples):
            try:
                labels = self._read_labels(sample)
            except MaskError as error:
                findings.append(str(error))
                continue
            self._sizes.append((labels.shape[0], labels.shape[1]))
            self._labels[index, "identity"] = fit_mask(labels, label_size)
            self.num_empty_masks += not np.any((labels != 0) & (labels != IGNORE_INDEX))
        if findings:
            raise MaskError(f"{len(findings)} of {len(self.samples)} masks cannot be used:\n{list_findings(findings)}")

    def _read_labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        raw = load_raw_labels(sample)
        height, width = load_size(sample)
        if raw.shape != (height, width):
            raise MaskError(
                f"the image {sample.image} has {height} x {width} pixels (rows x columns), its mask {sample.mask} has "
                f"{raw.shape[0]} x {raw.shape[1]}. Both must have the same size."
            )
        try:
            return map_classes(raw, classes=self._classes, ignore=self._ignore)
        except MaskError as error:
            raise MaskError(f"the mask {sample.mask} {error}") from error
