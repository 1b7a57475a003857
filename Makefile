# make demo   train a small model on shipped preference data, draw its curves, generate with it
# make test   the whole CPU test suite
# Both make their own environment in $(VENV) on first use; afterwards they need no network.

PYTHON ?= python3
VENV ?= .venv
NPROC ?= 1
LAYOUT ?= dp
LOSS ?= default
DEMO_ARGS ?=
FUZZ_SECONDS ?= 240

BIN := $(VENV)/bin
READY := $(VENV)/.fastpref-ready
# The newest Megatron-Core: it declares Python 3.12 but runs on 3.11, so it is unpacked beside the installed one.
NEXT_VERSION := 0.19.2
NEXT := $(abspath $(VENV))/megatron-$(NEXT_VERSION)
# Most tests keep one core busy, and those of ranks that hang or die wait: three processes share two cores, file by file.
TEST_WORKERS ?= 3
# What PyTorch 2.11 for CUDA brings; the CPU set-up has a newer one.
TRITON_OLD_VERSION := 3.6.0
TRITON_OLD := $(abspath $(VENV))/triton-$(TRITON_OLD_VERSION)
NEXT_TESTS := test_conftest.py trainer/ranks/test_platform.py trainer/model/test_model.py trainer/test_dpo_trainer.py \
  $(addprefix trainer/model/test_weights.py::, test_export_of_import_is_identical test_export_on_two_ranks_is_identical) \
  trainer/saves/test_resume.py parallel/test_resume_layouts.py trainer/saves/test_async_save.py parallel/test_async_save_ranks.py \
  $(addprefix parallel/test_layouts.py::, test_layout_trains_like_one_process test_expert_layout_trains_like_one_process) \
  parallel/test_experts.py::test_two_ranks_train_experts_like_one
# Transformer Engine's Python code, for whose compiled extension tests/te_stub stands in; docs/parallelism.md has the reasons
# for these versions.
MEGATRON_VERSION := 0.16.1
TE_OLDEST := 2.9.0
TE_NEWEST := 2.20.2
TE := $(abspath $(VENV))/transformer-engine-
TE_NEEDS := $(TE)needs
# (version of Transformer Engine, folder of another Megatron-Core)
te_path = $(CURDIR)/tests/te_stub:$(TE)$(1):$(TE_NEEDS)$(addprefix :,$(2))
# What is compared with other libraries, and the parts of the layout matrix, on one pair of versions ...
TE_TESTS := te $(addprefix trainer/, test_golden.py test_precision.py) \
  $(addprefix trainer/model/test_model.py::, test_model_equals_transformers test_model_on_two_ranks_equals_transformers \
    test_model_on_four_ranks_equals_transformers test_model_in_bfloat16_is_as_accurate_as_transformers \
    test_experts_on_two_ranks_equal_transformers test_experts_on_four_ranks_equal_transformers \
    test_every_parameter_counts_once_in_the_gradient_norm) \
  $(addprefix trainer/model/test_lora.py::, test_lora_equals_peft test_lora_in_bfloat16_is_as_accurate_as_peft \
    test_lora_on_two_ranks_equals_peft test_export_gives_peft_back_what_it_wrote) \
  $(addprefix trainer/model/test_weights.py::, test_export_of_import_is_identical test_export_on_two_ranks_is_identical \
    test_export_of_experts_on_four_ranks_is_identical) \
  parallel/test_experts.py::test_two_ranks_train_experts_like_one
# ... and on the others.
TE_SHORT_TESTS := te/test_te_parity.py trainer/test_golden.py
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# With an NVIDIA driver pip takes the CUDA build of torch that fits it; otherwise the pinned CPU set-up.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),requirements/gpu-constraints.txt,requirements/cpu-constraints.txt)

.PHONY: demo test faults fuzz kill-matrix soak test-megatron-next test-te test-triton-3.6 lint types env clean parity parity-te parity-trl \
  parity-zero3 test-zero3 deepspeed

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
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The numbered faults, with what came of each.
faults: $(READY)
	$(BIN)/python tests/faults

# Coverage-guided fuzzing of every reader of untrusted files, FUZZ_SECONDS for all of them together.
fuzz: $(READY)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[fuzz]"
	$(BIN)/python tests/fuzz --seconds $(FUZZ_SECONDS)

# SIGKILL at every step and every file operation of a save, in four layouts; about ten minutes.
kill-matrix: $(READY)
	$(BIN)/python -m checks.kill_matrix

# The demo's training on two ranks that are killed at random, again and again; at most 15 minutes.
soak: $(READY)
	$(BIN)/python -m checks.soak

# Every parallel layout against one process, 3 steps each; about ten minutes.
parity: $(READY)
	$(BIN)/python -m checks.layout_parity --output bench/results/parity_layouts.json

# What stands on Megatron-Core, once more on its newest version.
test-megatron-next: $(READY) $(NEXT)
	PYTHONPATH=$(NEXT) $(PYTEST) --megatron-version $(NEXT_VERSION) $(addprefix tests/, $(NEXT_TESTS))

$(NEXT): | $(READY)
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --target $@ megatron-core==$(NEXT_VERSION)

# The machine code of the Triton kernels, once more by the compiler of GPU machines.
test-triton-3.6: $(READY) $(TRITON_OLD)
	PYTHONPATH=$(TRITON_OLD) $(BIN)/python -m pytest --triton-version $(TRITON_OLD_VERSION) \
	  tests/kernels/triton/test_epilogue.py tests/kernels/gluon/test_gluon_compile.py

$(TRITON_OLD): | $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$(TRITON_OLD_VERSION)

# Models of Transformer Engine's layers: old with old and new with new, then a part on old with new.
test-te: $(READY) $(NEXT) $(TE)$(TE_OLDEST) $(TE)$(TE_NEWEST) $(TE_NEEDS)
	PYTHONPATH=$(call te_path,$(TE_OLDEST)) $(PYTEST) --te-version $(TE_OLDEST) --megatron-version $(MEGATRON_VERSION) \
	  $(addprefix tests/, $(TE_TESTS))
	PYTHONPATH=$(call te_path,$(TE_NEWEST),$(NEXT)) $(PYTEST) --te-version $(TE_NEWEST) --megatron-version $(NEXT_VERSION) \
	  $(addprefix tests/, $(TE_TESTS))
	PYTHONPATH=$(call te_path,$(TE_NEWEST)) $(PYTEST) --te-version $(TE_NEWEST) --megatron-version $(MEGATRON_VERSION) \
	  $(addprefix tests/, $(TE_SHORT_TESTS))

# Every layout on Transformer Engine's layers against one process on Megatron's own; six minutes for each file.
PARITY_TE := $(foreach te,$(TE_OLDEST) $(TE_NEWEST),$(foreach megatron,$(MEGATRON_VERSION) $(NEXT_VERSION),\
  bench/results/parity_te-$(te)-megatron-$(megatron).json))

parity-te: $(PARITY_TE)

.PHONY: $(PARITY_TE)
$(PARITY_TE): $(READY) $(NEXT) $(TE)$(TE_OLDEST) $(TE)$(TE_NEWEST) $(TE_NEEDS)
	PYTHONPATH=$(call te_path,$(word 2,$(subst -, ,$@)),$(if $(findstring megatron-$(NEXT_VERSION),$@),$(NEXT))) \
	  $(BIN)/python -m checks.te_parity --output $@

# Anew where the list below may have changed: its name holds no version.
$(TE_NEEDS): Makefile | $(READY)
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 ml-dtypes==0.6.0 einops==0.8.2
	@touch $@

$(TE)%: | $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ transformer-engine==$*

parity-trl: $(READY)
	$(BIN)/python -m checks.trl_parity

# TRL's trainers and fastpref's under DeepSpeed ZeRO-3 on two CPU ranks: twenty settings in about three minutes, or three.
parity-zero3: $(READY) deepspeed
	$(BIN)/python -m checks.zero3_parity --output bench/results/parity_zero3.json

test-zero3: $(READY) deepspeed
	$(BIN)/python -m pytest tests/integrations/test_trl_zero3.py

deepspeed: $(READY)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[dev,deepspeed]"

clean:
	rm -rf $(VENV) runs
