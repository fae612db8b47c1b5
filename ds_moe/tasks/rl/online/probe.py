"""Whether an engine computes with the weights that it was given: its greedy answers against the trainer's own.

A server may answer that it has loaded a folder and be wrong: experts in another layout, an old cache, the weights of
before. Log-probs of a few tokens tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import GenerationConfig

from ds_moe.data.encode import Encoded, collate_prompts
from ds_moe.data.processor import Processor
from ds_moe.distributed import parallel
from ds_moe.engine.whole_weights import evaluation_mode
from ds_moe.models.generation import own_generation_config
from ds_moe.rollout.engine import Completion, Prompt, RolloutEngine
from ds_moe.tasks.task import TrainingParts

TOKENS = 8  # of each answer
# By the dtype of the engine: how far its log-probs may be from the trainer's, on average. In bf16 rounding flips
# routers, which costs .03 to .1; weights in a wrong place cost .3 and more.
TOLERANCE = {"fp32": 2e-3, "bf16": 0.15}
GAP = 4  # tolerances that the answer of an engine may be less likely than the most likely one
MOVED = 0.1  # tolerances by which a log-prob of the trainer has moved for certain


@dataclass(frozen=True)
class OwnAnswer:
    """The trainer's greedy answer to a prompt: N tokens, and the log-probs (N, V) that they were chosen by."""

    tokens_N: list[int]
    logprob_NV: Tensor

    def of(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of other tokens, up to the first at which they part from the answer's, it included."""
        found = []
        for own, token, logprob_V in zip(self.tokens_N, tokens, self.logprob_NV, strict=False):
            found.append(float(logprob_V[token]))
            if token != own:
                break
        return found


@torch.no_grad()
def own_answers(parts: TrainingParts, prompts: Sequence[Encoded], processor: Processor) -> list[OwnAnswer]:
    """The trainer's answers under its weights of now; all ranks answer the same prompts (collective)."""
    model = parts.engine.module
    batch = collate_prompts(list(prompts), processor).to(parts.topology.device).inputs
    own = model.generation_config
    greedy = GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with evaluation_mode(parts.engine), own_generation_config(model):
        found = model.generate(**batch, generation_config=greedy, synced_gpus=parallel())
    new_BN = found.sequences[:, batch["input_ids"].shape[1] :].tolist()
    logprob_NBV = [step.float().log_softmax(-1).cpu() for step in found.logits[: len(new_BN[0])]]
    return [
        OwnAnswer(tokens, torch.stack([one[row] for one in logprob_NBV[: len(tokens)]]))
        for row, tokens in enumerate(new_BN)
    ]


class WeightsCheck:
    """Compares every hand-over, and remembers since when each server answers what it answers.

    Args:
        dtype: the coarser one of engine and trainer, a key of `TOLERANCE`.
    """

    def __init__(self, dtype: str) -> None:
        self._tolerance = TOLERANCE[dtype]
        self._since: dict[str, tuple[list[Completion], Sequence[OwnAnswer]]] = {}  # by server: its answers, and ours
        # at the first hand-over at which it gave them

    def compare(self, engine: RolloutEngine, version: str, prompts: Sequence[Prompt], own: Sequence[OwnAnswer]) -> None:
        """Raises `UserError` where the answers of a server are not those of the trainer's weights, and has those of
        later servers compared as `RolloutEngine.prove` does."""

        def problem(server: str, found: Sequence[Completion]) -> str | None:
            # First what says more: weights of before may also be far from those of now.
            text = self._has_not_moved(server, found, own) or self._differs(found, own)
            if text is None:
                return None
            given = f"{server} was given the weights {version} and answers as if it had others: {text}"
            return f"rl.engine: {given}; no step was taken on its rollouts (does it load this family's hub layout?)"

        engine.prove(prompts, TOKENS, problem)

    def _differs(self, found: Sequence[Completion], own: Sequence[OwnAnswer]) -> str | None:
        differences, worst = [], 0.0
        for one, answer in zip(found, own, strict=True):
            expected = answer.of(one.token_ids)
            differences += [abs(a - b) for a, b in zip(one.logprobs, expected, strict=False)]
            last = len(expected) - 1
            if last >= 0:
                worst = max(worst, float(answer.logprob_NV[last].max()) - expected[last])
        if not differences:
            return "it answers nothing"
        mean = fmean(differences)
        if not mean <= self._tolerance:  # a NaN is no match
            return f"log-probs of {len(differences)} greedy tokens differ by {mean:.3g} on average"
        if not worst <= GAP * self._tolerance:
            return f"its greedy token is less likely than the trainer's, by {worst:.3g} in log-prob"
        return None

    def _has_not_moved(self, server: str, found: Sequence[Completion], own: Sequence[OwnAnswer]) -> str | None:
        """That all is exactly as at earlier hand-overs, although the trainer's own log-probs have moved since the first
        of them: by little at a time, perhaps."""
        before, own_before = self._since.get(server, ((), ()))
        if [(one.token_ids, one.logprobs) for one in found] != [(one.token_ids, one.logprobs) for one in before]:
            self._since[server] = (list(found), own)
            return None
        moved = 0.0
        for one, now, then in zip(found, own, own_before, strict=True):
            both = zip(now.of(one.token_ids), then.of(one.token_ids), strict=False)
            moved = max([moved, *(abs(a - b) for a, b in both)])
        if moved > MOVED * self._tolerance:
            return f"its log-probs are exactly those of before, the trainer's have moved by {moved:.3g}"
        return None
