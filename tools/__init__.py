"""What stands beside the package: benchmarks, demos and a model of a step's time, each run as a module.

- `bench/`       benchmarks, `python -m tools.bench.<name>.bench`
- `demos/`       the demos of `make`, `python -m tools.demos.<name>.demo`
- `results.py`   claims and files of figures, for both
- `step_model/`  estimates the time and the memory of a step on machines that are not there
- `vllm_cpu/`    a real vLLM server on CPUs, in an environment of its own, for tests and a demo
- `setup_env.sh` makes the environment of every target of `make`
"""
