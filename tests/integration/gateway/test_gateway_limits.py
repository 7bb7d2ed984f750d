"""Counting connections, memory and log lines, without a network."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import pytest

from icmoe_server.gateway_limits import BodyBudget, Connections, Peer, RefusalLog


class House:
    """Connections that are socket pairs; the far end sees whether it was evicted."""

    def __init__(self, *, total: int, per_address: int) -> None:
        self.connections = Connections(total=total, per_address=per_address)
        self._ports = count(1000)
        self._near: dict[Peer, socket.socket] = {}
        self._far: dict[Peer, socket.socket] = {}

    def enter(self, address: str) -> Peer | None:
        peer = (address, next(self._ports))
        self._near[peer], self._far[peer] = socket.socketpair()
        self._far[peer].setblocking(False)
        return peer if self.connections.admit(peer, self._near[peer]) else None

    def leave(self, peer: Peer) -> None:
        self.connections.forget(peer, self._near[peer])

    def is_open(self, peer: Peer | None) -> bool:
        assert peer is not None
        try:
            return self._far[peer].recv(1) != b""
        except BlockingIOError:
            return True

    def close(self) -> None:
        for end in (*self._near.values(), *self._far.values()):
            end.close()


@pytest.fixture
def house() -> Iterator[House]:
    house = House(total=5, per_address=3)
    yield house
    house.close()


def test_a_flood_crowds_out_its_own_oldest_connections_only(house: House) -> None:
    other = house.enter("192.0.2.1")
    flood = [house.enter("192.0.2.66") for _ in range(20)]
    assert [house.is_open(peer) for peer in flood] == [False] * 17 + [True] * 3
    assert house.is_open(other)
    assert len(house.connections) == 4


def test_a_proven_connection_survives_a_flood_from_its_own_address(house: House) -> None:
    site = house.enter("192.0.2.1")
    assert site is not None
    house.connections.prove(site)
    flood = [house.enter("192.0.2.1") for _ in range(20)]
    assert house.is_open(site)
    assert [house.is_open(peer) for peer in flood] == [False] * 18 + [True] * 2


def test_idle_connections_go_before_busy_ones(house: House) -> None:
    first, second, third = (house.enter("192.0.2.1") for _ in range(3))
    assert first is not None
    with house.connections.request(first):
        house.enter("192.0.2.1")
    assert [house.is_open(peer) for peer in (first, second, third)] == [True, False, True]


def test_a_proven_connection_is_idle_again_after_its_request(house: House) -> None:
    site = house.enter("192.0.2.1")
    assert site is not None
    house.connections.prove(site)
    with house.connections.request(site):
        pass
    others = [house.enter("192.0.2.1") for _ in range(2)]
    for other in others:
        assert other is not None
        house.connections.prove(other)
    assert house.enter("192.0.2.1") is not None
    assert not house.is_open(site)


def test_nobody_is_evicted_for_a_stranger_while_all_do_accepted_work(house: House) -> None:
    sites = [house.enter("192.0.2.1") for _ in range(3)]
    with ExitStack() as busy:
        for site in sites:
            assert site is not None
            house.connections.prove(site)
            busy.enter_context(house.connections.request(site))
        assert house.enter("192.0.2.1") is None
    assert all(house.is_open(site) for site in sites)


def test_when_all_places_are_taken_the_address_with_most_gives_one(house: House) -> None:
    crowd = [house.enter("192.0.2.66") for _ in range(3)]
    pair = [house.enter("192.0.2.2") for _ in range(2)]
    newcomer = house.enter("192.0.2.1")
    assert [house.is_open(peer) for peer in (*crowd, *pair, newcomer)] == [False, True, True, True, True, True]


def test_closed_connections_give_their_place_back(house: House) -> None:
    peers = [house.enter("192.0.2.1") for _ in range(3)]
    assert peers[1] is not None
    house.leave(peers[1])
    assert len(house.connections) == 2
    house.enter("192.0.2.1")
    assert house.is_open(peers[0])
    house.connections.prove(peers[1])  # of a connection that is gone: nothing happens
    assert len(house.connections) == 3


def test_a_body_waits_until_its_whole_size_is_free() -> None:
    async def scenario() -> list[str]:
        budget = BodyBudget(total=100, per_address=60)
        order = []

        async def body(name: str, address: str, size: int, until: asyncio.Event) -> None:
            async with budget.reserve(address, size):
                order.append(f"+{name}")
                await until.wait()
            order.append(f"-{name}")

        first_may_end, rest_may_end = asyncio.Event(), asyncio.Event()
        tasks = [
            asyncio.create_task(body("a1", "a", 60, first_may_end)),
            asyncio.create_task(body("a2", "a", 1, rest_may_end)),  # a's share is used up
            asyncio.create_task(body("b1", "b", 40, rest_may_end)),  # b's is not
            asyncio.create_task(body("c1", "c", 41, rest_may_end)),  # all is used up
        ]
        for _ in range(10):
            await asyncio.sleep(0)
        order.append("|")
        first_may_end.set()
        for _ in range(10):
            await asyncio.sleep(0)
        order.append("|")
        rest_may_end.set()
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(scenario())
    assert order[:3] == ["+a1", "+b1", "|"]
    assert order[3] == "-a1"
    assert set(order[4:6]) == {"+a2", "+c1"}
    assert order[6] == "|"


def test_a_body_that_fails_gives_its_memory_back() -> None:
    async def scenario() -> None:
        budget = BodyBudget(total=10, per_address=10)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="broke off"):
                async with budget.reserve("a", 10):
                    raise RuntimeError("broke off")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), budget.reserve("a", 10), budget.reserve("a", 1):
                raise AssertionError
        async with asyncio.timeout(1), budget.reserve("a", 10):
            pass

    asyncio.run(scenario())


def test_refusals_are_escaped_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog(logging.getLogger("test"), lines=3, window=3600)
    log.refused(("192.0.2.66", 5), "POST", b"/v1/\x1b[2J\nforged line\xff" + b"x" * 1000, "not found")
    for _ in range(9):
        log.refused(None, "M" * 100, b"/", "not found")
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith(r"refused 192.0.2.66 POST /v1/\x1b[2J\nforged line\xffxxx")
    assert first.count("x") < 220
    assert second == third == f"refused ? {'M' * 20} /: not found"


def test_hidden_refusals_are_told_in_the_next_window(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog(logging.getLogger("test"), lines=1, window=3600)
    for _ in range(8):
        log.refused(None, "GET", b"/", "not found")
    log._since -= 3601
    log.refused(None, "GET", b"/", "not found")
    assert [record.getMessage() for record in caplog.records][1] == "7 more refused requests are not shown"
