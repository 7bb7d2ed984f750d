"""Asks a running centre, over its Unix socket or over TCP with a certificate."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import grpc

from icmoe.addresses import split_address
from icmoe.errors import ConfigError, ConnectError, IcmoeError, NetworkError, RunError, TlsError
from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.operator_pb2_grpc import OperatorStub

START = "is the centre running? Start it with icmoe-fl server start"
TIMEOUT_SECONDS = 10.0

_OPTIONS = (
    # Operators connect directly; a hospital's HTTP proxy is for the sites' way out.
    ("grpc.enable_http_proxy", 0),
    # A centre whose machine went away says no farewell.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class TcpTarget:
    """Where a centre listens for operators, and who we are.

    Args:
        address: ``host:port``.
        ca: certificate of the centre's authority.
        cert: of the operator, signed by it.
        key: of ``cert``.
    """

    address: str
    ca: Path
    cert: Path
    key: Path


Target = Path | TcpTarget
"""A Unix socket, or TCP."""


class OperatorClient:
    """A connection to the operator service.

    Args:
        target: where.

    Raises:
        ConfigError: if the address is none or a certificate cannot be read.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        if isinstance(target, TcpTarget):
            self._channel = grpc.secure_channel(target.address, _credentials(target), options=_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(f"unix:{target.absolute()}", options=_OPTIONS)
        self._stub = OperatorStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def status(self) -> pb.RunStatus:
        """How the run stands now.

        Raises:
            NetworkError: if the centre cannot be reached or does not let us in.
        """
        with self._explained():
            reply: pb.RunStatus = self._stub.Status(pb.StatusRequest(), timeout=TIMEOUT_SECONDS)
            return reply

    def watch(self) -> Iterator[pb.Event]:
        """The rounds so far, the status, then both as they change, until the run ends.

        Raises:
            NetworkError: if the centre cannot be reached, does not let us in or goes away.
        """
        with self._explained():
            stream = self._stub.WatchRounds(pb.WatchRoundsRequest())
            try:
                yield from stream
            finally:
                stream.cancel()

    def stop(self, *, now: bool) -> pb.StopReply:
        """Ask the run to end: after the round under way, or at once.

        Raises:
            NetworkError: if the centre cannot be reached or does not let us in.
            ConfigError: if the run has ended already.
        """
        when = pb.NOW if now else pb.AFTER_ROUND
        with self._explained():
            reply: pb.StopReply = self._stub.Stop(pb.StopRequest(when=when), timeout=TIMEOUT_SECONDS)
            return reply

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._explain(error.code(), error.details() or "no details") from error

    def _explain(self, code: grpc.StatusCode, details: str) -> IcmoeError:
        if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
            return ConfigError(details)
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return RunError(f"the centre could not answer ({code.name}): {details}")
        try:
            if isinstance(self._target, TcpTarget):
                _explain_tcp(self._target, details)
            _explain_socket(self._target, details)
        except NetworkError as found:
            return found


def _credentials(target: TcpTarget) -> grpc.ChannelCredentials:
    try:
        split_address(target.address)
    except ValueError as error:
        raise ConfigError(f"--address {target.address!r}: {error}") from error
    try:
        return grpc.ssl_channel_credentials(target.ca.read_bytes(), target.key.read_bytes(), target.cert.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read a certificate: {error}; check --ca, --cert and --key") from error


def _explain_socket(path: Path, details: str) -> NoReturn:
    """Find out why nobody answers at a Unix socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(TIMEOUT_SECONDS)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConnectError(f"nobody answers at {path}: {START}, and give its folder with --dir") from error
    except PermissionError as error:
        raise ConnectError(f"{path} belongs to another user; ask as the user the centre runs as") from error
    except OSError as error:
        raise ConnectError(f"cannot reach {path}: {error}") from error
    raise ConnectError(f"the centre at {path} went away or does not answer ({details}); ask again in a minute")


def _explain_tcp(target: TcpTarget, details: str) -> NoReturn:
    """Find out why nobody answers at an address: gRPC calls a refused certificate "unavailable" too."""
    host, port = split_address(target.address)
    try:
        context = ssl.create_default_context(cafile=target.ca)
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(target.cert, target.key, password="")  # never ask for one
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(
            f"--ca, --cert or --key is damaged, or key and certificate do not belong together: {error}"
        ) from error
    try:
        with socket.create_connection((host, port), TIMEOUT_SECONDS) as connection:
            _shake_hands(context, connection, host)
    except OSError as error:
        raise ConnectError(f"nobody answers at {target.address} ({error}): {START}, with operator.tcp set") from error
    raise ConnectError(
        f"the centre at {target.address} went away or does not answer ({details}); ask again in a minute"
    )


def _shake_hands(context: ssl.SSLContext, connection: socket.socket, host: str) -> None:
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            # With TLS 1.3 the other side looks at our certificate after our handshake is over.
            if not secured.recv(1):
                raise ConnectionResetError("it closed the connection after the handshake")
    except ssl.SSLCertVerificationError as error:
        raise TlsError(
            f"the certificate of {host} is not trusted: {error.verify_message}; check --ca, the clock, and that the "
            "centre's certificate names this host"
        ) from error
    except (ssl.SSLError, ConnectionResetError) as error:
        raise TlsError(
            f"{host} refused us ({error}); --cert must be an operator certificate of this centre, and not expired"
        ) from error
