# mcp_vllm: everything is installed into .venv; the first target that needs it makes it.

# A Python from 3.11 to 3.13; the first that is found unless you name one (make PYTHON=python3.12).
PYTHON ?= $(shell tools/find-python)
# Where PyTorch publishes its CPU wheels. Asked for torch only, and only when your own pip settings
# do not lead to the wheel.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# How long `make fuzz` takes.
MINUTES ?= 10

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PYTHON) tools/install.py --torch-index $(TORCH_INDEX)
INSTALL_INPUTS := requirements/cpu.lock pyproject.toml tools/install.py tools/compile_kernels.py \
	patches/vllm-metadata/generate.py
# Named after what the install was made from, so a change of any of it installs again.
STAMP := $(VENV)/.installed-$(shell cat $(INSTALL_INPUTS) | cksum | tr ' ' -)
LOCKS := $(notdir $(basename $(wildcard requirements/*.lock)))

# Two cores and one .venv: nothing here gains from running side by side, with make -j either.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-slow test-matrix fuzz lint docs lock clean

help: ## Show this list
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX)"

install: $(STAMP) ## Make .venv: the CPU build of vLLM, our dependencies, and mcp-vllm

$(STAMP):
	@tools/prerequisites $(PYTHON)
	@$(INSTALL) --venv $(VENV)
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP) ## Move a chat between two real engines and show what it saved
	$(VENV)/bin/mcp-vllm demo

test: $(STAMP) ## Run the tests: units, faults, and the main ones on real engines
	$(PY) -m pytest tests -m "not slow" --durations=12

test-unit: $(STAMP) ## Run the unit tests only (they need no vLLM)
	$(PY) -m pytest tests/unit -m "not slow" -n auto

test-slow: $(STAMP) ## Run the long suites on real engines that `make test` leaves out
	$(PY) -m pytest tests -m slow

test-matrix: $(LOCKS:%=test-against-%) ## Run all tests against each vLLM release that has a lock

test-against-%:
	@tools/prerequisites $(PYTHON)
	@$(INSTALL) --venv build/matrix/$* --lock requirements/$*.lock
	build/matrix/$*/bin/python -m pytest tests

# Not part of the install: 35 MB that nothing else needs.
fuzz: $(STAMP) ## Fuzz every decoder for MINUTES (10), guided by coverage
	$(PY) -m pip install --quiet "atheris>=3.0"
	$(PY) tests/faults/fuzz_decoder.py --minutes $(MINUTES)

lint: $(STAMP) ## Check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(STAMP) ## Write the pages of settings and docs/api.md from the code
	$(PY) -m mcp_vllm.config.docs docs
	$(PY) -m mcp_vllm.agent.openapi docs/api.md

lock: $(STAMP) ## Resolve requirements/cpu.lock again
	$(PY) tools/lock.py

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
