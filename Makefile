# Each target does all of its own set-up: a fresh machine needs python3 (3.11 or later), pip, g++ and make.
# Stamps in .venv make a second call quick; `make clean` forgets everything.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL ?= smollm2-135m-instruct
THREADS ?=
INITDB := /usr/lib/postgresql/*/bin/initdb

CPP := $(shell find server quant -name '*.cpp' -o -name '*.h' -o -name '*.inc') $(wildcard CMakeLists.txt)

.PHONY: run demo test postgres peers check bench compare fmt clean setup finetune-setup test-setup
.DELETE_ON_ERROR:

run: finetune-setup ## serve the default model on 127.0.0.1:8000, and learn from what is asked
	$(BIN)/sterna models pull $(MODEL)
	$(BIN)/sterna up --model $(MODEL)

demo: finetune-setup ## traffic, rounds, the gate, the swap: before and after, in about 45 minutes on two idle cores
	$(BIN)/sterna models pull smollm2-135m-instruct
	$(BIN)/python -m finetune.demo

test: test-setup check postgres ## linters, types, the speed check and every test that needs nothing but this machine
	$(BIN)/sterna models pull smollm2-135m-instruct
	$(BIN)/python -m benchmarks.regressions
	$(BIN)/python -m pytest --durations=10 -m "not real_peer and not gpu$$(ls $(INITDB) >/dev/null 2>&1 || echo ' and not postgres')"

# The trace log is tested on PostgreSQL too. Without its server, and without the right to install it, say so.
postgres:
	@ls $(INITDB) >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; } \
	  || echo "make: no PostgreSQL server here (apt-get install postgresql): its tests are left out"

peers: test-setup $(VENV)/.peers-built ## compare with llama.cpp, which compiles for about ten minutes once
	$(BIN)/sterna models pull smollm2-135m-instruct
	STERNA_TEST_LLAMACPP_PYTHON=$(abspath $(VENV))/llamacpp/bin/python $(BIN)/python -m pytest -m real_peer

check: test-setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## the engine alone: prefill and decode
	$(BIN)/sterna models pull $(MODEL)
	$(BIN)/sterna bench --model $(MODEL) $(if $(THREADS),--threads $(THREADS))

compare: setup ## beside llama.cpp, its AVX2 build and vLLM's CPU build, which are installed first: hours in all
	$(BIN)/sterna models pull smollm2-135m-instruct
	$(BIN)/python -m benchmarks.compare --peers llama llama-avx2 vllm

fmt: test-setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup: $(VENV)/.built
finetune-setup: $(VENV)/.finetune-built
test-setup: $(VENV)/.test-built

# --without-pip and pip's --python: Debian ships venv without ensurepip, so pip puts itself there.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Sterna needs Python 3.11 or later; $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet pip
	touch $@

$(VENV)/.build-tools: $(VENV)/.created pyproject.toml
	$(PIP) install --quiet "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.20" ninja
	touch $@

# The build folder is kept (build/), so that after a change only the touched C++ files are compiled.
$(VENV)/.built: $(VENV)/.build-tools pyproject.toml $(CPP)
	$(PIP) install --quiet --no-build-isolation --editable .
	touch $@

# torch first, alone and by its exact version: any other request may bring CUDA libraries of several gigabytes.
$(VENV)/.finetune-built: $(VENV)/.built
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-build-isolation --editable '.[finetune]'
	touch $@

$(VENV)/.test-built: $(VENV)/.finetune-built
	$(PIP) install --quiet --no-build-isolation --editable '.[test]'
	touch $@

# An environment of its own, so that nothing of a peer can reach ours.
$(VENV)/.peers-built: $(VENV)/.created
	$(BIN)/python -m venv --without-pip $(VENV)/llamacpp
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PIP) --python $(VENV)/llamacpp/bin/python install --quiet llama-cpp-python==0.3.36
	touch $@
