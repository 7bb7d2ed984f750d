"""The centre's side of the receipts: compare with what arrived, countersign, keep.

What counts as arrived is countersigned, whether or not the update is used afterwards. Numbers may jump: a site also
numbers messages that never arrived, and its torn lines. They may not go back, and a number that follows the last
countersigned one must name it.

Receipts of a round are kept beside its checkpoint. The checkpoint's folder is made when the round ends, and replaced
when it is repeated, so until then they wait in a file of their own beside it: ``write``, save the checkpoint,
``settle``. A kill between any two of these loses nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from icmoe.audit import RECEIPTS, read_witnesses, witness_files
from icmoe.checkpoint import round_folder, write_lines
from icmoe.enrolment import now
from icmoe.errors import ConfigError, ExchangeError, IncompatibleUpdateError, RunError
from icmoe.exchange import Job, SiteReport
from icmoe.receipts import Countersignature, Receipt, canonical, differing, flat_metrics, public_half
from icmoe.types import Arrays
from icmoe_server.pki import write_file

KEY = "receipts.key"
"""In the centre's ``pki``."""


@dataclass(frozen=True)
class Accepted:
    """A receipt that fits what arrived.

    Attributes:
        receipt: the site's.
        countersignature: ours.
        note: what a person should know; empty if nothing.
    """

    receipt: Receipt
    countersignature: Countersignature
    note: str = ""


class ReceiptBook:
    """Receipts of a run, and per site the last one over all runs.

    Args:
        run_dir: of the run.
        key: the centre's Ed25519 key; made at first use.
        heads: file of the last countersignatures, which outlives the run.

    Raises:
        ConfigError: if the key or a file is damaged.
        RunError: if the key cannot be written.
    """

    def __init__(self, run_dir: Path, *, key: Path, heads: Path) -> None:
        self._run_dir = run_dir
        self._key = _load_or_make(key)
        self._heads_file = heads
        self._heads = _read_heads(heads)
        # A centre that was killed may have kept a receipt and not yet noted it as the last.
        for witness in read_witnesses(run_dir) if witness_files(run_dir) else []:
            self._note_head(witness.countersignature)
        for folder in (run_dir / "checkpoints").glob("round_*"):
            self.settle(int(folder.name.removeprefix("round_")))

    @property
    def public_key(self) -> str:
        """That of the countersignatures, hexadecimal."""
        return public_half(self._key)

    def countersigned(self, site: str) -> Countersignature | None:
        """What travels back to a site with its next instruction; ``None`` for a new site."""
        return self._heads.get(site)

    def accept(
        self, text: str, *, site: str, public_key: str, job: Job, report: SiteReport, arrays: Arrays | None
    ) -> Accepted:
        """Compare a receipt with what arrived, and countersign it. Nothing is written.

        Args:
            text: of the receipt.
            site: that was asked.
            public_key: its registered receipt key.
            job: it was asked for.
            report: as received.
            arrays: as received; ``None`` if none came.

        Raises:
            ExchangeError: if it is no receipt.
            IncompatibleUpdateError: if it is not that of this reply, or contradicts earlier ones.
        """
        receipt = Receipt.from_json(text)
        _check_signature(receipt, site=site, public_key=public_key)
        _check_content(receipt, job=job, report=report, arrays=arrays or {})
        last = self._heads.get(site)
        if last is not None and last.sha256 == receipt.sha256:
            return Accepted(receipt, last)
        note = _check_place(receipt, last)
        return Accepted(receipt, self._countersign(receipt), note)

    def write(self, server_round: int, accepted: Iterable[Accepted]) -> None:
        """Keep receipts of a round, on disk when this returns.

        Raises:
            RunError: if they cannot be written.
        """
        accepted = tuple(accepted)
        if not accepted:
            return
        lines = _merge([*self._kept(server_round), *map(_line, accepted)])
        try:
            write_lines(self._waiting(server_round), lines)
            for one in accepted:
                self._note_head(one.countersignature)
            heads = {site: head.model_dump() for site, head in sorted(self._heads.items())}
            write_file(self._heads_file, json.dumps(heads, indent=1).encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"cannot write the receipts of round {server_round}: {error.strerror}. Free some space; the run "
                "goes on where it stopped."
            ) from error

    def settle(self, server_round: int) -> None:
        """Move the receipts of a round beside its checkpoint, which is there by now.

        Raises:
            RunError: if they cannot be written.
        """
        waiting = self._waiting(server_round)
        if not waiting.exists():
            return
        try:
            write_lines(round_folder(self._run_dir, server_round) / RECEIPTS, _merge(self._kept(server_round)))
            waiting.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot write the receipts of round {server_round}: {error.strerror}.") from error

    def _countersign(self, receipt: Receipt) -> Countersignature:
        return Countersignature(
            site=receipt.site,
            number=receipt.number,
            sha256=receipt.sha256,
            round=receipt.round,
            epsilon=None if receipt.epsilon is None else receipt.epsilon.value,
            time=now(),
            key=self.public_key,
        ).signed_by(self._key)

    def _note_head(self, countersignature: Countersignature) -> None:
        known = self._heads.get(countersignature.site)
        if known is None or countersignature.number > known.number:
            self._heads[countersignature.site] = countersignature

    def _waiting(self, server_round: int) -> Path:
        folder = round_folder(self._run_dir, server_round)
        return folder.with_name(f".{folder.name}.{RECEIPTS}")

    def _kept(self, server_round: int) -> list[dict[str, Any]]:
        files = (round_folder(self._run_dir, server_round) / RECEIPTS, self._waiting(server_round))
        return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def _check_signature(receipt: Receipt, *, site: str, public_key: str) -> None:
    if receipt.site != site:
        raise IncompatibleUpdateError(f"the receipt is one of site {receipt.site!r}, but {site!r} was asked")
    if receipt.key != public_key:
        raise IncompatibleUpdateError(f"the receipt is signed by another key than the one {site!r} is registered with")
    if not receipt.is_genuine():
        raise IncompatibleUpdateError("the receipt's signature does not fit it")


def _check_content(receipt: Receipt, *, job: Job, report: SiteReport, arrays: Arrays) -> None:
    expected = {
        "job": job,
        "round": report.server_round,
        "config": report.config_digest,
        "backbone": report.backbone_digest,
        "metrics": flat_metrics(report),
    }
    wrong = [name for name, value in expected.items() if getattr(receipt, name) != value]
    try:
        wrong += differing(receipt, arrays)
    except ValueError:
        wrong.append("a tensor came that no receipt can describe")
    if wrong:
        raise IncompatibleUpdateError(f"the receipt is not that of this reply: {wrong[0]} ({len(wrong)} differences)")


def _check_place(receipt: Receipt, last: Countersignature | None) -> str:
    """Where the receipt stands in the site's log; a note on a gap.

    Raises:
        IncompatibleUpdateError: if the log went back, or was rewritten.
    """
    if last is None:
        return "" if receipt.number == 1 else f"its log stood at number {receipt.number} when the centre first saw it"
    if receipt.number <= last.number:
        raise IncompatibleUpdateError(
            f"the receipt has number {receipt.number}, and {last.number} was countersigned already: the site's log was "
            "restored from a backup. Its operator confirms that with 'icmoe-fl privacy confirm'."
        )
    if receipt.number == last.number + 1:
        if receipt.previous != last.sha256:
            raise IncompatibleUpdateError(
                f"the receipt does not follow number {last.number} that was countersigned: the site's log was rewritten"
            )
        return ""
    unseen = receipt.number - last.number - 1
    return f"{unseen} line{'s' if unseen > 1 else ''} of its log before number {receipt.number} never came here"


def _line(accepted: Accepted) -> dict[str, Any]:
    note = {"note": accepted.note} if accepted.note else {}
    return {
        "receipt": accepted.receipt.model_dump(),
        "countersignature": accepted.countersignature.model_dump(),
        **note,
    }


def _merge(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each receipt once, by site and number."""
    once = {line["countersignature"]["sha256"]: line for line in lines}
    return sorted(once.values(), key=lambda line: (line["receipt"]["site"], line["receipt"]["number"]))


def _read_heads(path: Path) -> dict[str, Countersignature]:
    try:
        heads = json.loads(path.read_bytes())
        return {site: Countersignature.from_json(canonical(head)) for site, head in heads.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, ExchangeError) as error:
        raise ConfigError(f"cannot read {path}; restore it from a backup of the centre folder.") from error


def _load_or_make(path: Path) -> Ed25519PrivateKey:
    if not path.exists():
        made = Ed25519PrivateKey.generate()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}.") from error
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"cannot read {path}; restore it from a backup of the centre folder.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no Ed25519 key, so it is not ours; restore it from a backup.")
    return key
