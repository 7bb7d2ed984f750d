"""``icmoe-fl audit``: what left a site, and whether the log of it holds."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from icmoe.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from icmoe.audit import Audit, Problem

audit_app = typer.Typer(no_args_is_help=True, help="What left a hospital: its signed log of every message.")
LogFile = Annotated[Path, typer.Argument(help="The site's egress.jsonl, in its state folder.")]
_KEY = re.compile(r"[0-9a-f]{64}")


@audit_app.command("verify")
def verify(
    log: LogFile,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUNDIR", help="The centre's run directory: also finds a log cut off at its end."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX|FILE", help="The site's public receipt key, or its enrolment. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Find every edited, missing, moved, extra or repeated line of the log LOG.

    A log whose end was cut off looks whole; --against compares it with what the centre countersigned.

    Example: icmoe-fl audit verify state/egress.jsonl --against runs/cardiac --key hospitalA.enrolment.json
    """
    from icmoe.audit import read_witnesses, verify_log

    keys = [_public_key(one) for one in key or []]
    audit = verify_log(log, keys=keys)
    if against is not None:
        witnesses = read_witnesses(against, site=audit.sites[0] if audit.sites else None)
        audit = verify_log(log, keys=keys, against=witnesses)
    if as_json:
        typer.echo(json.dumps(_record(audit)))
    else:
        _say(audit, with_key=bool(keys), with_centre=against is not None)
    if audit.problems:
        raise PrivacyError(
            f"the log {log} does not hold: {len(audit.problems)} problem{'s' if len(audit.problems) > 1 else ''}. Keep "
            "it as it is, and compare it with a backup."
        )


@audit_app.command("show")
def show(
    log: LogFile,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page, with every tensor and number.")
    ] = None,
) -> None:
    """Show what left the hospital: one row per message of the log LOG.

    Example: icmoe-fl audit show state/egress.jsonl --html egress.html
    """
    from icmoe.audit import verify_log
    from icmoe.report.audit_page import write_audit_page

    audit = verify_log(log)
    Console().print(_table(audit))
    _say(audit, with_key=False, with_centre=False)
    if html is not None:
        typer.echo(f"Page: {write_audit_page(audit, log, html)}")


def _public_key(text: str) -> str:
    """A key given as hexadecimal digits, in a file of them, or in an enrolment.

    Raises:
        ConfigError: if it is none of these.
    """
    from icmoe.enrolment import Enrolment

    if _KEY.fullmatch(text):
        return text
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"--key takes 64 hexadecimal digits, a file of them, or an enrolment; got {text!r}.")
    content = path.read_bytes()[:128].decode("ascii", errors="replace").strip()
    return content if _KEY.fullmatch(content) else Enrolment.read(path).receipt_public_key


def _say(audit: "Audit", *, with_key: bool, with_centre: bool) -> None:
    for title, entries in (("Problem", audit.problems), ("Note", audit.notes)):
        for entry in entries:
            typer.echo(f"{title}: {entry}")
    if not audit.problems:
        last = max((line.number for line in audit.lines.values()), default=0)
        typer.echo(f"The log holds: {len(audit.receipts)} messages, {len(audit.lines)} lines, numbers 1 to {last}.")
    if not with_key:
        for key in audit.keys:
            typer.echo(f"Signed by {key}: compare it with the site's enrolment, or give --key.")
    if not with_centre:
        typer.echo("A log cut off at its end looks whole: --against RUNDIR compares it with the centre.")


def _record(audit: "Audit") -> dict[str, object]:
    def entries(problems: "tuple[Problem, ...]") -> list[dict[str, object]]:
        return [{"line": problem.line, "what": problem.what} for problem in problems]

    return {
        "holds": not audit.problems,
        "sites": audit.sites,
        "messages": len(audit.receipts),
        "lines": len(audit.lines),
        "keys": audit.keys,
        "problems": entries(audit.problems),
        "notes": entries(audit.notes),
    }


def _table(audit: "Audit") -> Table:
    from icmoe.report.audit_page import say_epsilon, say_time
    from icmoe.report.formats import format_count, format_megabytes

    table = Table(title=f"What left {', '.join(audit.sites) or 'this site'} (times in UTC)")
    for column in ("number", "time", "round", "job", "tensors", "size", "norm", "patients", "images", "epsilon"):
        table.add_column(column, justify="left" if column in ("time", "job", "epsilon") else "right")
    for receipt in audit.receipts:
        table.add_row(
            str(receipt.number), say_time(receipt.time), str(receipt.round), receipt.job, str(len(receipt.tensors)),
            format_megabytes(receipt.num_bytes), f"{receipt.norm:.3f}", format_count(receipt.patients),
            format_count(receipt.images), say_epsilon(receipt),
        )  # fmt: skip
    return table
