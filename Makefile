# make demo   train a small model on shipped preference data, draw its curves, generate with it
# make test   the whole CPU test suite
# Both make their own environment in $(VENV) on first use; afterwards they need no network.

PYTHON ?= python3
VENV ?= .venv
NPROC ?= 1
LAYOUT ?= dp
LOSS ?= default
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.fastpref-ready
# With an NVIDIA driver pip takes the CUDA build of torch that fits it; otherwise the pinned CPU set-up.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),requirements/gpu-constraints.txt,requirements/cpu-constraints.txt)

.PHONY: demo test lint types env clean parity-trl

env: $(READY)

$(READY): pyproject.toml requirements/cpu-constraints.txt requirements/gpu-constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# torch first: a resolver that still has a choice downloads builds for other devices
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py --loss $(LOSS) --nproc $(NPROC) --layout $(LAYOUT) $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

parity-trl: $(READY)
	$(BIN)/python examples/parity_trl.py

clean:
	rm -rf $(VENV) runs
