# Every target makes the environment that it needs: one per Python version, kept until
# pyproject.toml changes. Another interpreter: make test PYTHON=python3.13
PYTHON ?= python3
# Processes that the tests run in, and further arguments for pytest.
WORKERS ?= auto
PYTEST_ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PYTHON) does not run; name a Python >= 3.11 with PYTHON=...)
endif
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin

.PHONY: help test test-thorough test-accelerator test-versions mutants smoke lint format bench \
	bench-accelerator docs demo clean

help:
	@echo "make test               the test suite, doctests and the examples in README.md and docs/"
	@echo "make test-thorough      the same with many more examples for the property tests"
	@echo "make test-accelerator   property tests against raw JAX on whatever jax.devices() offers"
	@echo "make test-versions      the suite on every supported Python that is installed"
	@echo "make mutants            faults planted one at a time: do the tests notice each? (slow)"
	@echo "make smoke              installed without extras: the packages import, one check passes"
	@echo "make lint               ruff (lint and format) and mypy"
	@echo "make format             let ruff rewrite what it can"
	@echo "make bench              the benchmarks, with their claims checked"
	@echo "make bench-accelerator  the benchmarks on whatever jax.devices() offers"
	@echo "make docs               the guides and the API reference as a site, in build/site"
	@echo "make demo               a digits classifier trained in Linen, moved to NNX and trained on, as a report"
	@echo "make clean              remove environments and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/with-core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# $(VENV)/with-test is newer than pyproject.toml when the extra "test" is installed.
$(VENV)/with-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# Each process begins with one half of the tests, so that tests of one file share what is compiled.
test: $(VENV)/with-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-thorough: export FLAXLIFT_TEST_PROFILE = thorough
test-thorough: override PYTEST_ARGS += --timeout 0
test-thorough: test

# JAX_PLATFORMS empty: JAX takes the best that it finds. With a GPU install its JAX first, for
# example: .venv-3.11/bin/python -m pip install 'jax[cuda13]'
ACCELERATOR_TESTS := tests/test_accelerator.py tests/test_properties.py tests/test_both_kinds.py \
	tests/layers/test_generators.py tests/layers/test_pallas.py
test-accelerator: $(VENV)/with-test
	JAX_PLATFORMS= $(BIN)/python -m pytest -n 0 $(ACCELERATOR_TESTS) $(PYTEST_ARGS)

test-versions:
	for python in python3.11 python3.12 python3.13; do \
		if command -v $$python >/dev/null; then $(MAKE) test PYTHON=$$python || exit 1; \
		else echo "no $$python on this machine"; fi; \
	done

# Some of them: make mutants MUTANTS='captures host'; drawn at random: MUTANTS='--sample 20'
mutants: $(VENV)/with-test
	$(BIN)/python -m tests.mutation $(MUTANTS)

smoke: $(VENV)/with-core
	$(BIN)/python -c 'import lifted, nnx_bridge, layers'
	$(BIN)/flaxlift check examples.small_model:mlp

lint: $(VENV)/with-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/with-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/with-dev
	$(BIN)/python -m benchmarks
	$(BIN)/python -m examples.dropconnect_digits --save benchmarks/results

bench-accelerator: $(VENV)/with-dev
	JAX_PLATFORMS= $(BIN)/python -m benchmarks tracing intermediates dropconnect

docs: $(VENV)/with-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

demo: $(VENV)/with-demo
	$(BIN)/python -m examples.digits_migration
	$(BIN)/flaxlift check examples.published_models:resnet examples.published_models:bert

clean:
	rm -rf .venv-* .cache .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
