# make demo: run the whole chain on the tiny config.  make test: run the tests.  Both create .venv and install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

ARM ?= /opt/llamaq-arm

.PHONY: install demo test test-all arm lint clean

install: $(VENV)/.installed

# torch first and by version, so that no later package brings another one
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llamaq needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[cluster,dev]'
# lm-eval in its own call, since pip finds no solution for all: it needs python-dateutil 2, and kubernetes (tests only)
# asks for 3 but runs with 2
	$(BIN)/python -m pip install -q -e '.[eval]' 2>/dev/null
	touch $@

demo: install
	$(BIN)/tune run qat_lora_dpo --config tiny

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# also the marked suites, except gpu, arm and long: the chain end to end, kills and resumes, Ray, DeepSpeed, a real model
test-all: test
	$(BIN)/python -m pytest -m 'slow and not cluster' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m cluster
	$(BIN)/python -m pytest -m real

# the tests marked arm, with ExecuTorch's Arm build under emulation: x86-64 Linux, as root; installs 1.5 GB in 3 minutes
arm: install
	PYTHON=$(BIN)/python tests/arm/setup.sh $(ARM)
	LLAMAQ_ARM=$(ARM) $(BIN)/python -m pytest -m arm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
