"""Kill -9 in the middle of a round, one process after the other, on real processes over real TLS."""

import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SITES = ("a", "b", "c")
VICTIMS = (
    "nothing",
    "nothing",
    "SuperLink",
    "gateway",
    "superexec",
    "ServerApp",
    "SuperNode",
    "ClientApp",
    "warm process",
    "whole site",
    "whole centre",
    "everything",
)
"""Who dies in which round, from round 1, which also waits for the sites to come and to encode their images."""
SETTINGS = f"""\
task: {{name: discs, classes: {{disc: 1}}}}
model: {{backbone: lite_medsam, width: 16, residual_rank: 2}}
train: {{local_epochs: 8, batch_size: 2, basic_every: 2}}
federation: {{num_rounds: {len(VICTIMS)}, sites: [a, b, c], round_deadline: 600}}
"""


@dataclass
class Story:
    """A federation whose processes die."""

    federation: Any
    centre: Any
    sites: dict[str, Any]
    seconds: dict[int, float]

    @classmethod
    def begin(cls, federation: Any) -> "Story":
        centre = federation.start_centre()
        return cls(federation, centre, {site: federation.start_site(site) for site in SITES}, {})

    def round(self, number: int, victim: str) -> None:
        """Let ``victim`` die while site a works on the round, and wait for the round's end."""
        begin = time.monotonic()
        self.federation.wait_for(f"work in round {number}", lambda: self._is_at_work(number))
        print(f"round {number}: kill {victim}")
        self.kill(victim)
        self.federation.wait_for(f"the end of round {number}", lambda: len(self.federation.rounds()) >= number)
        self.seconds[number] = time.monotonic() - begin

    def _is_at_work(self, number: int) -> bool:
        status = self.federation.status()
        in_round = status.get("round") == number and status.get("state") == "training"
        return in_round and self.sites["a"].find("flwr-clientapp") is not None

    def kill(self, victim: str) -> None:
        """Kill -9; what a person or a service manager must start again is started again at once."""
        match victim:
            case "SuperLink" | "gateway" | "superexec" | "ServerApp":
                command = {"gateway": "icmoe_server.gateway", "ServerApp": "flwr-serverapp"}
                self._one(self.centre, command.get(victim, f"flower-{victim.lower()}")).kill()
            case "SuperNode" | "ClientApp" | "warm process":
                command = {"SuperNode": "flower-supernode", "ClientApp": "flwr-clientapp", "warm process": "stay_warm"}
                self._one(self.sites["a"], command[victim]).kill()
            case "whole site":
                self.sites["a"].kill_all()
                self.sites["a"] = self.federation.start_site("a")
            case "whole centre":
                self.centre.kill_all()
                self.centre = self.federation.start_centre()
            case "everything":
                for running in (self.centre, *self.sites.values()):
                    running.kill_all()
                self.centre = self.federation.start_centre()
                self.sites = {site: self.federation.start_site(site) for site in SITES}

    @staticmethod
    def _one(running: Any, command: str) -> psutil.Process:
        process = running.find(command)
        assert process is not None, f"{command} is not there"
        assert isinstance(process, psutil.Process)
        return process

    def end(self) -> tuple[int, list[int]]:
        """Exit codes of the centre and of the sites."""
        code = self.centre.process.wait(300)
        for site in self.sites.values():
            site.process.send_signal(signal.SIGTERM)
        return code, [site.process.wait(60) for site in self.sites.values()]


@pytest.fixture(scope="module")
def discs(new_federation: Any) -> Any:
    return new_federation(settings=SETTINGS)


@pytest.fixture(scope="module")
def story(discs: Any) -> Story:
    story = Story.begin(discs)
    for number, victim in enumerate(VICTIMS, start=1):
        story.round(number, victim)
    return story


@pytest.fixture(scope="module")
def exits(story: Story) -> tuple[int, list[int]]:
    return story.end()


def test_every_kill_is_survived(story: Story, exits: tuple[int, list[int]]) -> None:
    assert exits == (0, [0, 0, 0]), story.centre.output
    quiet = story.seconds[2]
    print(f"{'nothing':14} {quiet:5.0f} s")
    for number, victim in enumerate(VICTIMS, start=1):
        if victim != "nothing":
            print(f"{victim:14} {story.seconds[number]:5.0f} s, {story.seconds[number] - quiet:+.0f} s")


def test_no_kill_loses_a_site_or_counts_a_round_twice(discs: Any, exits: tuple[int, list[int]]) -> None:
    *rounds, scored = discs.rounds()
    assert [line["round"] for line in rounds] == list(range(1, len(VICTIMS) + 1))
    assert scored["evaluate_only"]
    for line in rounds:
        assert line["answered"] == list(SITES)
        assert line["failed"] == line["missing"] == line["quarantined"] == {}
    assert set(discs.results()["sites"]) == set(SITES)
    assert discs.results()["not_scored"] == {}


def test_after_all_kills_the_weights_are_those_of_a_quiet_simulation(discs: Any, exits: tuple[int, list[int]]) -> None:
    out = discs.root / "simulated"
    discs.run("simulate", discs.config, "--data", discs.root / "data", "--out", out)
    real, simulated = discs.weights(len(VICTIMS)), discs.weights(len(VICTIMS), out)
    assert max(float(np.abs(real[name] - simulated[name]).max()) for name in real) <= 1e-4


def test_a_killed_site_waits_out_its_dead_session_and_says_so(story: Story, exits: tuple[int, list[int]]) -> None:
    told = [running.output for running in story.federation.started if running.log.name.startswith("a-")]
    assert any("after a crash" in output for output in told)
    assert not any("Traceback" in output for output in told)
