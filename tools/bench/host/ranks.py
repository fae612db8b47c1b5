"""The benchmark's ranks: training steps of models so narrow that a step is what the host does to launch it.

A contender has processes of its own, because ZeRO-3 replaces torch's linear function in the whole process.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from ds_moe.distributed import Topology, parallel
from ds_moe.engine.start import start_distributed
from ds_moe.engine.whole_weights import whole_weights
from tools.bench.launched import leave, read_plan, write_result
from tools.bench.step.ranks import (
    NO_CHANGE,
    build,
    build_model,
    mean_over_ranks,
    most_of_ranks,
    note,
    random_tokens,
    reference,
    training_step,
)

NO_KERNEL = tuple("view reshape transpose permute. slice select split expand squeeze unsqueeze detach alias".split())
NO_KERNEL += tuple("as_strided unbind empty new_empty chunk _unsafe_view set_ resize_ promote_types lift_fresh".split())
ANSWERS, FEW, MORE = 3, 2, 6  # answers of one rank, of FEW tokens and of MORE than that


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy, each of them a kernel launch or more on an accelerator."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        self.count += name != "t" and not name.startswith(NO_KERNEL)
        return function(*args, **(kwargs or {}))


def build_plain(plan: dict[str, Any], topology: Topology, checkpointing: bool) -> PreTrainedModel:
    model = build_model(plan, topology.device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def plain_step(model: PreTrainedModel) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A step of transformers' own model without DeepSpeed: forward, backward, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=NO_CHANGE, fused=True)

    def step(ids_BS: Tensor) -> tuple[Tensor, float]:
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), float(norm)

    return step


def engine_step(engine: deepspeed.DeepSpeedEngine) -> Callable[[Tensor], tuple[Tensor, float]]:
    def step(ids_BS: Tensor) -> tuple[Tensor, float]:
        loss = training_step(engine, ids_BS)
        return loss, float(engine.get_global_grad_norm() or 0.0)

    return step


def measure(plan: dict[str, Any], topology: Topology) -> list[dict[str, Any]]:
    results = []
    for layers in plan["layers"]:
        sized = plan | {"model": plan["model"] | {"num_hidden_layers": layers}}
        ids_BS = random_tokens(plan["tokens"], sized, topology)
        expected = reference(build_model(sized, topology.device), ids_BS)
        for checkpointing in plan["checkpointing"]:
            name, zero = plan["contender"], plan["zero"]
            note(topology, f"{name} ZeRO-{zero} EP {topology.ep_size}, {layers} layers, checkpointing {checkpointing}")
            if name == "plain":
                model = build_plain(sized, topology, checkpointing)
                step = plain_step(model)
            else:
                model = build(name, sized, topology, zero, checkpointing)
                step = engine_step(model)
            loss, norm = step(ids_BS)
            found = {"loss_difference": abs(mean_over_ranks(loss) - expected[0])}
            found["norm_difference"] = abs(norm / expected[1] - 1)
            cpu_s = [timed(step, ids_BS) for _ in range(plan["steps"] + 1)][1:]
            found |= {"cpu_s": most_of_ranks(cpu_s, ids_BS.device), "kernels": kernels(step, ids_BS)}
            if name in ("plain", "ds_moe") and topology.world_size == 1 and not checkpointing:
                found["token_s"] = statistics.median(most_of_ranks(token_times(model, ids_BS), ids_BS.device))
            results.append({"layers": layers, "checkpointing": checkpointing, **found})
    return results


def token_times(model: Any, ids_BS: Tensor) -> list[float]:
    """Seconds of processor time a generated token, beyond the first few of an answer; some answers, one a figure."""
    times = []
    whole = whole_weights(model) if isinstance(model, deepspeed.DeepSpeedEngine) else nullcontext()
    with whole, torch.no_grad():
        for _ in range(ANSWERS + 1):
            few, many = (timed(partial(generate, model), ids_BS[:, :8], count) for count in (FEW, FEW + MORE))
            times.append((many - few) / MORE)
    return times[1:]


def generate(model: Any, ids_BS: Tensor, tokens: int) -> None:
    module = getattr(model, "module", model).eval()
    settings = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    module.generate(input_ids=ids_BS, generation_config=settings, use_cache=True, synced_gpus=parallel())


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of processor time of this process, all of its threads together, which waiting does not lengthen."""
    dist.barrier()
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def kernels(step: Callable[[Tensor], tuple[Tensor, float]], ids_BS: Tensor) -> int:
    with Kernels() as counted:
        step(ids_BS)
    return counted.count


def main() -> None:
    plan = read_plan()
    topology = start_distributed(plan["ep_size"])
    deepspeed.utils.logger.setLevel("ERROR")
    results = measure(plan, topology)
    write_result({"results": results})
    leave()


if __name__ == "__main__":
    sys.exit(main())
