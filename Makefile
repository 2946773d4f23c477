# `make demo` and `make test` need nothing but this checkout and a Python >= 3.12 somewhere on the machine.

VENV ?= .venv
CONSTRAINTS ?= requirements/jax-0.11.2.txt
WORKERS ?= 2
ARGS ?=

bin = $(VENV)/bin
installed = $(VENV)/.installed

.PHONY: help setup demo test test-newest lint format notebooks clean

help:
	@echo 'make demo         quantize a small Llama to every format: a table, a plot, a few lines it writes'
	@echo 'make test         run the tests (ARGS="-k nf4", WORKERS=8)'
	@echo 'make test-newest  run the fast tests on the newest JAX, in an environment of its own'
	@echo 'make lint         ruff and mypy'
	@echo 'make format       let ruff rewrite what it can'
	@echo 'make notebooks    execute every notebook, leaving the files as they are'
	@echo 'make clean        remove environments, caches and build products'

$(installed): pyproject.toml $(CONSTRAINTS) scripts/setup
	@scripts/setup $(VENV) $(CONSTRAINTS)

setup: $(installed)

demo: setup
	$(bin)/python examples/demo.py

test: setup
	$(bin)/python -m pytest -n $(WORKERS) $(ARGS)

test-newest:
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=requirements/jax-newest.txt \
	  ARGS='-m "not slow" $(ARGS)'

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: setup
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

notebooks: setup
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	  $(bin)/python -m nbconvert --to notebook --execute --output-dir "$$out" notebooks/*.ipynb

clean:
	rm -rf .venv .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qjax pallas_kernels xla_ffi tests -name __pycache__ -type d -prune -exec rm -rf {} +
