# Two commands do everything on a fresh machine with Python 3.11 and make:
#
#   make demo     install into .venv, then a whole federation on the embedded example; ends with a table and a report
#   make test     install into .venv, then lint, types, import contracts and all tests
#
# Which torch. Plain `make demo` takes the registry's torch: it uses an NVIDIA GPU where there is one, and works
# without. A torch that is already there is used and never replaced. So, for a small install without GPU libraries, or
# for a build that fits an older driver: make an environment, install the torch and torchvision you want (both, from
# the same place: they must match), activate it, and run `make install`. With an active environment (VIRTUAL_ENV or
# CONDA_PREFIX) that has torch, no .venv is made; everything below then uses that environment.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
HAS_TORCH := import sys; from importlib.util import find_spec; sys.exit(find_spec("torch") is None)
ENV := $(if $(ACTIVE),$(shell '$(ACTIVE)/bin/python' -c '$(HAS_TORCH)' 2>/dev/null && echo '$(ACTIVE)'))
ENV := $(or $(ENV),.venv)
BIN := $(ENV)/bin
STAMP := $(ENV)/.installed

# The first Python that fits pyproject.toml's requires-python; looked for only when .venv is made.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3 python,$(shell $(p) -c '$(FITS)' 2>/dev/null && echo $(p))))

# Quick tests two at a time; the federations of tests/integration alone, as each of them fills both cores.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest
QUICK = $(wildcard $(addprefix tests/,unit property reference contract))

# A stamp that another checkout left in a shared environment does not count: its editable install points there.
ifneq ($(shell cat '$(STAMP)' 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# constraints.txt, but with the torch that the environment already has. Another torch may need other versions of its own
# requirements, so their pins go too.
define PINS
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

def canonical(line):
    return re.match(r"[\w.-]*", line)[0].lower().replace("_", "-")

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

pins = Path("constraints.txt").read_text().splitlines()
here = {name: found(name) for name in ("torch", "torchvision") if found(name)}
if any(f"{name}=={release.split('+')[0]}" not in pins for name, release in here.items()):
    free = {"torch", "torchvision", *map(canonical, requires("torch") if "torch" in here else ())}
    pins = [pin for pin in pins if canonical(pin) not in free]
    pins += [f"{name}=={release}" for name, release in here.items()]
print(*pins, sep="\n")
endef
export PINS

.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or 3.12 found. Install one, or name it: make PYTHON=/path/to/python' >&2; exit 2; }
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c "$$PINS" > '$(ENV)/constraints.txt'
	$(BIN)/python -m pip install -c '$(ENV)/constraints.txt' -e '.[dev,demo,export]'
	@echo '$(CURDIR)' > $@

.PHONY: help install demo loopback test lint types imports pytest unit test-system format bench ablation privacy-table privacy-attack proto wheelhouse sbom clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

install: $(STAMP) ## make .venv (or use the active environment that has torch) and install everything

demo: $(STAMP) ## the main job on the embedded example: runs/demo/report.html
	$(BIN)/icmoe-fl simulate configs/run/demo.yaml --out runs/demo --overwrite --reference local,pooled

loopback: $(STAMP) ## a real centre and three real sites on this machine, with the embedded example
	$(BIN)/python deploy/loopback.py

test: $(STAMP) ## lint, types, imports and pytest, all of them; says at the end which failed
	@failed=""; \
	for step in lint types imports pytest; do \
		echo "== $$step"; \
		$(MAKE) --no-print-directory $$step || failed="$$failed $$step"; \
	done; \
	test -z "$$failed" || { echo "make test: FAILED:$$failed" >&2; exit 1; }

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

imports: $(STAMP) ## import contracts: who may know whom
	$(BIN)/lint-imports --no-logo

pytest: $(STAMP) ## all tests; those on real images need ICMOE_TEST_DATA
	$(PYTEST) -n $(WORKERS) $(QUICK) -m 'not slow'
	$(PYTEST) -n $(WORKERS) $(QUICK) -m slow
	$(PYTEST) tests/integration

unit: $(STAMP) ## the unit tests only, within a minute
	$(PYTEST) -n $(WORKERS) tests/unit -m 'not slow'

# Under test: real processes, real TLS, kill -9.
test-system: $(STAMP) ## the network deployment: gateway under attack, a centre with three sites
	$(PYTEST) tests/system

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure what docs/performance.md reports
	$(BIN)/python benchmarks/bench.py

ablation: $(STAMP) ## measure the ablation table of docs/methods/icmoe.md; may be stopped and continued
	$(BIN)/python benchmarks/ablation.py

privacy-table: $(STAMP) ## measure Dice under privacy for docs/privacy_table.md (a night); may be stopped and continued
	$(BIN)/python benchmarks/privacy_table.py

privacy-attack: $(STAMP) ## attack models with and without privacy for docs/privacy_table.md; may be stopped and continued
	$(BIN)/python benchmarks/privacy_attack.py

proto: ## make the operator service's Python from operator.proto, in an environment of its own
	test -x build/proto/bin/python || $(or $(PYTHON),python3.11) -m venv build/proto
	build/proto/bin/python -m pip install -q 'grpcio-tools==1.70.0' 'protobuf==5.29.6'
	build/proto/bin/python -m grpc_tools.protoc -I server --python_out=server --pyi_out=server --grpc_python_out=server icmoe_server/operator/operator.proto

WHEELS ?=
wheelhouse: $(STAMP) ## dist/wheelhouse: install without internet (some GB); WHEELS=folder: own torch build wins
	rm -rf dist/wheelhouse && mkdir -p dist/wheelhouse
	$(BIN)/python -m pip wheel --wheel-dir dist/wheelhouse $(if $(WHEELS),-f '$(WHEELS)') -c constraints.txt '.[lite]'
	cp deploy/wheelhouse/install.sh dist/wheelhouse/
	cd dist/wheelhouse && sha256sum -- *.whl > SHA256SUMS

sbom: $(STAMP) ## dist/sbom: CycloneDX list and licences of what is installed
	rm -rf build/sbom && mkdir -p dist/sbom
	$(BIN)/python -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet 'cyclonedx-bom>=7,<8' 'pip-licenses>=5,<6'
	build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON --output-file dist/sbom/icmoe-fl.cdx.json '$(abspath $(BIN)/python)'
	build/sbom/bin/pip-licenses --python='$(abspath $(BIN)/python)' --format=markdown --with-urls --output-file dist/sbom/licences.md

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
