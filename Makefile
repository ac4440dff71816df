# make train   install if need be, then train the tiny model with FP8 rollouts and AIS (two CPU cores)
# make test    the whole CPU test suite, with tests against a real SGLang server on the CPU
# make bench   the benchmarks beside TRL, verl and SGLang, whose environments it makes; benchmarks/results/latest.json
# make lint    ruff
# make sglang-cpu   the environment of that server (3 GB); `train` and `lint` do without it

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/tiny_countdown.yaml
RUN    ?= runs/$(basename $(notdir $(CONFIG)))-$(shell date +%Y%m%d-%H%M%S)
VENV   := .venv
READY  := $(VENV)/.installed
SGLANG := .venv-sglang
SGLANG_READY := $(SGLANG)/.installed

.PHONY: train test bench lint install sglang-cpu

train: $(READY)
	@$(VENV)/bin/ais-megatron train $(CONFIG) run.dir=$(RUN)

test: $(READY) $(SGLANG_READY)
	@$(VENV)/bin/python -m pytest

bench: $(READY) $(SGLANG_READY) .venv-trl/.installed .venv-verl/.installed
	@$(VENV)/bin/python benchmarks/run_all.py $(if $(ROUNDS),--rounds $(ROUNDS))

lint: $(READY)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

install: $(READY)

sglang-cpu: $(SGLANG_READY)

$(READY): pyproject.toml
	@echo "installing into $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

$(SGLANG_READY): tests/sglang/setup.sh tests/sglang/shim/pyproject.toml pyproject.toml
	@echo "installing SGLang for CPUs into $(SGLANG) with $(PYTHON)"
	@tests/sglang/setup.sh $(SGLANG) $(PYTHON)
	@touch $@

.venv-%/.installed: benchmarks/peers/setup.sh
	@echo "installing the peer $* into .venv-$* with $(PYTHON)"
	@rm -rf .venv-$* && benchmarks/peers/setup.sh $* .venv-$* $(PYTHON)
	@touch $@
