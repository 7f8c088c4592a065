# `make repro` runs the study, `make test` the tests; both make the virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.DEFAULT_GOAL := help
.PHONY: help setup repro results test check format dag clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Make the virtual environment with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(TOOLS): $(READY)
	$(INSTALL) '.[dev]'
	touch $@

repro: setup  ## Run what changed of the studies in params.yaml, then print the result tables
	dvc repro
	@$(MAKE) --no-print-directory results

results: setup  ## Print the result tables and where the plots are
	@python -m quantstudy results

test: $(TOOLS)  ## Run the tests
	python -m pytest

check: $(TOOLS)  ## Lint, formatting and types
	ruff check .
	ruff format --check .
	mypy

format: $(TOOLS)  ## Format the code
	ruff check --fix .
	ruff format .

dag: setup  ## Show the stages and what they depend on
	dvc dag

clean:  ## Delete the virtual environment and caches; models, data and reports stay
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
