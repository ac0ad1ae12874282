# Everything a developer does here. Each target first makes .venv by itself, once per pyproject.toml;
# PYTHON=python3.12, of the path or of pyenv, makes and uses .venv-3.12 beside it.

PYTHON ?= python3
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || \
  ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$(PYTHON) 2>/dev/null | tail -n 1)
INTERPRETER := $(or $(INTERPRETER),$(PYTHON))
RELEASE := $(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(RELEASE))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0
# All tests are run in parts at once, each a process of its own; those of servers wait most of the time.
SERVERS := $(wildcard tests/nats_engine/test_*.py)
OUTAGES := tests/nats_engine/test_nats_outages.py
SUITE := tests/nats_engine/test_nats_engine.py
# Of the exhaustive tests, those that take half of the work.
PAIRED := $(addprefix tests/crash/test_,interleavings.py interrupts.py forks.py)
# $(call begin,name,command): a part. end: wait for all of them, and show what they said.
begin = $(2) >$(VENV)/$(1).log 2>&1 & parts="$$parts $$!:$(VENV)/$(1).log"
end = for part in $$parts; do wait $${part%%:*} || code=1; cat $${part\#\#*:}; done; exit $$code
but = $(addprefix --ignore=,$(1))

.PHONY: help install format lint test faults torch mutants soak demo bench bench-nats docs clean all

help:  ## say what the targets are
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

install: $(STAMP)  ## make .venv and install the package in it, editable, with the development tools

$(STAMP): pyproject.toml
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "spoolipc needs Python 3.11 or later; $(PYTHON) is $$($(INTERPRETER) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(INTERPRETER) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment: it lacks venv or ensurepip." >&2; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(INTERPRETER) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(STAMP)  ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

test: $(STAMP)  ## run the tests; ARGS="tests/queue -k loan" narrows them
ifdef ARGS
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)
else
	@parts= code=0; plain() { $(BIN)/python -m pytest -m "not exhaustive" "$$@"; }; \
	$(call begin,crash,plain tests/crash); \
	$(call begin,system,plain tests/system); \
	export SPOOLIPC_VERIFY=1; \
	$(call begin,outages,plain tests/contract $(OUTAGES)); \
	$(call begin,servers,plain $(filter-out $(OUTAGES) $(SUITE),$(SERVERS))); \
	$(call begin,queue,plain tests/queue); \
	plain $(call but,$(addprefix tests/,crash system contract queue) $(filter-out $(SUITE),$(SERVERS))) || code=1; \
	$(end)
endif

faults: $(STAMP)  ## kill and fail every system call of every change of state, in minutes; ARGS="-k name" narrows it
ifdef ARGS
	$(BIN)/python -m pytest -m exhaustive $(ARGS)
else
	@parts= code=0; every() { $(BIN)/python -m pytest -m exhaustive "$$@"; }; \
	$(call begin,servers,every tests/nats_engine); \
	$(call begin,paired,every $(PAIRED)); \
	every $(call but,tests/nats_engine $(PAIRED)) || code=1; \
	$(end)
endif

torch: $(VENV)/.torch  ## the tests of spoolipc.torch, with a release of torch that they pass with
	$(BIN)/python -m pytest tests/tensors $(ARGS)

$(VENV)/.torch: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	@touch $@

mutants: $(STAMP)  ## break each promise on purpose and see a test fail, in minutes; ARGS="lease late" tries these only
	$(BIN)/python tests/mutants.py $(ARGS)

soak: $(STAMP)  ## kill writers and readers at random for SPOOLIPC_SOAK seconds (300), and account for every item
	PYTHONPATH=tests $(BIN)/python tests/system/soak.py $(ARGS)

demo: $(STAMP)  ## the article's experiment, on real processes; ARGS="--rounds 100" is its full size
	$(BIN)/python examples/article.py $(ARGS)

bench: $(VENV)/.bench  ## measure beside the peers and redraw docs/performance.md; ARGS="--quick" is shorter
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.report $(if $(findstring --quick,$(ARGS)),benchmarks/results/quick.json)

bench-nats: $(VENV)/.bench  ## measure spools on servers beside plain nats-py and others; ARGS="--quick" is shorter
	$(BIN)/python -m benchmarks.servers $(ARGS)

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

docs: $(STAMP)  ## write docs/reference.md from the docstrings; a test fails when it is not current
	$(BIN)/python docs/build.py

clean:  ## remove what building and testing left; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

all: format docs lint test  ## what to run before a commit
