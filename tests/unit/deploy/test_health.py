"""The probe of the containers, against a real gRPC health service on a Unix socket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

PROBE = Path(__file__).parents[3] / "deploy" / "health.py"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def servicer(tmp_path: Path) -> Iterator[health.HealthServicer]:
    (tmp_path / "state").mkdir()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{tmp_path / 'state' / 'operator.sock'}")
    server.start()
    yield servicer
    server.stop(grace=None).wait()


def probe(centre: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(PROBE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "ICMOE_CENTRE_DIR": str(centre)},
    )
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(("state", "wanted"), [(SERVING, (0, "SERVING")), (NOT_SERVING, (1, "NOT_SERVING"))])
def test_it_says_what_the_centre_says(
    servicer: health.HealthServicer, tmp_path: Path, state: int, wanted: tuple[int, str]
) -> None:
    servicer.set("icmoe.centre", state)

    assert probe(tmp_path) == wanted


def test_an_unknown_service_is_not_healthy(servicer: health.HealthServicer, tmp_path: Path) -> None:
    servicer.set("another", SERVING)

    code, said = probe(tmp_path)

    assert code == 1
    assert said.endswith("NOT_FOUND")


def test_no_centre_is_not_healthy_and_no_traceback(tmp_path: Path) -> None:
    code, said = probe(tmp_path)

    assert code == 1
    assert said.endswith("UNAVAILABLE")
