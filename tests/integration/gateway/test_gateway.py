"""What passes the gateway, and what does not."""

import os
import time
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from starlette.types import Send

from icmoe_server.gateway_app import FLEET_CALLS, FLEET_PATHS, MAX_BODY_BYTES

GET_RUN = "/v1/fleet/get-run"


# What passes


def test_the_calls_are_the_fleet_calls_of_this_flower() -> None:
    ours = {("POST", path) for path in FLEET_PATHS.values()}
    assert ours == {key for key in PROTOBUF_REQUEST_TYPES if key[1].startswith("/v1/fleet/")}
    assert len(FLEET_CALLS) == 12


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_a_fleet_call_passes_whole(gateway: Any, upstream: Any, call: str) -> None:
    with gateway.client() as client:
        answer = client.post(f"/v1/fleet/{call}", content=b"\x00\xff payload")
    assert (answer.status_code, answer.content) == (200, b"echo:\x00\xff payload")
    assert [(each.method, each.path, each.body) for each in upstream.arrivals] == [
        ("POST", f"/v1/fleet/{call}", b"\x00\xff payload")
    ]


def test_only_listed_headers_pass_in_both_directions(gateway: Any, upstream: Any) -> None:
    sent = {"content-type": "application/protobuf", "accept": "application/protobuf", "flwr-public-key": "a2V5"}
    hidden = {"authorization": "x", "cookie": "x", "x-forwarded-for": "10.0.0.1", "forwarded": "x", "te": "trailers"}
    with gateway.client() as client:
        client.post(GET_RUN, content=b"1")  # its answer sets a cookie
        answer = client.post(GET_RUN, content=b"1", headers={**sent, **hidden})
    arrived = dict(upstream.arrivals[1].headers)
    own = {"host", "content-length", "connection", "accept-encoding", "user-agent"}
    assert {name: value for name, value in arrived.items() if name not in own} == sent
    assert arrived["user-agent"] == "icmoe-gateway"
    own_answer = {"date", "transfer-encoding", "content-length"}
    assert set(answer.headers) - own_answer == {"content-type", "flwr-note"}


def test_answers_carry_the_date_by_which_sites_set_their_clocks(gateway: Any) -> None:
    with gateway.client() as client:
        answers = [client.get("/health"), client.get("/nothing"), client.post(GET_RUN, content=b"1")]
    assert all(abs(parsedate_to_datetime(each.headers["date"]).timestamp() - time.time()) < 5 for each in answers)


def test_errors_of_flower_pass_as_they_are(gateway: Any, upstream: Any) -> None:
    async def refuse(send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"14")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"code": 2004}'})

    upstream.answer = refuse
    with gateway.client() as client:
        answer = client.post(GET_RUN, content=b"1")
    assert (answer.status_code, answer.json()) == (401, {"code": 2004})


def test_bodies_of_both_framings_arrive_whole_up_to_the_cap(gateway: Any, upstream: Any) -> None:
    whole = os.urandom(MAX_BODY_BYTES)
    pieces = [whole[:1000], whole[1000:5_000_000]]
    with gateway.client() as client:
        assert client.post(GET_RUN, content=whole).status_code == 200
        assert client.post(GET_RUN, content=iter(pieces)).status_code == 200
        assert client.post(GET_RUN).status_code == 200
    assert [each.body for each in upstream.arrivals] == [whole, whole[:5_000_000], b""]


def test_a_large_answer_passes(gateway: Any, upstream: Any) -> None:
    large = os.urandom(20_000_000)

    async def answer_large(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": large})

    upstream.answer = answer_large
    with gateway.client() as client:
        assert client.post(GET_RUN, content=b"1").content == large


# What does not pass

OTHER_SPELLINGS = [
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/get-run/../../control/list-nodes",
    "/v1/fleet/get-run/",
    "/v1/fleet//get-run",
    "//v1/fleet/get-run",
    "/./v1/fleet/get-run",
    "/v1/fleet/get-run;",
    "/v1/fleet/get-run;a=b",
    "/V1/fleet/get-run",
    "/v1/fleet/Get-Run",
    "/v1/fleet%2fget-run",
    "/v1%2Ffleet%2Fget-run",
    "/v1/fleet/get%2drun",
    "/v1/fleet/%67et-run",
    "/v1/fleet/get-run%00",
    "/v1/fleet/get-run%20",
    "/v1/fleet/get-run#",
    "/v1/fleet/get-run\\",
    "/v1/fleet/get-run.json",
    "/v1/fleet/get-run?a=b",
    "/v1/fleet/",
    "/v1/fleet/push-metrics",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/api/v1/fleet/get-run",
    "/docs",
    "/openapi.json",
    "/",
    "/health/",
    "/health?x",
    "/HEALTH",
    "*",
    "https://127.0.0.1/v1/fleet/get-run",
    "http://fl.example.org:80/v1/control/list-nodes",
]


@pytest.mark.parametrize("target", OTHER_SPELLINGS)
def test_any_other_spelling_is_not_found(gateway: Any, upstream: Any, target: str) -> None:
    for method in ("POST", "GET"):
        answer = gateway.raw(gateway.plain(f"{method} {target}"))
        assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert upstream.arrivals == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "post", "PROPFIND"])
def test_other_methods_are_not_allowed(gateway: Any, upstream: Any, method: str) -> None:
    answer = gateway.raw(gateway.plain(f"{method} {GET_RUN}"))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"allow: POST" in answer
    assert gateway.raw(gateway.plain("POST /health")).startswith(b"HTTP/1.1 405 ")
    assert upstream.arrivals == []


@pytest.mark.parametrize(
    "request_lines",
    [
        "POST /v1/fleet/get-run HTTP/1.1\r\nContent-Length: 0",  # no host
        "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2",
        "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: -1",
        "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked",
        "nonsense",
    ],
)
def test_what_is_not_plain_http_is_refused(gateway: Any, upstream: Any, request_lines: str) -> None:
    answer = gateway.raw(request_lines.encode() + b"\r\n\r\n")
    assert answer.split()[1] in (b"400", b"501")
    assert upstream.arrivals == []


def test_headers_that_do_not_end_are_refused(gateway: Any, upstream: Any) -> None:
    """Only what is incomplete is measured: headers that arrive whole in one read have taken their memory already."""
    answer = gateway.raw(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 20_000)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert upstream.arrivals == []


def test_http_2_is_not_found(gateway: Any, upstream: Any) -> None:
    assert gateway.raw(b"PRI * HTTP/2.0\r\nConnection: close\r\n\r\nSM\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert upstream.arrivals == []


def test_a_second_request_cannot_hide_in_a_body(gateway: Any, upstream: Any) -> None:
    hidden = gateway.plain("POST /v1/control/list-nodes")
    head = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers = gateway.raw(head + b"0\r\n\r\n" + hidden)
    assert (answers.count(b"HTTP/1.1 200 "), answers.count(b"HTTP/1.1 404 ")) == (1, 1)
    assert [(each.path, each.body) for each in upstream.arrivals] == [(GET_RUN, b"")]


@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_a_body_beyond_the_cap_is_refused_and_the_answer_arrives(gateway: Any, upstream: Any, framing: str) -> None:
    too_large = bytes(MAX_BODY_BYTES + 1)
    with gateway.client() as client:
        answer = client.post(GET_RUN, content=too_large if framing == "declared" else iter([too_large]))
        assert (answer.status_code, answer.text) == (413, "the body is larger than 16777216 bytes\n")
        assert client.post(GET_RUN, content=b"1").status_code == 200
    assert [each.body for each in upstream.arrivals] == [b"1"]
