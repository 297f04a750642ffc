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

.PHONY: help test test-thorough smoke lint format bench demo clean

help:
	@echo "make test           the test suite, doctests and the examples in README.md and docs/"
	@echo "make test-thorough  the same with many more examples for the property tests"
	@echo "make smoke          installed without extras: the packages import, one check passes"
	@echo "make lint           ruff (lint and format) and mypy"
	@echo "make format         let ruff rewrite what it can"
	@echo "make bench          the benchmarks, with their claims checked"
	@echo "make demo           flaxlift check on two published Linen models"
	@echo "make clean          remove environments and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/with-core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# $(VENV)/with-test is newer than pyproject.toml when the extra "test" is installed.
$(VENV)/with-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

test: $(VENV)/with-test
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-thorough: export FLAXLIFT_TEST_PROFILE = thorough
test-thorough: test

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

demo: $(VENV)/with-demo
	$(BIN)/flaxlift check examples.published_models:resnet examples.published_models:bert

clean:
	rm -rf .venv-* .cache .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
