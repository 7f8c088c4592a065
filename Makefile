# `make repro` runs the study, `make test` the tests; both make the virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
STUDY ?= mobilenetv2_digits
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
RAY := $(VENV)/.ray
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e
# pip compiles with one core; without bytecode each of a hundred stages would compile what it imports anew.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
# The dvc of the virtual environment first writes code.yaml anew, so that it knows which stages run other code.
DVC := printf '%s\n' '\#!/bin/sh' 'exec "$$(dirname "$$(readlink -f "$$0")")/python" -m tools.dvc "$$@"' > $(BIN)/dvc
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
# Large pages for large tensors: VGG-11 trains a fifth faster, where the system allows it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup repro ship results compare test test-all browser check format front figures evidence dag peers clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Make the virtual environment with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[onnxruntime,openvino]'
	$(COMPILE)
	$(DVC)
	touch $@

$(TOOLS): $(READY)
	$(INSTALL) '.[dev,onnxruntime,openvino,ray]'
	$(COMPILE)
	$(DVC)
	touch $@

$(RAY): $(READY)
	$(INSTALL) '.[ray]'
	touch $@

repro: setup $(if $(filter-out 1,$(JOBS)),$(RAY))  ## Run what changed, then print the tables: make repro [JOBS=4, stages at once]
	@python -m quantstudy repro $(if $(JOBS),--jobs $(JOBS))
	@$(MAKE) --no-print-directory results

ship: setup  ## Find and pack the smallest or fastest variant: make ship STUDY=... [DROP=0.5 MINIMIZE=latency TRAIN=true]
	python -m tools.ship --study $(STUDY) $(if $(DROP),--max-drop $(DROP)) $(if $(MINIMIZE),--minimize $(MINIMIZE)) \
	  $(if $(TRAIN),--may-train $(TRAIN))

results: setup  ## Print the result tables and where the plots are
	@python -m quantstudy results

compare: setup  ## Which variants moved between two revisions or experiments: make compare A=HEAD~1 [B=HEAD PAGE=moved.html]
	@python -m quantstudy compare $(A) $(B) $(if $(PAGE),--page $(PAGE))

test: $(TOOLS)  ## Run the tests that take seconds
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m "not slow"

test-all: test  ## Run those that take minutes too
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m slow

browser:  ## Install the Chromium that the tests of the HTML report need, where this system lets us
	@if command -v chromium chromium-browser google-chrome > /dev/null; then echo 'a Chromium is there'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq && apt-get install -y -qq chromium; \
	then echo 'installed Chromium'; \
	else echo 'no Chromium, and none can be installed here; the tests of the HTML report will be skipped'; fi

check: $(TOOLS)  ## Lint, formatting, types, and whether code.yaml and the evidence are of this code
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	python -m tools.code --check
	python -m tools.evidence --check

format: $(TOOLS)  ## Format the code
	ruff check --fix .
	ruff format .

front: setup  ## Accuracy against size for budgets of bits: make front STUDY=...
	python -m benchmarks.budget_front --study $(STUDY)

figures: setup  ## Draw the figures of docs/
	python -m docs.drawing

evidence: setup $(PEERS)/.ready  ## Make what README and docs/ show, in several sittings: make evidence [PARTS="default runtimes"]
	@python -m tools.evidence $(PARTS)
	@python -m quantstudy readme

dag: setup  ## Draw the DAG by kind of stage, as Mermaid
	@python -m tools.dag

peers: $(PEERS)/.ready  ## Compare with NNCF, ONNX Runtime, torchao and others: make peers STUDY=...
	$(PEERS)/bin/python -m benchmarks.peers --study $(STUDY)

$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnxruntime,openvino,peers]'
	touch $@

clean:  ## Delete the virtual environment and caches; models, data and reports stay
	rm -rf $(VENV) $(PEERS) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
