"""Plain transformers as a run's rollout engine, in a process of its own on the host of rank 0.

A process, because ZeRO-3 changes torch for the whole process that trains, and `generate` draws from the global random
state. It shares nothing with the trainer: unconverted model, transformers' expert kernels, a KV cache.
"""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion, EnginesGone, Problem, Prompt, Sampling

SEQUENCES = 64  # that are sampled at a time
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROUTING_FORMAT = "record"


class LocalEngine:
    """Satisfies `RolloutEngine`.

    Args:
        dtype: "fp32" or "bf16", that the model computes in.
        timeout_s: of one answer, of up to `SEQUENCES` completions.
    """

    def __init__(self, dtype: str, timeout_s: float) -> None:
        self._dtype, self._timeout_s = dtype, timeout_s
        self._process: subprocess.Popen[str] | None = None

    def check(self) -> list[str]:
        return [f"plain transformers on the host of rank 0, {self._dtype}"]

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        deliver: Callable[[int, list[Completion]], None],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """As `RolloutEngine.sample`. A completion that holds a forbidden token is lost: the others are samples of the
        whole softmax then."""
        forbidden = set(sampling.forbidden)
        at_a_time = max(1, SEQUENCES // sampling.completions)
        for start in range(0, len(prompts), at_a_time):
            pulse()
            some = prompts[start : start + at_a_time]
            found = self._ask(
                do="sample",
                prompts=[_message(prompt) for prompt in some],
                completions=sampling.completions,
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
                seed=sampling.seed + start,
            )
            for number, answers in enumerate(found["completions"], start=start):
                completions = [_completion(one, sampling.max_new_tokens) for one in answers]
                deliver(number, [one for one in completions if not forbidden & set(one.token_ids)])

    def publish(self, folder: Path, version: str) -> None:
        self._ask(do="load", folder=str(folder.resolve()), version=version)

    def prove(self, prompts: Sequence[Prompt], max_new_tokens: int, problem: Problem) -> None:
        asked = {"completions": 1, "temperature": 0.0, "max_new_tokens": max_new_tokens, "seed": 0}
        found = [self._ask(do="sample", prompts=[_message(one)], **asked)["completions"][0][0] for one in prompts]
        if text := problem("the engine", [_completion(one, max_new_tokens) for one in found]):
            raise UserError(text)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ask(self, **request: object) -> dict:
        if self._process is None:
            self._process = _start(self._dtype)
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self._timeout_s, _end, (self._process, late))
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            text = f"rl.engine local has not answered within {self._timeout_s:g} s"
            raise EnginesGone(f"{text} (raise rl.engine.timeout_s, if it was at work)")
        if not line:
            raise EnginesGone(f"the process of rl.engine local has ended with status {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise UserError(f"rl.engine local: {found['error']}")
        return found


def _end(process: "subprocess.Popen[str]", late: threading.Event) -> None:
    late.set()
    process.kill()


def _start(dtype: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ds_moe.tasks.rl.online.local_worker", dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in OF_RANKS},
    )


def _message(prompt: Prompt) -> dict[str, object]:
    return {"tokens": prompt.token_ids, "images": [_png(image) for image in prompt.images]}


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _completion(answer: dict, max_new_tokens: int) -> Completion:
    cut = len(answer["token_ids"]) == max_new_tokens and not answer["ended"]
    return Completion(
        token_ids=answer["token_ids"],
        logprobs=answer["logprobs"],
        routing=answer["routing"],
        routing_format=ROUTING_FORMAT,
        finish_reason="length" if cut else "stop",
        version=answer["version"],
    )
