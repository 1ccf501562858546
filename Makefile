# Two commands: `make run` (a first run with its report) and `make test` (the gate).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: run test clean

run: $(VENV)/.installed
	$(BIN)/framp run presets/digits.toml --engine flower

test: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/gate

# The stamp is newer than pyproject.toml once everything is installed.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { $(PYTHON) --version; echo "FRAMP needs Python 3.11, 3.12 or 3.13: make run PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) framp.egg-info
