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
NEXT := $(abspath $(VENV))/megatron-next
# With an NVIDIA driver pip takes the CUDA build of torch that fits it; otherwise the pinned CPU set-up.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),requirements/gpu-constraints.txt,requirements/cpu-constraints.txt)

.PHONY: demo test faults test-megatron-next lint types env clean parity parity-trl

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

# The numbered faults, with what came of each.
faults: $(READY)
	$(BIN)/python tests/faults

# Every parallel layout against one process, 3 steps each; about ten minutes.
parity: $(READY)
	$(BIN)/python examples/parity_layouts.py

# The newest Megatron-Core, which declares Python 3.12 but runs on 3.11: unpacked beside the installed one.
test-megatron-next: $(READY)
	$(BIN)/pip download --quiet --no-deps --ignore-requires-python -d $(NEXT) megatron-core==0.19.2
	$(BIN)/python -m zipfile -e $(NEXT)/megatron_core-*.whl $(NEXT)/unpacked
	PYTHONPATH=$(CURDIR):$(NEXT)/unpacked $(BIN)/python -m pytest \
	  tests/trainer/test_model.py tests/trainer/test_dpo_trainer.py tests/trainer/test_platform.py
	PYTHONPATH=$(CURDIR):$(NEXT)/unpacked $(BIN)/python -m pytest tests/parallel/test_layouts.py -k "test_layout_trains and not x"

parity-trl: $(READY)
	$(BIN)/python examples/parity_trl.py

clean:
	rm -rf $(VENV) runs
