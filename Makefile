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

PACKAGES = $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")

# Sanitized code is loaded into a Python that is not: the run-time libraries go first. -S keeps an
# editable installation's import hook from going before PYTHONPATH.
SANITIZED := build/sanitized
WATCHED = PYTHONPATH=$(SANITIZED):$(PACKAGES) \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 C3A_SANITIZED=1 $(PY) -S -m pytest

.PHONY: help finetune test levels sanitize aarch64 lint format bench cuda

help:
	@echo "make finetune   set up, then fine-tune MiniLM on Rotten Tomatoes with C3A (about 4 minutes)"
	@echo "make test       set up, then check formatting and run every test"
	@echo "make levels     the tests at the CPU's other instruction sets (after make test)"
	@echo "make sanitize   the CPU kernels' tests under AddressSanitizer and UBSan (after make test)"
	@echo "make aarch64    compile the CPU library for aarch64 (after make test)"
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

levels:
	C3A_CPU_LEVEL=x86-64-v3 $(PY) -m pytest --ignore tests/test_cli.py
	C3A_CPU_LEVEL=x86-64-v2 $(PY) -m pytest --ignore tests/test_cli.py
	C3A_CPU_LEVEL=aten $(PY) -m pytest tests/test_operator.py tests/test_rules.py tests/test_linear.py

sanitize:
	rm -rf $(SANITIZED)
	C3A_SANITIZE=ON C3A_CUDA=OFF C3A_PYBIND=OFF $(INSTALL) --no-deps --target $(SANITIZED) .
	$(WATCHED) tests/test_cpu.py tests/test_operator.py tests/test_spectra.py
	C3A_CPU_LEVEL=x86-64-v3 $(WATCHED) tests/test_cpu.py
	C3A_CPU_LEVEL=x86-64-v2 $(WATCHED) tests/test_cpu.py

# Another compiler for another machine; nothing of it runs here.
AARCH64 = $(PY) -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O2 -Wall -Wextra -Werror \
	-DC3A_LEVEL=native -DTORCH_TARGET_VERSION=0x020a000000000000ULL -fPIC -c -o build/aarch64.o \
	-isystem $(PACKAGES)/torch/include

aarch64:
	$(INSTALL) ziglang
	mkdir -p build
	for file in cpp/library.cpp cpp/aten.cpp cpp/cpu.cpp cpp/cpu_kernel.cpp cpp/cpu_plan.cpp; do \
		$(AARCH64) $$file || exit 1; done

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
	$(PY) bench/bench.py --plot bench/speed.png --json bench/speed.json

# cufft.h comes from cuFFT's own wheel. Compiling needs no GPU and no CUDA build of torch.
cuda: $(PY)
	$(INSTALL) $(TORCH)
	$(INSTALL) --no-deps nvidia-cufft==12.0.0.61
	C3A_CUDA=ON $(INSTALL) --force-reinstall --no-deps .
	$(PY) -m c3a info
