"""The report a clinician looks at, and TensorBoard events beside it; both are made from a run directory alone."""

from icmoe.report.pages import write_report
from icmoe.report.tensorboard import write_tensorboard

__all__ = ["write_report", "write_tensorboard"]
