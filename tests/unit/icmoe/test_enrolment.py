import json
import os
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from icmoe.enrolment import MAX_BYTES, Enrolment, canonical_flower_key, flower_key_fingerprint, grouped, now
from icmoe.errors import ConfigError, RunError

CREATED = "2026-01-31T08:00:00+00:00"
FLOWER_KEY = (
    ec.derive_private_key(7, ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
)


def content(**changes: Any) -> dict[str, Any]:
    return {
        "site": "hospitalA",
        "flower_public_key": FLOWER_KEY,
        "receipt_public_key": "0f" * 32,
        "icmoe_version": "0.1.0",
        "flwr_version": "1.41.0",
        "created": CREATED,
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "hospitalA.enrolment.json"
    path.write_text(json.dumps(content(**changes)), encoding="utf-8")
    return path


def openssh(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return text.decode()


def test_it_travels(tmp_path: Path) -> None:
    enrolment = Enrolment(**content(created=now()))
    enrolment.write(tmp_path / "hospitalA.enrolment.json")
    assert Enrolment.read(tmp_path / "hospitalA.enrolment.json") == enrolment
    assert [path.name for path in tmp_path.iterdir()] == ["hospitalA.enrolment.json"]


def test_a_comment_does_not_make_another_key(tmp_path: Path) -> None:
    read = Enrolment.read(written(tmp_path, flower_public_key=f"{FLOWER_KEY} root@pacs-01\n"))
    assert read.flower_public_key == FLOWER_KEY
    assert read.fingerprint == Enrolment(**content()).fingerprint


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_the_fingerprint_is_the_one_of_openssh(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", str(key)], check=True, capture_output=True, text=True).stdout
    base64 = shown.split()[1].removeprefix("SHA256:")
    text = canonical_flower_key(key.with_suffix(".pub").read_text())
    assert bytes.fromhex(flower_key_fingerprint(text)) == b64decode(base64 + "=")


def test_fingerprints_are_read_aloud_in_groups() -> None:
    assert grouped("0123456789ab") == "0123 4567 89ab"


@pytest.mark.parametrize(
    "site", ["", ".", "..", "a/b", "a b", "-yes", "a\n", "ä", "a" * 65, "a.yaml", "a\x00", 7, None]
)
def test_other_site_names_are_refused(tmp_path: Path, site: object) -> None:
    with pytest.raises(ConfigError, match=r"  site: "):
        Enrolment.read(written(tmp_path, site=site))


@pytest.mark.parametrize("site", ["A", "_", "7", "hospital-A_2", "a" * 64])
def test_site_names_that_are_fine(tmp_path: Path, site: str) -> None:
    assert Enrolment.read(written(tmp_path, site=site)).site == site


WRONG_KEYS = {
    "nothing": "",
    "words": "not a key",
    "cut": FLOWER_KEY[:80],
    "bit flipped": FLOWER_KEY[:-6] + "AAAAAA",
    "other curve": openssh(ec.generate_private_key(ec.SECP256R1())),
    "ed25519": openssh(ed25519.Ed25519PrivateKey.generate()),
    "rsa": openssh(rsa.generate_private_key(65537, 2048)),
    "two keys": f"{FLOWER_KEY}\n{openssh(ec.derive_private_key(8, ec.SECP384R1()))}",
    "unknown kind": "ssh-dss AAAA",
    "not ascii": FLOWER_KEY.replace("A", "Ä"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_flower_keys_are_really_parsed(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"flower_public_key: .*(OpenSSH public key|P-384)"):
        Enrolment.read(written(tmp_path, flower_public_key=WRONG_KEYS[name]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("receipt_public_key", "0F" * 32),
        ("receipt_public_key", "0f" * 31),
        ("icmoe_version", "[red]1"),
        ("flwr_version", ""),
        ("created", "yesterday"),
        ("created", "2026-01-31T08:00:00"),
        ("created", "2026-01-31T08:00:00+02:00"),
        ("extra", "value"),
    ],
)
def test_every_field_is_checked(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"  {field}: "):
        Enrolment.read(written(tmp_path, **{field: value}))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({key: value for key, value in content().items() if key != "receipt_public_key"}))
    with pytest.raises(ConfigError, match="receipt_public_key: Field required"):
        Enrolment.read(path)


def test_a_private_key_that_was_sent_by_mistake_is_not_shown(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    path = tmp_path / "hospitalA"
    path.write_text(text)
    for wrong in (path, written(tmp_path, flower_public_key=text)):
        with pytest.raises(ConfigError, match="must never leave its hospital") as caught:
            Enrolment.read(wrong)
        assert text.splitlines()[1] not in str(caught.value)


def test_a_strangers_words_do_not_steer_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Enrolment.read(written(tmp_path, **{"\x1b]0;gone\x07": 1, "site": "\x1b[2J"}))
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)


def test_large_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"larger than {MAX_BYTES} bytes"):
        Enrolment.read(written(tmp_path, site="a" * MAX_BYTES))
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="larger"):
        Enrolment.read(endless)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "absent", Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"there is no file|cannot read"):
            Enrolment.read(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b'"x"', b"\xff\xfe{}", b"[" * 5000, b"\x00" * 100])
def test_damaged_files_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="enrolment"):
        Enrolment.read(path)


@given(position=st.integers(0, 100_000), byte=st.integers(0, 255), length=st.integers(0, 100_000))
def test_damage_anywhere_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, length: int
) -> None:
    whole = json.dumps(content()).encode()
    damaged = bytearray(whole)
    damaged[position % len(whole)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(bytes(damaged)[: length % len(whole) + 1])
    try:
        read = Enrolment.read(path)
    except ConfigError:
        return
    assert read.flower_public_key == canonical_flower_key(read.flower_public_key)


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write the enrolment"):
        Enrolment(**content()).write(tmp_path / "file" / "x.json")
