"""Three hospitals on 4 Mbit/s with 100 ms round trip, on lines that break in the middle of what they send.

Every party has a network of its own, so what leaves it is seen whole.
"""

import logging
import signal
import time
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.numpy import load_file

from icmoe.flower import pack_arrays

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("a", "b", "c")
MAX_SECONDS = 300
CALLS_BYTES = 100_000
"""Headers, heartbeats and looks for messages of a round, about 1 kB each."""
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def plans(cut: Any) -> dict[int, dict[str, list[Any]]]:
    """Round -> site -> breaks of its line, of 1 to 20 s, one after the other."""
    return {
        1: {
            "a": [cut("body", 1.0, after=100_000), cut("body", 20.0, after=150_000)],
            "b": [cut("answer", 5.0, after=100_000)],
            "c": [cut("instruction", 1.0)],
        },
        2: {
            "a": [cut("body", 5.0, after=100_000, shut=False)],
            "b": [cut("body", 20.0, after=200_000)],
            "c": [cut("answer", 1.0, after=50_000), cut("body", 5.0, after=100_000)],
        },
    }


@pytest.fixture(scope="module")
def finished(world: Any, plans: Any) -> dict[str, Any]:
    """The whole story once; what is asserted below is read from it."""
    federation, began = world.federation, time.monotonic()
    centre_log = world.start_centre()
    logs = {site: world.start_site(site) for site in SITES}
    centre, *sites = world.started
    told: dict[str, Any] = {"sent": {site: [] for site in SITES}}
    for server_round, plan in plans.items():
        before = {site: world.lines[site].num_up for site in SITES}
        for site, cuts in plan.items():
            world.lines[site].plan.extend(cuts)

        def is_over(number: int = server_round) -> bool:
            return len(federation.rounds()) >= number or centre.poll() is not None

        federation.wait_for(f"round {server_round}", is_over, seconds=MAX_SECONDS)
        for site in SITES:
            told["sent"][site].append(world.lines[site].num_up - before[site])
    told["exit code"] = centre.wait(MAX_SECONDS)
    told["seconds"] = time.monotonic() - began
    told["output"] = centre_log.read_text()
    for site in sites:
        site.send_signal(signal.SIGTERM)
    told["site exits"] = [site.wait(60) for site in sites]
    told["packets"] = {name: watch.packets.copy() for name, watch in world.watches.items()}
    told["missed"] = {name: watch.num_missed for name, watch in world.watches.items()}
    told["questions"] = world.names.questions.copy()
    told["logs"] = {site: log.read_text() for site, log in logs.items()}
    return told


def test_gateway_over_4_mbit_lines_with_cuts_of_1_to_20_s_completes_in_time(finished: dict[str, Any]) -> None:
    logger.info("%.0f s; bytes sent by site and round: %s", finished["seconds"], finished["sent"])
    assert finished["exit code"] == 0, finished["output"]
    assert finished["seconds"] < MAX_SECONDS


def test_gateway_over_4_mbit_lines_keeps_all_sites_in_every_round(world: Any, finished: dict[str, Any]) -> None:
    rounds = world.federation.rounds()
    assert [line["round"] for line in rounds] == [1, 2, 2]
    for line in rounds:
        assert line["answered"] == list(SITES)
        assert line["failed"] == line["missing"] == line["quarantined"] == {}
    assert finished["site exits"] == [0, 0, 0], finished["logs"]


def test_each_planned_cut_was_made(world: Any, plans: Any, finished: dict[str, Any]) -> None:
    """Or the two tests above would show nothing."""
    for site, line in world.lines.items():
        assert [cut for _, cut in line.done] == [cut for plan in plans.values() for cut in plan[site]]


def test_a_message_and_receipts_lost_on_the_way_are_noticed(world: Any, finished: dict[str, Any]) -> None:
    """What flwr alone would wait for in vain; see icmoe_client.steady_line."""
    assert "the line broke while the centre may have asked something" in world.supernode_log("c")
    assert "only its receipt was lost" in world.supernode_log("b")


def test_an_interrupted_upload_goes_on_where_it_was(world: Any, plans: Any, finished: dict[str, Any]) -> None:
    """A cut costs at most the objects under way, of which Flower sends two at a time; the others are not sent again."""
    tensors = load_file(world.federation.run_dir / "checkpoints" / "round_001" / "adapters.safetensors")
    largest = max(len(one.deflate()) for one in get_all_nested_objects(pack_arrays(tensors)).values())
    for site, rounds in finished["sent"].items():
        for (server_round, plan), sent in zip(plans.items(), rounds, strict=True):
            payload = world.federation.rounds()[server_round - 1]["bytes_up"][site]
            assert 200_000 < payload <= 1_000_000
            again = 2 * largest * len(plan[site])
            assert payload < sent < payload + again + CALLS_BYTES, (site, server_round, sent)


def test_a_site_calls_nobody_but_its_server(world: Any, finished: dict[str, Any]) -> None:
    for site, place in world.sites.items():
        seen = {(packet.kind, packet.to, packet.port) for packet in finished["packets"][site]}
        allowed = {("syn", place.ours, 8443), ("tcp", place.ours, 8443)}
        if site == world.named_site:
            allowed.add(("udp", place.ours, 53))
        assert seen == allowed, site
    assert set(finished["questions"]) == {world.server_name}
    assert set(finished["missed"].values()) == {0}


def test_the_centre_calls_nobody(world: Any, finished: dict[str, Any]) -> None:
    """All its packets go back to whoever called it; none opens a connection."""
    assert {(packet.kind, packet.to) for packet in finished["packets"]["centre"]} == {("tcp", world.centre.ours)}


def test_a_stray_look_up_and_a_stray_call_would_have_been_seen(world: Any, finished: dict[str, Any]) -> None:
    stray = (
        "import contextlib, socket\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('telemetry.example.org', 443)\n"
        "with contextlib.suppress(OSError): socket.create_connection(('192.0.2.1', 443), 0.5)\n"
    )
    for name, place in {"centre": world.centre, **world.sites}.items():
        world.run_python(place, stray)
        world.federation.wait_for("the packets", lambda name=name: len(new(world, finished, name)) >= 2, seconds=10)
        assert ("udp", place.ours, 53) in new(world, finished, name)
        assert ("syn", "192.0.2.1", 443) in new(world, finished, name)
    assert "telemetry.example.org" in world.names.questions


def new(world: Any, finished: dict[str, Any], name: str) -> set[tuple[str, str, int]]:
    """What left a place since the run ended."""
    return {tuple(packet) for packet in world.watches[name].packets - finished["packets"][name]}
