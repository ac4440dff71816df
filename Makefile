# make train   install if need be, then train the tiny model with FP8 rollouts and AIS (two CPU cores)
# make test    the whole CPU test suite
# make lint    ruff

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/tiny_countdown.yaml
RUN    ?= runs/$(basename $(notdir $(CONFIG)))-$(shell date +%Y%m%d-%H%M%S)
VENV   := .venv
READY  := $(VENV)/.installed

.PHONY: train test lint install

train: $(READY)
	@$(VENV)/bin/ais-megatron train $(CONFIG) run.dir=$(RUN)

test: $(READY)
	@$(VENV)/bin/python -m pytest

lint: $(READY)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

install: $(READY)

$(READY): pyproject.toml
	@echo "installing into $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
