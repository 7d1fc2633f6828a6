# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip upgrades nothing that constraints.txt pins, so torch stays the tested build
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all check bench faults install format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt tests/oracles.txt tests/parity/fetch_ssd_minimal.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/oracles -r tests/oracles.txt
	$(BIN)/python tests/parity/fetch_ssd_minimal.py $(VENV)/oracles
	touch $@

demo: install
	$(BIN)/graft train presets/models/default.yaml --resume auto

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports --no-cache

test: check
	$(BIN)/python -m pytest -n 2 -m "not slow and not fault"

faults: install
	$(BIN)/python -m pytest -n 2 -m fault

test-all: check
	$(BIN)/python -m pytest -n 2

bench: install
	$(BIN)/python -m benchmarks

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis runs .graft_cache
