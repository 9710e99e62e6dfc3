# `make demo` and `make test` work on a fresh machine with python3 and, for the compiled extension, a C++17 compiler.
# TIMEROME_CUDA=auto|0|1, TIMEROME_CUDA_ARCHS and MAX_JOBS reach the build (see setup.py).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py constraints.txt timerome/_version.py $(wildcard csrc/*)

.PHONY: demo test lint install clean

demo: install
	$(BIN)/timerome demo

# One pytest process with two threads: more threads than cores spin against each other.
test: lint
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch comes first and by itself, so that a CPU or CUDA build chosen by the machine's pip settings is the one kept.
$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info timerome/*.so
