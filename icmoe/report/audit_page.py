"""An egress log as a page for a person: what left, when, and whether the log holds."""

from pathlib import Path

from icmoe.audit import Audit
from icmoe.receipts import Receipt
from icmoe.report.pages import render, replace_text

MAX_DETAILED = 200
"""Messages whose tensors are listed; a hundred tensors make 28 kB of page."""


def write_audit_page(audit: Audit, log: Path, path: Path) -> Path:
    """Write a self-contained page that loads nothing from anywhere.

    Args:
        audit: of the log.
        log: where it is, for the heading.
        path: of the page.

    Raises:
        RunError: if it cannot be written.
    """
    view = {
        "audit": audit,
        "log": log,
        "site": ", ".join(audit.sites) or "unknown",
        "receipts": [(place, line) for place, line in audit.lines.items() if isinstance(line, Receipt)],
        "num_bytes": sum(receipt.num_bytes for receipt in audit.receipts),
        "epsilon": last_epsilon(audit),
        "say_epsilon": say_epsilon,
        "say_time": say_time,
        "max_detailed": MAX_DETAILED,
    }
    return replace_text(path, render("audit.html.j2", view))


def last_epsilon(audit: Audit) -> tuple[str, str]:
    """Epsilon of the last receipt that has one, and what it speaks of."""
    known = [receipt.epsilon for receipt in audit.receipts if receipt.epsilon is not None]
    if not known:
        return "no bound", "no message had differential privacy"
    last = known[-1]
    return f"epsilon {last.value:.4g}", f"delta {last.delta:g}, per {last.unit}, {last.accountant.upper()} accounting"


def say_epsilon(receipt: Receipt) -> str:
    """``2.31 (delta 1e-05, patient)``; a dash without differential privacy."""
    epsilon = receipt.epsilon
    return "\N{EN DASH}" if epsilon is None else f"{epsilon.value:.4g} (delta {epsilon.delta:g}, {epsilon.unit})"


def say_time(time: str) -> str:
    """``2026-01-31 08:00:00``, UTC."""
    return time.replace("T", " ").partition("+")[0]
