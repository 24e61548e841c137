# make quickstart   set up and run the example
# make test         set up, lint, run the tests
# make env          set up only (.venv; elsewhere with MMRAZOR_QUANT_VENV=/path)

# The first of these that runs: a version manager's python3.11 may exist and not work.
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c '' 2>/dev/null && { echo $$p; break; }; done)
MMRAZOR_QUANT_VENV ?= .venv
export MMRAZOR_QUANT_VENV
BIN := $(MMRAZOR_QUANT_VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help env quickstart test lint format clean

help:
	@echo 'make quickstart | test | env | lint | format | clean'

env:
	@test -n '$(PYTHON)' || { echo 'No Python found: install Python 3.11, then run make again.' >&2; exit 1; }
	@$(PYTHON) tools/env/setup_env.py

quickstart: env
	@$(BIN)/python tools/quickstart.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadfile

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps the environment and the user's wheel cache: they are expensive to make again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
