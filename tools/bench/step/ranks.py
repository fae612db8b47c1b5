"""The benchmark's ranks: training steps of one model, with the same weights and tokens under each contender's engine.

The learning rate is so small that no weight changes. The optimizer does all of its work, yet every step of a contender
is the first step, with the same loss, gradients and routing, and can be held against plain transformers.
"""

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.distributed import Topology
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import on_cpu, start_distributed
from tools.bench.launched import leave, read_plan, run_config, write_result
from tools.bench.resident import new_peak, resident
from tools.bench.rivals import rival_engine

BLOCK = "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock"
NO_CHANGE = 1e-20  # a learning rate that rounds away
MEMORY_STEPS = 3


def build_model(plan: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The same weights in every call and on every rank."""
    fixed = {"norm_topk_prob": True, "tie_word_embeddings": False, "use_cache": False}
    config = Qwen3MoeConfig(**plan["model"], **fixed, experts_implementation="grouped_mm")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[plan["dtype"]]
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def build(
    contender: str, plan: dict[str, Any], topology: Topology, zero: int | str = 3, checkpointing: bool = False
) -> deepspeed.DeepSpeedEngine:
    """The contender's engine. All get one DeepSpeed configuration, a run's own, and add what makes them contenders."""
    train = {"lr": NO_CHANGE, "schedule": "constant", "steps": 1, "precision": plan["dtype"]}
    config = run_config(topology, zero, gradient_checkpointing=checkpointing, **train)
    model = build_model(plan, topology.device)
    if checkpointing and contender != "ds_moe":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu(), plan["model"]["hidden_size"])
    if contender == "ds_moe":
        prepare_model(model, config, topology)
        return build_engine(model, config, ds_config, total_steps=1)
    return rival_engine(contender, model, ds_config, topology, BLOCK)


def random_tokens(tokens: int, plan: dict[str, Any], topology: Topology) -> Tensor:
    """(B, S) ids of this rank, the same in every call."""
    generator = torch.Generator().manual_seed(topology.rank)
    shape = (tokens // plan["sequence"], plan["sequence"])
    return torch.randint(plan["model"]["vocab_size"], shape, generator=generator).to(topology.device)


def training_step(engine: deepspeed.DeepSpeedEngine, ids_BS: Tensor) -> Tensor:
    loss = engine(input_ids=ids_BS, labels=ids_BS).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def mean_over_ranks(value: Tensor) -> float:
    total = value.double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def most_of_ranks(values: list[Any], device: torch.device) -> list[Any]:
    """Each number of the list, integers or seconds, at its largest over the ranks."""
    most = torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def reference(model: nn.Module, ids_BS: Tensor) -> tuple[float, float]:
    """(loss, norm of the gradients) of plain transformers on the tokens of all ranks."""
    loss = model(input_ids=ids_BS, labels=ids_BS).loss
    norms = []
    for grad in torch.autograd.grad(loss, list(model.parameters())):
        dist.all_reduce(grad)
        norms.append((grad / dist.get_world_size()).double().norm())
    return mean_over_ranks(loss.detach()), torch.stack(norms).norm().item()


@contextmanager
def counting_sent() -> Iterator[list[int]]:
    """A list of one number: bytes this rank hands to others in `all_to_all_single`, its own share left out."""
    sent, original = [0], dist.all_to_all_single

    def counted(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        splits = input_split_sizes or [len(input) // dist.get_world_size(group)] * dist.get_world_size(group)
        sent[0] += (len(input) - splits[dist.get_rank(group)]) * input.stride(0) * input.element_size()
        return original(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def checked_step(engine: deepspeed.DeepSpeedEngine, ids_BS: Tensor, expected: tuple[float, float]) -> dict[str, float]:
    """A step's loss and gradient norm, how far they are from the expected ones, and what the busiest rank sent."""
    with counting_sent() as sent:
        loss = mean_over_ranks(training_step(engine, ids_BS))
    norm = float(engine.get_global_grad_norm() or 0.0)
    differences = {"loss_difference": abs(loss - expected[0]), "norm_difference": abs(norm / expected[1] - 1)}
    [most_sent] = most_of_ranks(sent, ids_BS.device)
    return {"loss": loss, "grad_norm": norm, **differences, "sent_bytes": most_sent}


def is_right(result: dict[str, float], plan: dict[str, Any]) -> bool:
    return result["loss_difference"] <= plan["loss_tolerance"] and result["norm_difference"] <= plan["norm_tolerance"]


def timed_steps(engine: deepspeed.DeepSpeedEngine, ids_BS: Tensor, steps: int) -> list[float]:
    """Seconds of each step: those of the slowest rank, all having started together."""
    taken = []
    for _ in range(steps):
        dist.barrier()
        get_accelerator().synchronize()
        began = time.perf_counter()
        training_step(engine, ids_BS)
        get_accelerator().synchronize()
        taken.append(time.perf_counter() - began)
    return most_of_ranks(taken, ids_BS.device)


def measure_times(plan: dict[str, Any], topology: Topology) -> list[dict[str, Any]]:
    """One result a number of tokens and contender, without times where loss or gradients are not transformers'."""
    plain = build_model(plan, topology.device)
    batches = {tokens: random_tokens(tokens, plan, topology) for tokens in plan["tokens"]}
    expected = {tokens: reference(plain, ids_BS) for tokens, ids_BS in batches.items()}
    del plain  # a GPU would miss its memory
    engines = {contender: build(contender, plan, topology, plan["zero"]) for contender in plan["contenders"]}
    results = []
    for tokens, ids_BS in batches.items():
        note(topology, f"{topology.world_size} processes, {tokens} tokens a rank: checking and timing")
        found = {name: checked_step(engine, ids_BS, expected[tokens]) for name, engine in engines.items()}
        times: dict[str, list[float]] = {name: [] for name, result in found.items() if is_right(result, plan)}
        for repeat in range(plan["repeats"] + 1):  # the first one warms up
            for name in times:
                taken = timed_steps(engines[name], ids_BS, plan["steps"])
                times[name] += taken if repeat else []
        timed = {name: {"step_s": taken} for name, taken in times.items()}
        results += [{"tokens": tokens, "contender": name, **found[name], **timed.get(name, {})} for name in found]
    return results


def measure_memory(plan: dict[str, Any], topology: Topology) -> list[dict[str, Any]]:
    """The largest rank's peak over some steps, tokens rising. Only a process's first engine is weighed by itself.

    `imported_bytes` were there before the engine (Python and its libraries), `built_bytes` before the steps.
    """
    results = []
    for contender in plan["contenders"]:
        imported = memory("VmRSS")
        engine = build(contender, plan, topology, plan["zero"])
        for tokens in sorted(plan["tokens"]):
            note(topology, f"{contender}, {tokens} tokens a rank: peak memory")
            ids_BS = random_tokens(tokens, plan, topology)
            give_back()
            built = memory("VmRSS")
            for _ in range(MEMORY_STEPS):
                training_step(engine, ids_BS)
            sizes = most_of_ranks([memory("VmHWM"), built, imported], topology.device)
            keys = ("peak_bytes", "built_bytes", "imported_bytes")
            results.append({"tokens": tokens, "contender": contender, **dict(zip(keys, sizes, strict=True))})
    return results


def memory(which: str) -> int:
    """Bytes of this process: VmRSS is now, VmHWM the peak since `give_back`; on a GPU what torch has allocated."""
    if on_cpu():
        return resident(which)
    return torch.cuda.max_memory_allocated() if which == "VmHWM" else torch.cuda.memory_allocated()


def give_back() -> None:
    if on_cpu():
        new_peak()
    else:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def note(topology: Topology, text: str) -> None:
    if topology.rank == 0:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    plan = read_plan()
    topology = start_distributed(plan["processes"])
    deepspeed.utils.logger.setLevel("ERROR")
    results = measure_times(plan, topology) if "time" in plan["measure"] else []
    results += measure_memory(plan, topology) if "memory" in plan["measure"] else []
    environment = {
        **{module.__name__: module.__version__ for module in (torch, deepspeed, transformers)},
        **{"dtype": plan["dtype"], "backend": dist.get_backend(), "threads": torch.get_num_threads()},
        "device": "cpu" if on_cpu() else torch.cuda.get_device_name(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }
    parameters = build_model(plan, torch.device("meta")).num_parameters()
    write_result({"environment": environment, "parameters": parameters, "results": results})
    leave()


if __name__ == "__main__":
    main()
