"""Completions of a real vLLM server on CPUs as the rollouts that `tools.bench.replay` compares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ds_moe.config.rollout import EngineConfig
from ds_moe.data.chat import Sample
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, encode
from ds_moe.data.images import load_image
from ds_moe.data.processor import Processor
from ds_moe.models.processor import tiny_processor
from ds_moe.replay.traces import decode
from ds_moe.rollout.engine import Completion, Prompt, Sampling
from ds_moe.rollout.servers import Servers
from tools.bench.replay.bench import Rollout, prompts
from tools.vllm_cpu.model import tiny_model, write_model
from tools.vllm_cpu.server import VllmServer

WIDE = {"hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 48}


@dataclass(frozen=True)
class Case:
    """A model with random weights: a preset made wider, and the processor that goes with it."""

    preset: str
    kind: str
    text: dict[str, int]

    @property
    def processor(self) -> Processor:
        return tiny_processor("vl" if self.kind == "vl" else "text")

    def model(self, seed: int, router_scale: float = 1.0):
        return tiny_model(self.preset, seed, router_scale, **self.text)

    def write(self, folder: Path, seed: int, router_scale: float = 1.0) -> Path:
        return write_model(self.model(seed, router_scale), self.processor, folder)


CASES = {
    "Qwen3-MoE": Case(
        "tiny-moe", "text", {**WIDE, "num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 8}
    ),
    "Qwen3-VL-MoE": Case(
        "tiny-vl-moe", "vl", {**WIDE, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4}
    ),
}


@contextmanager
def serving(folder: Path, log: Path, dtype: str, note=print) -> Iterator[tuple[VllmServer, Servers]]:
    """A server of a model's folder, and the client of it; both end with the block."""
    with VllmServer(folder, log, dtype=dtype) as server:
        server.wait()
        config = EngineConfig(urls=[server.url], in_flight=16, timeout_s=600.0, wait_s=300.0)
        servers = Servers(config, routing=True, longest=512, note=note)
        try:
            servers.check()
            yield server, servers
        finally:
            servers.close()


def questions(case: Case, seed: int, count: int) -> list[tuple[Prompt, Encoded]]:
    """Prompts as the client takes them, and as the trainer reads them: text by ids, images as conversations."""
    processor = case.processor
    if case.kind == "text":
        found = prompts("text", processor, seed, count)
        return [(Prompt(one.input_ids[: one.prompt].tolist(), []), one) for one in found]
    samples = digits_samples("held-out")
    picked = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [asked(samples[index], processor) for index in picked]


def asked(sample: Sample, processor: Processor) -> tuple[Prompt, Encoded]:
    """A sample whose images have a size that the processor leaves alone."""
    one = encode(sample, processor, 256, 2**20)
    messages: list[dict[str, object]] = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts
            ],
        }
        for turn in sample.turns[:-1]
    ]
    images = [load_image(source, 2**20) for source in sample.images]
    return Prompt(one.input_ids[: one.prompt].tolist(), messages, images, where=sample.where), one


def rollouts_of(
    servers: Servers, begins: Sequence[tuple[Prompt, Encoded]], sampling: Sampling, processor: Processor
) -> list[Rollout]:
    """Sample, and put each completion behind its prompt."""
    if processor.image_token_id is not None:
        video = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        sampling = replace(sampling, forbidden=(processor.image_token_id, video))
    made: dict[int, list[Completion]] = {}
    servers.sample([prompt for prompt, _ in begins], sampling, made.__setitem__)
    found = []
    for number in sorted(made):
        begin = begins[number][1]
        for one in made[number]:
            ids = torch.cat([begin.input_ids[: begin.prompt], torch.tensor(one.token_ids)])
            trace = decode(one.routing, kind=one.routing_format)
            found.append(Rollout(replace(begin, input_ids=ids, labels=ids), trace, torch.tensor(one.logprobs)))
    return found
