"""Keep a hospital connected: start Flower's SuperNode, understand how it ends, start it again, or explain.

Flower refuses a key for 60 s after its process was killed, with the very words it has for a key it does not know. So
the centre is asked first whether it knows the key, and a refusal after that is waited out before it is believed.
"""

import os
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

from icmoe.errors import AuthError, ConfigError
from icmoe.flower_engine import CLIENT_APP_COMMAND, flower_environment, supernode_command
from icmoe.processes import Child, told_to_end
from icmoe_client.admission import Admission
from icmoe_client.deployed import SITE_VARIABLE, warm_command, write_guard
from icmoe_client.schedule import TrainingHours, is_paused
from icmoe_client.site_file import SiteConfig

REFUSED_PATIENCE = 75.0
"""Seconds a refused key is tried again: longer than the 60 s for which Flower remembers a dead session."""
RETRY_PAUSE = 5.0
LONGEST_PAUSE = 60.0
TICK = 0.5
SAY_EVERY = 60.0

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_REFUSED = re.compile(r"\[code: 200\d\]|Failed to activate SuperNode|Failed to register")
_RECEIVING = re.compile(r"Receiving: ")
_ANSWERED = re.compile(r"Sent successfully|Failed to (send|receive) message|Ignoring (reply )?message")
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
        self._admission = Admission(site)
        self._in_doubt = False
        self._connected = False
        self._answering = False
        self._told = ""
        self._quiet_until = 0.0
        self._log = site.state_dir / "logs" / "supernode.log"
        self._environment = flower_environment(
            site.state_dir / "flwr_home", **{SITE_VARIABLE: str(site_file.absolute())}
        )
        self._environment.setdefault("ICMOE_CACHE_DIR", str(site.state_dir / "cache"))
        self._guard = write_guard(site.state_dir / "bin")
        self._environment["PATH"] = f"{self._guard}{os.pathsep}{self._environment['PATH']}"

    def run(self) -> None:
        """Stay connected until told to end.

        Raises:
            AuthError: if the centre does not know the key, or holds it as in use for longer than a dead session can
                explain.
            NetworkError: if the certificate or the clock is wrong.
        """
        with told_to_end(self._end):
            refused_since: float | None = None
            pause = RETRY_PAUSE
            while not self._ending:
                if not self._may_train():
                    time.sleep(TICK)
                    continue
                if self._is_hindered():
                    self._sleep(RETRY_PAUSE)
                    continue
                child = self._start()
                connected = self._watch(child)
                if self._ending:
                    return
                refusal = self._refusal(child)
                if connected and refusal is None:
                    refused_since, pause = None, RETRY_PAUSE
                if refusal is not None:
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since > REFUSED_PATIENCE:
                        raise refusal
                    self._tell("The centre holds this key as in use: that is so for a minute after a crash. Trying on.")
                elif self._may_train():
                    self._tell(f"The connection ended; connecting again in {pause:.0f} s. Its log is {self._log}.")
                    pause = min(LONGEST_PAUSE, pause * 2) if not connected else RETRY_PAUSE
                self._sleep(RETRY_PAUSE if refusal is not None else pause)

    def _start_warm(self) -> Child:
        log = self._log.with_name("warm.log")
        return Child("warm", warm_command(self._guard), environment=self._environment, log=log)

    def _start(self) -> Child:
        command = supernode_command(
            server=self._site.server,
            ca_certificate=self._ca_certificate,
            key=self._site.flower_key,
            site=self._site.name,
            port=_free_port(),
        )
        self._connected = self._answering = False
        return Child("supernode", command, environment=self._environment, log=self._log, on_line=self._on_line)

    def _watch(self, child: Child) -> bool:
        """Stay until the process ends, or must; whether it had been connected."""
        warm: Child | None = None
        try:
            while child.exit_code is None:
                if self._connected and warm is None:
                    warm = self._start_warm()
                if self._ending or (not self._may_train() and not self._is_busy(child)):
                    child.end()
                elif self._in_doubt:
                    self._in_doubt = self._is_hindered()
                    self._sleep(RETRY_PAUSE if self._in_doubt else TICK)
                time.sleep(TICK)
            child.wait(2.0)
        finally:
            child.end()
            if warm is not None:
                warm.end()
        return self._connected

    def _on_line(self, line: str) -> None:
        text = _COLOURS.sub("", line)
        if _NO_ANSWER.search(text):
            # The centre's, or for a moment at start and end that of a Flower process here: the words are the same.
            self._in_doubt = True
        elif _RECEIVING.search(text):
            self._answering = True
        elif _ANSWERED.search(text):
            self._answering = False
        elif "SuperNode ID" in text or "Connected to" in text:
            self._connected = True
            self._say(f"{self._site.name} is connected to {self._site.server}. Its log is {self._log}.")

    def _is_busy(self, child: Child) -> bool:
        """Whether a message is at work, or its reply is still on its way up."""
        return self._answering or _is_working(child.pid)

    def _refusal(self, child: Child) -> AuthError | None:
        if not _REFUSED.search("\n".join(child.last_lines)):
            return None
        return AuthError(
            f"{self._site.server} accepts the key of {self._site.name} but holds it as in use since more than "
            f"{REFUSED_PATIENCE:.0f} s, longer than after a crash: another process, on this machine or on one that has "
            "a copy of the key, is connected with it. End that one. If it is not yours the key is stolen: have the "
            "centre revoke it, and enrol again."
        )

    def _is_hindered(self) -> bool:
        """Whether the centre cannot be reached or does not take the key now; says so.

        Raises:
            NetworkError: if waiting does not help.
        """
        obstacle = self._admission.obstacle()
        if obstacle:
            self._tell_now_and_then(f"{obstacle} Trying on.")
        return bool(obstacle)

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

    def _tell_now_and_then(self, line: str) -> None:
        """What is new at once, what goes on once a minute."""
        if line != self._told or time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + SAY_EVERY
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
