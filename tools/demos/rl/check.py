"""Whether the engine samples from the weights that it was given: plain transformers on each folder of them.

While a run trains, every folder of weights is kept (as hard links), and a vLLM server is asked for greedy answers as
soon as it says that it has them. Afterwards plain transformers reads each folder and answers the same; and scores what
the engine has sampled in that round, under those weights and under the weights of other rounds, which must be worse.
"""

import base64
import io
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.chat import Sample
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate
from ds_moe.data.marks import plain_message
from ds_moe.data.processor import Processor
from ds_moe.tasks.rl.rollout_record import parse_rollout
from ds_moe.tasks.rl.rollouts import Rollouts
from ds_moe.tasks.rl.sample import generate_rollouts, load_policy

PROBES = 8  # held-out questions that a server is asked after each hand-over
NEW_TOKENS = 4  # of an answer, as in the run file
NEAR = 0.1  # by which a greedy token of the engine may be less likely than the most likely one: rounding of bf16
SCORED = 128  # completions of a round
POLL_S = 0.1


class HandOvers:
    """Keeps what a run hands over, from its first step to its last.

    Attributes:
        kept: a folder for each version of weights, of the name that the run gave it.
        answers: name of such a folder -> the server's greedy answers, token ids, to `probes()`.
    """

    def __init__(self, output: Path, kept: Path, url: str | None) -> None:
        self._weights, self.kept, self._url = output / "weights", kept, url
        self.answers: dict[str, list[list[int]]] = {}
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._keep, daemon=True)]
        self._threads += [threading.Thread(target=self._ask, daemon=True)] if url else []

    def __enter__(self) -> "HandOvers":
        self.kept.mkdir(parents=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _keep(self) -> None:
        while True:
            last = self._done.is_set()
            for folder in sorted(self._weights.glob("step_*")):
                if not (self.kept / folder.name).exists():
                    shutil.copytree(folder, self.kept / folder.name, copy_function=os.link)
            if last:
                return
            self._done.wait(POLL_S)

    def _ask(self) -> None:
        asked = [request_of(sample) for sample in probes()]
        while not self._done.wait(POLL_S):
            try:
                version = self._version()
                if ":" not in version or name_of(version) in self.answers:  # the first one is the server's own
                    continue
                answers = [self._post("/v1/chat/completions", one)["choices"][0]["token_ids"] for one in asked]
                if self._version() == version:  # the weights were the same all the time
                    self.answers[name_of(version)] = answers
            except (urllib.error.URLError, OSError, KeyError):
                continue  # the run that uses the server says what is wrong with it

    def _version(self) -> str:
        with urllib.request.urlopen(f"{self._url}/weight_info", timeout=60) as answer:
            return json.load(answer)["weight_version"]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)


def name_of(version: str) -> str:
    """The folder of a version, which is "run:step"."""
    return f"step_{int(version.rpartition(':')[2] or 0):08d}"


def probes() -> list[Sample]:
    return digits_samples("held-out")[:PROBES]


def request_of(sample: Sample) -> dict[str, Any]:
    """A greedy answer to the sample's question, as the HTTP interface of OpenAI and vLLM has it."""
    images = iter(sample.images)
    messages = []
    for turn in sample.turns[:-1]:
        message = json.loads(json.dumps(plain_message(turn)))
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                data = next(images).data
                part.clear()
                url = f"data:image/png;base64,{base64.b64encode(io.BytesIO(data).read()).decode()}"
                part.update({"type": "image_url", "image_url": {"url": url}})
        messages.append(message)
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return {"model": "policy", "messages": messages, "max_tokens": NEW_TOKENS, "return_token_ids": True, **greedy}


def checked(output: Path, seen: HandOvers) -> list[dict[str, Any]]:
    """For each round what plain transformers, in bf16 as the engine, makes of the weights that sampled it."""
    files = sorted((output / "rollouts").glob("round_*.json"))
    names = [f"step_{json.loads(file.read_text())['step']:08d}" for file in files]
    lines = [file.with_suffix(".jsonl").read_text().splitlines()[:SCORED] for file in files]
    records = [[json.loads(line) for line in some] for some in lines]
    found: list[dict[str, Any]] = []
    others: dict[int, float] = {}  # round -> on the weights of the one before, of the first on those of the last
    for number, name in enumerate(names):
        model, processor = load_policy(seen.kept / name, torch.bfloat16)
        one: dict[str, Any] = {"logprob_difference": difference(model, processor, records[number], files[0].parent)}
        one |= greedy_check(model, processor, seen.answers.get(name, []))
        found.append({**one, "of_others": None})
        other = (number + 1) % len(names)  # a round that these weights have not sampled
        if names[other] != name:
            others[other] = difference(model, processor, records[other], files[0].parent)
    for number, value in others.items():
        found[number]["of_others"] = value
    return found


def difference(model: PreTrainedModel, processor: Processor, records: list[dict[str, Any]], root: Path) -> float:
    """Mean distance of the engine's log-probs of sampled tokens from those of plain transformers."""
    kind = Rollouts(shape=None)
    encoded = [
        kind.encode(kind.parse(record, f"record {number}", root.resolve()), processor, 4096, 2**24)
        for number, record in enumerate(records)
    ]
    distances = []
    for start in range(0, len(encoded), 64):
        some = encoded[start : start + 64]
        logprob_BSV = logprobs(model, collate(some, processor).inputs)
        for row, one in enumerate(some):
            at = one.labels.ne(NO_LOSS).nonzero().flatten()
            ours = logprob_BSV[row, at - 1].gather(-1, one.input_ids[at, None])[:, 0]
            distances += (ours - one.engine[at]).abs().tolist()
    return fmean(distances)


@torch.inference_mode()
def logprobs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """(B, S, V) in fp32 of padded sequences."""
    inputs = {name: value for name, value in inputs.items() if name != "routing"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits.float().log_softmax(-1)


def greedy_check(model: PreTrainedModel, processor: Processor, answers: list[list[int]]) -> dict[str, int]:
    """How many greedy answers of a server are those of plain transformers, and how many are not even near."""
    counts = {"greedy_answers": len(answers), "greedy_equal": 0, "greedy_unlike": 0}
    if not answers:
        return counts
    samples = probes()
    ours = generate_rollouts(model, processor, samples, per_prompt=1, temperature=0, max_new_tokens=NEW_TOKENS)
    for record, theirs in zip(ours, answers, strict=True):
        prompt = record["completion_mask"].index(1)
        tokens = record["tokens"][prompt:]
        if tokens == theirs:
            counts["greedy_equal"] += 1
            continue
        parted = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), None)
        if parted is None or not near(model, processor, record, prompt + parted, theirs[parted]):
            counts["greedy_unlike"] += 1
    return counts


def near(model: PreTrainedModel, processor: Processor, record: dict[str, Any], place: int, token: int) -> bool:
    """Whether `token` is about as likely as the one that stands at `place`."""
    parsed = parse_rollout({key: value for key, value in record.items() if key != "images"}, "answer", Path())
    encoded = Rollouts(shape=None).encode(replace(parsed, images=record["images"]), processor, 4096, 2**24)
    logprob_V = logprobs(model, collate([encoded], processor).inputs)[0, place - 1]
    return float(logprob_V[record["tokens"][place]] - logprob_V[token]) < NEAR
