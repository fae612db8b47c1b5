"""Memory and time of the loss: logits of all tokens against logits where labels are, a tile at a time.

    python -m tools.bench.loss.bench --json loss.json     # 25 minutes on one core
    python -m tools.bench.loss.bench --ways today ours --shares 0.04

4,096 tokens of a vocabulary of 151,936 (Qwen3-VL's) go through a model whose decoder is as small as it can be, forward
and backward, in a process of their own for every figure. The peak is that of the process's resident memory (VmHWM),
above what it was before the forward; seconds are those of the CPU, on one thread.
Exit status 1 if a loss or a gradient differs, or the memory is above the shares of today's that are promised.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ds_moe.data.batch import NO_LOSS
from ds_moe.models.head import at_labels, targets_of
from tools.bench.resident import new_peak, resident
from tools.results import command_line, new_table, refusing, show, write_json

MIB = 2**20
ROWS, LENGTH, VOCABULARY = 4, 1024, 151_936
WIDTH = 256
LABELLED = (0.04, 1.0)
LIMITS = {0.04: 1 / 15, 1.0: 1 / 3}  # of the peak with logits of all tokens
LOSS, GRADIENT = {"float32": 1e-6, "bfloat16": 1e-3}, {"float32": 5e-6, "bfloat16": 2e-2}


# --- the ways: each gives a scalar to call backward on


def today(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Transformers' loss, as ds_moe e49d3ff called it."""
    return model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=1).loss


def ours(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    return at_labels(model, {"input_ids": ids}, labels).loss


def deepspeed(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """DeepSpeed's chunks over the logits of labelled positions, which exist all at once."""
    target, hidden = _labelled(model, ids, labels)
    return chunked_cross_entropy(model.lm_head(hidden), target, reduction="sum")


def torch_rows(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """torch >= 2.13, with a loss a token, which RL needs: it computes logits again in backward, as ours."""
    target, hidden = _labelled(model, ids, labels)
    return _of_torch(hidden, model.lm_head.weight, target, "none").sum()


def torch_sum(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """torch >= 2.13, summed: it computes the gradients in forward, also where none are asked for."""
    target, hidden = _labelled(model, ids, labels)
    return _of_torch(hidden, model.lm_head.weight, target, "sum")


def rl_today(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of all tokens as ds_moe e49d3ff made them (`replay/ratios.py`, `token_logprobs`)."""

    def of_sequence(logits_SV: Tensor, ids_S: Tensor) -> Tensor:
        logits_SV = logits_SV.float()
        return logits_SV.gather(1, ids_S.roll(-1).unsqueeze(1)).squeeze(1) - logits_SV.logsumexp(1)

    logits_BSV = model(input_ids=ids, use_cache=False).logits
    rows = [
        checkpoint(of_sequence, *one, use_reentrant=False, preserve_rng_state=False)
        for one in zip(logits_BSV.unbind(), ids.unbind(), strict=True)
    ]
    logprob_BS = F.pad(torch.stack(rows)[:, :-1], (1, 0))
    return -torch.where(labels != NO_LOSS, logprob_BS, 0).sum()


def rl_ours(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    return -at_labels(model, {"input_ids": ids}, labels).logits.sum()


def _labelled(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    target = targets_of(labels)
    keep = target != NO_LOSS
    return target[keep], model.model(input_ids=ids, use_cache=False).last_hidden_state[keep]


def _of_torch(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    rows = max(1, 2**26 // (len(weight) * weight.element_size()))  # tiles like ours
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


WAYS: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {
    "today": today,
    "ours": ours,
    "deepspeed": deepspeed,
    "torch, a loss a token": torch_rows,
    "torch, summed": torch_sum,
    "rl, today": rl_today,
    "rl, ours": rl_ours,
}


# --- one measurement


def measure(way: str, share: float, dtype: str) -> dict[str, Any]:
    """In this process, which has done nothing else."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 2}
    config = Qwen3MoeConfig(vocab_size=VOCABULARY, num_experts_per_tok=1, tie_word_embeddings=True, **shape, **heads)
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    labels = torch.where(torch.rand(ids.shape) < share, ids, NO_LOSS)
    model.model(input_ids=ids[:, :8], use_cache=False)  # what is only made once
    new_peak()
    before = resident("VmRSS")
    began = time.process_time()
    loss = WAYS[way](model, ids, labels)
    forward_s = time.process_time() - began
    loss.backward()
    weight = model.lm_head.weight
    return {
        "way": way,
        "labelled": share,
        "dtype": dtype,
        "labels": int((labels[:, 1:] != NO_LOSS).sum()),
        "peak_bytes": resident("VmHWM") - before,
        "weight_gradient_bytes": weight.nbytes,  # among them
        "forward_s": forward_s,
        "backward_s": time.process_time() - began - forward_s,
        "loss": loss.item() / max(int((labels[:, 1:] != NO_LOSS).sum()), 1),
        "gradient": _sketch(weight.grad),
    }


def _sketch(gradient: Tensor) -> list[float]:
    """The gradient's products with eight fixed random matrices, over its norm: enough to tell two apart."""
    drawn = torch.Generator().manual_seed(1)
    products = []
    for _ in range(8):
        signs = torch.randint(2, (len(gradient), 1), generator=drawn) * 2 - 1
        columns = torch.randint(2, (1, gradient.shape[1]), generator=drawn) * 2 - 1
        products.append((gradient.double() * signs * columns).sum().item())
    return [*products, gradient.double().norm().item()]


def in_a_process(way: str, share: float, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench.loss.bench", "--measure", way, str(share), dtype]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}  # what is freed goes back
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- what is promised


def compared(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each measurement beside today's of the same labels: its share of the memory, and how its result differs."""
    today = {(one["labelled"], one["dtype"], one["way"]): one for one in found}
    result = []
    for one in found:
        other = today.get((one["labelled"], one["dtype"], "rl, today" if one["way"].startswith("rl") else "today"))
        if other is None:
            result.append(one)
            continue
        norm = other["gradient"][-1]
        away = max(abs(a - b) for a, b in zip(one["gradient"], other["gradient"], strict=True))
        result.append(
            one
            | {
                "of_today": one["peak_bytes"] / other["peak_bytes"],
                "loss_difference": abs(one["loss"] - other["loss"]) / max(abs(other["loss"]), 1.0),
                "gradient_difference": away / norm / math.sqrt(WIDTH),
            }
        )
    return result


def broken(found: list[dict[str, Any]]) -> list[str]:
    """What does not hold, a line each."""
    lines = []
    for one in compared(found):
        name = f"{one['way']}, {one['labelled']:.0%} labelled, {one['dtype']}"
        if one.get("loss_difference", 0) > LOSS[one["dtype"]]:
            lines.append(f"{name}: the loss is {one['loss_difference']:.1e} from today's")
        if one.get("gradient_difference", 0) > GRADIENT[one["dtype"]]:
            lines.append(f"{name}: the gradient is {one['gradient_difference']:.1e} from today's")
        if one["way"].endswith("ours") and one["dtype"] == "float32":
            limit = LIMITS.get(one["labelled"], 1.0)
            if one.get("of_today", 0) > limit:
                lines.append(f"{name}: {one['of_today']:.3f} of today's memory, above {limit:.3f}")
    return lines


def table(found: list[dict[str, Any]]) -> None:
    numbers = ["labelled", "peak MiB", "of today", "forward s", "backward s", "loss diff.", "gradient diff."]
    lines = new_table(["dtype", "way"], numbers, "loss of 4,096 tokens, vocabulary of 151,936")
    for one in compared(found):
        lines.add_row(
            one["dtype"],
            one["way"],
            f"{one['labelled']:.0%}",
            f"{one['peak_bytes'] / MIB:,.0f}",
            f"1/{1 / one['of_today']:.1f}" if "of_today" in one else "",
            f"{one['forward_s']:.1f}",
            f"{one['backward_s']:.1f}",
            f"{one['loss_difference']:.0e}" if "of_today" in one else "",
            f"{one['gradient_difference']:.0e}" if "of_today" in one else "",
        )
    show(lines)


@refusing
def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--json", "--show")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(LABELLED), help="of the tokens with a label")
    parser.add_argument("--dtypes", nargs="+", choices=list(LOSS), default=list(LOSS))
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SHARE", "DTYPE"), help="one figure, in this process")
    options = parser.parse_args(arguments)
    if options.measure:
        way, share, dtype = options.measure
        print(json.dumps(measure(way, float(share), dtype)))
        return 0
    if options.show:
        found = json.loads(options.show.read_text())["measured"]
    else:
        cases = [(w, s, d) for d in options.dtypes for s in options.shares for w in options.ways]
        found = [in_a_process(*case) for case in cases]
    table(found)
    lines = broken(found)
    show("\n".join(lines) or "the promised shares of today's memory hold, losses and gradients are today's")
    settings = {"tokens": ROWS * LENGTH, "vocabulary": VOCABULARY, "hidden_size": WIDTH, "torch": torch.__version__}
    write_json({"settings": settings, "measured": compared(found), "broken": lines}, options.json)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
