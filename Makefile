# Every target makes its own environment: nothing but make, a C compiler and a Python from 3.10 on has to be there.
#
#   make run        the tour: real model layers against the reference
#   make test       the test suite (tests that need a GPU only where there is one)
#   make test-all   the same with what takes minutes, and all cases of the grids of which make test has a sixteenth
#   make lint       ruff, mypy
#   make fuzz       random problems over every public function, simulated: make fuzz ARGS="--problems 600 --seed 1 --jobs 2"
#   make mutations  docs/mutations.md: the kernels with each synchronisation damaged, under the race detector (hours)
#   make bundle-h100, make bundle-b200, make bundle-a100
#                   the kernels of the tour and the examples, to run without the compiler: docs/bundles.md
#   make gpu-check  one problem per kernel, a short sweep, GPU tests, compute-sanitizer, in MINUTES (30), results to OUT;
#                   without a GPU the static checks
#   make gpu-pack   the same as a folder for a machine without a package index: make gpu-pack ARGS="--python 3.12"
#
# Variables: PY=python3 uses an interpreter that already has everything instead of making .venv.
#            OUT is where a bundle goes, a folder or a wheel (build/bundle-h100), or the results of gpu-check.
#            TORCH_INDEX=URL names a package index for torch: one that has builds for the CPU alone, or, where the driver
#            supports no CUDA beyond 12, one that has builds for CUDA 12.

MINUTES := 30

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.PHONY: run test test-all lint fuzz mutations bundle-h100 bundle-b200 bundle-a100 gpu-check gpu-pack clean

# The major version of CUDA that the driver supports; empty without a GPU.
CUDA_MAJOR := $(shell $(if $(filter undefined,$(origin PY)),python3,$(PY)) perf/cuda_driver.py 2>/dev/null)
EXTRAS := dev,perf,$(if $(filter-out 12,$(CUDA_MAJOR)),cu13,cu12)
TORCH := torch==2.13.0

ifeq ($(origin PY),undefined)
PY := .venv/bin/python
ENVIRONMENT := .venv/.installed
FLAVOURS := .venv/.flavours
endif

run: $(ENVIRONMENT)
	$(PY) -m cute_fa run

test: $(ENVIRONMENT) $(FLAVOURS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

test-all: ARGS += --all-cases
test-all: test

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

fuzz: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.testing.fuzz $(ARGS)

mutations: $(ENVIRONMENT)
	$(PY) -m tests.testing.mutations $(ARGS)

bundle-h100: BUNDLE_ARCH := sm_90a
bundle-b200: BUNDLE_ARCH := sm_100a
bundle-a100: BUNDLE_ARCH := sm_80
bundle-h100 bundle-b200 bundle-a100: OUT = build/$@
# The examples run simulated, with as many SMs as the GPU has, whatever GPU this machine has.
bundle-h100 bundle-b200 bundle-a100: $(ENVIRONMENT)
	mkdir -p build
	keys=build/$@.keys
	export CUDA_VISIBLE_DEVICES= PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}"
	$(PY) -W ignore -m cute_fa.tools.tour_keys --arch $(BUNDLE_ARCH) > $$keys
	export CUTE_FA_RECORD_KEYS=$$keys
	$(PY) -W ignore examples/generate_llama.py --arch $(BUNDLE_ARCH)
	$(PY) -W ignore examples/serve.py --arch $(BUNDLE_ARCH)
	unset CUTE_FA_RECORD_KEYS
	$(PY) -W ignore -m cute_fa bundle --keys $$keys --out "$(OUT)" --jobs 2

gpu-check: $(ENVIRONMENT)
	$(PY) -m perf gpu-check --minutes $(MINUTES) $(if $(OUT),--out "$(OUT)") -- $(ARGS)

gpu-pack: $(ENVIRONMENT) $(FLAVOURS)
	$(PY) -m perf gpu-pack --flavour cu13 $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info

# torch goes first: otherwise the resolver would pull its newest build, with gigabytes of CUDA libraries, also on a
# machine without a GPU. A torch of the machine's own that sees its GPU is kept, from 2.11 on. Where python3 is itself a
# virtual environment, --system-site-packages shows the packages of the interpreter below it, and not its own: these a
# .pth file adds.
.venv/.installed: pyproject.toml
	@python=
	for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ]; then echo "No Python from 3.10 on with its venv module was found on the PATH." >&2; exit 1; fi
	site=
	if [ -n "$(CUDA_MAJOR)" ] && $$python -c '
	import sys, torch
	sys.exit(not torch.cuda.is_available() or [int(part) for part in torch.__version__.split(".")[:2]] < [2, 11])
	' 2>/dev/null; then
	  site=--system-site-packages
	fi
	echo "Setting up .venv with $$($$python --version); this takes a few minutes."
	$$python -m venv $$site .venv
	if [ -n "$$site" ]; then
	  packages=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	  $$python -c '
	import site, sys
	outer = site.getsitepackages() if sys.prefix != sys.base_prefix else []
	print(*(f"import site; site.addsitedir({path!r})" for path in outer), sep="\n")
	' > "$$packages/outer.pth"
	else
	  .venv/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	fi
	.venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

# The DSL's libraries for the other CUDA beside the environment: tests compile with both.
.venv/.flavours: .venv/.installed
	.venv/bin/python -m perf flavours --install
	touch $@
