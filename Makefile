# Each target is enough on a fresh machine with Python 3.11 or newer and an internet connection.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Whatever the environment says: without bytecode on the disk, every process that a test starts would
# compile anew what it imports.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-card fuzz bench-gpu lint clean

help:
	@echo "make demo       train a small CNN on four 4000x4000 images under a memory budget (minutes)"
	@echo "make test       the CPU tests, but for the slow ones"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make test-card  those that the host can run in a GPU's place"
	@echo "make bench-gpu  a short UltraMNIST benchmark on a CUDA device; call it again to go on"
	@echo "make fuzz       open files that are changed at random, for ten minutes"
	@echo "make lint       ruff, mypy and the import contracts"

# torch goes in first and alone: whatever depends on it then takes the build that is there.
# Resolved together with them, another one of several gigabytes may be downloaded.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/streamcnn demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu"

# Collecting all files takes longer than these tests' first results, and imports what they do not need.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $$(grep -l "mark\.gpu" tests/test_*.py)

# Kernels of Triton run under its interpreter with TRITON_INTERPRET=1 in place of STREAMCNN_TRITON=0, for long.
test-card: $(INSTALLED)
	STREAMCNN_EMULATED_CARD=1 STREAMCNN_TRITON=0 PYTHONPATH=tests \
		$(BIN)/python -m pytest -m gpu $$(grep -l "mark\.gpu" tests/test_*.py)

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --minutes 10

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks run --scale gpu --budget 11GB --device cuda --seconds 440 --workers 8 \
		--methods STREAM-PYRAMID,PYRAMID-1024,PYRAMID-512,STREAM-RN18,RN-1024,RN-512
	$(BIN)/python -m benchmarks table --scale gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info demo-output fuzz-faults .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
