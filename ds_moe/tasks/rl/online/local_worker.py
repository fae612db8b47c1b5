"""`python -m ds_moe.tasks.rl.online.local_worker`: a model of transformers that samples for a run, see `local.py`.

It reads a JSON object a line from its standard input, and answers each with one. It ends when its input does, even in
the middle of its work: then the run is gone.
"""

import base64
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedModel

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.encode import Encoded, encode_images
from ds_moe.data.images import ImageSource
from ds_moe.data.processor import Processor
from ds_moe.errors import UserError
from ds_moe.export.model import DTYPES
from ds_moe.faults.signals import leave_to_parent
from ds_moe.models.generation import own_generation_config
from ds_moe.tasks.rl.sample import complete, ends_of, load_policy

Message = dict[str, object]


class LocalModel:
    """The model of the folder that was loaded last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._version = dtype, ""
        self._loaded: tuple[PreTrainedModel, Processor] | None = None

    def load(self, folder: str, version: str) -> Message:
        self._loaded = None  # before the other one is read: there may be no room for two
        self._loaded = load_policy(Path(folder), self._dtype)
        self._version = version
        return {"version": version}

    @torch.inference_mode()
    def sample(
        self, prompts: list[dict], completions: int, temperature: float, max_new_tokens: int, seed: int
    ) -> Message:
        """Completions of each prompt, {"tokens", "images"}; the same ones for the same `seed`."""
        assert self._loaded is not None
        model, processor = self._loaded
        ends = ends_of(processor)
        encoded = [_encoded(prompt, processor) for prompt in prompts for _ in range(completions)]
        torch.manual_seed(seed)
        with own_generation_config(model):
            found = list(complete(model, processor, encoded, temperature, max_new_tokens, ()))
        answers = [
            {
                "token_ids": record["tokens"][prompt.prompt :],
                "logprobs": record["logprobs"],
                "routing": record.get("routing"),
                "version": self._version,
                "ended": record["tokens"][-1] in ends,
            }
            for prompt, record in zip(encoded, found, strict=True)
        ]
        return {"completions": [answers[i : i + completions] for i in range(0, len(answers), completions)]}


def _encoded(prompt: dict, processor: Processor) -> Encoded:
    tokens = torch.tensor(prompt["tokens"])
    sources = [ImageSource("image", data=base64.b64decode(image)) for image in prompt["images"]]
    pixel_values, grid, _ = encode_images(sources, processor, sys.maxsize)
    return Encoded(tokens, torch.full_like(tokens, NO_LOSS), len(tokens), pixel_values, grid)


def answer(model: LocalModel, request: Message) -> Message:
    work = {"load": model.load, "sample": model.sample}[str(request.pop("do"))]
    try:
        return work(**request)
    except UserError as error:
        return {"error": str(error)}


def _listen(requests: "queue.Queue[Message]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def main(dtype: str) -> None:
    leave_to_parent()
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for answers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    requests: queue.Queue[Message] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), name="requests", daemon=True).start()
    model = LocalModel(DTYPES[dtype])
    while True:
        print(json.dumps(answer(model, requests.get())), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
