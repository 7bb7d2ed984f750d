"""Dockerfiles, compose files and Helm charts: who a process is, what it may do, what it is built from."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from icmoe import __version__

DEPLOY = Path(__file__).parents[3] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*[!e]"))
CHARTS = ("centre", "site")
UID = "10001"


def last_stage(dockerfile: Path) -> str:
    return re.split(r"^FROM ", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)[-1]


def services(name: str) -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load((DEPLOY / "compose" / name).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = loaded["services"]
    return found


def template(chart: str) -> str:
    return (DEPLOY / "helm" / chart / "templates" / f"{chart}.yaml").read_text(encoding="utf-8")


def test_there_is_one_dockerfile_per_end() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.client", "Dockerfile.server"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_image_is_slim_offline_and_not_root(dockerfile: Path) -> None:
    final = last_stage(dockerfile)

    assert "ARG BASE=python:3.11-slim\n" in dockerfile.read_text(encoding="utf-8")
    assert final.startswith("${BASE}\n")
    assert f"USER {UID}:{UID}\n" in final
    assert re.findall(r"pip install[^\n]*", final) == [
        "pip install --no-cache-dir --no-index -f /wheels 'icmoe-fl[lite]'"
    ]
    assert not re.search(r"\bapt|\bgcc|build-essential|\bADD ", final)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_wheels_are_those_of_the_constraints(dockerfile: Path) -> None:
    text = dockerfile.read_text(encoding="utf-8")

    assert "-c /own/constraints.txt" in text
    assert "COPY constraints.txt " in text
    ignored = Path(f"{dockerfile}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert "!constraints.txt" in ignored


@pytest.mark.parametrize("name", ["centre.yaml", "site.yaml", "demo.yaml"])
def test_every_service_of_compose_is_hardened(name: str) -> None:
    for service in services(name).values():
        assert service["user"] == f"{UID}:{UID}"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
        assert not service.get("network_mode")


def test_only_the_gateway_is_published() -> None:
    assert services("centre.yaml")["centre"]["ports"] == ["${ICMOE_PORT:-8443}:8443"]
    assert all("ports" not in service for name in ("site.yaml", "demo.yaml") for service in services(name).values())


def test_images_of_patients_are_mounted_read_only() -> None:
    for name in ("site.yaml", "demo.yaml"):
        mounts = [
            mount for service in services(name).values() for mount in service.get("volumes", ()) if "DATA" in mount
        ]
        assert mounts
        assert all(mount.endswith(":/data:ro") for mount in mounts)
    assert re.search(r"mountPath: /data\n\s+readOnly: true", template("site"))


def test_the_health_checks_ask_the_health_service() -> None:
    assert 'CMD ["icmoe-fl-health"]' in last_stage(DEPLOY / "Dockerfile.server")
    assert services("centre.yaml")["centre"]["healthcheck"]["test"] == ["CMD", "icmoe-fl-health"]
    assert template("centre").count("exec: {command: [icmoe-fl-health]}") == 2


@pytest.mark.parametrize("chart", CHARTS)
def test_pods_are_hardened(chart: str) -> None:
    text = template(chart)

    for line in (
        "runAsNonRoot: true",
        f"runAsUser: {UID}",
        "seccompProfile: {type: RuntimeDefault}",
        "automountServiceAccountToken: false",
        "fsGroupChangePolicy: OnRootMismatch",
        "capabilities: {drop: [ALL]}",
        "readOnlyRootFilesystem: true",
        "allowPrivilegeEscalation: false",
        "policyTypes: [Ingress, Egress]",
    ):
        assert line in text, line
    assert "securityContext: *container" in text


def test_the_network_policies_leave_one_way() -> None:
    assert "egress: []" in template("centre")
    egress = template("site").split("egress:\n")[1]
    assert "ingress: []" in template("site")
    assert egress.count("- to:") == 2
    assert ".Values.server.cidr" in egress
    assert "port: 53" in egress


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_and_images_carry_the_packages_version(chart: str) -> None:
    meta = yaml.safe_load((DEPLOY / "helm" / chart / "Chart.yaml").read_text(encoding="utf-8"))

    assert meta["version"] == meta["appVersion"] == __version__
    for name in ("centre.yaml", "site.yaml"):
        (service,) = services(name).values()
        assert service["image"].endswith(f":${{ICMOE_VERSION:-{__version__}}}")
