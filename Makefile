# Two commands do everything on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all chaos lint format docs notebooks wheel clean

demo: $(STAMP)
	$(BIN)/python -m shadowlit demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# With the rest of those families of tests of which `make test` runs one.
test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu and not hub and not chaos"

# Commands are killed some 200 times; CHAOS='--chaos-seed=7' for other moments. A table of figures comes last.
chaos: $(STAMP)
	$(BIN)/python -m pytest -q tests/chaos -m chaos $(CHAOS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site: strict (--quiet would drop the warnings that --strict counts), without a network. Its search needs a server: python -m http.server -d build/site.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel in an empty environment and an empty folder: demo, init, plan and fit. Needs a package index.
wheel: $(STAMP)
	$(BIN)/python dev/wheel.py

notebooks: $(STAMP)
	$(BIN)/jupyter nbconvert --to html --execute --output-dir notebooks/html notebooks/*.ipynb

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Where pip leaves no byte code (PYTHONDONTWRITEBYTECODE), every process would compile what it imports.
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1
	touch $(STAMP)
