# Two commands: `make demo` and `make test`. Each sets up its own environment in .venv first; PYTHON names the interpreter (3.11 or newer).
# OMP_WAIT_POLICY=PASSIVE: threads that wait sleep. On two cores that others use too this halves the time of a step; on idle ones it costs little.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	OMP_WAIT_POLICY=PASSIVE $(BIN)/qatlas demo --out demo

test: $(VENV)/ready
	$(BIN)/ruff check src tests runs benchmarks
	$(BIN)/mypy
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check src tests runs benchmarks
	$(BIN)/mypy

# What training costs beside torchao, modelopt and brevitas, where they are installed in .venv; go on with the same command. A quiet machine, please.
bench: $(VENV)/ready
	$(BIN)/python benchmarks/training.py --json bench.json --page docs/performance.md

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'qatlas needs Python 3.11 or newer; name one: make PYTHON=python3.12 demo'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info src/*.egg-info
