"""A vLLM server on loopback, started and stopped by Python.

with VllmServer(folder_of_a_model, log=Path("vllm.log")) as server:
    server.wait()
    print(server.url)
"""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from ds_moe.errors import UserError
from tools.vllm_cpu.install import SETTINGS, default_folder, missing, python_of

# What the client needs of any server, and what keeps a server of a tiny model small. Blocks of 32 tokens: with the
# CPU's 128 the prefix cache would only ever see prompts longer than that.
FLAGS = ["--enable-return-routed-experts", "--logprobs-mode", "processed_logprobs"]
SMALL = "--max-model-len 512 --max-num-batched-tokens 512 --max-num-seqs 64 --block-size 32 --enforce-eager".split()
ENVIRONMENT = SETTINGS | {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
START_S = 600.0  # until a server must answer, on a machine that does much else


class VllmServer:
    """One server: three processes and about 3 GB. It ends with the `with` block, and when this process does."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        dtype: str = "float32",
        port: int | None = None,
        flags: Sequence[str] = FLAGS,
        more: Sequence[str] = (),
    ) -> None:
        """
        Args:
            model: a folder in hub layout.
            log: what the server says is added to it.
            dtype: in which it computes, float32 or bfloat16.
            port: on 127.0.0.1; None: one that is free.
            more: options of vLLM beside `flags` and those of a small server.
        """
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype, "--served-model-name", "policy"]
        self._options = ["--model", str(model.absolute()), *options, *SMALL, *flags, *more]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start the server, which answers some time later; see `wait`. Raises `UserError` without vLLM."""
        if reason := missing():
            raise UserError(f"the server {reason}")
        python = python_of(default_folder())
        words = [str(python), "-m", "vllm_without_gpu.serve", str(os.getpid()), *self._options]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            environment = {**inherited, **ENVIRONMENT}
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        return self

    def wait(self, seconds: float = START_S) -> Self:
        """Return once the server answers. Raises `UserError` with the end of its log where it does not."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self._process is None or self._process.poll() is not None:
                raise UserError(f"vLLM has ended: {self._last_words()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise UserError(f"vLLM does not answer after {seconds:.0f} s: {self._last_words()}")

    def stop(self) -> None:
        """End the server and its processes, and wait for that."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """End all its processes at once, as a machine that dies does."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return f"{(errors or lines or ['nothing'])[-1].strip()[:500]} ({self.log})"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
