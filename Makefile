PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test check demo clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rtx]' \
	  || echo 'TensorRT-RTX has no wheel for this Python or platform: its tests will be skipped'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

demo: setup
	$(BIN)/python benchmarks/demo.py

clean:
	rm -rf .venv runs build *.egg-info
