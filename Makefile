# `make demo` and `make test` set up what they need in .venv from nothing: Python >= 3.10 and a C++
# compiler; nvcc is used when present.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: setup demo physics test fuzz soak audit lint bench gpu gpu-bench gpu-check gpu-packages docs clean help

help:
	@echo "make setup | demo | physics | test | fuzz | soak | audit | lint | bench | docs | clean"
	@echo "on a machine with a GPU: make gpu | gpu-bench | gpu-check; before: make gpu-packages"

# torch first and alone: the compiled libraries take their headers from it. timm, for the tests of
# its EMA, without its own requirements, which would bring another torch along.
$(VENV)/packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=70.1" wheel
	VICREG_KERNELS_BUILD=python $(BIN)/python -m pip install -q --disable-pip-version-check \
	    --no-build-isolation -e ".[triton,trainer,test,lint]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps timm==1.0.31
	touch $@

# Beside a torch without CUDA this builds the CPU library alone; the audits compile the CUDA sources.
$(VENV)/libraries: $(VENV)/packages $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

setup: $(VENV)/libraries

# Anew: a physics run that is there would be gone on with.
demo: setup
	rm -rf runs/demo
	$(BIN)/python -m jepa.demo --output runs/demo

# The whole of the physics test: a model of embeddings and one of pixels, 11 minutes each on two cores.
physics: setup
	$(BIN)/jepa train vjepa_causal_physics --output runs/vjepa_causal_physics
	$(BIN)/jepa train pixels_physics --output runs/pixels_physics
	$(BIN)/jepa surprise runs/vjepa_causal_physics --beside runs/pixels_physics

test: setup
	$(BIN)/python -m pytest -m "not gpu and not thorough" -n 2 --dist loadfile

# Random calls of every op against the float64 reference, 60 seconds an op or
# VICREG_KERNELS_FUZZ_SECONDS, once on the library and once on its build under ASan and UBSan; then
# the trainer's damaged files. A failure prints its seed and its call as one line of Python
# (tests/fuzz).
fuzz: setup
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.fuzz --sanitized
	VICREG_KERNELS_FUZZ=$${VICREG_KERNELS_FUZZ:-20} $(BIN)/python -m pytest -n 2 tests/trainer/test_damage.py

# 10,000 calls of every op and module on random shapes: memory, caches, threads and descriptors must
# stay flat after a warm-up.
soak: setup
	$(BIN)/python -W ignore -m tests.fuzz.soak

# What takes minutes of compiling: the GPU kernels for every architecture (`make test` compiles them
# for one), and the CUDA sources under sanitizers.
audit: setup
	VICREG_KERNELS_AUDIT=all $(BIN)/python -m pytest -n 2 --dist loadfile tests/*/test_audit_*.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m thorough --ignore-glob="tests/*/test_audit_*.py"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers' own requirements would bring another torch along.
bench: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	    lightly==1.6.0 pytorch-metric-learning==2.9.0 scipy tqdm
	$(BIN)/python -m bench.run

# Three commands for a machine with an NVIDIA GPU, with its own python3, without network or .venv, each
# over within ten minutes (docs/gpu_run.md): build, tests, first figures; all figures; sanitizers.
gpu:
	$(PYTHON) -m bench.gpu gpu

gpu-bench:
	$(PYTHON) -m bench.gpu bench

gpu-check:
	$(PYTHON) -m bench.gpu check

# Where there is a network: what the trainer imports and such a machine lacks, into .gpu-packages.
gpu-packages:
	$(PYTHON) -m bench.gpu_packages

docs: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check mkdocs mkdocs-material
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site runs .cache *.egg-info vicreg_kernels/*.so vicreg_kernels/build_report.json
