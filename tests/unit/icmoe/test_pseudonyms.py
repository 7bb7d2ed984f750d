"""The site's secret is 64 hexadecimal digits and nothing that merely reads as a number."""

from pathlib import Path

import pytest

from icmoe.data.pseudonyms import load_secret, pseudonym
from icmoe.errors import DataError

DIGITS = "0f" * 32


@pytest.mark.parametrize(
    "content",
    [
        "0x" + DIGITS[2:],
        "0x" + DIGITS,
        "+" + DIGITS[1:],
        "-" + DIGITS,
        DIGITS[:31] + "_" + DIGITS[32:],
        DIGITS[:32] + "_" + DIGITS[32:],
        DIGITS[:32] + " " + DIGITS[32:],
        DIGITS[:32] + "\n" + DIGITS[32:],
        DIGITS[1:],
        DIGITS + "0",
        DIGITS[:-1] + "g",
        DIGITS[:-1] + "٣",  # a digit, but not an ASCII one
    ],
)
def test_what_python_would_take_for_a_number_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pseudonym.key"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        load_secret(path)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("content", [DIGITS, DIGITS.upper(), DIGITS + "\n", "\t" + DIGITS + "  \r\n"])
def test_blanks_around_it_and_capitals_are_allowed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pseudonym.key"
    path.write_bytes(content.encode())
    assert load_secret(path) == bytes.fromhex(DIGITS)


def test_secret_decides_the_pseudonym() -> None:
    one, other = bytes.fromhex(DIGITS), bytes(32)
    assert pseudonym(" P1 ", secret=one) == pseudonym("P1", secret=one)
    assert pseudonym("P1", secret=one) != pseudonym("P1", secret=other)
