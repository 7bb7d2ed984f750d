"""The nginx example lets through what the gateway lets through."""

import re
from pathlib import Path

from icmoe_server.gateway_app import FLEET_CALLS, HEALTH_PATH, MAX_BODY_BYTES

TEXT = (Path(__file__).parents[3] / "deploy" / "nginx" / "icmoe-fl.conf").read_text(encoding="utf-8")
LOCATION = re.compile(r"^\s*location (.+?) \{ (.+?) \}$", re.MULTILINE)


def test_its_locations_are_the_gateways_paths_each_exact_with_a_constant_behind_it() -> None:
    paths = [f"/v1/fleet/{call}" for call in FLEET_CALLS] + [HEALTH_PATH.decode()]
    wanted = {f"= {path}": f"proxy_pass https://icmoe_fl_superlink{path};" for path in paths}

    assert dict(LOCATION.findall(TEXT)) == {**wanted, "/": "return 404;"}
    assert TEXT.count("location ") == len(wanted) + 1 + TEXT.count("`location =`")


def test_a_request_must_be_spelled_as_the_path_is() -> None:
    pattern = re.compile(r'"~(\^POST .+?)" 0;')
    allowed = re.compile(pattern.findall(TEXT)[0])

    assert all(allowed.search(f"POST /v1/fleet/{call}") for call in FLEET_CALLS)
    for sent in (
        "/v1/fleet/%2e%2e/control/list-nodes",
        "//v1/fleet/get-run",
        "/v1/fleet/get-run?x=1",
        "/v1/fleet/./get-fab",
    ):
        assert not allowed.search(f"POST {sent}")
    assert not allowed.search("GET /v1/fleet/get-run")


def test_bodies_are_limited_and_the_upstream_is_verified_on_loopback() -> None:
    assert f"client_max_body_size {MAX_BODY_BYTES // 2**20}m;" in TEXT
    assert "proxy_ssl_verify on;" in TEXT
    assert re.findall(r"^\s*server ([\d.]+):\d+;", TEXT, re.MULTILINE) == ["127.0.0.1"]
