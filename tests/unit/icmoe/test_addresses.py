import pytest

from icmoe.addresses import check_host, split_address


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fl.example.org:8443", ("fl.example.org", 8443)),
        ("192.0.2.1:1", ("192.0.2.1", 1)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("centre_1:443", ("centre_1", 443)),
    ],
)
def test_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "fl.example.org",
        ":8443",
        "fl.example.org:",
        "fl.example.org:0",
        "fl.example.org:65536",
        "fl.example.org:84a",
        "fl.example.org:+84",
        "fl.example.org:٨٤",
        "https://fl.example.org:8443",
        "2001:db8::1:8443",
        "[fl.example.org]:8443",
        "fl..example.org:8443",
        "fl.example.org\n:8443",
        'fl"x:8443',
        "-fl:8443",
        "256.0.0.1:8443",
        "*.example.org:8443",
        "klinik-ä.example.org:8443",
    ],
)
def test_anything_else_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"needed|host name|brackets|address"):
        split_address(address)


def test_host_names_end_somewhere() -> None:
    assert check_host("a" * 63) == "a" * 63
    for name in ("a" * 64, ".".join(["a" * 60] * 5), "fl.example.org\n"):
        with pytest.raises(ValueError, match="host name"):
            check_host(name)
