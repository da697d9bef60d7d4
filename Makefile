# Starts from a bare clone: `make setup` finds a Python, makes .venv, installs and builds csrc/.
# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# What `make cascade` runs.
CASCADE := recipes/tiny/cascade.py
# Its processes: two on a CPU, of a thread each, are faster than one of two threads.
ifndef RANKS
RANKS := $(shell if nvidia-smi -L >/dev/null 2>&1 || [ "$$(getconf _NPROCESSORS_ONLN)" -lt 2 ]; \
  then echo 1; else echo 2; fi)
endif
# Workers of pytest: tests of parallelism start 2-4 processes of their own.
TEST_WORKERS ?= 2
# tests/conftest.py decides which files come first.
PYTEST = $(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
SUITE ?= cpu
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# GPU=1: Triton and fla-core, and what can be had of Transformer Engine, apex and FlashAttention-3.
GPU_INSTALLED := $(if $(filter 1,$(GPU)),$(VENV)/.gpu_installed)
BUILT := $(VENV)/.built
INTEGRATIONS := build/integrations
LIBRARIES := nemocascade/_native.so kernels/nemocascade_kernels/_native.so
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# An environment whose Python has gone, or a library that was deleted, is made anew.
ifneq ($(shell $(RUN) -c 'print(1)' 2>/dev/null),1)
$(shell rm -f $(INSTALLED) $(BUILT) $(VENV)/.gpu_installed)
endif
ifneq ($(words $(wildcard $(LIBRARIES))),$(words $(LIBRARIES)))
$(shell rm -f $(BUILT))
endif

.PHONY: setup cascade test test-slow test-vllm test-integrations gpu-dry fuzz lint style format bench wheels clean help

setup: $(BUILT) $(GPU_INSTALLED)  ## Find a Python >= 3.12, make .venv, install, build csrc/ (GPU=1: packages of a GPU node)

$(INSTALLED): pyproject.toml
	@if ! $(RUN) -c '' 2>/dev/null; then \
	  python=$$(tools/find_python.sh); \
	  echo "making $(VENV) with $$python"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@echo "installing torch, Megatron-Core and the tools into $(VENV): some minutes, about 6 GB"
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet $$($(RUN) tools/build_requirements.py)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev,peers]'
	touch $@

$(VENV)/.gpu_installed: $(INSTALLED) tools/gpu_packages.py
	$(PIP) install --quiet --no-build-isolation --editable '.[dev,peers,gpu]'
	$(RUN) tools/gpu_packages.py
	touch $@

$(BUILT): $(INSTALLED) setup.py CMakeLists.txt $(CSRC)
	$(RUN) setup.py --quiet build_ext --inplace
	$(RUN) tools/native_report.py
	touch $@

cascade: setup  ## Run the cascade at small size (ARGS="--dry-run" passes arguments)
ifeq ($(RANKS),1)
	$(RUN) -m nemocascade.cli run $(CASCADE) $(ARGS)
else
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/torchrun --standalone \
	  --nproc-per-node $(RANKS) -m nemocascade.cli run $(CASCADE) $(ARGS)
endif

# mypy runs beside the tests, and says what it found after them.
test: style  ## Every quick test, and lint
	@mkdir -p build
	@$(RUN) -m mypy >build/mypy.txt 2>&1 & mypy=$$!; \
	trap 'kill $$mypy 2>/dev/null || true' EXIT; \
	tests=0; OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(ARGS) || tests=$$?; \
	types=0; wait $$mypy || types=$$?; \
	sed 's/^/mypy: /' build/mypy.txt; \
	exit $$((tests ? tests : types))

test-slow: setup  ## The tests that take more than a minute each
	-$(RUN) tools/vllm_environment.py build/vllm/venv
	OMP_NUM_THREADS=1 $(PYTEST) -m slow $(ARGS)

test-vllm: setup  ## Rollouts by a real vLLM on this CPU, installed into build/vllm
	$(RUN) tools/vllm_environment.py build/vllm/venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow tests/vllm $(ARGS)

test-integrations: $(INTEGRATIONS)/.installed  ## lm-eval, PEFT, datasets, wandb and mlflow, installed into build/integrations
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -m integration tests/data/test_hub_rows.py \
	  tests/megatron/test_lora.py tests/serving/test_lm_eval.py tests/train/test_trackers.py $(ARGS)

# An environment on top of .venv: torch and what else is there is not installed again.
$(INTEGRATIONS)/.installed: $(INSTALLED) | $(BUILT)
	$(RUN) -m venv --clear $(INTEGRATIONS)
	$(RUN) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  >$$($(INTEGRATIONS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check 'nemocascade[integrations]'
	touch $@

gpu-dry: setup  ## Steps and rollouts on a played GPU, against their budgets (UPDATE=1 writes them)
	OMP_NUM_THREADS=1 $(RUN) tests/gpu_dry/run.py $(if $(UPDATE),--update) $(ARGS)

fuzz: setup  ## 100,000 mutated inputs into every reader, 15 minutes (ARGS="--only NAME --examples N")
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz/run.py $(ARGS)

lint: style  ## ruff, docstrings, clang-format, hadolint and mypy, changing nothing
	$(RUN) -m mypy

style: setup  ## lint without mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/lint_docstrings.py
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(VENV)/bin/hadolint Dockerfile

format: setup  ## Apply ruff's fixes and all formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

bench: setup  ## Run the benchmarks (SUITE=gpu where there is one; ARGS goes to benchmarks/run.py)
	$(RUN) benchmarks/data/bench_packing.py
	$(RUN) benchmarks/run.py --suite $(SUITE) $(ARGS)

wheels: setup  ## Both wheels into dist/, with the libraries that setup has built
	rm -rf build/lib* build/bdist.* kernels/build
	NEMOCASCADE_USE_BUILT=1 $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . ./kernels

clean:  ## Remove what was built; .venv stays
	rm -rf build dist *.egg-info $(LIBRARIES) $(BUILT) .mypy_cache .ruff_cache .pytest_cache

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
