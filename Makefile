# `make demo` and `make test` set up what they need in .venv; a second call does not reinstall.
# Another interpreter: make test PYTHON=/path/to/python3.12

FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)
RUN = .venv/bin/python -m

.PHONY: demo test lint types check clean

demo: .venv/ready
	@.venv/bin/mmrl demo $(ARGS)

test: .venv/ready
	@$(RUN) pytest --numprocesses logical --dist loadfile $(ARGS)

lint: .venv/ready
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

types: .venv/ready
	@$(RUN) mypy
	@$(RUN) mypy benchmarks

check: test lint types

.venv/ready: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(FITS)' 2>/dev/null || { \
	  echo "error: Python 3.11, 3.12 or 3.13 is needed;" \
	  "$(or $(PYTHON),python3): $$($(or $(PYTHON),python3) -V 2>&1 || true)" >&2; \
	  echo "       (Debian 12 or later: apt-get install python3 python3-venv;" >&2; \
	  echo "       another interpreter: make PYTHON=/path/to/python3.12)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "error: $(PYTHON) cannot make a virtual environment: its venv module is missing" >&2; \
	  echo "       (Debian, Ubuntu: apt-get install python$$version-venv)" >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) -V); the first time takes some minutes."
	@$(PYTHON) -m venv .venv
	@$(RUN) pip install --disable-pip-version-check --constraint constraints.txt hatchling
	@$(RUN) pip install --disable-pip-version-check --constraint constraints.txt \
	  --no-build-isolation --editable '.[dev,serve]'
	@touch $@

# .venv and runs/ stay.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find mmrl envs agents deploy tests -name __pycache__ -prune -exec rm -rf {} +
