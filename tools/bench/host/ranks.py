"""The benchmark's ranks: training steps of models so narrow that a step is what the host does to launch it.

A contender has processes of its own, because ZeRO-3 replaces torch's linear function in the whole process.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moe.distributed import Topology
from ds_moe.engine.start import start_distributed
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

NO_KERNEL = (
    "view",
    "reshape",
    "transpose",
    "permute.",
    "slice",
    "select",
    "split",
    "expand",
    "squeeze",
    "unsqueeze",
    "detach",
)
NO_KERNEL += (
    "alias",
    "as_strided",
    "unbind",
    "empty",
    "new_empty",
    "chunk",
    "_unsafe_view",
    "set_",
    "resize_",
    "promote_types",
    "lift_fresh",
)


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy, each of them a kernel launch or more on an accelerator."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        self.count += name != "t" and not name.startswith(NO_KERNEL)
        return function(*args, **(kwargs or {}))


def plain_step(
    plan: dict[str, Any], topology: Topology, checkpointing: bool
) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A step of transformers' own model without DeepSpeed: forward, backward, clipping, fused AdamW."""
    model = build_model(plan, topology.device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
                step = plain_step(sized, topology, checkpointing)
            else:
                step = engine_step(build(name, sized, topology, zero, checkpointing))
            loss, norm = step(ids_BS)
            found = {"loss_difference": abs(mean_over_ranks(loss) - expected[0])}
            found["norm_difference"] = abs(norm / expected[1] - 1)
            cpu_s = [timed(step, ids_BS) for _ in range(plan["steps"] + 1)][1:]
            results.append(
                {"layers": layers, "checkpointing": checkpointing, **found}
                | {"cpu_s": most_of_ranks(cpu_s, ids_BS.device), "kernels": kernels(step, ids_BS)}
            )
    return results


def timed(step: Callable[[Tensor], tuple[Tensor, float]], ids_BS: Tensor) -> float:
    """Seconds of processor time of this process, all of its threads together, which waiting does not lengthen."""
    dist.barrier()
    began = time.process_time()
    step(ids_BS)
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
