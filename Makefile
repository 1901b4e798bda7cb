# Two commands set everything up: `make finetune` runs the main job, `make test` the tests.
# They use the active virtual environment, else make .venv here.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
OUTPUT ?= runs/rotten_tomatoes

SOURCES := bench build_support python tests

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet

.PHONY: help finetune test lint format bench cuda

help:
	@echo "make finetune   set up, then fine-tune MiniLM on Rotten Tomatoes with C3A (about 6 minutes)"
	@echo "make test       set up, then check formatting and run every test"
	@echo "make bench      set up, then time the operator against its peers"
	@echo "make cuda       rebuild with the CUDA library (needs nvcc 13)"
	@echo "make format     format the sources"

$(PY):
	$(PYTHON) -m venv "$(VENV)"

finetune: $(PY)
	$(INSTALL) $(TORCH)
	$(INSTALL) '.[finetune]'
	$(PY) -m c3a finetune --output $(OUTPUT)

test: $(PY)
	$(INSTALL) $(TORCH)
	$(INSTALL) '.[test]'
	$(MAKE) lint
	$(PY) -m pytest

lint:
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES) README.md
	$(VENV)/bin/clang-format --dry-run --Werror cpp/* cuda/*

format: $(PY)
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES) README.md
	$(VENV)/bin/clang-format -i cpp/* cuda/*

bench: $(PY)
	$(INSTALL) $(TORCH)
	$(INSTALL) '.[bench]'
	$(PY) bench/bench.py

# cufft.h comes from cuFFT's own wheel. Compiling needs no GPU and no CUDA build of torch.
cuda: $(PY)
	$(INSTALL) $(TORCH)
	$(INSTALL) --no-deps nvidia-cufft==12.0.0.61
	C3A_CUDA=ON $(INSTALL) --force-reinstall --no-deps .
	$(PY) -m c3a info
