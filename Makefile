# `make demo` and `make test` need nothing but Python 3.10-3.13 and make: each sets itself up.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo report test check bench clean

help: ## show what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## make .venv and install everything into it, if it is not up to date

# torch first and by its exact version: everything after it then keeps that build.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY) ## ABMIL and TransMIL with and without the plug-in on real data: a table and a figure
	$(BIN)/python run.py -m +experiment=demo
	$(BIN)/python -m mil_anchor report outputs/demo
	$(BIN)/python -m mil_anchor figures outputs/demo

report: $(READY) ## the plug-in table on real and on synthetic data: one HTML page
	$(BIN)/python run.py -m +experiment=report
	$(BIN)/python run.py -m +experiment=report_synthetic
	$(BIN)/python -m mil_anchor report outputs/report

test: $(READY) ## all tests
	$(BIN)/python -m pytest -q -m ""

check: $(READY) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY) ## time and memory next to other libraries' models: goals met and missed
	for script in plugin peers memory growth read_bag loop sweep; do \
		$(BIN)/python -m benchmarks.$$script || exit 1; \
	done
	$(BIN)/python -m benchmarks.modes --device cuda
	$(BIN)/python -m benchmarks.results

clean: ## remove the environment and all outputs
	rm -rf .venv outputs
