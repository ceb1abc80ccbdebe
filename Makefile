# Needs only Python 3.11 or 3.12; PYTHON=/path/to/python chooses one. `make help` lists the targets.

.PHONY: help quickstart test lint types unit bench lock clean environment
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
WORKERS := 2
export PYTHON
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

help:
	@echo 'make quickstart   goes from the bundled sample to scores over gRPC (FRESH=1 starts over)'
	@echo 'make test         lint, types and unit'
	@echo 'make lint         ruff: rules and format'
	@echo 'make types        mypy'
	@echo 'make unit         pytest in 2 processes, 2 GB each (WORKERS=8; TESTS="tests/stem_tf -k resume" chooses tests)'
	@echo 'make bench        runs a benchmark of benchmarks/README.md: BENCH="train_step --steps=4"'
	@echo 'make lock         writes requirements/*.txt after a change of setup.py (UPGRADE=1 takes the newest versions)'
	@echo 'make clean        removes .venv, caches, builds and runs/quickstart'
	@echo 'PYTHON=/path/to/python3.12 chooses the interpreter of .venv.'

quickstart:
	@start=$$(date +%s); bash tools/environment.sh $(VENV) plots && \
	exec $(BIN)/python examples/quickstart.py --setup_seconds=$$(( $$(date +%s) - start )) $(if $(FRESH),--fresh)

environment:
	@bash tools/environment.sh $(VENV) dev

test: lint types unit

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	$(BIN)/mypy

unit: environment
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(TESTS)

bench: environment
	$(if $(BENCH),$(BIN)/python -m benchmarks.$(BENCH),$(error name a benchmark: make bench BENCH="train_step --steps=4"))

lock:
	bash tools/lock.sh $(if $(UPGRADE),--upgrade)

clean:
	rm -rf $(VENV) build dist *.egg-info stem_client/build stem_client/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache runs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
