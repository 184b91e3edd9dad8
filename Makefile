# `make rank` sets everything up and ranks the example; `make test` runs the tests. Everything lives in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/include/uma/*.h) setup.py pyproject.toml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help rank test test-gpu-kernels reliability test-fast check lint format types imports sanitize fuzz instructions bench bench-peers report build clean doctor

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# Without ensurepip `python -m venv` fails half-way: what it made is removed, or the next run would take it for whole.
$(BIN)/python:
	@made=; test -e "$(VENV)" || made=yes; \
	echo '$(PYTHON) -m venv $(VENV)'; \
	$(PYTHON) -m venv "$(VENV)" || { \
	  test -z "$$made" || rm -rf "$(VENV)"; \
	  echo 'error: no virtual environment could be made' >&2; \
	  echo 'hint: install Python 3.11 or newer with its venv module (Debian: apt-get install python3-venv)' >&2; \
	  exit 1; }

# Plain users need the core only; developers' extras come with the first `make test`.
$(STAMP): $(BIN)/python $(SOURCES)
	@echo "installing uma-engine into $(VENV) (compiles csrc/, about a minute)"
	$(BIN)/pip install --quiet --editable .
	@$(BIN)/python -c "from uma_kernels import dispatch as d; print('compiled kernels:', d.isa() or 'NOT BUILT, the slow reference back end is in use (install g++ and run again)')"
	@touch $@

$(VENV)/.dev-installed: $(STAMP) pyproject.toml
	$(BIN)/pip install --quiet 'uma-engine[dev,bench]'  # installed already: this adds what the extras need, and compiles nothing
	@touch $@

rank: $(STAMP)  ## set up, fetch the default weights, rank the example
	$(BIN)/uma rank examples/job.md examples/candidates.jsonl --top-n 15

doctor: $(STAMP)  ## what was found on this machine
	$(BIN)/uma doctor

test: $(VENV)/.dev-installed  ## all tests, but for those of GPU kernels
	$(BIN)/python -m pytest -q -m 'not interpreted and not reliability'

# Two processes: an interpreted kernel uses one CPU. A machine with a GPU runs bench/gpu.sh instead.
test-gpu-kernels: $(VENV)/.dev-installed  ## GPU kernels without a GPU: interpreted against the reference, compiled for sm_80 and sm_90
	$(BIN)/python -m pytest -q -m interpreted -n 2 --dist worksteal

# Minutes; FORM=long takes hours and keeps its numbers in bench/results.
reliability: $(VENV)/.dev-installed  ## chaos against a whole server: kills, hangs, swaps, damage, storms, noise
	UMA_RELIABILITY=$(FORM) $(BIN)/python -m pytest -q tests/reliability

test-fast: $(VENV)/.dev-installed  ## tests without weights and slow ones
	$(BIN)/python -m pytest -q -m 'not slow and not weights and not interpreted'

check: lint types imports test  ## everything that CI asks for

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev-installed  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev-installed
	$(BIN)/mypy

imports: $(VENV)/.dev-installed
	$(BIN)/lint-imports

sanitize: $(VENV)/.dev-installed  ## the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer
	bash tests/sanitize.sh $(BIN)/python

fuzz: $(VENV)/.dev-installed  ## 10,000 random cases of the C++ ops on each instruction set (FUZZ="--seed 7" draws others)
	$(BIN)/python -m tests.fuzz $(FUZZ)

# New figures are kept with `python -m bench.instructions`.
instructions: $(VENV)/.dev-installed  ## instructions of a rank, counted by valgrind, against the figures kept last
	$(BIN)/python -m bench.instructions --check

bench-peers: $(VENV)/.dev-installed  ## this engine and others in turns (installs them under .peers/), then docs/benchmarks.md
	$(BIN)/python -m bench.peers
	$(BIN)/python -m bench.report

report: $(VENV)/.dev-installed  ## docs/benchmarks.md and its pictures from bench/results
	$(BIN)/python -m bench.report

bench: $(VENV)/.dev-installed  ## the first benchmark: ranking against transformers
	$(BIN)/python -m bench.ranking

build: $(VENV)/.dev-installed  ## sdist and wheel into dist/
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache kernels/uma_kernels/_C*.so
