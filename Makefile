PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test slow gpu check floors browser docs coverage demo wheel lock audit clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@echo 'Making .venv: 8 GB of disk, about half of it to download: PyTorch with CUDA, TensorRT-RTX, DALI, and the tools of the tests.'
	@echo 'It takes about three minutes on a fast network. (pip install . brings what a user needs: 6 GB, and no tools of the tests.)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rtx]' \
	  || echo 'TensorRT-RTX has no wheel for this Python or platform: its tests will be skipped'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dali]' \
	  || echo 'DALI has no wheel for this Python or platform: its tests will be skipped'
	touch $@

# mypy sees the package qswin in a folder of links, made anew so that none is left of a file that is gone
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .venv/links
	mkdir -p .venv/links/qswin
	ln -s $(CURDIR)/qswin/*.py $(CURDIR)/models $(CURDIR)/calib $(CURDIR)/qat $(CURDIR)/trt .venv/links/qswin/
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# The tests that take long: the commands of README.md and docs/, and the long variants of others
slow: setup
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist load --timeout 900

# The tests that a GPU runs otherwise, or that need one; what was skipped, and why, comes last. Packages need a compiler
# that links its library dynamically.
gpu: setup
	CXX=$${CXX:-/usr/bin/g++} $(BIN)/python -m pytest -m "gpu or not slow" -rs tests/qat/kernels tests/qat/lowering \
	  tests/cpp/test_gpu.py tests/qat/backends/test_inductor.py tests/qat/mixed_precision/test_latency.py \
	  tests/trt/engines/test_gpu.py

# The tests with the oldest release of every dependency: make floors PYTHON=python3.10
floors: .floors/ready
	.floors/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

.floors/ready: pyproject.toml constraints/floors.txt
	$(PYTHON) -m venv --clear .floors
	.floors/bin/pip install --quiet --disable-pip-version-check --constraint constraints/floors.txt \
	  --editable '.[demo,test]' --editable '.[rtx]'
	touch $@

# Headless Chromium and the accessibility checker axe-core, for the test of the report's page, which is skipped without
browser: .browser/chromium

.browser/chromium:
	npm install --silent --no-save --prefix .browser @sparticuz/chromium@147 axe-core@4
	cd .browser && node --input-type=module --eval "import chromium from '@sparticuz/chromium'; \
	  import { copyFileSync } from 'fs'; copyFileSync(await chromium.executablePath(), 'chromium')"

# The pages as a site, build/site/index.html. A warning is an error, and a dead link is a warning; --quiet would hide both.
docs: .site/ready
	NO_MKDOCS_2_WARNING=1 .site/bin/mkdocs build --strict

.site/ready: constraints/docs.txt
	$(PYTHON) -m venv --clear .site
	.site/bin/pip install --quiet --disable-pip-version-check --requirement constraints/docs.txt
	touch $@

# Which lines all the tests reach; takes about twice as long as they do
coverage: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report=term:skip-covered

demo: setup
	$(BIN)/python benchmarks/demo.py

# The wheel of the last commit: the same bytes whenever and wherever it is made, with the same setuptools
DIST := dist
wheel: setup
	rm -rf build/source
	mkdir -p build/source $(DIST)
	git archive HEAD | tar --extract --preserve-permissions --directory build/source
	umask 022; SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --no-index \
	  --wheel-dir $(DIST) build/source

# The releases that CI installs: those of this environment, once the tests have passed in it
lock: setup
	head -1 constraints/lock.txt > build.lock
	$(BIN)/pip freeze --exclude-editable | grep -v ' @ ' >> build.lock
	mv build.lock constraints/lock.txt

# Known vulnerabilities of the locked releases; needs the internet
audit: setup
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --no-deps --disable-pip --requirement constraints/lock.txt

# What can be made again; runs/ is the user's
clean:
	rm -rf .venv .floors .browser .site build dist *.egg-info runs/demo .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
