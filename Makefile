# make demo   installs into .venv and runs the main job on the embedded default
# make test   installs with the dev extras and runs ruff, mypy and pytest
# make paper-efficiency profiles what the papers' efficiency tables list and writes results/tables/
# make format rewrites the sources in the house format
# make clean  removes .venv and everything that was built
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, PYTEST_ARGS="-k table" what is tested.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two test processes at most: each holds torch and a model in memory. Stealing work leaves files whole, so that what the tests
# of a file share is made once, not once per process.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); if [ "$$n" -gt 2 ]; then echo 2; else echo "$$n"; fi)

# pip runs setuptools with PYTHONWARNINGS=ignore: its advice about editable installs is pages long.
BIN := $(VENV)/bin
MADE := $(VENV)/.made
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types pytest format paper-efficiency clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(RUN_STAMP)
	@$(BIN)/ovbench run --demo --method sc-clip --dataset voc21

test: lint types pytest

lint: $(DEV_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	@$(BIN)/mypy

pytest: $(DEV_STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

paper-efficiency: $(DEV_STAMP)
	@$(BIN)/python studies/paper_efficiency.py

format: $(DEV_STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist ovbench.egg-info .pytest_cache .mypy_cache .ruff_cache

$(MADE):
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "No '$(PYTHON)' found. Install Python 3.10 to 3.13, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "ovbench needs Python 3.10 to 3.13; '$(PYTHON)' is `$(PYTHON) -V 2>&1`." \
	         "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making $(VENV) with `$(PYTHON) -V 2>&1`" >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

$(RUN_STAMP): pyproject.toml $(MADE)
	@echo "Installing ovbench and what it needs (torch is large: this takes some minutes the first time)" >&2
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml $(MADE)
	@echo "Installing ovbench with its dev tools (torch is large: this takes some minutes the first time)" >&2
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(RUN_STAMP)
