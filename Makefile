# Verbs of the project. `make help` lists them. Everything is made in .venv: nothing outside this folder changes.
#
#   PYTHON=python3.12         the interpreter that .venv is made with
#   TORCH="torch==2.13.0"     which PyTorch, as arguments of pip install
#   FASTSPARSE_CPU=0          do without a C++ compiler (see setup.py)
#   FASTSPARSE_CUDA=1         insist on CUDA kernels; 0 leaves them out (default: for what runs here, where a GPU is;
#                             for a wheel, where nvcc is)

PYTHON ?= python3
TORCH ?= torch==2.13.0
export FASTSPARSE_CPU ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --no-input
AUDIT := $(VENV)/bin/torch-abi-audit --verbose --check torch
# By families, and of ops that have a file of their own.
KERNEL_TESTS := sparse_products matching_pursuit_backward gated_recurrences newton_recurrence \
  $(patsubst tests/test_%.py,%,$(wildcard $(patsubst fastsparse/ops/%,tests/test_%,$(wildcard fastsparse/ops/*.py))))
# As many processes as there are processors; who ends first takes over tests of the others.
SHARED := --numprocesses auto --maxprocesses 8 --dist worksteal
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: help demo docs test test-all fuzz lint bench bench-peers peers-test gpu-first gpu-test gpu-bench wheel wheel-test hub sanitize abi clean
.DELETE_ON_ERROR:

help:  ## list these verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/.extra-demo kernels  ## train a sparse autoencoder on a small transformer and write report.html
	$(PY) -m examples.demo

test: $(VENV)/.extra-test kernels  ## run every test, each with every pair of its parameters, and the docstrings' examples
	$(PY) -m pytest $(SHARED)

test-all: $(VENV)/.extra-test kernels  ## the same with every combination of parameters
	$(PY) -m pytest $(SHARED) --exhaustive

# What fails is had again by the seed that is printed with it: make fuzz SEED=17 CALLS=1
fuzz: $(VENV)/.extra-test kernels  ## call ops at random and check them: MINUTES=10, SEED, CALLS, OP, BACKEND, VERBOSE=1
	OMP_WAIT_POLICY=passive $(PY) tests/fuzz.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(CALLS),--calls $(CALLS)) \
	  $(if $(OP),--op $(OP)) $(if $(BACKEND),--backend $(BACKEND)) $(if $(VERBOSE),--verbose)

docs: $(VENV)/.extra-docs  ## build the documentation into site/, strictly
	$(VENV)/bin/zensical build --clean --strict

lint: $(VENV)/.extra-test  ## check style with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/.extra-bench kernels  ## measure against PyTorch
	$(PY) -m benchmarks

bench-peers: peers  ## measure against PyTorch and every peer, in .venv-peers
	.venv-peers/bin/python -m benchmarks --peers

# Most releases on PyPI hold no tests: CHECKOUTS=folder has checkouts of those libraries' repositories, by their names.
peers-test: peers  ## run the adapters' tests, and the libraries' own without and with our ops: LIBRARY, CHECKOUTS
	.venv-peers/bin/python -m pip install --quiet --no-input 'pytest>=9' pytest-xdist 'hypothesis>=6.100'
	.venv-peers/bin/python -m pytest $(SHARED) tests/compat tests/formats/test_peers.py
	.venv-peers/bin/python tests/peers/run.py $(LIBRARY) $(if $(CHECKOUTS),--checkouts $(CHECKOUTS))

# On a machine with a GPU, which may have no network: with PYTHON and its packages as they are, and no .venv.
#   WHEELS=folder   installs what PYTHON lacks (pytest, pytest-xdist, ...) into build/gpu-site, from wheels there
#   OUT=folder      where results go (default: build/gpu-results)
#   BUDGET=450      seconds for all of it, building included (540 of gpu-first)
#   COMMIT=name     what is measured, where there is no git to ask
#   ARGS=--choice   for gpu-bench, such as which of our own two backends is faster where
gpu-first: BUDGET := 540
gpu-first:  ## what to know first of a new GPU: is it right, op by op, how fast, and why, within BUDGET
	$(GPU) tests/gpu/first.py --package build/gpu --output $(GPU_OUT) --until $(UNTIL) $(if $(COMMIT),--commit $(COMMIT))

gpu-test: NEEDS := pytest xdist hypothesis
gpu-test: gpu-kernels  ## run all tests on this machine's GPU, and compute-sanitizer, within BUDGET
	$(GPU) tests/gpu/suite.py --package build/gpu --output $(GPU_OUT) --until $(UNTIL) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

gpu-bench: gpu-kernels  ## measure on this machine's GPU, within BUDGET
	$(GPU) -m benchmarks --device cuda --package build/gpu --output $(GPU_OUT) --until $(UNTIL) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

# One for every Python and PyTorch. CXX=aarch64-linux-gnu-g++ FASTSPARSE_CUDA=0 makes one for another machine, untested.
# auditwheel says which is the oldest system by the symbols that the libraries use: manylinux_2_28 or before.
MACHINE = $(firstword $(subst -, ,$(shell $(CXX) -dumpmachine)))
wheel: $(VENV)/.extra-wheel  ## build a wheel into dist/, audit it, and test it in a fresh environment
	rm -rf dist build/wheel
	FASTSPARSE_WHEEL=1 $(PY) -m pip wheel --quiet --no-input --no-deps --no-build-isolation --wheel-dir dist .
	$(PY) -m wheel unpack --dest build/wheel dist/*.whl
	for library in build/wheel/*/fastsparse/_ops_*.so; do $(AUDIT) $$library || exit 1; done
	$(VENV)/bin/auditwheel show dist/*.whl | tr '\n' ' ' | grep -oE 'constrains the platform tag to "manylinux_2_(1.|2[0-8])_.*'
	$(if $(filter $(MACHINE),$(shell uname -m)),$(MAKE) wheel-test)

# With TORCH=... under another PyTorch: what is in dist/ must serve every one from 2.10 on. That the CUDA sources compile
# against others, for which those are large downloads, is tried only where docs/headers.json is behind the sources.
WHEEL_TEST := build/wheel-test-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
WHEEL_TESTS := build backend info composition reference validation $(KERNEL_TESTS)
wheel-test:  ## test dist/'s wheel on CPU tensors, outside this folder's sources, under TORCH
	rm -rf $(WHEEL_TEST)
	$(PYTHON) -m venv $(WHEEL_TEST)/env
	$(WHEEL_TEST)/env/bin/python -m pip install --quiet --no-input $(TORCH) numpy pytest hypothesis setuptools
	$(WHEEL_TEST)/env/bin/python -m pip install --quiet --no-input --no-deps dist/*.whl
	cp -r tests $(WHEEL_TEST)/tests
	cd $(WHEEL_TEST) && env/bin/python -m fastsparse info && env/bin/python -m pytest --config-file ../../pyproject.toml \
	  --rootdir . -k 'not emulated and not interpreted' $(patsubst %,tests/test_%.py,$(WHEEL_TESTS)) tests/nn
	$(WHEEL_TEST)/env/bin/python -m tests.compilation --headers

# What needs no compiler: kernel-builder copies torch-ext/fastsparse for each backend, and says what it is.
HUB := build/hub
hub:  ## lay out in build/hub what Hugging Face's kernel-builder builds from
	rm -rf $(HUB)
	mkdir -p $(HUB)/torch-ext/fastsparse
	cp hub/build.toml hub/flake.nix $(HUB)
	cp hub/__init__.py $(HUB)/torch-ext/fastsparse
	cp -r fastsparse kernels $(HUB)/torch-ext/fastsparse
	mv $(HUB)/torch-ext/fastsparse/kernels $(HUB)/torch-ext/fastsparse/fastsparse
	find $(HUB) -name __pycache__ -prune -exec rm -r {} + -o -name '*.so' -exec rm {} +

# A whole second package in build/sanitize. The interpreter isn't instrumented, so the runtime is preloaded, and
# libstdc++ with it, which must be there when the sanitizer looks for what it has to intercept.
SANITIZED := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)"
sanitize: $(VENV)/.extra-test  ## run op tests on kernels built with ASan and UBSan, CUDA's under the emulator
	FASTSPARSE_CUDA=0 FASTSPARSE_SANITIZE=1 $(PY) setup.py --quiet build --build-lib build/sanitize --build-temp build/sanitize-temp
	cd build/sanitize && $(SANITIZED) ../../$(PY) -m pytest --config-file ../../pyproject.toml --rootdir ../.. \
	  $(SHARED) --capture=sys -k cpu- $(patsubst %,../../tests/test_%.py,$(KERNEL_TESTS))
	cd build/sanitize && FASTSPARSE_EMULATOR=address $(SANITIZED) ../../$(PY) -m pytest --config-file ../../pyproject.toml \
	  --rootdir ../.. $(SHARED) --capture=sys -k cuda-emulated $(patsubst %,../../tests/test_%.py,topk_encode_cuda \
	    batch_topk_encode_cuda threshold_encode_cuda sparse_products linear_recurrence linear_recurrence_cuda gated_recurrences \
	    gated_recurrences_cuda)

abi: $(VENV)/.extra-test kernels  ## check that the ops use PyTorch's stable ABI alone
	for library in fastsparse/_ops_*.so; do $(AUDIT) $$library || exit 1; done

clean:  ## remove what was built; .venv stays
	rm -rf build dist site .cache *.egg-info fastsparse/*.so .hypothesis .pytest_cache .ruff_cache .benchmarks

# ---- what the verbs stand on ----

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $(PYTHON) must be Python 3.10 or later (PYTHON=... chooses another)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "make: $(PYTHON) has no venv module: on Debian, apt install python3-venv" >&2; exit 1; }

# PyTorch before anything that depends on it, so that nothing else chooses its version.
$(TORCH_STAMP): | $(PY)
	rm -f $(VENV)/.torch-*
	$(INSTALL) $(TORCH)
	$(INSTALL) 'setuptools>=77' wheel 'pybind11>=2.13' numpy
	touch $@

# The package in place with an extra's dependencies. Its kernels are built below, where only what changed is.
$(VENV)/.extra-%: setup.py pyproject.toml $(TORCH_STAMP)
	FASTSPARSE_CPU=0 FASTSPARSE_CUDA=0 $(INSTALL) --no-build-isolation -e '.[$*]'
	touch $@

# The package with CUDA kernels for this machine's GPU alone, whole in build/gpu. timeout: a build can't take it all.
BUDGET ?= 450
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
START := $(shell date +%s)
UNTIL = $(shell expr $(START) + $(BUDGET))
GPU_OUT := $(abspath $(or $(OUT),build/gpu-results))
GPU_PATH := PYTHONPATH="$(CURDIR)/build/gpu-site$${PYTHONPATH:+:$$PYTHONPATH}"
GPU := $(GPU_PATH) $(PYTHON)
.PHONY: gpu-kernels
gpu-kernels:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-input --no-index --no-deps --upgrade --target build/gpu-site $(WHEELS)/*.whl)
	@arch=$$($(GPU) tests/gpu/ready.py numpy setuptools triton $(NEEDS)) \
	  && FASTSPARSE_CPU=0 FASTSPARSE_CUDA=1 FASTSPARSE_CUDA_ARCHS=$${FASTSPARSE_CUDA_ARCHS:-$$arch} \
	  $(GPU_PATH) timeout 240 $(PYTHON) setup.py --quiet build --build-lib build/gpu --build-temp build/gpu-temp

# The libraries that we are measured against and go under, with the package in place beside them.
.PHONY: peers
peers: kernels
	PYTHON=$(PY) benchmarks/peers/install.sh .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-input 'setuptools>=77' wheel
	FASTSPARSE_CPU=0 FASTSPARSE_CUDA=0 .venv-peers/bin/python -m pip install --quiet --no-input --no-build-isolation --no-deps -e .

# CUDA takes minutes, which only a GPU repays: it is built where one is or where asked, and kept up to date where it was.
GPU_DEVICES := /dev/nvidia[0-9]* /dev/dxg
CUDA_HERE := $(or $(FASTSPARSE_CUDA),$(if $(wildcard $(GPU_DEVICES) fastsparse/_ops_cuda.so),auto,0))
KERNELS_STAMP := build/.kernels-cuda-$(CUDA_HERE)
.PHONY: kernels
ifeq ($(FASTSPARSE_CPU),1)
kernels: $(KERNELS_STAMP)
else
kernels:
endif

# Which files have changed since is setup.py's to find out.
$(KERNELS_STAMP): $(SOURCES) $(TORCH_STAMP)
	@command -v $${CXX:-g++} > /dev/null \
	  || { echo "make: no C++ compiler: on Debian, apt install g++ (or go without: FASTSPARSE_CPU=0)" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "make: Python.h is missing: on Debian, apt install python3-dev" >&2; exit 1; }
	FASTSPARSE_CUDA=$(CUDA_HERE) $(PY) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@
