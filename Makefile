# The doors of the project. Each sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
READY  := $(VENV)/.ready
SHOWN  := $(VENV)/.demo
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: base-model demo test test-slow check format docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(READY)

$(STAMP): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $(STAMP)

$(SHOWN): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt peft
	touch $(SHOWN)

demo: $(SHOWN)  ## teach the embedded model new tasks, and show it (lorica-demo/report.html)
	HF_HUB_OFFLINE=1 $(BIN)/lorica demo

test: $(STAMP)  ## the whole suite but its slow part, on two processes
	$(PYTEST) -n 2 --dist worksteal -m "not slow"

test-slow: $(STAMP)  ## the slow part
	$(PYTEST) -n 2 --dist worksteal -m slow

check: $(STAMP)  ## format, lint, types, suite
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks examples docs
	$(BIN)/ruff check --fix src tests benchmarks examples docs

base-model: $(STAMP)  ## train the embedded model anew (half an hour), into build/base-model
	$(BIN)/python benchmarks/base_model.py --out build/base-model --seed 0 --steps 2400 --threads 2

docs: $(STAMP)  ## write the generated parts of README and docs anew
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
