# SPDX-License-Identifier: Apache-2.0
# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv themselves.

PYTHON ?= python3
WORKERS ?= 2
PYTEST = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help demo test test-fast test-users test-prepare test-lmms docs lint

help:
	@echo "make demo       train the tiny flagship in stages, evaluate it, write runs/demo/report.html"
	@echo "make test       run every test"
	@echo "make test-fast  run every test but the slow ones"
	@echo "make test-users  the web page in headless Chromium, the notebooks, pages of docs; screenshots in \$$LIONJAX_SCREENSHOTS"
	@echo "make test-prepare  the test of data preparation by Apache Beam, in .venv-prepare: its pins are older"
	@echo "make test-lmms  the tests with the real lmms-eval, in .venv-lmms: up to 7.5 GB"
	@echo "make docs       build the documentation and the API reference into site/; a broken link fails"
	@echo "make lint       check code and formatting with ruff"
	@echo "Each sets up .venv the first time. PYTHON=python3.12 chooses the Python, WORKERS=4 the test processes."

demo:
	@$(PYTHON) launch/environment.py demo
	@bash launch/laptop.sh

test:
	@$(PYTHON) launch/environment.py test
	$(PYTEST) $(ARGS)

test-fast:
	@$(PYTHON) launch/environment.py test
	$(PYTEST) -m "not slow" $(ARGS)

test-users:
	@$(PYTHON) launch/environment.py test
	@.venv/bin/python -c "import playwright" 2>/dev/null || \
		.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[users]" \
		-c lock/$$(.venv/bin/python -c "import sys; print('py311' if sys.version_info < (3, 12) else 'py312')").txt
	LIONJAX_USERS=1 JAX_PLATFORMS=cpu .venv/bin/python -m pytest tests/users $(ARGS)

test-prepare:
	@test -x .venv-prepare/bin/python || $(PYTHON) -m venv .venv-prepare
	@.venv-prepare/bin/python -m pip install --quiet -c lock/prepare.txt -e ".[prepare]" pytest pytest-timeout
	JAX_PLATFORMS=cpu .venv-prepare/bin/python -m pytest tests/unit/data/test_prepare.py tests/unit/data/test_prepare_regions.py $(ARGS)

test-lmms:
	@test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	@.venv-lmms/bin/python -m pip install --quiet -e ".[data,torch]" lmms-eval==0.7.3 "filelock<4" pytest pytest-timeout
	@.venv-lmms/bin/python -m pip uninstall --quiet --yes torchvision
	JAX_PLATFORMS=cpu .venv-lmms/bin/python -m pytest tests/e2e/test_lmms_eval.py $(ARGS)

docs:
	@$(PYTHON) launch/environment.py demo
	@.venv/bin/python -c "import material, mkdocstrings_handlers.python, ruff" 2>/dev/null || \
		.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" \
		-c lock/$$(.venv/bin/python -c "import sys; print('py311' if sys.version_info < (3, 12) else 'py312')").txt
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

lint:
	@$(PYTHON) launch/environment.py test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
