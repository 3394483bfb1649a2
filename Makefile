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
.PHONY: help setup demo docs test test-python test-cpp test-asan test-tsan test-vulkan lint format typecheck stubs check-stubs bench sdist wheel clean distclean

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

# A build of its own with an environment of its own: the module of `make setup` stays what it is. Mesa's lavapipe is a Vulkan
# device that computes on the CPU; VK_DRIVER_FILES= (empty) tests the machine's own GPU.
VULKAN_SETUP := build/vulkan-venv/setup.stamp
VULKAN_PACKAGES := glslc libvulkan-dev mesa-vulkan-drivers spirv-headers
VK_DRIVER_FILES ?= $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd*.json))
GGML_VK_VISIBLE_DEVICES ?= 0

test-vulkan: $(VULKAN_SETUP) ## placements on a Vulkan device, a GPU or Mesa's software one; builds for minutes the first time
	@$(if $(VK_DRIVER_FILES),VK_DRIVER_FILES=$(VK_DRIVER_FILES) VK_ICD_FILENAMES=$(VK_DRIVER_FILES)) GGML_VK_VISIBLE_DEVICES=$(GGML_VK_VISIBLE_DEVICES) \
	  build/vulkan-venv/bin/python -m pytest -m vulkan tests/vulkan

$(VULKAN_SETUP): $(NATIVE_SOURCES)
	@if command -v dpkg apt-get >/dev/null && ! dpkg --status $(VULKAN_PACKAGES) >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends $(VULKAN_PACKAGES); \
	  else echo "a Vulkan build needs these packages: $(VULKAN_PACKAGES)" >&2; exit 1; fi; fi
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

# The peers: llama.cpp's own programs, from the same objects, and llama-cpp-python, built from the same sources.
bench: setup ## benchmarks against llama.cpp and llama-cpp-python; BENCH=benchmarks/test_speed.py for one of them, BENCH_ARGS for pytest
	@$(CMAKE) -S . -B $(BUILD) -DLLAMA_MOE_BENCH_PEERS=ON
	@$(CMAKE) --build $(BUILD) --target llama-bench llama-batched-bench llama-server
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_PROJECT_ggml_INCLUDE=$(abspath third_party/no_amx.cmake)" $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation \
	  --config-settings=build-dir=$(BUILD) --editable '.[bench]'
	$(BIN)/python -m pytest $(BENCH) --benchmark-only $(BENCH_ARGS)

sdist: setup ## the source distribution, with llama.cpp's sources in it
	@$(BIN)/python -m build --sdist

wheel: setup ## a wheel for this machine
	@$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove what was built; .venv and fetched files stay
	rm -rf build dist llama_moe/_core*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

distclean: clean ## remove .venv too
	rm -rf $(VENV)
