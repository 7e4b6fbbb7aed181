# make demo     train the demo: nothing to prepare, a few minutes on two cores (ARGS="key=value ..." overrides)
# make real     train SmolLM2-135M on reasoning-gym, 30 steps on a CPU (examples/real_text)
# make check    lint, types and the fast tests
# make test     the fast tests and the end-to-end ones: what a change must pass
# make nightly  every test: other families, layouts and faults besides; before a release
# make chaos    kill ranks of short runs, KILLS=100 times, and compare with a run that was left alone
# make sanitize fuzz the C++ under the address and undefined-behaviour sanitizers (SMALL=, LARGE=, SEED= inputs)
# make gpu-check  every check that needs a GPU, benchmarks and a short demo; report in runs/gpu_check
# make docs     write docs/configuration.md anew and build the documentation in build/docs; a dead link is an error
# make setup    the virtual environment alone; the others call it
# make clean    build leftovers and caches; distclean: .venv and the demo's assets too. Neither touches a run.

SHELL := bash
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
ARGS ?=
PYTEST_ARGS ?=
# Two modules of tests at a time, what a module has started shared by its tests; the slow ones come first.
SIDE_BY_SIDE := -n 2 --dist loadscope --no-loadscope-reorder

SMALL ?= 100000
LARGE ?= 150
SEED ?= 7
SANITIZED ?= build/fuzz_count_ngrams

.PHONY: demo real check lint types fast test slow nightly chaos gpu-check sanitize docs setup clean distclean

demo: setup
	@bash launch/demo.sh $(ARGS)

real: setup
	@bash examples/real_text/run.sh $(ARGS)

setup:
	@bash launch/setup.sh

check: lint types fast

lint: setup
	$(PYTHON) -m ruff check .

types: setup
	$(PYTHON) -m mypy

fast: setup
	$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) -m "not slow" $(PYTEST_ARGS)

test: setup
	$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) -m "not nightly" --durations=20 $(PYTEST_ARGS)

slow: setup
	$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) -m "slow and not nightly" $(PYTEST_ARGS)

nightly: setup
	$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) --durations=50 $(PYTEST_ARGS)

# Ranks of short runs are killed at random moments, KILLS times; see tests/cluster/test_chaos.py.
KILLS ?= 100
chaos: setup
	MMR1_DS_CHAOS_KILLS=$(KILLS) $(PYTHON) -m pytest tests/cluster/test_chaos.py -o log_cli=true -o log_cli_level=INFO

gpu-check: setup
	@$(PYTHON) benchmarks/gpu_check.py

sanitize:
	@mkdir -p $(dir $(SANITIZED))
	$(CXX) -O1 -g -std=c++17 -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	  kernels/csrc/fuzz_count_ngrams.cpp -o $(SANITIZED)
	$(SANITIZED) $(SMALL) $(LARGE) $(SEED)

docs: setup
	$(PYTHON) docs/excerpts.py
	$(PYTHON) -c "from mmr1_ds.config.reference import markdown; open('docs/configuration.md', 'w').write(markdown())"
	$(PYTHON) -m sphinx -q -W --keep-going -b html -d build/docs_trees docs build/docs
	@echo "docs: build/docs/index.html"

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv runs/demo_assets
