# make demo       train the shipped model and see it learn
# make test       all tests
# make test-fast  the quick ones: about a minute on two cores
# make check      what CI runs: format, lint, types, tests, doctests
# make bench      speed, one JSON line a figure
# make tables     every method of the paper on the shipped model; hours, resumable
# make tables-quick  two iterations of every row, to see that they run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One process a core, one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo test test-fast types check bench tables tables-quick clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); this takes some minutes"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

demo: $(VENV)/.installed
	rm -rf outputs/demo
	$(BIN)/unigrpo train output.folder=outputs/demo

test: $(VENV)/.installed-test
	$(PYTEST)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" -o addopts="--import-mode=importlib -q" tests

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# mypy runs on one core, so it need not hold up the tests.
	$(MAKE) --jobs=2 types test
	$(MAKE) tables-quick

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/bench.py

tables: $(VENV)/.installed
	$(BIN)/unigrpo tables

tables-quick: $(VENV)/.installed
	rm -rf outputs/tables-quick
	$(BIN)/unigrpo tables --quick --out outputs/tables-quick

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
