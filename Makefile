# `make demo` and `make test` need nothing but Python 3.11, pip and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint format typecheck unit fuzz clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/tokenflow demo

test: setup lint typecheck
	$(BIN)/python -m pytest --ignore=tests/apart
	$(BIN)/python -m pytest tests/apart

unit: setup
	$(BIN)/python -m pytest tests/unit tests/property

fuzz: setup
	TOKENFLOW_FUZZ_REQUESTS=10000 $(BIN)/python -m pytest -s tests/cluster/test_security.py -k fuzz

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy -p tokenflow.replicas -p tokenflow.kvstore -p tokenflow.loadgen -p tokenflow.cluster -p tokenflow.client

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
