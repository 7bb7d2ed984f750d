"""The site's egress log: a line on disk before anything leaves. Signed by the site's receipt key, chained by digest."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from icmoe.checkpoint import write_text
from icmoe.enrolment import now
from icmoe.errors import ConfigError, ExchangeError, PrivacyError, RunError
from icmoe.exchange import Job, SiteReport
from icmoe.receipts import (
    MAX_CHARS,
    MAX_LINE,
    NOTHING_BEFORE,
    AnyLine,
    Countersignature,
    Epsilon,
    Line,
    Receipt,
    RestoredLine,
    TornLine,
    describe_tensors,
    flat_metrics,
    parse_line,
    public_half,
)
from icmoe.types import Arrays
from icmoe_client.log_file import LogFile
from icmoe_client.site_keys import receipt_public_key

LOG, COUNTERSIGNED = "egress.jsonl", "countersigned.json"
_HAS_EPSILON = b'"epsilon":{'
_Line = TypeVar("_Line", bound=Line)


class EgressLog:
    """Append-only. Two processes of a site may use it at once.

    Args:
        path: of the log; what the centre countersigned last is kept beside it.
        key: the site's receipt key.
        site: its name.

    Raises:
        ConfigError: if the key cannot be used.
    """

    def __init__(self, path: Path, *, key: Path, site: str) -> None:
        self._file = LogFile(path)
        self._key = _private_key(key)
        self._site = site
        self._countersigned = path.with_name(COUNTERSIGNED)

    def append(
        self,
        report: SiteReport,
        arrays: Arrays | None,
        *,
        run: str,
        job: Job,
        patients: int | None,
        images: int | None,
        epsilon: Epsilon | None,
    ) -> Receipt:
        """Write and sign what is about to leave. It is on disk when this returns; only then may it leave.

        Args:
            report: as ``release`` gave it.
            arrays: likewise; ``None`` where only the report leaves.
            run: as the ledger names it.
            job: of the instruction.
            patients: trained on; ``None`` where that may not leave.
            images: likewise.
            epsilon: after this round.

        Raises:
            PrivacyError: if the log is damaged or older than what the centre countersigned.
            RunError: if it cannot be written.
        """
        with self._file.locked():
            self._set_torn_line_aside()
            last = self._last()
            self._refuse_if_behind(last)
            receipt = self._signed(
                Receipt,
                last,
                run=run,
                round=report.server_round,
                job=job,
                config=report.config_digest,
                backbone=report.backbone_digest,
                tensors=describe_tensors(arrays or {}),
                metrics=flat_metrics(report),
                patients=patients,
                images=images,
                epsilon=epsilon,
            )
            if len(receipt.to_json()) > MAX_CHARS:
                raise PrivacyError("the receipt would be longer than the centre accepts; nothing was sent")
            self._file.append(receipt.to_json())
        return receipt

    def head(self) -> AnyLine | None:
        """The last whole line; ``None`` in an empty log.

        Raises:
            PrivacyError: if it is damaged.
        """
        return self._last()

    def countersigned(self) -> Countersignature | None:
        """What the centre countersigned last.

        Raises:
            PrivacyError: if the file is damaged.
        """
        try:
            known = Countersignature.from_json(self._countersigned.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ExchangeError) as error:
            raise PrivacyError(
                f"this site cannot read {COUNTERSIGNED} in its state folder; the site restores it from a backup"
            ) from error
        return known

    def acknowledge(self, countersignature: Countersignature) -> None:
        """Keep what the centre countersigned, and make sure that this log has that line.

        Raises:
            PrivacyError: if the log lacks the line: it was restored from a backup, or cut; or if the centre signs with
                another key than before. Words that may go to the centre.
        """
        with self._file.locked():
            known = self.countersigned()
            if countersignature.site != self._site or not countersignature.is_genuine():
                raise PrivacyError("the centre's countersignature is not one for this site, or its signature is wrong")
            if known is not None and known.key != countersignature.key:
                raise PrivacyError(
                    "the centre countersigns with another key than before. If the centre made a new one, the site "
                    f"removes {COUNTERSIGNED} from its state folder."
                )
            if known is None or countersignature.number > known.number:
                self._keep(countersignature)
        newest = known if known is not None and known.number > countersignature.number else countersignature
        self._refuse_unless_held(newest.sha256)

    def highest_epsilons(self) -> tuple[Epsilon, ...]:
        """The most that receipts say was spent, for each delta that was ever used.

        Raises:
            PrivacyError: if a line is damaged.
        """
        highest: dict[float, Epsilon] = {}
        for content in self._file.lines()[:-1]:
            if _HAS_EPSILON not in content:
                continue
            line = parse_line(content)
            if not isinstance(line, Receipt) or line.epsilon is None or not line.is_genuine():
                raise PrivacyError("a line of this site's egress log is damaged; 'icmoe-fl audit verify' tells which")
            epsilon = line.epsilon
            if epsilon.delta not in highest or epsilon.value > highest[epsilon.delta].value:
                highest[epsilon.delta] = epsilon
        return tuple(highest.values())

    def go_on_after_loss(self) -> RestoredLine:
        """Continue behind the line that the centre countersigned last, after an operator confirmed the loss.

        Raises:
            ConfigError: if nothing is lost.
            PrivacyError: if the log is damaged.
            RunError: if it cannot be written.
        """
        with self._file.locked():
            self._set_torn_line_aside()
            known, last = self.countersigned(), self._last()
            if known is None or self._holds(known.sha256):
                raise ConfigError(
                    "the egress log holds everything the centre countersigned; there is nothing to confirm."
                )
            number = last.number if last is not None else 0
            behind = known.number > number
            line = RestoredLine(
                number=max(known.number, number) + 1,
                previous=known.sha256 if behind or last is None else last.sha256,
                time=now(),
                site=self._site,
                key=public_half(self._key),
                lost_from=number + 1,
                countersigned=known.sha256,
            ).signed_by(self._key)
            self._file.append(line.to_json())
        return line

    def _keep(self, countersignature: Countersignature) -> None:
        try:
            write_text(self._countersigned, countersignature.to_json())
        except OSError as error:
            raise RunError(f"cannot write {self._countersigned}: {error.strerror}. Free some space.") from error

    def _signed(self, kind: type[_Line], last: Line | None, **content: Any) -> _Line:
        return kind(
            number=1 if last is None else last.number + 1,
            previous=NOTHING_BEFORE if last is None else last.sha256,
            time=now(),
            site=self._site,
            key=public_half(self._key),
            **content,
        ).signed_by(self._key)

    def _last(self) -> AnyLine | None:
        text = self._file.last_line(at_most=2 * MAX_LINE)
        if text is None:
            return None
        line = parse_line(text)
        if line is None or line.site != self._site or not line.is_genuine():
            raise PrivacyError(
                "the last line of this site's egress log is damaged, so nothing may leave. At the site: "
                f"'icmoe-fl audit verify' on {LOG} says what is wrong; a whole copy of it helps."
            )
        return line

    def _refuse_if_behind(self, last: Line | None) -> None:
        known = self.countersigned()
        if known is not None and known.number > (0 if last is None else last.number):
            self._refuse_unless_held(known.sha256)

    def _refuse_unless_held(self, sha256: str) -> None:
        if not self._holds(sha256):
            raise PrivacyError(
                "this site's egress log lacks a line that the centre has countersigned, as after restoring an old "
                "backup. Nothing leaves until an operator at the site has run 'icmoe-fl privacy confirm'."
            )

    def _holds(self, sha256: str) -> bool:
        """Whether a line of this digest is in the log, or its loss was confirmed."""
        for content in self._file.lines():
            if hashlib.sha256(content).hexdigest() == sha256:
                return True
            # Reading every line of a long log at every message would take seconds.
            line = parse_line(content) if sha256.encode() in content else None
            if isinstance(line, RestoredLine) and line.countersigned == sha256:
                return True
        return False

    def _set_torn_line_aside(self) -> None:
        """Make what a killed process left of a line the content of a whole one."""
        fragment = self._file.torn_line(at_most=2 * MAX_LINE)
        if not fragment:
            return
        if len(fragment) > MAX_CHARS:
            raise PrivacyError(
                f"this site's egress log ends in no line of ours; 'icmoe-fl audit verify' on {LOG} tells more"
            )
        torn = self._signed(TornLine, self._last(), fragment=fragment.decode("latin-1"))
        self._file.replace_torn_line(torn.to_json())


def _private_key(path: Path) -> Ed25519PrivateKey:
    receipt_public_key(path)  # refuses a key that others may read, or of another kind
    content = path.read_bytes()
    load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
    key = load(content, password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key
