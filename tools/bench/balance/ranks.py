"""The benchmark's ranks: train each method and seed with the trainer's own step, watch balance on held-out text.

Everything a run draws comes from its seed: methods of one seed start from the same weights and see the same bytes.
The result is written anew after every run, so that a benchmark that was stopped leaves what it has measured.
"""

import hashlib
import itertools
import os
import platform
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.data.batch import Batch
from ds_moe.distributed import Topology
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.moe.decision import RoutingDecision, count_experts
from ds_moe.monitor.meters import relative_load
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.set_up import seed_everything
from ds_moe.training.step import optimizer_step
from tools.bench.launched import leave, read_plan, run_config, write_result

SEQUENCE = 256  # bytes
MICRO_BATCH = 8  # sequences a rank
HELD_OUT_WINDOWS = 512  # of SEQUENCE bytes, spread evenly over the held-out text
HELD_OUT_SHARE = 10  # one file in ten, by the hash of its path
TRAIN = {"lr": 3e-3, "warmup_steps": 20, "schedule": "cosine", "weight_decay": 0.01, "min_lr_ratio": 0.05}
MODEL = {
    **{"vocab_size": 257, "pad_token_id": 256, "max_position_embeddings": SEQUENCE},  # bytes, and padding
    **{"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "tie_word_embeddings": False},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    **{"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "norm_topk_prob": True},
}
NO_SOURCES = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def standard_library() -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(training bytes, held-out bytes, what they are). Files are split by the hash of their path, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    files = sorted(path.as_posix() for path in found if not NO_SOURCES & set(path.parts))
    sides: dict[bool, list[str]] = {False: [], True: []}
    for file in files:
        number = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big")
        sides[number % HELD_OUT_SHARE == 0].append(file)
    train, held_out = (b"\0".join((root / file).read_bytes() for file in sides[side]) for side in (False, True))
    about = {
        "python": platform.python_version(),
        "train_files": len(sides[False]),
        "train_bytes": len(train),
        "held_out_files": len(sides[True]),
        "held_out_bytes": len(held_out),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
    }
    return np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), about


def windows(text: np.ndarray, starts: np.ndarray) -> Tensor:
    """(B, SEQUENCE) int64 token ids from each of `starts`."""
    return torch.from_numpy(text[starts[:, None] + np.arange(SEQUENCE)].astype(np.int64))


def as_batch(ids_BS: Tensor) -> Batch:
    return Batch.of_rows({"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}, labels=ids_BS)


def training_steps(text: np.ndarray, seed: int, topology: Topology) -> Iterator[list[Batch]]:
    """One micro-batch a step and rank. The global batch depends on the seed and the step only."""
    for step in itertools.count():
        random = np.random.default_rng([seed, step])
        starts = random.integers(len(text) - SEQUENCE, size=MICRO_BATCH * topology.world_size)
        yield [as_batch(windows(text, starts[topology.rank :: topology.world_size]))]


def held_out_batches(text: np.ndarray, topology: Topology) -> list[Batch]:
    """This rank's share of the held-out windows, the same for every method and seed."""
    per_rank = HELD_OUT_WINDOWS // topology.world_size // MICRO_BATCH * MICRO_BATCH
    starts = np.linspace(0, len(text) - SEQUENCE, per_rank * topology.world_size).astype(np.int64)
    mine = windows(text, starts[topology.rank :: topology.world_size])
    return [as_batch(ids_BS) for ids_BS in mine.split(MICRO_BATCH)]


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: list[Batch]) -> tuple[float, np.ndarray]:
    """Held-out loss in nats a byte, and counts_LE: assignments of every expert over the whole set and all ranks."""
    layers = moe_layers(engine.module)
    counts_LE = torch.zeros(len(layers), MODEL["num_experts"], dtype=torch.int64)

    def count(index: int, gate: Any, args: Any, decision: RoutingDecision) -> None:
        counts_LE[index] += count_experts(decision.expert_N, MODEL["num_experts"])

    hooks = [layer.gate.register_forward_hook(partial(count, layer.index)) for layer in layers]
    engine.eval()
    loss = torch.stack([engine(**batch.with_labels, use_cache=False).loss for batch in batches]).mean()
    engine.train()
    for hook in hooks:
        hook.remove()
    dist.all_reduce(loss)
    dist.all_reduce(counts_LE)
    return loss.item() / dist.get_world_size(), counts_LE.numpy()


def start_run(balance: list[dict[str, Any]], seed: int, steps: int, topology: Topology, **train: Any) -> TrainingParts:
    """The trainer's parts around the small language model, without those of images and files; `train` replaces keys of
    TRAIN."""
    train = {**TRAIN, "warmup_steps": min(TRAIN["warmup_steps"], steps - 1), "precision": "fp32", **train}
    config = run_config(topology, 1, MICRO_BATCH, moe={"balance": balance}, seed=seed, steps=steps, **train)
    seed_everything(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL))
    context = prepare_model(model, config, topology)
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu(), MODEL["hidden_size"])
    engine = build_engine(model, config, ds_config, steps)
    engine.train()
    return TrainingParts(config, topology, engine, context)


def measure(plan: dict[str, Any], method: str, seed: int, texts: tuple[np.ndarray, np.ndarray], topology: Topology):
    """Train one method with one seed; yields the run's record after every evaluation, complete at the last."""
    own = plan.get("train_of", {}).get(method, {})  # of `tools.bench.optimizers`
    parts = start_run(plan["methods"][method], seed, plan["steps"], topology, **own)
    task, progress = Task(parts), Progress(plan["steps"])
    batches = training_steps(texts[0], seed, topology)
    held_out = held_out_batches(texts[1], topology)
    began = time.perf_counter()
    record: dict[str, Any] = {"method": method, "seed": seed, "points": [], "train_s": 0.0}
    while progress.step < plan["steps"]:
        step_began = time.perf_counter()
        micro_batches = [batch.to(topology.device) for batch in next(batches)]
        outcome = optimizer_step(parts, task, micro_batches, progress)
        record["train_s"] += time.perf_counter() - step_began
        if progress.step in plan["evaluate_at"]:
            loss, counts_LE = evaluate(parts.engine, held_out)
            point = {"step": progress.step, "train_loss": outcome.loss, "loss": loss}
            point["max_vio_L"] = (relative_load(counts_LE).max(axis=1) - 1).tolist()
            record["points"].append(point | {"counts_LE": counts_LE.tolist()})
            record["seconds"] = time.perf_counter() - began
            yield record
    parts.engine.destroy()


def main() -> None:
    plan = read_plan()
    topology = start_distributed(plan["ep_size"])
    *texts, about = standard_library()
    result = {
        **plan,
        "text": about,
        "model": MODEL,
        "train": TRAIN | {"sequence": SEQUENCE, "global_batch": MICRO_BATCH * topology.world_size},
        "held_out_windows": HELD_OUT_WINDOWS,
        "world_size": topology.world_size,
        "versions": {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)},
        "cores": len(os.sched_getaffinity(0)),
        "runs": [],
    }
    began = time.perf_counter()
    todo = list(itertools.product(plan["seeds"], plan["methods"]))  # seed by seed: a half-done benchmark compares
    for number, (seed, method) in enumerate(todo):
        record: dict[str, Any] = {}
        for record in measure(plan, method, seed, tuple(texts), topology):
            if topology.rank == 0:
                done = number + record["points"][-1]["step"] / plan["steps"]
                left_s = (time.perf_counter() - began) * (len(todo) / done - 1)
                head = f"run {number + 1}/{len(todo)}  {described(record, plan['steps'])}"
                print(f"{head}  ETA {left_s / 60:.0f} min", flush=True)
        result["runs"].append(record)
        result["seconds"] = time.perf_counter() - began
        write_result(result)
    leave()


def described(record: dict[str, Any], steps: int) -> str:
    point = record["points"][-1]
    return (
        f"{record['method']}, seed {record['seed']}  step {point['step']}/{steps}"
        f"  held-out loss {point['loss']:.4f}  MaxVio_global {np.mean(point['max_vio_L']):.3f}"
        f"  {record['train_s'] / point['step']:.3f} s/step"
    )


if __name__ == "__main__":
    main()
