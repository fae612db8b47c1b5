"""`python -m vllm_without_gpu.serve PARENT OPTIONS`: vLLM's OpenAI server, in a group of processes of its own.

All of them end when the process PARENT does, however that ended.
"""

import os
import runpy
import signal
import sys
import threading
import time


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
