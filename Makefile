# Everything a person or CI types. Each target does its own set-up, once; stamps remember what is done.
# Paths are relative, so the checkout may lie below a directory with spaces in its name.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# `command -v` is not enough: a version manager may offer a python3.11 that only says it is not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed
OLD_SDKS := 0.7.0 0.16.1
OLD_SDK_STAMPS := $(OLD_SDKS:%=.venvs/tinker-%/.installed)

.PHONY: help venv demo lint test sdks clean

help:
	@echo "make demo   a model learns its name through the tinker SDK (minutes; downloads 93 MB once)"
	@echo "make test   lint, types and every test"
	@echo "make lint   ruff and mypy only"
	@echo "make venv   .venv with the package in it: .venv/bin/twinkle-serve"
	@echo "make clean  remove the virtual environments (models/ stays)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== virtual environment (.venv, $(PYTHON))"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e '.[dev,sharding]'
	@touch $@

# Old SDKs share every other package with .venv: their own requirements have no upper bounds that matter.
sdks: $(OLD_SDK_STAMPS)

.venvs/tinker-%/.installed: $(STAMP)
	@echo "== tinker $* in a virtual environment of its own"
	$(BIN)/python -m venv --without-pip .venvs/tinker-$*
	$(BIN)/python -m pip --python .venvs/tinker-$*/bin/python --disable-pip-version-check install --quiet \
	    --no-deps tinker==$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$(.venvs/tinker-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint sdks
	@echo "== pytest"
	$(BIN)/python -m pytest --durations=10

clean:
	rm -rf .venv .venvs
