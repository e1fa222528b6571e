# Headrace: every target does its own set-up. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
DEMO_ARGS ?=
TEST_ARGS ?=
# Ends with make, also after a kill -9, and with it all that it has started.
TIED := exec $(BIN)/python -I -S devstack/child.py $$PPID --

.DEFAULT_GOAL := help
.PHONY: help setup demo up test lint format types protos check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with the pinned versions (EXTRA=gpu for a CUDA machine)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 13)))' || \
	  { echo "headrace needs Python 3.11 or 3.12: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed: on Debian, install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	@touch $@

demo: setup ## train on simulated data, start everything, show a click change an answer (DEMO_ARGS=--keep)
	$(TIED) $(BIN)/headrace demo $(DEMO_ARGS)

up: setup ## run the whole stack until stopped
	$(TIED) $(BIN)/headrace up

check: setup ## test every dependency and name what is missing
	$(BIN)/headrace check

test: setup ## lint, types and all tests (TEST_ARGS='-k name' to choose)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TIED) $(BIN)/python -m pytest $(TEST_ARGS)

lint: setup ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## mypy, strict
	$(BIN)/mypy

format: setup ## ruff, fixing what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup ## regenerate the code of protos/
	$(BIN)/python protos/generate.py

clean: ## remove .venv, caches and .headrace
	rm -rf $(VENV) .headrace .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
