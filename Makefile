# Everything a person or CI types. Each target does its own set-up, once; stamps remember what is done.
# Paths are relative, so the checkout may lie below a directory with spaces in its name.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# `command -v` is not enough: a version manager may offer a python3.11 that only says it is not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo docs lint test test-with-servers test-without test-2rank test-haproxy test-faults bench bench-quick peers bench-engine bench-sampling bench-sharding test-sharding bench-flood bench-durability cookbook modelscope clean

help:
	@echo "make demo              a model learns its name through the tinker SDK (minutes; downloads 93 MB once)"
	@echo "make test              lint, types and every test"
	@echo "make test-2rank        the end-to-end tests against two ranks that share the models (minutes)"
	@echo "make test-haproxy      the same behind HAProxy in the place of Serve's own proxy (minutes)"
	@echo "make test-faults       the long form: 50,000 random schedules, 52 cases of kills, a cluster of two nodes (over an hour)"
	@echo "make bench             every figure of benchmarks/README.md, with plots (20 minutes; peers once: 4 GB more)"
	@echo "make bench-quick       only shows that each part of it works (minutes)"
	@echo "make bench-engine      many tenants in one pass beside one after another, and adapter paging"
	@echo "make bench-sampling    tokens a second beside transformers.generate"
	@echo "make bench-sharding    a step on one rank and on two, and the bytes that ranks send"
	@echo "make test-sharding     the long form: four ranks, 100 random ticks, real shapes (3.7 GB of disk)"
	@echo "make bench-durability  cost of journal and snapshots on a training step"
	@echo "make bench-flood       one flooding and four modest tenants"
	@echo "make docs              build/site from docs/"
	@echo "make cookbook          tinker-cookbook's recipes, unmodified, on a small model (half an hour; downloads 0.4 GB once)"
	@echo "make modelscope        the hosted service's program with both of its clients (downloads 1 GB once)"
	@echo "make lint              ruff and mypy only"
	@echo "make venv              .venv with the package in it: .venv/bin/twinkle-serve"
	@echo "make clean             remove the virtual environment (models/ stays)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== virtual environment (.venv, $(PYTHON))"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e '.[dev,sharding]'
	# Tests use its tools; what it asks for besides is there, or nothing that they need.
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps tinker-cookbook==0.6.1
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests that start servers mostly wait, the others compute, so both go side by side.
test: lint
	@echo "== pytest, twice: with servers (shown when it is over), and the rest"
	@$(MAKE) --no-print-directory -j2 -k test-with-servers test-without

test-with-servers: $(STAMP)
	@$(BIN)/python -m pytest -m slow --durations=10 > .venv/test-with-servers.log 2>&1 && passed=yes || passed=no; \
	    echo "== with servers"; cat .venv/test-with-servers.log; test $$passed = yes

test-without: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --durations=10

# A peer that cannot be installed is a row that says so, not a failure.
peers: $(STAMP)
	@echo "== other servers to compare with (.peers)"
	-$(BIN)/python -m benchmarks.peers.twinkle
	-$(BIN)/python -m benchmarks.peers.skyrl

bench: peers
	$(BIN)/python -W ignore -m benchmarks.suite

bench-quick: $(STAMP)
	$(BIN)/python -W ignore -m benchmarks.suite --quick --results bench-quick

# One thread and sleeping OpenMP workers: other jobs on the machine then disturb all arms alike.
bench-engine: $(STAMP)
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.engine
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.paging

bench-sampling: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.load

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

bench-sharding: $(STAMP)
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.sharding

test-sharding: $(STAMP)
	TWINKLE_SHARDING_LONG=1 $(BIN)/python -m pytest tests/engine/sharding --durations=10

test-faults: $(STAMP)
	TWINKLE_SCHEDULES=50000 $(BIN)/python -m pytest tests/control/test_durability.py tests/storage
	TWINKLE_FAULT_SEEDS=13 $(BIN)/python -m pytest tests/faults tests/cluster/test_ranks.py --durations=10

test-2rank: $(STAMP)
	TWINKLE_DEPLOYMENT=deployments/local-2rank.yaml $(BIN)/python -m pytest tests/e2e --durations=10

test-haproxy: $(STAMP)
	TWINKLE_PROXY=haproxy $(BIN)/python -m pytest tests/e2e --durations=10

bench-flood: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -W ignore -m benchmarks.flood

bench-durability: $(STAMP)
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.durability

cookbook: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.cookbook.run_recipes

modelscope: $(STAMP)
	TWINKLE_KITS=1 $(BIN)/python -m pytest tests/e2e/test_modelscope_example.py

clean:
	rm -rf .venv
