# `make demo` and `make test` each install what they need into .venv; neither needs the other, none needs root.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FOLDERS := mesh placement registry runtimes
PROTOS := runtimes/proto/oip mesh/proto/mmesh mesh/proto/raymesh mesh/proto/health mesh/proto/reflection \
  mesh/proto/reflection_v1alpha registry/proto/etcd
# Passed on: make test ARGS="-k registry -x", make demo ARGS="--models 200", make bench ARGS="warm many".
ARGS ?=

.PHONY: help setup demo test lint bench protos simulate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("raymesh needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras: installed again only when what it depends on has changed.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

# Type checkers and editors find `raymesh.<folder>` through these links; running and testing need none of them.
.PHONY: typings
typings:
	@mkdir -p typings/raymesh
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder typings/raymesh/$$folder; done

setup: $(VENV)/.installed-dev typings ## install everything a developer needs into .venv

demo: $(VENV)/.installed-demo ## a thousand real models behind one endpoint: train, serve, churn, check every answer
	$(BIN)/python loadtests/demo.py $(ARGS)

test: $(VENV)/.installed-dev ## all tests, those on a real mesh included (ARGS="-m 'not e2e and not slow'" for the quick ones)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev typings ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=loadtests $(BIN)/mypy loadtests/*.py loadtests/peers/*.py
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev ## measure this machine (ARGS="warm many cold herd density register" for some of it)
	$(BIN)/python loadtests/bench.py $(ARGS)

simulate: $(VENV)/.installed-dev ## placement alone, in virtual time, on a large made-up cluster
	$(BIN)/python loadtests/simulate.py $(ARGS)

protos: $(VENV)/.installed-dev ## compile the .proto files to the descriptor sets beside them
	for proto in $(PROTOS); do \
	  $(BIN)/python -m grpc_tools.protoc -I $$(dirname $$proto) --include_imports \
	    --descriptor_set_out=$$proto.binpb $$proto.proto; \
	done

clean: ## remove what was built, downloaded or measured here, .venv included
	rm -rf $(VENV) typings build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
