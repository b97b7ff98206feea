# Two commands do everything on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint notebooks clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch comes first and by itself: constraints.txt pins the build that was tested.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	# backpack (a test oracle's dependency) names torchvision but does not import it; its CUDA build cannot load
	# beside a CPU torch and then breaks transformers, so it goes.
	$(BIN)/python -m pip uninstall -q -y torchvision
	touch $(READY)

# One thread: kernels this small are no faster on two, and much slower where the cores are shared.
demo: $(READY)  ## Predict, explain, run and check on real data; leaves demo/report.html
	OMP_NUM_THREADS=1 $(BIN)/stabkit demo --output demo

lint: $(READY)  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Lint, type-check and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

notebooks: $(READY)  ## Execute the notebooks in place, for their stored outputs
	OMP_NUM_THREADS=1 $(BIN)/python tests/test_notebooks.py

clean:  ## Remove what the other targets made
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
