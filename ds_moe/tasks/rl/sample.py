"""Rollouts for `task: rl`: a plain transformers engine samples completions, with log-probs, routing and rewards.

    python -m ds_moe.tasks.rl.sample MODEL OUT.jsonl --data digits --prompts 64 --per-prompt 8 --dtype bf16

MODEL is a Hugging Face folder, or a checkpoint or the output folder of a run (its newest one), exported first. The
engine shares nothing with the trainer: unconverted model, transformers' expert kernels, a KV cache. Samples are those
of the full softmax at --temperature, without top-k or top-p: their log-probs are those of the policy that is trained.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ds_moe.config.sections import DataConfig, ModelConfig
from ds_moe.data.chat import Sample, final_answer
from ds_moe.data.chat_template import TokenRules, end_token
from ds_moe.data.encode import Encoded, answer_text, collate_prompts, encode
from ds_moe.data.images import ImageSource, RecordError, load_image
from ds_moe.data.processor import Processor
from ds_moe.data.records import open_records
from ds_moe.data.special_tokens import check_content_tokens, text_of
from ds_moe.errors import UserError
from ds_moe.export.model import DTYPES, export_checkpoint
from ds_moe.models.generation import own_generation_config
from ds_moe.models.load import load_model
from ds_moe.models.processor import load_processor
from ds_moe.replay import RoutingRecorder, RoutingTrace, joined, to_record

# Options of `generate_rollouts`.
SAMPLING = ("per_prompt", "temperature", "max_new_tokens", "batch_size", "seed", "max_length", "content_tokens")
REWARDS: dict[str, Callable[[str, str], float]] = {  # of (completion, right answer)
    "exact": lambda completion, answer: float(completion.strip() == answer.strip()),
    "contains": lambda completion, answer: float(answer.strip() in completion),
}
Record = dict[str, Any]  # as rollout_record.py reads it, but before it is written "images" holds the sources


def load_policy(folder: Path, dtype: torch.dtype, experts: str | None = None) -> tuple[PreTrainedModel, Processor]:
    """(model, processor) of an exported folder, a checkpoint, or the newest checkpoint of a run's output folder.

    Raises `UserError` for anything else, and for weights that are missing or left over.
    """
    if (folder / "checkpoints").is_dir() or (folder / "state.json").is_file():
        with tempfile.TemporaryDirectory() as exported:
            export_checkpoint(folder, Path(exported) / "export")
            return load_policy(Path(exported) / "export", dtype, experts)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a Hugging Face folder nor a run's output folder or checkpoint")
    model = load_model(ModelConfig(path=str(folder)), dtype).eval()
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_processor(str(folder))


def open_prompts(data: str, count: int | None, seed: int) -> list[Sample]:
    """`count` conversations of a data file (or of "digits", the training split), a choice that `seed` makes."""
    records = open_records(data, "train", DataConfig(train=data))
    count = len(records) if count is None else min(count, len(records))
    return [records.sample(index) for index in sorted(random.Random(seed).sample(range(len(records)), count))]


@torch.inference_mode()
def generate_rollouts(
    model: PreTrainedModel,
    processor: Processor,
    samples: list[Sample],
    *,
    per_prompt: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    seed: int = 0,
    reward: Callable[[str, str], float] = REWARDS["exact"],
    max_length: int = 4096,
    max_pixels: int = 16_777_216,
    content_tokens: Sequence[str] = (),
) -> list[Record]:
    """`per_prompt` completions of each sample's prompt. One that contains an image token, which no model can read
    back, is left out.

    Args:
        temperature: 0 is greedy, with the log-probs of temperature 1.
        batch_size: sequences in one call of `generate`.
        content_tokens: special tokens that stay whole in prompts, as data.content_tokens of a run file.

    Raises:
        UserError: a sample that cannot be encoded, or a token that texts must not write.
    """
    check_content_tokens(processor, content_tokens)
    rules = TokenRules(content_tokens=tuple(content_tokens))
    encoded = []
    for sample in samples:
        try:
            encoded.append(encode(sample, processor, max_length, max_pixels, rules))
        except RecordError as error:
            raise UserError(f"{sample.where}: {error}") from error
    jobs = [number for number in range(len(samples)) for _ in range(per_prompt)]
    completions: list[Record] = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), own_generation_config(model):
        torch.manual_seed(seed)
        for start in range(0, len(jobs), batch_size):
            prompts = [encoded[number] for number in jobs[start : start + batch_size]]
            completions += _complete(model, processor, prompts, temperature, max_new_tokens, content_tokens)
    records = []
    for number, record in zip(jobs, completions, strict=True):
        if processor.image_token_id in record["tokens"][encoded[number].prompt :]:
            continue
        sample, answer = samples[number], answer_text(encoded[number], processor, content_tokens)
        facts = {"reward": reward(final_answer(record["completion"]), answer), "group": f"{number} {sample.where}"}
        facts |= {"answer": answer, "images": sample.images}
        records.append(record | facts | ({"kind": sample.kind} if sample.kind else {}))
    return records


class _SampledLogProbs(LogitsProcessor):
    """Sets the temperature, and keeps the log-prob of each sampled token alone: logits of a long answer are GiBs."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last_BV: Tensor | None = None  # of the step whose token is not known yet
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last_BV is not None:
            self._steps.append(self._last_BV.gather(-1, input_ids[:, -1:]))
        self._last_BV = (scores / self._temperature).log_softmax(-1)
        return self._last_BV

    def of(self, new_BN: Tensor) -> Tensor:
        """(B, N) for the tokens that `generate` returned, which on CUDA may be fewer than it has made."""
        steps = [*self._steps, self._last_BV.gather(-1, new_BN[:, -1:])]
        return torch.cat(steps[: new_BN.shape[1]], dim=1)


def _complete(
    model: PreTrainedModel,
    processor: Processor,
    prompts: list[Encoded],
    temperature: float,
    max_new_tokens: int,
    content_tokens: Sequence[str],
) -> Iterator[Record]:
    """One completion of each prompt: tokens, completion_mask, logprobs, its text, and if it has any its routing."""
    batch = collate_prompts(prompts, processor).to(model.device).inputs
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    own_end = processor.tokenizer.eos_token_id
    ends = list(dict.fromkeys(end for end in (end_token(processor), own_end) if end is not None))
    pad = processor.tokenizer.pad_token_id
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling)
    scored = _SampledLogProbs(temperature or 1.0)
    experts = getattr(model.config.get_text_config(), "num_experts", None)
    width = batch["input_ids"].shape[1]
    with RoutingRecorder(model) if experts else nullcontext() as recorder:
        output = model.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList([scored]))
    new_BN, logprob_BN = output[:, width:].cpu(), scored.of(output[:, width:]).cpu()
    routing_BSLK = joined(recorder.take(), len(prompts)).cpu().numpy() if recorder else None
    for row, one in enumerate(prompts):
        length = _completion_length(new_BN[row], ends)
        new = new_BN[row, :length].tolist()
        tokens = one.input_ids[: one.prompt].tolist() + new
        first = width - one.prompt  # behind the padding on the left
        trace = None if routing_BSLK is None else RoutingTrace(routing_BSLK[row, first : first + len(tokens) - 1])
        made = {
            "tokens": tokens,
            "completion_mask": [0] * one.prompt + [1] * length,
            "logprobs": [min(value, 0.0) for value in logprob_BN[row, :length].tolist()],
            "completion": text_of(new, processor, content_tokens),
        }
        if trace is not None:
            made["routing"] = to_record(trace)
        yield made


def _completion_length(new_N: Tensor, ends: list[int]) -> int:
    """Tokens up to the first that ends a completion, it included; all where there is none."""
    found = torch.isin(new_N, torch.tensor(ends)).nonzero()
    return int(found[0]) + 1 if len(found) else len(new_N)


def write_rollouts(records: list[Record], file: Path) -> None:
    """JSON lines, complete or not at all; images as PNG, each once, below `images/` beside the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for record in records:
            images = [_stored(image, file.parent) for image in record["images"]]
            lines.write(json.dumps({**record, "images": images}) + "\n")
    os.replace(partial, file)


def _stored(image: ImageSource, folder: Path) -> str:
    data = image.data if image.data is not None else Path(str(image.path)).read_bytes()
    name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        (folder / "images").mkdir(exist_ok=True)
        partial = folder / f"{name}.partial"
        load_image(image, max_pixels=sys.maxsize).save(partial, "PNG")
        os.replace(partial, folder / name)
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--data", default="digits", help='JSONL or Parquet of messages, or "digits" (default)')
    parser.add_argument("--prompts", type=int, metavar="N", help="a random choice of so many (default: all)")
    parser.add_argument("--per-prompt", type=int, default=8, metavar="N", help="completions (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=4096, metavar="N", help="of a prompt and its right answer")
    parser.add_argument(
        "--content-tokens", nargs="+", default=(), metavar="TOKEN", help="as data.content_tokens of the run file"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the engine (default %(default)s)")
    parser.add_argument("--experts-implementation", metavar="NAME", help="transformers' (default: the model's own)")
    parser.add_argument("--reward", choices=REWARDS, default="exact", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples (default %(default)s)")
    options = parser.parse_args()
    if options.temperature < 0 or min(options.per_prompt, options.max_new_tokens, options.batch_size) < 1:
        parser.error("--temperature must not be negative; --per-prompt, --max-new-tokens, --batch-size at least 1")
    try:
        model, processor = load_policy(options.model, DTYPES[options.dtype], options.experts_implementation)
        samples = open_prompts(options.data, options.prompts, options.seed)
        began = time.perf_counter()
        asked = {key: getattr(options, key) for key in SAMPLING}
        records = generate_rollouts(model, processor, samples, reward=REWARDS[options.reward], **asked)
        if not records:
            raise UserError("every completion holds an image token, which no model can read back (train it first)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    write_rollouts(records, options.out)
    completed = sum(sum(record["completion_mask"]) for record in records)
    mean_reward = sum(record["reward"] for record in records) / len(records)
    print(
        f"{options.out}: {len(records)} completions of {len(samples)} prompts, mean reward {mean_reward:.3f}, "
        f"{completed / len(records):.1f} tokens each, {completed / seconds:,.0f} tokens/s; "
        f"{len(samples) * options.per_prompt - len(records)} with image tokens left out"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
