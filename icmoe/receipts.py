"""Receipts: what a site writes down and signs before anything leaves, and what the centre signs when it has arrived.

A site's egress log holds one line per message, each the canonical JSON of a signed record. ``previous`` is the sha256
of the line before, and the signature covers everything but itself, so a line cannot be edited, moved or taken out
without a trace. Three kinds of line share one numbering:

* ``receipt``: a message is about to leave;
* ``torn``: the process died while it wrote a line; what it had written is kept here. Nothing left, because a message
  leaves only after its line is on disk;
* ``restored``: an operator confirmed that the lines before it were lost with a disk, and goes on behind the last line
  that the centre countersigned.

The centre sees receipts only, and not those whose message was lost: gaps between the numbers it knows are in order.
Numpy and cryptography only: both ends use this module.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from icmoe.enrolment import SiteName, UtcTime
from icmoe.errors import ExchangeError
from icmoe.exchange import Job, SiteReport
from icmoe.types import Arrays

NOTHING_BEFORE = "0" * 64
"""``previous`` of the first line."""

MAX_CHARS = 2**20
"""Of a receipt; one of a hundred tensors has 25,000."""

MAX_LINE = 2**23
"""Of any line: a torn one is kept whole, and escaping may make it six times longer."""

MAX_NUMBER = 10**7
"""Of a line; a message a minute makes as many in twenty years."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}(\.[a-z0-9]{1,16}){0,2}$")]
_UNSIGNED = "0" * 128


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SentTensor(_Record):
    """One tensor of a message. ``bytes`` and ``sha256`` are those of its values, C order, little-endian."""

    name: str = Field(pattern=r"^(experts|router)(\.[A-Za-z0-9_]+)+$", max_length=256)
    shape: tuple[Count, ...] = Field(max_length=8)
    dtype: Literal["float16", "float32"]
    bytes: Count
    norm: float = Field(ge=0.0, description="L2")
    sha256: Sha256


class Epsilon(_Record):
    """What the site's ledger says after the round: privacy spent on these data so far, over all runs."""

    value: float = Field(ge=0.0)
    delta: float = Field(gt=0.0, lt=1.0)
    accountant: Literal["rdp", "prv"]
    unit: Literal["patient", "image"]


class _Signed(_Record):
    """A record that its ``key`` has signed."""

    time: UtcTime
    site: SiteName
    key: PublicKey = Field(description="Ed25519, that of the signature")
    signature: str = Field(default=_UNSIGNED, pattern=r"^[0-9a-f]{128}$")

    def to_json(self) -> str:
        """The one text of this record."""
        return canonical(self.model_dump())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what came over the wire. The signature is not looked at.

        Raises:
            ExchangeError: if it is no such record in its one canonical form. The text holds nothing of it.
        """
        what = cls.__name__.lower()
        if not isinstance(text, str) or len(text) > MAX_CHARS:
            raise ExchangeError(f"a {what} is a text of at most {MAX_CHARS} characters; this is not")
        try:
            record = cls.model_validate_json(text)
        except ValueError as error:
            raise ExchangeError(f"the {what} is malformed; run the same icmoe-fl everywhere") from error
        if record.to_json() != text:
            raise ExchangeError(f"the {what} is not in its canonical form; run the same icmoe-fl everywhere")
        return record

    def signed_by(self, key: Ed25519PrivateKey) -> Self:
        """The same record with its signature.

        Raises:
            ValueError: if ``key`` is not the private half of the record's key.
        """
        if public_half(key) != self.key:
            raise ValueError("this key is not the one the record names")
        return self.model_copy(update={"signature": key.sign(self._content()).hex()})

    def is_genuine(self) -> bool:
        """Whether the signature is that of the record's key over the record's content."""
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key)).verify(
                bytes.fromhex(self.signature), self._content()
            )
        except (InvalidSignature, ValueError):
            return False
        return True

    def _content(self) -> bytes:
        return canonical(self.model_dump(exclude={"signature"})).encode()


class Line(_Signed):
    """What every line of an egress log has."""

    number: int = Field(ge=1, le=MAX_NUMBER)
    previous: Sha256

    @property
    def sha256(self) -> str:
        """Digest of the line's text, which the next line names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class Receipt(Line):
    """A message that is about to leave.

    Attributes:
        run: which run, as the ledger names it.
        round: of the instruction it answers.
        job: of the instruction.
        config: sha256 of the run config.
        backbone: sha256 of the frozen weights.
        tensors: by name, in order; empty where only a report leaves.
        metrics: every number of the report, see ``flat_metrics``; null where a class is absent.
        patients: trained on; null where it does not leave.
        images: trained on; null where it does not leave.
        epsilon: null without differential privacy.
    """

    kind: Literal["receipt"] = "receipt"
    run: str = Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")
    round: Count
    job: Job
    config: Sha256
    backbone: Sha256
    tensors: tuple[SentTensor, ...]
    metrics: dict[MetricName, float | None]
    patients: Count | None
    images: Count | None
    epsilon: Epsilon | None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def norm(self) -> float:
        """L2 norm over all tensors."""
        return float(sum(tensor.norm**2 for tensor in self.tensors) ** 0.5)


class TornLine(Line):
    """A line that was never finished. ``fragment`` is its bytes as latin-1, so that none is lost."""

    kind: Literal["torn"] = "torn"
    fragment: str


class RestoredLine(Line):
    """Lines were lost; ``number - 1`` is that of the last countersigned line or of the last line of the log."""

    kind: Literal["restored"] = "restored"
    lost_from: int = Field(ge=1, description="first number that is gone; equal to number if none is")
    countersigned: Sha256 = Field(description="sha256 of the countersigned line that this log lacks")


class Countersignature(_Signed):
    """The centre's word that a receipt and what it describes have arrived. It does not say that they were used."""

    kind: Literal["countersignature"] = "countersignature"
    number: int = Field(ge=1, le=MAX_NUMBER)
    sha256: Sha256 = Field(description="of the receipt's line")
    round: Count
    epsilon: float | None = Field(ge=0.0)


AnyLine = Receipt | TornLine | RestoredLine
_LINES: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: for NaN and infinity, which JSON has not.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_line(line: bytes) -> AnyLine | None:
    """Read a line of a log without its newline; ``None`` if it is none, or not in its canonical form."""
    try:
        parsed = _LINES.validate_json(line)
        return parsed if parsed.to_json().encode() == line else None
    except ValueError:
        return None


def describe_tensors(arrays: Arrays) -> tuple[SentTensor, ...]:
    """What a receipt says of tensors, ordered by name.

    Raises:
        ValueError: if one has a name or dtype that no receipt can hold.
    """
    return tuple(
        SentTensor(
            name=name,
            shape=array.shape,
            dtype=array.dtype.name,  # type: ignore[arg-type]  # pydantic refuses others
            bytes=array.nbytes,
            norm=float(np.sqrt(np.square(array.astype(np.float64)).sum())),
            sha256=hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
        )
        for name, array in sorted(arrays.items())
    )


def flat_metrics(report: SiteReport) -> dict[str, float | None]:
    """All numbers of a report under flat names.

    ``expert_shares.basic.0`` is the share of an expert, ``dice_per_class.1`` the Dice of the first foreground class,
    ``None`` where it is absent.
    """
    flat: dict[str, float | None] = {name: float(value) for name, value in report.numbers.items()}
    flat |= {f"expert_shares.{expert}": float(share) for expert, share in report.expert_shares.items()}
    for number, dice in enumerate(report.dice_per_class, start=1):
        flat[f"dice_per_class.{number}"] = None if np.isnan(dice) else float(dice)
    return flat


def public_half(key: Ed25519PrivateKey) -> str:
    """Public half of a key, hexadecimal."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def differing(receipt: Receipt, arrays: Arrays) -> Sequence[str]:
    """In which words a receipt does not describe these tensors; empty if it does.

    Norms are compared to nine digits, because another machine adds in another order; the digests are exact.
    """
    said: Mapping[str, SentTensor] = {tensor.name: tensor for tensor in receipt.tensors}
    if len(said) != len(receipt.tensors):
        return ["it names a tensor twice"]
    if set(said) != set(arrays):
        return [f"it names {len(said)} tensors, {len(arrays)} came, and their names are not the same"]
    wrong = []
    for real in describe_tensors(arrays):
        claim = said[real.name]
        exact = {"shape", "dtype", "bytes", "sha256"}
        wrong += [
            f"{real.name}: other {field}" for field in sorted(exact) if getattr(real, field) != getattr(claim, field)
        ]
        if not np.isclose(claim.norm, real.norm, rtol=1e-9, atol=0.0):
            wrong.append(f"{real.name}: other norm")
    return wrong
