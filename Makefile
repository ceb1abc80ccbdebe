# make help | quickstart | test | clean. Needs Python 3.11 or 3.12 and nothing else; PYTHON=/path/to/python chooses one.

.PHONY: help quickstart test clean
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
export PYTHON
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

help:
	@echo 'make quickstart   from the bundled sample to scores over gRPC (FRESH=1 starts over)'
	@echo 'make test         ruff, mypy and pytest'
	@echo 'make clean        remove .venv, caches, builds and runs/quickstart'
	@echo 'PYTHON=/path/to/python3.12 chooses the interpreter of .venv.'

quickstart:
	@start=$$(date +%s); bash tools/environment.sh $(VENV) plots && \
	exec $(BIN)/python examples/quickstart.py --setup_seconds=$$(( $$(date +%s) - start )) $(if $(FRESH),--fresh)

test:
	@bash tools/environment.sh $(VENV) dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info stem_client/build stem_client/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache runs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
