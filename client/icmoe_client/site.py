"""What belongs to a hospital and is never sent: where its images are, what its machine can do."""

from dataclasses import dataclass, field
from pathlib import Path

from icmoe.data.manifest import Sample
from icmoe_client.site_file import SitePolicy


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
        source_digests: sha256 of each sample's image file or series, in order, as the data check found them; ``None``
            reads the files.
        num_examples: weight in the average that the site file fixes; ``None`` is the number of training images.
        policy: what may be asked of it, and what may leave.
        ledger: the privacy ledger; ``None`` is ``ledger.sqlite`` in ``state_dir``.
        receipt_key: signs a receipt of every message; ``None``, in simulations only, writes none.
        simulated: noise may then come from the run's seed, so that a run can be repeated, and protects nobody.
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
    source_digests: tuple[str, ...] | None = None
    num_examples: int | None = None
    policy: SitePolicy = field(default_factory=SitePolicy)
    ledger: Path | None = None
    receipt_key: Path | None = None
    simulated: bool = False
