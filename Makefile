# make demo: the whole chain on the tiny config.  make test: the tests.  Both make .venv and install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint clean

install: $(VENV)/.installed

# torch by name and first: nothing installed later may bring another one
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llamaq needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[cluster,dev]'
	touch $@

demo: install
	$(BIN)/tune run qat_lora_dpo --config tiny

test: install
	$(BIN)/python -m pytest

# everything but what needs a GPU: the chain end to end, kills and resumes, real Ray and DeepSpeed
test-all: test
	$(BIN)/python -m pytest -m 'slow or cluster'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
