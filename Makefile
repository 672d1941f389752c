# `make demo` and `make test` are all the set-up there is: each makes its own virtual environment in .venv first.
#   PYTHON=python3.12 another interpreter     VENV=DIR another environment
#   PYTEST_ARGS='-k walk' a part of the tests; CXX=clang++ another compiler; WSSS_CUDA=ON as pip would build it
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
VENV_PYTHON := $(BIN)/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
export PATH := $(BIN):$(PATH)

# What is built here runs here: for the GPUs of this machine, without CUDA where there is none. pip builds them all.
ifeq ($(origin WSSS_CUDA)$(origin WSSS_CUDA_ARCHS),undefinedundefined)
GPU_KINDS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2-real/p' | sort -u)
ifeq ($(GPU_KINDS),)
export WSSS_CUDA := OFF
else
export WSSS_CUDA_ARCHS := $(shell echo $(GPU_KINDS) | tr ' ' ',')
endif
endif

NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
# What runs once more without the compiled module: all that reaches the fall-back, in seconds. References are slow.
FALLBACK_TESTS := $(addprefix tests/test_,info.py labels.py colour.py neighbours.py compat.py)
# For every architecture: minutes.
NVCC_TESTS := tests/test_cuda_compile.py
# PyTorch without CUDA is a tenth of the download. Asked only where it helps and pip was not told where to look.
CPU_TORCH := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench gpu build clean

help:
	@echo "make demo    build, refine photographs, print the path of the picture"
	@echo "make test    build, run every test, and the fall-back's with the compiled module hidden"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   the speed table"
	@echo "make gpu     build, prove and measure everything on this machine's GPU (PART='bench walk': a part of it)"
	@echo "make build   compile again and say what this installation runs"
	@echo "make clean   remove what was built (the packages in $(VENV) stay)"

demo: $(VENV)/.with-demo
	@$(BIN)/wsss demo

ifeq ($(strip $(PYTEST_ARGS)),)
test: $(VENV)/.with-test
	@# Meanwhile, what needs other settings: the Triton kernels in their interpreter, which must be chosen before triton
	@# is imported, nvcc's minutes, and the references, which carry it alone where the compiled module is missing.
	@log=$$(mktemp); trap 'rm -f '$$log EXIT; trap 'rm -f '$$log'; trap - TERM; kill 0' INT TERM; \
	( TRITON_INTERPRET=1 $(VENV_PYTHON) -m pytest -q tests/triton $(NVCC_TESTS); first=$$?; \
	  echo "The compiled module hidden:"; \
	  WSSS_DISABLE_NATIVE=1 $(VENV_PYTHON) -m pytest -q $(FALLBACK_TESTS); exit $$((first | $$?)) ) >$$log 2>&1 & others=$$!; \
	WSSS_REQUIRE_NATIVE=1 $(VENV_PYTHON) -m pytest $(NVCC_TESTS:%=--ignore=%); native=$$?; \
	wait $$others; others=$$?; \
	echo "Meanwhile, the Triton kernels in their interpreter and what nvcc makes of the CUDA sources:"; cat $$log; \
	exit $$((native | others))
else
test: $(VENV)/.with-test
	WSSS_REQUIRE_NATIVE=1 $(VENV_PYTHON) -m pytest $(PYTEST_ARGS)
endif

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -type f)

bench: $(VENV)/.with-bench
	WSSS_REQUIRE_NATIVE=1 $(VENV_PYTHON) -m benchmarks

gpu:
	@PYTHON=$(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(PYTHON)) benchmarks/gpu.sh

build: $(VENV)/.torch
	$(PIP_INSTALL) --no-build-isolation -e .
	@$(VENV_PYTHON) -m wsss_kernels

clean:
	rm -rf build dist *.egg-info wsss_kernels/_C.*.so $(VENV)/.with-*

# Editable, so only the compiled part has to follow its sources.
$(VENV)/.with-%: $(VENV)/.torch $(NATIVE_SOURCES)
	@echo "Building wsss-kernels and installing what 'make $*' needs"
	@$(PIP_INSTALL) --no-build-isolation -e '.[$*]'
	@$(VENV_PYTHON) -m wsss_kernels | sed -n 1,6p
	@touch $@

# torch before everything else: what is installed later finds it there and pulls no other.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing PyTorch and the build tools into $(VENV)"
	@$(PIP_INSTALL) --upgrade pip
	@index=; \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! command -v rocm-smi >/dev/null \
	   && ! $(VENV_PYTHON) -m pip config list | grep -E 'index-url|find-links|no-index' >/dev/null \
	   && $(VENV_PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_TORCH)/torch/", timeout=5)' 2>/dev/null; \
	then index='--extra-index-url $(CPU_TORCH)'; fi; \
	$(PIP_INSTALL) $$index 'torch>=2.8' numpy setuptools wheel pybind11 cmake ninja
	@touch $@

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null \
	|| { echo "$(PYTHON) was not found: name an interpreter with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "Python's venv module is missing. Debian, Ubuntu: apt-get install python3-venv   Fedora: dnf install python3-pip" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	|| { echo "Python's C headers are missing. Debian, Ubuntu: apt-get install python3-dev   Fedora: dnf install python3-devel" >&2; exit 1; }
	@for compiler in "$${CXX:-c++}" c++ g++ clang++; do command -v "$$compiler" >/dev/null 2>&1 && exit 0; done; \
	echo "No C++ compiler was found. Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++" >&2; exit 1
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@
