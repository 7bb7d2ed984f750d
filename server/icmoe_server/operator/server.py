"""Opens the operator service: on a Unix socket of the centre's own user, and on TCP to holders of a certificate."""

import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISSOCK
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from icmoe.errors import ConfigError, ConnectError
from icmoe_server.operator.operator_pb2_grpc import add_OperatorServicer_to_server
from icmoe_server.operator.service import MAX_WATCHERS, OperatorService

if TYPE_CHECKING:
    from icmoe_server.centre import Centre

HEALTH_SERVICES = ("", "icmoe.centre")
HEALTH_SECONDS = 0.5
MAX_SOCKET_PATH = 107
"""Bytes a Unix socket's path may have on Linux."""

_SPARE_THREADS = 8
_OPTIONS = (
    # A second server on the same port must fail, not share its calls.
    ("grpc.so_reuseport", 0),
    # Watchers ask every 30 s whether the centre is still there.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

logger = logging.getLogger(__name__)


def serve_operator(centre: "Centre", service: OperatorService) -> grpc.Server:
    """Start to answer operators.

    The Unix socket has mode 0600. Calls over TCP need a certificate of the centre's CA. Both also serve
    ``grpc.health.v1``: SERVING while all processes of the centre run.

    Args:
        centre: folder and config of the centre.
        service: what answers.

    Returns:
        The server, started. ``stop`` ends it, watchers included, and removes the socket.

    Raises:
        ConfigError: if the socket's path is too long or a certificate is missing.
        ConnectError: if another process serves at the socket or the port.
    """
    pool = ThreadPoolExecutor(MAX_WATCHERS + _SPARE_THREADS, thread_name_prefix="operator")
    server = grpc.server(pool, options=_OPTIONS)
    add_OperatorServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    _tell_health(state, service)
    if centre.config.operator.tcp is not None:
        _listen_tcp(server, centre, centre.config.operator.tcp)
    _listen_socket(server, centre.socket)
    server.start()
    threading.Thread(target=_keep_health, args=(server, state, service), name="operator-health", daemon=True).start()
    return server


def _listen_socket(server: grpc.Server, path: Path) -> None:
    """Bind a Unix socket.

    gRPC removes whatever socket is in its way, a live one too, so this looks first.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the operator socket {path} has more than the {MAX_SOCKET_PATH} bytes a socket's path may have; set "
            "operator.socket in centre.yaml to a shorter path, such as /run/icmoe-fl/operator.sock"
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_stale(path)
    # Nobody else may slip in between bind and chmod.
    before = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except RuntimeError as error:
        raise ConnectError(f"cannot open the operator socket {path}: {error}") from error
    finally:
        os.umask(before)


def _remove_stale(path: Path) -> None:
    """Remove what a killed centre left; refuse when somebody listens there.

    Raises:
        ConnectError: if somebody does, or if it is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not S_ISSOCK(mode):
        raise ConnectError(f"{path} is in the way of the operator socket and is no socket; move it elsewhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConnectError(f"cannot tell whether somebody listens at {path}: {error}") from error
    raise ConnectError(f"another centre answers at {path}; stop it first (icmoe-fl server stop), or use another --dir")


def _listen_tcp(server: grpc.Server, centre: "Centre", address: str) -> None:
    try:
        pair = (centre.server_key.read_bytes(), centre.server_cert.read_bytes())
        authority = centre.ca_cert.read_bytes()
    except OSError as error:
        raise ConfigError(f"operator.tcp needs the centre's certificates: {error}; see icmoe-fl server init") from error
    credentials = grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConnectError(
            f"cannot listen for operators at {address}: the port is taken or the certificates do not belong together; "
            f"see operator.tcp in centre.yaml ({error})"
        ) from error


def _keep_health(server: grpc.Server, state: health.HealthServicer, service: OperatorService) -> None:
    while server.wait_for_termination(HEALTH_SECONDS):  # True: not terminated yet
        _tell_health(state, service)


def _tell_health(state: health.HealthServicer, service: OperatorService) -> None:
    answer = health_pb2.HealthCheckResponse
    status = answer.SERVING if service.healthy() else answer.NOT_SERVING
    for name in HEALTH_SERVICES:
        state.set(name, status)
