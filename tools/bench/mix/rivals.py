"""The ranks of contenders without us: transformers under DeepSpeed, with padded rows.

zero3     ZeRO-3 + transformers grouped_mm: the model as it is, each MoE block a ZeRO-3 leaf module
autoep    DeepSpeed AutoEP, experts spread over all ranks

They get the samples of each micro-step, and the DeepSpeed configuration, that a padded run of ours gets.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import Batch
from ds_moe.data.chat import parse_record
from ds_moe.data.encode import Encoded, collate, encode
from ds_moe.data.processor import Processor
from ds_moe.distributed import Topology
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.models.processor import load_processor
from tools.bench.launched import leave, run_config
from tools.bench.mix.model import plain_model
from tools.bench.mix.turns import Step, take_turns
from tools.bench.rivals import rival_engine

BLOCK = "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextSparseMoeBlock"
NO_CHANGE = 1e-20  # a learning rate that rounds away


def encoded_records(file: Path, processor: Processor, max_length: int, max_pixels: int) -> list[Encoded]:
    lines = file.read_text().splitlines()
    records = [parse_record(json.loads(line), f"{file}:{number}", file.parent) for number, line in enumerate(lines, 1)]
    return [encode(record, processor, max_length, max_pixels) for record in records]


def global_batches(samples: list[Encoded], size: int) -> list[list[Encoded]]:
    """In the order of the file, each sorted by length, longest first: neighbours share a micro-step."""
    cut = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [sorted(batch, key=lambda sample: -len(sample.input_ids)) for batch in cut]


def own_micro_batches(batch: list[Encoded], size: int, topology: Topology) -> list[list[Encoded]]:
    ranks = topology.world_size
    starts = range(topology.rank * size, len(batch), ranks * size)
    return [batch[start : start + size] for start in starts]


def build(plan: dict[str, Any], config: RunConfig, topology: Topology) -> deepspeed.DeepSpeedEngine:
    model = plain_model(Path(plan["model"]))
    hidden_size = model.config.get_text_config().hidden_size
    ds_config: dict[str, Any] = resolve_deepspeed(config, topology.world_size, on_cpu(), hidden_size)
    if plan["contender"] == "autoep":
        for name in ("num_experts", "num_experts_per_tok"):  # it reads them from the top, where a VL config has none
            setattr(model.config, name, getattr(model.config.get_text_config(), name))
    layers = r"model\.language_model\.layers\.\d+\.mlp"
    return rival_engine(plan["contender"], model, ds_config, topology, BLOCK, moe_layer_pattern=layers)


def optimizer_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[Batch]) -> Step:
    """The loss is the mean over the labels of the global batch, as DeepSpeed averages over ranks and micro-batches."""
    counts = torch.zeros(2, dtype=torch.int64)
    for batch in micro_batches:
        counts += torch.stack([batch.label_tokens, batch.tokens])
    dist.all_reduce(counts)
    labels, tokens = counts.tolist()
    share, loss = labels / (dist.get_world_size() * len(micro_batches)), torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        own = engine(**batch.with_labels, use_cache=False, num_items_in_batch=share).loss
        engine.backward(own)
        engine.step()
        loss += own.detach() / len(micro_batches)
    dist.all_reduce(loss)
    norm = float(engine.get_global_grad_norm() or 0.0)
    return Step(loss.item() / dist.get_world_size(), norm, tokens, len(micro_batches))


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    topology = start_distributed(plan["processes"])
    deepspeed.utils.logger.setLevel("ERROR")
    batch = {"samples": plan["micro_batch_size"], "global_batch_size": plan["global_batch_size"]}
    config = run_config(topology, 3, **batch, lr=NO_CHANGE, schedule="constant", steps=1, precision="fp32")
    processor = load_processor(plan["model"])
    samples = encoded_records(Path(plan["records"]), processor, plan["max_length"], config.data.max_pixels)
    mine = [
        own_micro_batches(batch, plan["micro_batch_size"], topology)
        for batch in global_batches(samples, plan["global_batch_size"])
    ]
    del samples  # those of other ranks
    engine = build(plan, config, topology)
    taken = 0

    def step() -> Step:
        nonlocal taken
        micro_batches = [collate(one, processor) for one in mine[taken % len(mine)]]
        taken += 1
        return optimizer_step(engine, micro_batches)

    take_turns(step, len(mine), Path(plan["folder"]))
    leave()


if __name__ == "__main__":
    main()
