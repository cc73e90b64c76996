PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test check browser coverage demo clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rtx]' \
	  || echo 'TensorRT-RTX has no wheel for this Python or platform: its tests will be skipped'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dali]' \
	  || echo 'DALI has no wheel for this Python or platform: its tests will be skipped'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .venv/links/qswin
	ln -sfn $(CURDIR)/qswin/*.py $(CURDIR)/models $(CURDIR)/calib $(CURDIR)/qat $(CURDIR)/trt .venv/links/qswin/
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# Headless Chromium for the test of the report's page, which is skipped without one
browser: .browser/chromium

.browser/chromium:
	npm install --silent --no-save --prefix .browser @sparticuz/chromium@147
	cd .browser && node --input-type=module --eval "import chromium from '@sparticuz/chromium'; \
	  import { copyFileSync } from 'fs'; copyFileSync(await chromium.executablePath(), 'chromium')"

# Which lines the tests reach; takes about twice as long as the tests
coverage: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report=term:skip-covered

demo: setup
	$(BIN)/python benchmarks/demo.py

clean:
	rm -rf .venv .browser runs build *.egg-info
