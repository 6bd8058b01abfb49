# make demo   raises an assistant in MINUTES minutes, writes its report, and says how to talk to it
# make test   checks and tests everything; make check does the same with the quick tests only
#
# The tests run in WORKERS processes: by default one a core, four at most; with WORKERS=0 all in one.
#
# Each makes .venv once, and refreshes it when pyproject.toml or constraints.txt change. On Linux pip's default torch brings CUDA
# along; for a smaller download let PIP_EXTRA_INDEX_URL name PyTorch's index of CPU builds.

MINUTES ?= 10
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/laptop
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --hypothesis-profile ci
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check lint clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo: $(VENV)/.runtime
	$(BIN)/sog run laptop --minutes $(MINUTES) --out $(RUN)
	@echo
	@echo "The report:      $(RUN)/report.html (open it in a browser; it needs no network)"
	@echo "Talk to it:      $(BIN)/sog chat"
	@echo "On a web page:   $(BIN)/sog serve"
	@echo "After thumbs:    $(BIN)/sog improve $(RUN)"

check: lint
	$(PYTEST) -q -m "not slow"

test: lint
	$(PYTEST)

lint: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; say which one to use: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[corpora,constrained,gguf]'
	@touch $@

$(VENV)/.develop: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[corpora,constrained,dev,gguf,hf]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
