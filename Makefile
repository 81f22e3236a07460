# Every target makes .venv by itself, with pip, when it is missing, incomplete or older than the files that define it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

EXPERIMENT ?= rings
DEPTHS ?=
ARGS ?=
# One more than processors: many tests wait for processes of their own.
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) + 1)

# The first Python that runs (a name on PATH may be a broken shim), is new enough and can make environments.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; \
	done)

# The stamp is written last and holds the checkout's path: scripts of an environment name it, so a moved one is remade.
STAMP := .venv/.stamp
READY := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && .venv/bin/python -c '' 2>/dev/null && echo yes)

.PHONY: help setup sweep test test-coverage test-fid test-interrupted test-gpu chaos bench dashboard clean .venv force

help: ## list the targets
	@echo "varscale: scaling laws of visual autoregressive image models"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make sweep takes DEPTHS=12,16,20, EXPERIMENT=rings (a shipped name or a YAML file) and ARGS='--workers 1';"
	@echo "  make test takes ARGS for pytest; PYTHON=… names the Python that makes .venv."

setup: .venv ## make .venv: the exact packages of constraints.txt and varscale itself, editable
	@echo "Ready: .venv/bin/varscale"

.venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(if $(READY),,force)
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "make: no Python of 3.11 or later that has venv (on Debian: apt install python3-venv); name one by PYTHON=…" >&2; \
		exit 1; \
	fi; \
	rm -f $(STAMP); \
	if [ "$(READY)" = yes ]; then \
		echo "Bringing .venv up to date …"; \
	else \
		echo "Making .venv with $$("$$python" --version), once; this takes a few minutes (details: .venv/setup.log) …"; \
		"$$python" -m venv --clear .venv; \
	fi; \
	.venv/bin/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		> .venv/setup.log 2>&1 || { tail -n 20 .venv/setup.log >&2; exit 1; }; \
	printf '%s\n' "$$(pwd -P)" > $(STAMP)

sweep: .venv ## train a grid from nothing and fit its laws: make sweep DEPTHS=12,16,20
	@.venv/bin/varscale sweep "$(EXPERIMENT)" $(if $(DEPTHS),--depths "$(DEPTHS)") $(ARGS)

test: .venv ## linters, types, import rules and tests; stops at the first that fails
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/lint-imports --no-cache
	@.venv/bin/mypy
	@.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-coverage: .venv ## how often the laws' intervals cover planted values; takes minutes
	@.venv/bin/python -m pytest -m coverage -rP $(ARGS)

test-fid: .venv ## FID of 10,000 CIFAR-10 images is torch-fidelity's own value; needs ../shared, takes minutes
	@.venv/bin/python -m pytest -m fid $(ARGS)

test-interrupted: .venv ## what takes minutes: sweeps and searches killed at several moments, every benchmark
	@.venv/bin/python -m pytest -m slow $(ARGS)

test-gpu: .venv ## what needs a GPU: the processor's results, to the bit after a kill, memory as foreseen
	@.venv/bin/python -m pytest -m gpu $(ARGS)

chaos: .venv ## random events over many small grids, here and on Slurm; ARGS='--events 100 --seed 0'; takes an hour
	@.venv/bin/python tests/chaos.py $(ARGS)

bench: .venv ## measure training, sampling and data speed on this machine
	@.venv/bin/python -m benchmarks $(ARGS)

dashboard: .venv ## open MLflow on the runs of this folder, on loopback
	@.venv/bin/varscale dashboard $(ARGS)

clean: ## remove build products and caches; keeps .venv and runs/
	@rm -rf dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
