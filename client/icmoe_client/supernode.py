"""Keep a hospital connected: start Flower's SuperNode, understand how it ends, start it again, or explain.

Flower refuses a key for 60 s after its process was killed, with the very words it has for a key it does not know. So a
refusal is waited out first and believed afterwards.
"""

import os
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

from icmoe.errors import AuthError, ConfigError, NetworkError, TlsError
from icmoe.flower_engine import CLIENT_APP_COMMAND, flower_environment, supernode_command
from icmoe.processes import Child, told_to_end
from icmoe_client.deployed import SITE_VARIABLE, write_guard
from icmoe_client.schedule import TrainingHours, is_paused
from icmoe_client.site_file import SiteConfig

REFUSED_PATIENCE = 100.0
"""Seconds a refused key is tried again: longer than Flower remembers a dead session."""
RETRY_PAUSE = 5.0
LONGEST_PAUSE = 60.0
TICK = 0.5
SAY_EVERY = 60.0

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_REFUSED = re.compile(r"\[code: 200\d\]|Failed to activate SuperNode|Failed to register")
_BAD_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^(\]]+)")
_NO_ANSWER = re.compile(r"Connection attempt failed")


class SuperNode:
    """A hospital's connection, for as long as it takes part.

    Args:
        site: its settings.
        site_file: where they are; the ClientApp reads them again for each message.
        say: tells a person one line.
    """

    def __init__(self, site: SiteConfig, site_file: Path, *, say: Callable[[str], None]) -> None:
        if site.ca_certificate is None:
            raise ConfigError(
                "ca_certificate is missing in the site file: Flower trusts other authorities than this operating "
                "system does, so name the file, such as the ca.crt that 'icmoe-fl site init' fetched."
            )
        self._site = site
        self._ca_certificate = site.ca_certificate
        self._say = say
        self._ending = False
        self._told = ""
        self._quiet_until = 0.0
        self._log = site.state_dir / "logs" / "supernode.log"
        self._environment = flower_environment(
            site.state_dir / "flwr_home", **{SITE_VARIABLE: str(site_file.absolute())}
        )
        self._environment.setdefault("ICMOE_CACHE_DIR", str(site.state_dir / "cache"))
        guard = write_guard(site.state_dir / "bin")
        self._environment["PATH"] = f"{guard}{os.pathsep}{self._environment['PATH']}"

    def run(self) -> None:
        """Stay connected until told to end.

        Raises:
            AuthError: if the centre refuses the key for longer than a dead session can explain.
            TlsError: if the centre's certificate is not trusted.
        """
        with told_to_end(self._end):
            refused_since: float | None = None
            pause = RETRY_PAUSE
            while not self._ending:
                if not self._may_train():
                    time.sleep(TICK)
                    continue
                child = self._start()
                connected = self._watch(child)
                if self._ending:
                    return
                problem = self._explain(child)
                if connected:
                    refused_since, pause = None, RETRY_PAUSE
                if isinstance(problem, TlsError):
                    raise problem
                if isinstance(problem, AuthError):
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since > REFUSED_PATIENCE:
                        raise problem
                    self._tell("The centre refuses this key for now: that is so for a minute after a crash. Trying on.")
                elif self._may_train():
                    self._tell(f"The connection ended ({problem}); connecting again in {pause:.0f} s.")
                    pause = min(LONGEST_PAUSE, pause * 2) if not connected else RETRY_PAUSE
                self._sleep(RETRY_PAUSE if isinstance(problem, AuthError) else pause)

    def _start(self) -> Child:
        command = supernode_command(
            server=self._site.server,
            ca_certificate=self._ca_certificate,
            key=self._site.flower_key,
            site=self._site.name,
            port=_free_port(),
        )
        return Child("supernode", command, environment=self._environment, log=self._log, on_line=self._on_line)

    def _watch(self, child: Child) -> bool:
        """Stay until the process ends, or must; whether it had been connected."""
        try:
            while child.exit_code is None:
                if self._ending or (not self._may_train() and not _is_working(child.pid)):
                    child.end()
                time.sleep(TICK)
            child.wait(2.0)
        finally:
            child.end()
        return child.seconds_alive > 30.0

    def _on_line(self, line: str) -> None:
        text = _COLOURS.sub("", line)
        if _NO_ANSWER.search(text) and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + SAY_EVERY
            self._say(f"{self._site.server} does not answer; trying on. icmoe-fl client --check says more.")
        elif "SuperNode ID" in text or "Connected to" in text:
            self._say(f"{self._site.name} is connected to {self._site.server}. Its log is {self._log}.")

    def _explain(self, child: Child) -> NetworkError | str:
        text = _COLOURS.sub("", "\n".join(child.last_lines))
        if found := _BAD_CERTIFICATE.search(text):
            return TlsError(
                f"the certificate of {self._site.server} is not trusted: {found[1].strip()}. Nothing was sent. "
                f"Run icmoe-fl client --site {self._site.name} --check, and ask the study centre."
            )
        if _REFUSED.search(text):
            return AuthError(
                f"{self._site.server} does not accept the key of {self._site.name} since more than "
                f"{REFUSED_PATIENCE:.0f} s. Either it was not registered yet (send the enrolment file to the study "
                "centre), was revoked, or another process of this site uses it."
            )
        return next((line for line in reversed(text.splitlines()) if line.strip()), "without a word")

    def _may_train(self) -> bool:
        """Whether it is not paused and within training hours; says once when that changes."""
        hours = self._site.training_hours
        now = datetime.now(UTC)
        if is_paused(self._site):
            self._tell("Paused. icmoe-fl client --resume ends that.")
            return False
        if hours is not None and not (parsed := TrainingHours.parse(hours)).open_now(now):
            opening = parsed.next_opening(now).astimezone()
            self._tell(f"Outside training_hours ({hours}); taking part again at {opening:%Y-%m-%d %H:%M}.")
            return False
        return True

    def _tell(self, line: str) -> None:
        if line != self._told:
            self._told = line
            self._say(line)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._ending and time.monotonic() < end:
            time.sleep(TICK)

    def _end(self) -> None:
        self._ending = True


def _is_working(pid: int) -> bool:
    """Whether a SuperNode has a ClientApp at work, which is left to finish its round."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return any(CLIENT_APP_COMMAND in " ".join(child.cmdline()) for child in children)
    except psutil.Error:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
