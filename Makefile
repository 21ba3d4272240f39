# Two commands do everything: `make demo` and `make test`. Each sets up what it needs, in .venv, the first time.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR: # half a virtual environment is none
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Two for each core, since half of a test is waiting; above eight of them the longest file decides.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 4 ? 8 : 2 * n)))
PYTEST = $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo test test-all test-stress unit scenarios soak short-soak lint package bench bench-long bench-results chaos \
	chaos-stock mutants docs captures clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/demo ## The whole way of a record on embedded servers, in a minute; ARGS="--stay" keeps it open
	$(BIN)/kafka-delivery demo $(ARGS)

test: $(VENV)/dev ## All that takes seconds: unit, integration, and a scenario for each promise; two minutes on two cores
	$(PYTEST) -m "smoke or not scenario" $(ARGS)

test-all: lint test scenarios package short-soak ## All that CI runs

unit: $(VENV)/dev ## The tests that need no process and no server
	$(PYTEST) tests/unit $(ARGS)

scenarios: $(VENV)/dev ## The other scenarios: worker processes, real servers; ten minutes
	$(PYTEST) tests/scenarios -m "not smoke" $(ARGS)

soak: $(VENV)/dev ## Everything of minutes, one after the other: outages, two hundred thousand dead letters, short chaos
	$(BIN)/python -m pytest tests/soak -s $(ARGS)

short-soak: $(VENV)/dev ## A minute of everything that can go wrong, and a short run of the benchmarks, with nothing beside them
	$(BIN)/python -m pytest tests/soak/test_short_chaos.py tests/soak/test_bench.py $(ARGS)

lint: $(VENV)/dev ## Style, types, and what other people's tools say of our files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/static $(ARGS)

package: $(VENV)/dev ## The wheel: built, in an image too, and tested on every Python that is here
	$(BIN)/python -m pytest tests/package $(ARGS)
	tests/package/on-every-python $(BIN)

test-stress: $(VENV)/dev ## Three runs of `make test` on a machine that is busy and stands still; ARGS="--seed N"
	$(BIN)/python tests/stress/stress.py --jobs $(JOBS) $(ARGS)

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
	$(BIN)/python tests/soak/chaos/chaos.py --seconds 1200 $(ARGS)

chaos-stock: $(VENV)/dev ## The same on Celery's own transport, three minutes of it: fails when nothing is lost
	$(BIN)/python tests/soak/chaos/chaos.py --stock --seconds 150 $(ARGS)
