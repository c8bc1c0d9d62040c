# The two commands of a newcomer are `make provision` and `make test`; `make` alone lists all.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.ready
# INVENTORY=jetsons.ini: your own fleet. Without it: the simulated one, which needs root on Linux.
INVENTORY ?=
FLEET ?= default
# What `make bundle` is for: ids of platform rows, and Pythons of the controller that has no internet.
PLATFORMS ?=
PYTHONS ?=
BUNDLE_ARGS ?=
# Further words for ansible-playbook, e.g. ARGS='--ask-become-pass --limit site_a'.
ARGS ?=

PYTHON_ENV := PATH="$(BIN):$$PATH" PYTHONUNBUFFERED=1
PROVISION = $(PYTHON_ENV) $(BIN)/python tools/provision.py \
	--fleet '$(FLEET)' $(if $(INVENTORY),--inventory '$(INVENTORY)') $(if $(ARGS),--args '$(ARGS)')

.PHONY: help venv provision check verify fleet-up fleet-down test test-cuda test-browser gpu-proof lint unit molecule lock bundle open clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo; echo "  INVENTORY=jetsons.ini  your fleet (default: a simulated one)   ARGS='…'  more for ansible-playbook"
	@echo "  PYTHON=python3.12      the controller's Python (3.10 to 3.13)  FLEET=…   name of the simulated fleet"

# Only a missing or outdated stamp runs this: a second `make` costs nothing.
$(STAMP): tools/bootstrap $(wildcard requirements/py3*.txt)
	@tools/bootstrap '$(VENV)' '$(STAMP)' $(if $(INVENTORY),,--install-system-packages)

venv: $(STAMP) ## make .venv with the locked requirements, for typing ansible-playbook yourself

provision: $(STAMP) ## bring a fleet from bare to verified
	@$(PROVISION) provision

check: $(STAMP) ## say what provision would change, change nothing (--check --diff)
	@$(PROVISION) check

verify: $(STAMP) ## test what is installed, install nothing
	@$(PROVISION) verify

fleet-up: $(STAMP) ## start the simulated fleet
	@$(PROVISION) fleet-up

fleet-down: $(STAMP) ## stop the simulated fleet and remove its hosts
	@$(PROVISION) fleet-down

test: $(STAMP) ## everything that CI runs
	@$(PYTHON_ENV) $(BIN)/python tools/run_tests.py $(STAGES)

# A lane of its own: CI has no time for it.
test-cuda: $(STAMP) ## one kernel of upstream's through the whole chain by a real nvcc: 6 minutes, 1 GB of disk
	@$(PYTHON_ENV) $(BIN)/python tools/provision.py prepare
	$(PYTHON_ENV) pytest tests/cuda -v

test-browser: $(STAMP) ## the fleet report in a headless Chromium (as root on Debian it is installed)
	$(PYTHON_ENV) python tests/browser/need_chromium.py
	$(PYTHON_ENV) pytest tests/browser

gpu-proof: ## prove the kernels on this machine's own GPU (docs/gpu.md)
	python3 tools/gpu_proof.py controller wheels provision again vision measure upstream builds $(GPU_ARGS)

lint: $(STAMP) ## ruff, mypy, yamllint, ansible-lint
	$(PYTHON_ENV) ruff check .
	$(PYTHON_ENV) mypy
	$(PYTHON_ENV) yamllint --strict .
	$(PYTHON_ENV) ansible-lint --offline

unit: $(STAMP) ## the unit tests alone
	$(PYTHON_ENV) pytest tests/unit

molecule: $(STAMP) ## the default scenario on the simulator
	@$(PROVISION) molecule

# --no-emit-index-url and running inside the folder keep this machine's addresses and paths out of the files.
lock: $(STAMP) ## resolve requirements/*.in again, for each supported Python
	cd requirements; for version in 3.10 3.11 3.12 3.13; do \
	    echo "==> Python $$version"; \
	    $(BIN)/uv pip compile --quiet --upgrade --python-version $$version --generate-hashes --no-emit-index-url \
	        --no-emit-find-links --no-header --output-file py$${version/./}.txt controller.in dev.in; \
	done

# PLATFORMS: ids of platform rows, fetched without any device. Without it: what the devices of INVENTORY lack.
bundle: $(STAMP) ## pack all that a controller without internet needs into one file (docs/offline.md)
	@$(PYTHON_ENV) $(BIN)/python tools/bundle.py make --platforms '$(PLATFORMS)' $(if $(PYTHONS),--pythons '$(PYTHONS)') \
	    $(if $(INVENTORY),--inventory '$(INVENTORY)') $(if $(ARGS),--args '$(ARGS)') $(BUNDLE_ARGS)

open: ## verify the bundle that this folder was unpacked from, and put its parts in place
	@$(or $(PYTHON),python3) tools/bundle.py open $(BUNDLE_ARGS)

# What a bundle brought stays: without internet nobody could fetch it again.
clean: ## remove .venv, caches and the simulated fleet
	@if [ -x $(BIN)/python ]; then $(PROVISION) fleet-down; fi
	rm -rf --one-file-system '$(VENV)' .pytest_cache .mypy_cache .ruff_cache reports
	@if [ -d .cache ]; then find .cache -mindepth 1 -maxdepth 1 ! -name bundle -exec rm -rf --one-file-system {} +; fi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
