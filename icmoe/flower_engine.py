"""Flower's deployment engine behind one door: processes, environment, Control API, the app that travels.

Everything here may move with the next minor release of Flower, and has moved twice in a year. So all of it stands in
this module, and the module refuses to work with another release than the one it was tested with. Written against
flwr 1.41: one HTTPS port for the Fleet, Control and Runtime APIs of a SuperLink.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from icmoe import __version__
from icmoe.errors import ConfigError, ConnectError, PolicyError, RunError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

FLOWER = "1.41"
"""The only minor release this module speaks. All peers of a federation must have the same one."""

CALL_TIMEOUT = 10.0
"""Seconds for a call of the Control API; it is on this machine."""

SERVER_MODULE, CLIENT_MODULE = "icmoe_server.deployed", "icmoe_client.deployed"
SUPERNODE_MODULE = "icmoe_client.steady_line"
CLIENT_APP_COMMAND = "flwr-clientapp"
"""What a SuperNode starts for every message, looked up in its PATH."""

RunState = Literal["pending", "running", "completed", "stopped", "failed"]
Command = list[str]


def check_flower() -> None:
    """Refuse another Flower than the one this module was written for.

    Raises:
        ConfigError: naming both releases.
    """
    found = version("flwr")
    if not found.startswith(f"{FLOWER}."):
        raise ConfigError(
            f"flwr {found} is installed, but this icmoe-fl speaks flwr {FLOWER} and every peer of a federation needs "
            f"the same: pip install 'flwr>={FLOWER}.0,<{FLOWER[:-2]}{int(FLOWER[-2:]) + 1}'"
        )


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """Environment of every Flower process: quiet, offline but for its one peer, with a home of its own.

    Telemetry, update checks and the installation of dependencies are off. Loopback calls never take the proxy that
    the environment may name for calls to the outside.
    """
    never_proxied = {*filter(None, os.environ.get("NO_PROXY", "").split(",")), "127.0.0.1", "localhost"}
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": ",".join(sorted(never_proxied)),
        "no_proxy": ",".join(sorted(never_proxied)),
        "PATH": f"{_scripts()}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def superlink_command(
    *, port: int, certificate: Path, key: Path, ca_certificate: Path, database: Path, secret: Path
) -> Command:
    """The SuperLink, on loopback only: its Control API has no authentication."""
    return [
        *(_script("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(ca_certificate)),
        *("--enable-supernode-auth", "--database", str(database), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"),
    ]


def superexec_command(*, port: int, ca_certificate: Path, secret: Path, parent_pid: int) -> Command:
    """The launcher of ServerApp processes; it ends with its parent."""
    return [
        *(_script("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--root-certificates", str(ca_certificate), "--superexec-auth-secret-file", str(secret)),
        *("--parent-pid", str(parent_pid)),
    ]


def supernode_command(*, server: str, ca_certificate: Path, key: Path, site: str, port: int) -> Command:
    """A site's SuperNode, mended for lines that break. ``port`` is its Runtime API, on loopback."""
    start = f"from {SUPERNODE_MODULE} import run_supernode; run_supernode()"
    return [
        *(sys.executable, "-c", start, "flower-supernode"),
        *("--superlink", server, "--root-certificates", str(ca_certificate)),
        *("--auth-supernode-private-key", str(key), "--node-config", f'site="{site}"'),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def _scripts() -> Path:
    return Path(sys.executable).parent


def _script(name: str) -> str:
    return str(_scripts() / name)


@lru_cache(maxsize=1)
def build_app() -> bytes:
    """The app that travels: a stub of three lines that names the code installed at each end. Always the same bytes."""
    from flwr.cli.build import build_fab_from_files

    pyproject = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "icmoe-fl-app"
version = "{__version__}"
description = "Runs the installed icmoe-fl at each end"
license = "Apache-2.0"
dependencies = ["flwr>={FLOWER}"]

[tool.flwr.app]
publisher = "icmoe-fl"

[tool.flwr.app.components]
serverapp = "icmoe_fl_app.server:app"
clientapp = "icmoe_fl_app.client:app"
"""
    app, _ = build_fab_from_files(
        {
            "pyproject.toml": pyproject.encode(),
            "icmoe_fl_app/__init__.py": b'"""Stub."""\n',
            "icmoe_fl_app/server.py": f"from {SERVER_MODULE} import app as app\n".encode(),
            "icmoe_fl_app/client.py": f"from {CLIENT_MODULE} import app as app\n".encode(),
        }
    )
    return app


def app_digest() -> str:
    """Sha256 of ``build_app()``: what a site of the same version allows."""
    return hashlib.sha256(build_app()).hexdigest()


@dataclass(frozen=True)
class Node:
    """A registered SuperNode.

    Attributes:
        node_id: of Flower; stays the same for the same key.
        public_key: in Flower's form, see ``public_key_bytes``.
        online: whether its heartbeat is fresh.
        last_seen: ISO time at which it was last known to be online; ``None`` if it never was.
    """

    node_id: int
    public_key: bytes
    online: bool
    last_seen: str | None


class ControlClient:
    """The Control API of the SuperLink on this machine.

    Args:
        port: of the SuperLink.
        ca_certificate: that signed its certificate.
    """

    def __init__(self, *, port: int, ca_certificate: Path) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=False,
            root_certificates=ca_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def register(self, public_key: str, *, name: str) -> int:
        """Let a key take part.

        Args:
            public_key: OpenSSH text of an EC key.
            name: of the site, for Flower's own lists.

        Returns:
            Flower's node id.

        Raises:
            RunError: if Flower refuses, as it does for ever for a key that was unregistered once.
            ConnectError: if the SuperLink does not answer.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        request = RegisterNodeRequest(public_key=public_key_bytes(public_key), name=name)
        return int(self._call(self._client.RegisterNode, request).node_id)

    def unregister(self, node_id: int) -> None:
        """Cut a node off; its key can never come back."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        """All registered nodes."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._call(self._client.ListNodes, ListNodesRequest())
        return [
            Node(
                node_id=node.node_id,
                public_key=node.public_key,
                online=node.status == "online",
                last_seen=(found.now if node.status == "online" else node.last_deactivated_at) or None,
            )
            for node in found.nodes_info
            if node.status != "unregistered"
        ]

    def start_run(self) -> int:
        """Start a run of our app.

        Returns:
            Flower's run id.
        """
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        request = StartRunRequest(fab=Fab(hash_str=app_digest(), content=build_app()))
        reply = self._call(self._client.StartRun, request)
        if not reply.HasField("run_id"):
            raise RunError(f"Flower did not start the run: {reply.note or 'no reason given'}")
        return int(reply.run_id)

    def runs(self) -> dict[int, tuple[RunState, str]]:
        """State and detail of all runs this SuperLink knows."""
        from flwr.proto.control_pb2 import ListRunsRequest

        found = self._call(self._client.ListRuns, ListRunsRequest())
        return {run_id: (_state(run.status), run.status.details) for run_id, run in found.run_dict.items()}

    def stop_run(self, run_id: int) -> None:
        """End a run; its messages are dropped."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._call(self._client.StopRun, StopRunRequest(run_id=run_id))

    @staticmethod
    def _call(method: Callable[[Any], Any], request: object) -> Any:
        import httpx

        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise RunError(f"Flower's SuperLink refused: {error.response.text[:300]}") from error
        except httpx.HTTPError as error:
            raise ConnectError(f"Flower's SuperLink does not answer: {type(error).__name__}") from error


def _state(status: Any) -> RunState:
    if status.status == "finished":
        return {"completed": "completed", "stopped": "stopped"}.get(status.sub_status, "failed")  # type: ignore[return-value]
    return "running" if status.status == "running" else "pending"


def public_key_bytes(public_key: str) -> bytes:
    """An OpenSSH public key in the form in which Flower keeps it.

    Raises:
        ConfigError: if it is not an EC key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = serialization.load_ssh_public_key(public_key.encode())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"this is not an OpenSSH public key: {error}") from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise ConfigError("Flower needs an EC key (ecdsa-sha2-nistp384), such as icmoe-fl site init makes")
    return public_key_to_bytes(key)


def run_local_client_app(load: Callable[[], "ClientApp"], *, allowed: Mapping[str, str]) -> None:
    """Stand in for Flower's ``flwr-clientapp``: run the installed app and never the code that came with the run.

    Flower would unpack that code and import it. Its bytes are only hashed here.

    Args:
        load: imports the local app, called once the run's app is allowed.
        allowed: sha256 of allowed apps -> what they are.
    """
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    def check(content: bytes, *_: object, **__: object) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if digest not in allowed:
            raise PolicyError(f"the app {digest[:12]} is not on this site's allow-list; nothing was read")

    def loader(*_: object, **__: object) -> Callable[..., "ClientApp"]:
        return lambda *_, **__: load()

    for name in ("install_from_fab", "get_load_client_app_fn"):
        if not hasattr(runtime, name):
            raise ConfigError(f"flwr {version('flwr')} has no {name}: the guard of this site does not fit it")
    vars(runtime).update(install_from_fab=check, get_load_client_app_fn=loader)
    sys.argv[0] = CLIENT_APP_COMMAND
    flwr_clientapp()
