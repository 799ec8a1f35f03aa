# `make` alone lists the commands. Each installs and builds what it needs, and nothing twice.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
NVCC ?= nvcc
CUDA_ARCHITECTURES ?=
# Every test, on all cores. What says which tests to run replaces it: then one process runs them.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
# A stamp is younger than everything that it stands for.
STAMPS := $(VENV)/stamps
# Build isolation would bring a second torch; the constraints keep the first one.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  --no-build-isolation --constraint requirements/build.txt

# Folders count too: they change when a file in them is deleted.
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
  $(shell find csrc python -name __pycache__ -prune -o -print)
CXX_SOURCES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help
help:  ## List the commands
	@sed -En 's/^([a-z]+):.*## /\1 /p' Makefile | while read -r name text; do \
	  printf '  make %-8s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: build $(STAMPS)/demo  ## Run the main job on photographs, check and time it, draw demo.png
	$(BIN)/python -m benchmarks.demo

.PHONY: test
test: build $(STAMPS)/test $(STAMPS)/neighbours  ## Run every test on all cores (PYTEST_ARGS="-k name" for some)
	@# Of the instruction sets that /proc/cpuinfo names, torch's compiler would else try each one in
	@# every test process: a file compiled, and another interpreter that imports torch to load it.
	OMP_WAIT_POLICY=passive TORCHINDUCTOR_VEC_ISA_OK=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: build
build: $(STAMPS)/pixfuse  ## Set up .venv, compile and install the package there

.PHONY: bench
bench: build $(STAMPS)/bench  ## Check, then time, against every peer
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.PHONY: lint
lint: $(STAMPS)/test $(STAMPS)/lint  ## Check style, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/codespell
	$(BIN)/mypy

.PHONY: format
format: $(STAMPS)/lint  ## Format Python and C++
	$(BIN)/ruff check --fix --quiet || true
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

.PHONY: cuda
cuda: $(STAMPS)/build  ## Compile the CUDA library for all architectures (needs nvcc)
	@command -v $(NVCC) >/dev/null || { \
	  echo "make cuda needs nvcc (the CUDA toolkit, 13.0 or later) on the PATH" >&2; exit 1; }
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DPIXFUSE_CUDA=ON \
	  -DCMAKE_CUDA_COMPILER="$$(command -v $(NVCC))" \
	  $(if $(CUDA_ARCHITECTURES),-D'CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)',-UCMAKE_CUDA_ARCHITECTURES) \
	  -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)"
	@# Its own two at a time, not a share of what this make runs.
	env -u MAKEFLAGS $(BIN)/cmake --build build/cuda --target pixfuse_cuda

.PHONY: clean
clean:  ## Remove everything that was built, .venv too
	rm -rf $(VENV) build dist demo.png .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "pixfuse needs Python 3.10 or later; choose one with make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV) || { \
	  echo "No virtual environment could be made: install Python's venv module" >&2; \
	  echo "(on Debian and Ubuntu: apt-get install python3-venv) and run make again." >&2; exit 1; }
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/build: requirements/build.txt $(STAMPS)/venv
	$(PIP_INSTALL) -r requirements/build.txt
	@touch $@

$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/build
	$(PIP_INSTALL) -r $<
	@touch $@

# torchvision's own requirements ask for another torch than ours.
$(STAMPS)/test $(STAMPS)/demo $(STAMPS)/bench: $(STAMPS)/%: \
    requirements/%.txt requirements/torchvision.txt $(STAMPS)/build
	$(PIP_INSTALL) -r $<
	$(PIP_INSTALL) --no-deps -r requirements/torchvision.txt
	@touch $@

$(STAMPS)/bench: requirements/demo.txt

# Some of them require torchvision: it must be there, or pip would bring one with its own torch.
# Compiling what they install takes as long as installing it, and most of it is never imported.
$(STAMPS)/neighbours: requirements/neighbours.txt $(STAMPS)/test
	$(PIP_INSTALL) --no-compile -r $<
	@touch $@

$(STAMPS)/pixfuse: $(STAMPS)/build $(SOURCES)
	$(PIP_INSTALL) --no-deps .
	@touch $@
