# Two commands do everything: `make demo` and `make test`. Each sets up what it needs, in .venv, the first time.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR: # half a virtual environment is none
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-slow unit lint acceptance mutants bench bench-long bench-results chaos chaos-stock docs captures clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/demo ## The whole way of a record on embedded servers, in a minute; ARGS="--stay" keeps it open
	$(BIN)/kafka-delivery demo $(ARGS)

test: $(VENV)/dev ## The tests that take seconds; what needs java or redis-server is skipped where it is missing
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/dev ## The long ones: short forms of chaos and benchmarks, signals, shutdowns
	$(BIN)/python -m pytest -m "slow and not acceptance" $(ARGS)

unit: $(VENV)/dev ## The tests that need no server
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(VENV)/dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

acceptance: $(VENV)/dev ## Real Kafka and Redis, outages of one and three minutes, and one that comes and goes; ten minutes
	$(BIN)/python -m pytest -m acceptance -s $(ARGS)

mutants: $(VENV)/dev ## Delete or turn one rule at a time, and show which no test notices; ARGS="--only claim.lua"
	$(BIN)/python tests/mutation/mutants.py $(ARGS)

docs: $(VENV)/demo ## Write the pages that are made from the code and from benchmarks/results.json
	$(BIN)/python docs/generate.py

captures: $(VENV)/dev ## Write the terminal output of docs/dead-letters.md anew, from real servers; half a minute
	$(BIN)/python docs/capture_dead_letters.py

clean: ## Remove what was set up and cached
	rm -rf $(VENV) .cache dist

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable '.[demo]' --group dev
	@touch $@

bench: $(VENV)/dev ## What it does a second, beside its peers in the same run; needs java and redis-server, five minutes
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-long: $(VENV)/dev ## The same three times, with medians
	$(BIN)/python benchmarks/bench.py --repeat 3 $(ARGS)

bench-results: $(VENV)/dev ## The same as bench-long, written where docs/scaling.md takes its numbers from, and to that page
	$(BIN)/python benchmarks/bench.py --repeat 3 --output benchmarks/results.json $(ARGS)
	$(BIN)/python docs/generate.py

chaos: $(VENV)/dev ## Twenty minutes of everything that can go wrong, and an account at the end
	$(BIN)/python tests/chaos/chaos.py --seconds 1200 $(ARGS)

chaos-stock: $(VENV)/dev ## The same on Celery's own transport, three minutes of it: fails when nothing is lost
	$(BIN)/python tests/chaos/chaos.py --stock --seconds 150 $(ARGS)
