"""The supervisor of a centre: SuperLink, SuperExec and gateway kept alive, keys registered, the run resubmitted.

Nothing here trains or aggregates; that is the ServerApp, a process that SuperExec starts. The supervisor can be killed
at any moment and started again: the run directory and the registry are the only truth, and both are always whole.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from icmoe.checkpoint import holds_run, write_json
from icmoe.config import RunConfig
from icmoe.errors import ConfigError, ConnectError, IcmoeError, RunError
from icmoe.flower_engine import (
    ControlClient,
    check_flower,
    flower_environment,
    public_key_bytes,
    superexec_command,
    superlink_command,
)
from icmoe.locks import hold, is_held
from icmoe.processes import told_to_end
from icmoe_server.centre import Centre
from icmoe_server.children import Kept
from icmoe_server.operator.messages import ChildInfo
from icmoe_server.operator.server import serve_operator
from icmoe_server.operator.service import OperatorService
from icmoe_server.registry import NodeStatus, SiteRegistry, read_nodes
from icmoe_server.status import (
    CENTRE_VARIABLE,
    RUN_VARIABLE,
    SERVER_APP_LOG,
    note_failure,
    read_status,
    server_app_lock,
)

START_SECONDS = 60.0
TICK = 1.0
LOOK_AT_NODES_EVERY = 5.0
RUNS_ALREADY = "this centre runs already. 'icmoe-fl server status' shows it, 'icmoe-fl server stop' ends it."
MAX_FAILURES = 5
"""Flower runs that may fail one after the other without a new round."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartRequest:
    """What ``icmoe-fl server start`` was asked to do.

    Attributes:
        centre: its folder.
        run: the run config.
        config: file it came from, for the process that builds the model.
        overrides: ``KEY=VALUE`` changes to it.
        run_dir: run directory.
        checkpoint: file of the backbone's pretrained weights, where they do not ship with a package.
        verify_checkpoint: compare it with the published digest.
        say: tells a person one line.
    """

    centre: Centre
    run: RunConfig
    config: Path
    overrides: Sequence[str]
    run_dir: Path
    checkpoint: Path | None
    verify_checkpoint: bool
    say: Callable[[str], None]


class Supervisor:
    """Runs a centre until its run has ended, or until it is told to end.

    Args:
        request: what to run and where.
    """

    def __init__(self, request: StartRequest) -> None:
        self._request = request
        self._centre = request.centre
        self._ending = False
        self._failures = 0
        self._last_round = -1
        self._flower_run: int | None = None
        self._served = False
        self._looked_at_nodes = 0.0
        environment = flower_environment(
            self._centre.flwr_home, **{CENTRE_VARIABLE: str(self._centre.root), RUN_VARIABLE: str(request.run_dir)}
        )
        commands = {"superlink": self._superlink, "superexec": self._superexec, "gateway": self._gateway}
        self._children = [
            Kept(name, command, environment=environment, log=self._centre.logs / f"{name}.log")
            for name, command in commands.items()
        ]

    def run(self) -> str:
        """Bring the centre up and stay until the run has ended.

        Returns:
            The state in which it ended: ``finished`` or ``stopped``; ``interrupted`` if this process was told to end.

        Raises:
            IcmoeError: if the run failed, or cannot start.
        """
        check_flower()
        with hold(self._centre.lock, otherwise=RUNS_ALREADY), told_to_end(self._end):
            prepare_run(self._request)
            if read_status(self._request.run_dir).get("state") == "finished":
                return "finished"
            try:
                return self._supervise()
            except RunError as error:
                # Operators who watch read the reason there.
                note_failure(self._request.run_dir, str(error))
                raise
            finally:
                for child in reversed(self._children):
                    child.end()

    def _supervise(self) -> str:
        for child in self._children[:1]:
            child.start()
        self._wait_for_superlink()
        for child in self._children[1:]:
            child.start()
        operator = serve_operator(self._centre, OperatorService(self._request.run_dir, self._infos))
        try:
            self._request.say(
                f"The centre is up: sites connect to {self._centre.config.advertise}. "
                f"Expected: {', '.join(self._request.run.federation.sites)}."
            )
            while not self._ending:
                self._keep_children()
                with suppress(ConnectError), self._control() as control:
                    self._look_at_nodes(control)
                    state = self._look_at_run(control)
                    if state is not None:
                        return state
                time.sleep(TICK)
            return "interrupted"
        finally:
            operator.stop(grace=1.0).wait()

    def _keep_children(self) -> None:
        for child in self._children:
            child.keep()

    def _look_at_run(self, control: ControlClient) -> str | None:
        """Submit the run, or submit it again where it broke; the state in which it ended, if it did."""
        status = read_status(self._request.run_dir)
        state = status.get("state")
        if self._flower_run is not None and state in ("finished", "stopped"):
            return str(state)
        if self._flower_run is not None and state == "failed":
            raise RunError(str(status.get("reason")))
        flower_state, detail = control.runs().get(self._flower_run or 0, ("failed", ""))
        if self._flower_run is None:
            self._start_run(control)
        elif flower_state in ("failed", "stopped", "completed"):
            self._note_failure(int(status.get("round", 0)), detail)
            self._start_run(control)
        elif self._server_app_died():
            self._note_failure(int(status.get("round", 0)), "its process was killed")
            self._start_run(control)
        return None

    def _start_run(self, control: ControlClient) -> None:
        """Runs of a centre that was killed, or of a ServerApp that died, would still hand out work: they end first."""
        for run_id, (state, _) in control.runs().items():
            if state in ("pending", "running"):
                control.stop_run(run_id)
        self._served = False
        self._flower_run = control.start_run()

    def _server_app_died(self) -> bool:
        """Whether the ServerApp was there and is gone; Flower itself would notice after 50 s."""
        before, self._served = self._served, is_held(server_app_lock(self._request.run_dir))
        return before and not self._served

    def _note_failure(self, server_round: int, detail: str) -> None:
        """Count failures of Flower's runs; a round in between shows that trying again helps.

        Raises:
            RunError: after too many.
        """
        self._failures = self._failures + 1 if server_round <= self._last_round else 1
        self._last_round = server_round
        if self._failures >= MAX_FAILURES:
            raise RunError(
                f"the run broke {self._failures} times in a row in round {server_round}: "
                f"{detail or 'no reason given'}. "
                f"{self._centre.logs / SERVER_APP_LOG} has the details; the rounds before are kept."
            )
        logger.warning("the run broke in round %d (%s); it goes on from its last checkpoint", server_round, detail)

    def _look_at_nodes(self, control: ControlClient) -> None:
        """Make Flower follow the registry, and write down what it sees of the nodes."""
        if time.monotonic() - self._looked_at_nodes < LOOK_AT_NODES_EVERY:
            return
        self._looked_at_nodes = time.monotonic()
        nodes = {node.public_key: node for node in control.nodes()}
        try:
            sites, known = SiteRegistry(self._centre.registry).sites(), read_nodes(self._centre.nodes)
        except ConfigError as error:
            # Nobody is let in or cut off on the word of a damaged file; who takes part already goes on.
            logger.error("%s", error)
            return
        for site in sites:
            node = nodes.get(public_key_bytes(site.flower_public_key))
            try:
                if site.revoked is None and node is None:
                    node_id = control.register(site.flower_public_key, name=site.name)
                    known[site.fingerprint] = NodeStatus(node_id=str(node_id))
                    self._request.say(f"{site.name} may take part.")
                elif site.revoked is not None and node is not None:
                    control.unregister(node.node_id)
                    known.pop(site.fingerprint, None)
                    self._request.say(f"{site.name} was cut off.")
                elif node is not None:
                    old = known.get(site.fingerprint)
                    seen = node.last_seen or (old.last_seen if old else None)
                    known[site.fingerprint] = NodeStatus(node_id=str(node.node_id), last_seen=seen, online=node.online)
            except RunError as error:
                logger.error("%s: %s", site.name, error)
        write_json(self._centre.nodes, {key: status.model_dump() for key, status in known.items()})

    def _wait_for_superlink(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._ending:
            try:
                with self._control() as control:
                    control.runs()
                return
            except ConnectError as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"Flower's SuperLink does not start; see {self._centre.logs / 'superlink.log'}"
                    ) from error
            self._children[0].keep()
            time.sleep(0.2)

    def _control(self) -> ControlClient:
        return ControlClient(port=self._centre.config.superlink_port, ca_certificate=self._centre.ca_cert)

    def _infos(self) -> list[ChildInfo]:
        return [child.info for child in self._children]

    def _superlink(self) -> list[str]:
        return superlink_command(
            port=self._centre.config.superlink_port,
            certificate=self._centre.server_cert,
            key=self._centre.server_key,
            ca_certificate=self._centre.ca_cert,
            database=self._centre.database,
            secret=self._centre.superexec_secret,
        )

    def _superexec(self) -> list[str]:
        return superexec_command(
            port=self._centre.config.superlink_port,
            ca_certificate=self._centre.ca_cert,
            secret=self._centre.superexec_secret,
            parent_pid=os.getpid(),
        )

    def _gateway(self) -> list[str]:
        return [
            *(sys.executable, "-m", "icmoe_server.gateway"),
            *("--upstream", f"https://127.0.0.1:{self._centre.config.superlink_port}"),
            *("--upstream-ca", str(self._centre.ca_cert), "--bind", self._centre.config.bind),
            *("--certificate", str(self._centre.server_cert), "--key", str(self._centre.server_key)),
        ]

    def _end(self) -> None:
        self._ending = True


def prepare_run(request: StartRequest) -> None:
    """Make the run directory where there is none; the model is built in a process that may import torch.

    Raises:
        ConfigError: if the folder holds another run, or the run config names no sites.
        IcmoeError: if the model cannot be built.
    """
    if not request.run.federation.sites:
        raise ConfigError(
            "a centre needs to know whom to expect: name them in the run config, such as "
            "federation: {sites: [hospitalA, hospitalB]}, or with --set 'federation.sites=[hospitalA,hospitalB]'."
        )
    if holds_run(request.run_dir):
        stored = (request.run_dir / "config.sha256").read_text(encoding="utf-8").strip()
        if stored != request.run.digest():
            raise ConfigError(
                f"{request.run_dir} holds a run of another config. Go on with it by --config "
                f"{request.run_dir / 'config.yaml'}, or give this one a name of its own with --name."
            )
        if any((request.run_dir / "checkpoints").glob("round_*")):
            _forget_last_end(request.run_dir)
            return
    command = [sys.executable, "-m", "icmoe.first_checkpoint", str(request.config), str(request.run_dir)]
    command += [part for override in request.overrides for part in ("--set", override)]
    command += ["--checkpoint", str(request.checkpoint)] if request.checkpoint is not None else []
    command += [] if request.verify_checkpoint else ["--trust-checkpoint"]
    request.say("Building the first model, once ...")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _error_with_code(done.returncode)(done.stderr.strip()[-2000:])


def _forget_last_end(run_dir: Path) -> None:
    """A run that stopped or failed goes on now; one that finished stays finished."""
    if read_status(run_dir).get("state") in ("stopped", "failed"):
        for name in ("status.json", "stop"):
            (run_dir / name).unlink(missing_ok=True)


def _error_with_code(exit_code: int) -> type[IcmoeError]:
    return ConfigError if exit_code == ConfigError.exit_code else RunError
