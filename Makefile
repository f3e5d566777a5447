# Everything a person or CI types. Each target does its own set-up, once; stamps remember what is done.
# Paths are relative, so the checkout may lie below a directory with spaces in its name.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# `command -v` is not enough: a version manager may offer a python3.11 that only says it is not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo lint test clean

help:
	@echo "make demo   a model learns its name through the tinker SDK (minutes; downloads 93 MB once)"
	@echo "make test   lint, types and every test"
	@echo "make lint   ruff and mypy only"
	@echo "make venv   .venv with the package in it: .venv/bin/twinkle-serve"
	@echo "make clean  remove the virtual environment (models/ stays)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== virtual environment (.venv, $(PYTHON))"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e '.[dev,sharding]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	@echo "== pytest"
	$(BIN)/python -m pytest --durations=10

clean:
	rm -rf .venv
