"""What belongs to a hospital and is never sent: where its images are, what its machine can do."""

from dataclasses import dataclass
from pathlib import Path

from icmoe.data.manifest import Sample


@dataclass(frozen=True)
class Site:
    """One hospital as its own process sees it.

    Attributes:
        name: as the centre knows it.
        samples: of all splits.
        state_dir: the site's own disk: tensors with local scope, logs.
        checkpoint: file of the pretrained weights; ``None`` for backbones that ship with a package.
        verify_checkpoint: compare that file with the published digest.
        device: ``auto`` takes a GPU where there is one.
        max_physical_batch_size: images that fit into memory at once; gradients accumulate up to the run's batch size.
        num_threads: CPU threads; ``None`` leaves torch's default.
        num_left_out: training images of the manifest that are not in ``samples``, because the data check found them
            damaged; counted in every report.
    """

    name: str
    samples: tuple[Sample, ...]
    state_dir: Path
    checkpoint: Path | None = None
    verify_checkpoint: bool = True
    device: str = "auto"
    max_physical_batch_size: int | None = None
    num_threads: int | None = None
    num_left_out: int = 0
