# `make demo` and `make test` need nothing but this checkout and a Python >= 3.12 somewhere on the machine.

VENV ?= .venv
CONSTRAINTS ?= requirements/jax-0.11.2.txt
WORKERS ?= 2
ARGS ?=
# Whether `make test` compiles kernels for GPUs that are not here (tests/aot), where that can be installed.
AOT ?= yes
# The Python of `make test-gpu`: one that has JAX for the GPU at hand.
PYTHON ?= python3

bin = $(VENV)/bin
installed = $(VENV)/.installed
compiler = $(VENV)/cuda-compiler/.installed

# Where XLA's programs for tests are kept: processes and later runs find them there.
compiled = JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/compiled \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

.PHONY: help setup cuda-compiler try-cuda-compiler demo test test-newest test-aot test-gpu lint format notebooks clean

help:
	@echo 'make demo         quantize a small Llama to every format: a table, a plot, a few lines it writes'
	@echo 'make test         run the tests (ARGS="-k nf4", WORKERS=8)'
	@echo 'make test-newest  run three cases of each fast test on the newest JAX, in an environment of its own'
	@echo 'make test-aot     compile every kernel for every GPU of the table that tests/aot has; needs no GPU'
	@echo 'make test-gpu     run every kernel on the GPU here, by the JAX of PYTHON=python3 (ARGS="--limit 300")'
	@echo 'make lint         ruff and mypy'
	@echo 'make format       let ruff rewrite what it can'
	@echo 'make notebooks    execute every notebook, leaving the files as they are'
	@echo 'make clean        remove environments, caches and build products'

$(installed): pyproject.toml $(CONSTRAINTS) scripts/setup
	@scripts/setup $(VENV) $(CONSTRAINTS)

setup: $(installed)
	@scripts/build-ffi $(bin)/python

$(compiler): requirements/aot.txt scripts/setup-cuda-compiler | $(installed)
	@scripts/setup-cuda-compiler $(VENV) requirements/aot.txt

cuda-compiler: setup $(compiler)

try-cuda-compiler: setup
	@$(MAKE) --no-print-directory cuda-compiler || echo 'make: no CUDA compiler to be had here: tests/aot is skipped'

demo: setup
	$(bin)/python examples/demo.py

test: setup $(if $(AOT),try-cuda-compiler)
	$(compiled) $(bin)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Readers of files, the command, checks of checks and what is built on products alone run on the pinned JAX only. XLA
# compiles for the newest without LLVM's optimizations, a quarter of the time: those are on in `make test`.
elsewhere = $(addprefix --ignore=tests/,benchmarks gpu test_architecture.py test_packaging.py test_readme.py \
  $(addprefix qjax/,bench budget calibration checkpoints cli quality))

test-newest: export XLA_FLAGS = --xla_backend_optimization_level=0
test-newest:
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=requirements/jax-newest.txt AOT= \
	  ARGS='-m "not slow" --cases 3 $(elsewhere) $(ARGS)'

test-aot: cuda-compiler
	QJAX_AOT=all $(bin)/python -m pytest -n $(WORKERS) --dist worksteal tests/aot $(ARGS)

test-gpu:
	@scripts/build-ffi $(PYTHON)
	$(PYTHON) tests/gpu/run.py $(ARGS)

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
	rm -f xla_ffi/*/*.so
	find qjax pallas_kernels xla_ffi tests -name __pycache__ -type d -prune -exec rm -rf {} +
