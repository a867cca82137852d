# From a bare Python >= 3.11: `make demo` samples, `make test` tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check format docs docs-serve docs-setup figures

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sana_jax needs Python >= 3.11; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python sample.py --prompt_file=configs/emoji_prompts.txt --grid --output_dir=outputs --overwrite

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_layers_of_the_package.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation: `make docs` builds it into site/, `make docs-serve` shows it
# at http://127.0.0.1:8000 and again whenever a page changes.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs-setup: $(VENV)/.installed-docs

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: docs-setup
	$(MKDOCS) build --strict

docs-serve: docs-setup
	$(MKDOCS) serve

# Draws the figures of the documentation anew.
figures: docs-setup
	JAX_PLATFORMS=cpu $(BIN)/python -m docs.figures
