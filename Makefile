# Every target does the set-up it needs: a virtual environment in $(VENV), the pinned dependencies, one compiled op.
VENV ?= .venv
# More arguments for pytest: make test ARGS="-k resume -x"
ARGS ?=

PY := $(abspath $(VENV))/bin/python
READY := $(VENV)/.ready
export VENV
# The launchers and scripts started from here must be this environment's.
export PATH := $(abspath $(VENV))/bin:$(PATH)

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help setup demo replay-demo gate-demo assemble-demo test test-all lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## only the set-up: environment, dependencies, DeepSpeed's CPU op

# ds_moe/__init__.py holds the version, which the installed metadata must repeat.
$(READY): setup.py constraints.txt tools/setup_env.sh ds_moe/__init__.py
	@bash tools/setup_env.sh
	@touch $(READY)

demo: $(READY)  ## train a tiny Qwen3-VL-MoE on real images (2 processes), export it, evaluate the export
	@$(PY) -m tools.demos.digits.demo

replay-demo: $(READY)  ## reinforcement on real images, with routing replay and without (2 processes, under 10 minutes)
	@$(PY) -m tools.demos.replay.demo

gate-demo: $(READY)  ## a learned gate over four LoRA adapters, on rendered screens (2 processes, under 10 minutes)
	@$(PY) -m tools.demos.gate.demo $(ARGS)

assemble-demo: $(READY)  ## two experts trained apart become one Qwen3-VL-MoE (2 processes, about 3 minutes)
	@$(PY) -m tools.demos.assemble.demo $(ARGS)

test: $(READY)  ## the test suite without the slow and the GPU tests (at most 17 minutes)
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(READY)  ## every test; GPU tests are skipped where there is no GPU
	@$(PYTEST) $(ARGS)

lint: $(READY)  ## ruff, its formatter and pyright; fails on any finding
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)

format: $(READY)  ## rewrite the sources as the linter wants them
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY)  ## the CPU benchmarks: every tools/bench/*/bench.py
	@for file in tools/bench/*/bench.py; do \
		module=$$(echo "$${file%.py}" | tr / .); \
		echo "== $$module"; $(PY) -m "$$module" --suite cpu || exit 1; \
	done

clean:  ## remove the environment and the caches (not runs/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
