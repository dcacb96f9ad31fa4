PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled then; pip would compile all of it, for a minute.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
STAMP := $(VENV)/.installed
# What the tests of the documentation and of the release need beside it; make train does without.
CHECKS_STAMP := $(VENV)/.installed-checks
# Workers are processes: more threads in each only fight over the cores.
export OMP_NUM_THREADS ?= 1
# Without bytecode each of hundreds of processes would compile all that it imports; git ignores it, make clean removes it.
unexport PYTHONDONTWRITEBYTECODE

# nproc would tell the threads instead.
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
JOBS ?= $(shell echo $$(($(CORES) + 2)))
FAST_JOBS ?= $(CORES)
# To look through all the others for these takes a quarter of a minute.
SERIAL = $(shell grep -rl 'mark.serial' tests --include='*.py')

# The oldest Lightning and torch that pyproject.toml admits; they need older versions of some that constraints.txt pins.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_LIGHTNING := 2.5.1
OLDEST_TORCH := 2.8.0

# Libraries that train with Lightning, and what they need.
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed

# What a machine with a GPU may lack, and cannot fetch: pure Python, about 2 MB.
GPU_WHEELS := .gpu-wheels

.PHONY: help train docs test test-fast test-oldest test-clients test-gpu gpu-wheels lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make train   train four workers by elastic averaging on real images; ARGS="key=value ..." overrides'
	@echo 'make docs    the documentation site, in site/'
	@echo 'make test    lint, types, all tests; on JOBS processes, $(JOBS) unless you say otherwise'
	@echo 'make test-fast  the tests that start no processes; two to three minutes'
	@echo 'make test-oldest  all tests with the oldest supported Lightning and torch, in a venv of its own'
	@echo 'make test-clients  real libraries with strategy="ddp" and "easgd", in a venv of their own'
	@echo 'make test-gpu  tests and benchmarks on a GPU, without network, with the python3 that is there'
	@echo 'make gpu-wheels  fetch what that python3 may lack, into $(GPU_WHEELS); carry it there'
	@echo 'make lint    lint and types only'
	@echo 'make clean   remove what was built (.venv* too); runs in outputs/ stay'

# The stamp is newer than what it was installed from, so a second run starts at once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'make: $(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	@touch $@

$(CHECKS_STAMP): $(STAMP)
	$(INSTALL) '.[docs,release]'
	@touch $@

train: $(STAMP)
	$(BIN)/easgd-train $(ARGS)

# The variable silences an announcement of MkDocs Material about another program.
docs: $(CHECKS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Many tests wait, for a timeout or a process: more of them at once than cores. Those that measure time run alone.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs=2 lint $(CHECKS_STAMP)
	$(BIN)/python -m pytest -m 'not serial' -n $(JOBS) --dist worksteal $(ARGS)
	$(BIN)/python -m pytest -m serial $(or $(ARGS),$(SERIAL)) || [ $$? -eq 5 ]  # none is left of ARGS

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not processes' -n $(FAST_JOBS) --dist worksteal $(ARGS)

$(OLDEST_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|lightning|pytorch-lightning|fsspec|packaging|twine|virtualenv)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt \
		torch==$(OLDEST_TORCH) lightning==$(OLDEST_LIGHTNING) pytorch-lightning==$(OLDEST_LIGHTNING) \
		--editable '.[dev,docs,release]'
	@touch $@

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -m 'not serial' -n $(JOBS) --dist worksteal $(ARGS)
	$(OLDEST)/bin/python -m pytest -m serial $(or $(ARGS),$(SERIAL)) || [ $$? -eq 5 ]  # none is left of ARGS

$(CLIENTS_STAMP): pyproject.toml constraints.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint tests/clients/constraints.txt \
		chemprop pytorch-forecasting neuralforecast pytest pytest-timeout --editable .
	@touch $@

test-clients: $(CLIENTS_STAMP)
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

test-gpu:
	PYTHON="$(PYTHON)" WHEELS="$(GPU_WHEELS)" bash examples/benchmarks/gpu_check.sh $(ARGS)

gpu-wheels:
	@mkdir -p $(GPU_WHEELS)
	@for name in hydra_core omegaconf antlr4_python3_runtime pytest_timeout; do \
		ls $(GPU_WHEELS)/$$name-*.whl >/dev/null 2>&1 || $(PYTHON) -m pip wheel --quiet --no-deps \
			--constraint constraints.txt --wheel-dir $(GPU_WHEELS) "$$(echo $$name | tr _ -)" || exit 1; \
	done
	@ls $(GPU_WHEELS)

clean:
	rm -rf $(VENV) $(OLDEST) $(CLIENTS) $(GPU_WHEELS) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lightning_easgd conf tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
