# The doors of the project. Each sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
READY  := $(VENV)/.ready
SHOWN  := $(VENV)/.demo
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: base-model demo test test-slow lint check format docs lowest package clean

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

lint: $(STAMP)  ## format, lint, types, direction of imports
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test  ## all of these, and the suite

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks examples docs
	$(BIN)/ruff check --fix src tests benchmarks examples docs

base-model: $(STAMP)  ## train the embedded model anew (half an hour), into build/base-model
	$(BIN)/python benchmarks/base_model.py --out build/base-model --seed 0 --steps 2400 --threads 2

docs: $(STAMP)  ## write the generated parts of README and docs anew
	$(BIN)/python docs/generate.py

lowest:  ## the oldest packages that pyproject.toml admits, in an environment of their own
	rm -rf build/lowest && mkdir -p build
	$(PYTHON) -m venv build/lowest
	$(PYTHON) .ci/lowest.py peft tensorboard > build/lowest.txt
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' constraints.txt)" -r build/lowest.txt
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	build/lowest/bin/python -m pip check
	build/lowest/bin/python tests/smoke.py

package:  ## wheel and source archive in dist/, and the wheel tried in an environment of its own
	rm -rf dist build && mkdir -p build
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/tools/bin/python -m build --outdir dist
	build/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch dist/*.whl
	build/wheel/bin/python tests/smoke.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
