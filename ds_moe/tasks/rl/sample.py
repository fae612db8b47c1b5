"""What `ds-moe rollouts` does: a plain transformers engine samples completions, with log-probs, routing and rewards."""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ds_moe.config.rules.model import expert_count
from ds_moe.config.sections import DataConfig, ModelConfig
from ds_moe.data.chat import BadRecord, Sample
from ds_moe.data.chat_template import TokenRules, end_token
from ds_moe.data.encode import Encoded, answer_text, collate_prompts, encode
from ds_moe.data.images import RecordError
from ds_moe.data.processor import Processor
from ds_moe.data.records import open_records
from ds_moe.data.special_tokens import check_content_tokens, text_of
from ds_moe.errors import UserError
from ds_moe.export.model import DTYPES, export_checkpoint
from ds_moe.models.generation import own_generation_config
from ds_moe.models.load import load_model
from ds_moe.models.processor import load_processor
from ds_moe.replay import RoutingRecorder, RoutingTrace, joined, to_record
from ds_moe.rollout.reward import BUILT_IN, exact
from ds_moe.tasks.rl.rollout_record import without_videos
from ds_moe.tasks.rl.write import Record, check_out, write_rollouts

# Options of `generate_rollouts`.
SAMPLING = ("per_prompt", "temperature", "max_new_tokens", "batch_size", "seed", "max_length", "content_tokens")


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


def open_prompts(
    data: str, count: int | None, seed: int, root: str | None = None, bad: list[BadRecord] | None = None
) -> list[Sample]:
    """`count` conversations of a data file (or of "digits", the training split), a choice that `seed` makes.

    Args:
        root: folder that image paths start from; None: that of the data file.
        bad: bad records are added to it; None: the first one is a `UserError`.
    """
    if data == "digits" and root is not None:
        raise UserError("--root would not be used: the data is digits, which reads no files")
    records = open_records(
        data, "train", DataConfig(train=data, root=root, on_bad_record="stop" if bad is None else "skip")
    )
    if bad is not None:
        bad += records.bad
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
    reward: Callable[[str, str], float] = exact,
    max_length: int = 4096,
    max_pixels: int = 16_777_216,
    content_tokens: Sequence[str] = (),
    bad: list[BadRecord] | None = None,
) -> list[Record]:
    """`per_prompt` completions of each sample's prompt. One that contains an image token, which no model can read
    back, is left out.

    Args:
        temperature: 0 is greedy, with the log-probs of temperature 1.
        batch_size: sequences in one call of `generate`.
        content_tokens: special tokens that stay whole in prompts, as data.content_tokens of a run file.
        bad: samples that cannot be encoded are added to it and left out; None: the first one is a `UserError`.

    Raises:
        UserError: no sample that can be encoded, or a token that texts must not write.
    """
    check_content_tokens(processor, content_tokens)
    rules = TokenRules(content_tokens=tuple(content_tokens))
    good, encoded = [], []
    for sample in samples:
        try:
            encoded.append(encode(without_videos(sample), processor, max_length, max_pixels, rules))
            good.append(sample)
        except RecordError as error:
            if bad is None:
                raise UserError(f"{sample.where}: {error}") from error
            bad.append(BadRecord(sample.where, str(error)))
    if bad and not good:
        raise UserError(f"there is no record to use ({len(bad)} bad; the first: {bad[0]})")
    samples = good
    jobs = [number for number in range(len(samples)) for _ in range(per_prompt)]
    completions: list[Record] = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), own_generation_config(model):
        torch.manual_seed(seed)
        for start in range(0, len(jobs), batch_size):
            prompts = [encoded[number] for number in jobs[start : start + batch_size]]
            completions += complete(model, processor, prompts, temperature, max_new_tokens, content_tokens)
    records = []
    for number, record in zip(jobs, completions, strict=True):
        if processor.image_token_id in record["tokens"][encoded[number].prompt :]:
            continue
        sample, answer = samples[number], answer_text(encoded[number], processor, content_tokens)
        facts = {"reward": reward(record["completion"], answer), "group": f"{number} {sample.where}"}
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


def complete(
    model: PreTrainedModel,
    processor: Processor,
    prompts: list[Encoded],
    temperature: float,
    max_new_tokens: int,
    content_tokens: Sequence[str],
) -> Iterator[Record]:
    """One completion of each prompt: tokens, completion_mask, logprobs, its text, and if it has any its routing.

    Call it without gradients and inside `own_generation_config`; `generate` draws from torch's global random state.
    """
    batch = collate_prompts(prompts, processor).to(model.device).inputs
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    ends = ends_of(processor)
    pad = processor.tokenizer.pad_token_id
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling)
    scored = _SampledLogProbs(temperature or 1.0)
    experts = expert_count(model.config)
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


def ends_of(processor: Processor) -> list[int]:
    """The tokens that end a completion: the one that answers are taught to end with, and the tokenizer's own."""
    own = processor.tokenizer.eos_token_id
    return list(dict.fromkeys(end for end in (end_token(processor), own) if isinstance(end, int)))


def _completion_length(new_N: Tensor, ends: list[int]) -> int:
    """Tokens up to the first that ends a completion, it included; all where there is none."""
    found = torch.isin(new_N, torch.tensor(ends)).nonzero()
    return int(found[0]) + 1 if len(found) else len(new_N)


def rollouts(options: argparse.Namespace) -> None:
    """`ds-moe rollouts`: sample, write, and say what was written.

    Raises `UserError` for bad data, a model that cannot be loaded, and an OUT.jsonl that must not be written.
    """
    out = options.out
    check_out(out, options.data)
    bad: list[BadRecord] | None = [] if options.skip_bad else None
    samples = open_prompts(options.data, options.prompts, options.seed, options.root, bad)
    model, processor = load_policy(options.model, DTYPES[options.dtype], options.experts_implementation)
    unread = len(bad or ())
    began = time.perf_counter()
    asked = {key: getattr(options, key) for key in SAMPLING}
    records = generate_rollouts(model, processor, samples, reward=BUILT_IN[options.reward], bad=bad, **asked)
    seconds = time.perf_counter() - began
    if not records:
        raise UserError("every completion holds an image token, which no model can read back (train it first)")
    try:
        write_rollouts(records, out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    completed = sum(sum(record["completion_mask"]) for record in records)
    mean_reward = sum(record["reward"] for record in records) / len(records)
    prompts = len(samples) - (len(bad or ()) - unread)  # those whose images or texts could be encoded
    print(
        f"{out}: {len(records)} completions of {prompts} prompts, mean reward {mean_reward:.3f}, "
        f"{completed / len(records):.1f} tokens each, {completed / seconds:,.0f} tokens/s"
    )
    if (with_images := prompts * options.per_prompt - len(records)) > 0:
        print(f"{with_images} completions with image tokens left out")
    if bad:
        print(f"{len(bad)} bad records left out; the first: {bad[0]}")
