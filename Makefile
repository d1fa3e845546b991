# make setup   .venv with the pinned dependencies and the compiled modules; other targets do it first
# make train   trains a compact model on generated scenes and evaluates it
# make test    the test suite;  make lint   ruff
# make aot-newest   compiles the Triton kernels under the newest triton on PyPI
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch from there (PyPI's is a CUDA build).

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# Stamps stand in for what pip did, so that a second run reuses it.
DEPENDENCIES := $(VENV)/.dependencies
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCH_BRINGS_TRITON := "from importlib.metadata import requires; \
	raise SystemExit(not any('triton' in need for need in requires('torch')))"
# The embedded data and the run that `make train` makes of it.
SCENES := build/scenes
RUN := logs/albef_scenes
# The packages of a triton that is not the environment's own.
TRITON_NEWEST := build/triton-newest

.PHONY: setup train test lint aot-newest clean

setup: $(BUILT)

$(DEPENDENCIES): constraints.txt constraints-cpu.txt
	@echo "setup: installing the pinned dependencies into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		torch setuptools wheel
	$(PIP) install --no-deps -r constraints.txt
	$(BIN)/python -c $(TORCH_BRINGS_TRITON) || $(PIP) install --no-deps -r constraints-cpu.txt
	@touch $@

$(BUILT): $(DEPENDENCIES) setup.py pyproject.toml $(SOURCES)
	@echo "setup: building the compiled modules"
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(SCENES)/.made: | $(BUILT)
	$(BIN)/vlpfast data make scenes $(SCENES) --num-samples 20000
	@touch $@

# Captions 0 and 1 describe an image fully; 2 and 3 fit others too. `heldout` shows combinations of
# shape and colour that training never does.
train: setup $(SCENES)/.made
	$(BIN)/vlpfast train albef_scenes --data $(SCENES)/train --resume latest
	$(BIN)/vlpfast eval $(RUN) --data $(SCENES)/val --task retrieval --captions 0 1 --rerank-k 16
	$(BIN)/vlpfast eval $(RUN) --data $(SCENES)/heldout --task retrieval --captions 0 1
	$(BIN)/vlpfast eval $(RUN) --data $(SCENES)/val --task mlm
	@echo "loss curves: $(RUN)/loss.png; recall bars: $(RUN)/eval/"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

aot-newest: setup
	$(PIP) install --no-deps --upgrade --target $(TRITON_NEWEST) triton
	PYTHONPATH=$(TRITON_NEWEST) $(BIN)/python -m vlpfast.kernels.aot

clean:
	rm -rf $(VENV) build dist *.egg-info vlpfast/*.so .pytest_cache .ruff_cache .hypothesis
