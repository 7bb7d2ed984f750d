#!/usr/bin/env python3
"""Ask the centre's gRPC health service; exit 0 when all its children run, 1 otherwise.

For container probes. Kubernetes' own gRPC probe speaks neither Unix sockets nor TLS, and the operator service has
nothing else; so this small client runs inside the container.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "icmoe.centre"
TIMEOUT = 5.0  # seconds


def check(socket: Path) -> str:
    """The state the service behind ``socket`` reports, such as SERVING; or why it cannot be asked."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            return f"no answer from {socket}: {error.code().name}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> int:
    """Print the state and turn it into an exit code."""
    centre = Path(os.environ.get("ICMOE_CENTRE_DIR", "centre"))
    state = check(centre / "state" / "operator.sock")
    sys.stdout.write(f"{state}\n")
    return 0 if state == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
