# Each target sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# extra arguments of pytest, e.g. make test-cpu ARGS="-k conv2d"
ARGS ?=
OUT ?= runs/lenet5-digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test lint test-cpu test-interpret test-gpu test-nightly aot aot-update bench results install clean

train: install
	$(BIN)/fastcnn train --model lenet5 --data digits --out $(OUT)

test: lint test-cpu test-interpret aot

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fastcnn needs Python 3.11 or newer: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-cpu: install
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-interpret: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpret $(ARGS)

test-gpu: install
	$(BIN)/python -m pytest -m gpu $(ARGS)

# half an hour: every network of fastcnn.models whole, every CNN of torchvision and timm converted
test-nightly: install
	$(BIN)/python -m pytest -n 2 -m nightly $(ARGS)

aot: install
	$(BIN)/python tests/aot.py

# after a change of kernels or of Triton: what they compile to, to be committed with it
aot-update: install
	$(BIN)/python tests/aot.py --update

# e.g. make bench ARGS="ops --op conv2d"; then make results
bench: install
	$(BIN)/fastcnn bench $(or $(ARGS),--quick)

# tables and plots of benchmarks/results, the blocks of both README files, the pages of predictions and of the networks
results: install
	$(BIN)/python -m fastcnn.benchmarks.report
	$(BIN)/python -m fastcnn.benchmarks.predict
	$(BIN)/python -m fastcnn.benchmarks.predict_memory
	$(BIN)/python -m fastcnn.benchmarks.predict_backward
	$(BIN)/python -m fastcnn.benchmarks.predict_chain
	$(BIN)/python -m fastcnn.benchmarks.gallery

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
