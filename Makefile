# The two commands a newcomer needs are `make demo` and `make test`; each sets up what it needs.
# PYTHON        interpreter for the environment (3.11 or newer); found by itself
# VENV          where the environment lives
# TORCH_INDEX_URL  package index of another PyTorch build (see README, "Install")
# PREFTUNE_DATA folder of real preference pairs; tests that need it skip without it
# BENCH         options of benchmarks/against_trl.py
# KILLS         how many kills `make soak` makes

VENV ?= .venv
TORCH_INDEX_URL ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN = $(VENV)/bin
TORCH = $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
BENCH ?= --minutes 45
PYTEST = $(BIN)/python -m pytest -q
# Two processes of one thread each: the tests' models are far too small for more threads.
PARALLEL = -n 2
KILLS ?= 50

.PHONY: demo test test-all check bench soak fmt clean

$(VENV)/.run: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "preftune needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]'
	@touch $@

demo: $(VENV)/.run  ## train the embedded model on the embedded pairs and show what changed
	$(BIN)/preftune quickstart

test: $(VENV)/.dev  ## the tests that run in a few minutes on two cores
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not slow and not gpu and not peers"

test-all: $(VENV)/.dev $(VENV)/.peers  ## every test; those without their device or data skip with a reason
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not slow"
	$(PYTEST) -m slow -s

check: $(VENV)/.dev  ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.peers  ## measure speed and memory, against TRL too; BENCH="--minutes 90" for longer
	$(BIN)/python benchmarks/step_rate.py
	$(BIN)/python benchmarks/layout_memory.py
	$(BIN)/python benchmarks/tokenise.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/against_trl.py $(BENCH)

soak: $(VENV)/.dev  ## kill runs at random instants and compare what they become; KILLS=500 for longer
	$(BIN)/python -m tests.faults.soak --kills $(KILLS)

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)
