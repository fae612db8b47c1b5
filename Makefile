# Every target does the set-up it needs: a virtual environment in $(VENV), the pinned dependencies, one compiled op.
VENV ?= .venv
# More arguments for pytest: make test ARGS="-k resume -x"
ARGS ?=

PY := $(abspath $(VENV))/bin/python
# The newest transformers that setup.py allows; constraints.txt pins the one that everything else is tested with.
NEWEST_TRANSFORMERS := $(abspath $(VENV))/transformers/5.24.0
READY := $(VENV)/.ready
export VENV
# The launchers and scripts started from here must be this environment's.
export PATH := $(abspath $(VENV))/bin:$(PATH)

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help setup demo replay-demo rl-demo gate-demo dpo-demo assemble-demo video-demo test test-all test-transformers lint format bench clean

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

rl-demo: $(READY)  ## reinforcement with an engine in the loop (2 processes, under 15 minutes; ARGS="--engine vllm": by a real vLLM)
	@$(PY) -m tools.demos.rl.demo $(ARGS)

gate-demo: $(READY)  ## a learned gate over four LoRA adapters, on rendered screens (2 processes, under 10 minutes)
	@$(PY) -m tools.demos.gate.demo $(ARGS)

dpo-demo: $(READY)  ## preferred answers on real images, and wrong ones as a control (2 processes, about 6 minutes)
	@$(PY) -m tools.demos.dpo.demo $(ARGS)

video-demo: $(READY)  ## which way a digit moves, learned from clips (2 processes, under 10 minutes)
	@$(PY) -m tools.demos.video.demo $(ARGS)

assemble-demo: $(READY)  ## two experts trained apart become one Qwen3-VL-MoE (2 processes, about 3 minutes)
	@$(PY) -m tools.demos.assemble.demo $(ARGS)

test: $(READY)  ## the test suite without the slow and the GPU tests (7 to 15 minutes on 2 quiet cores)
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(READY)  ## every test, and test-transformers; GPU tests are skipped where there is no GPU
	@$(PYTEST) $(ARGS)
	@$(MAKE) --no-print-directory test-transformers

# Beside the environment's own transformers, for processes that have the folder on PYTHONPATH.
$(NEWEST_TRANSFORMERS): $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ transformers==$(notdir $@)

test-transformers: $(NEWEST_TRANSFORMERS)  ## tests of models, experts, parity, resume, gate, rl with the newest transformers
	@PYTHONPATH=$(NEWEST_TRANSFORMERS) $(PYTEST) -m "not slow and not gpu" tests/moe tests/models tests/tasks tests/replay \
		tests/libraries/test_transformers.py $(addprefix tests/distributed/test_,parity.py resume.py lora.py gate.py) $(ARGS)
	@PYTHONPATH=$(NEWEST_TRANSFORMERS) $(PYTEST) $(addprefix tests/distributed/test_,rl.py end_token.py ties.py) $(ARGS)

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
