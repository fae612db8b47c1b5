"""The benchmark's ranks: optimizer steps over one long row, shared by all of them, and what they need."""

import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.row_part import part_of_row
from ds_moe.distributed import over_ranks
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.memory.predict import predict
from ds_moe.models.families import family_of
from ds_moe.models.load import build_outline
from ds_moe.models.tower import lighten_tower
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.step import optimizer_step
from tools.bench.launched import leave, read_plan, write_result
from tools.bench.memory.ranks import config_of
from tools.bench.resident import new_peak, resident

import_module("ds_moe.train")  # its libraries belong to what a rank of a run has


def long_row(config: RunConfig, model: PretrainedConfig, samples: int) -> Batch:
    """Samples of equal length, each an image of a quarter of its tokens and random text, all of which is labelled."""
    tokens, vision = config.tokens_per_row, model.vision_config
    length, merge = tokens // samples, vision.spatial_merge_size
    ids_BS = torch.randint(5, model.text_config.vocab_size, (samples, length))
    ids_BS[:, : length // 4] = model.image_token_id
    grid = torch.tensor([[1, merge, merge * (length // 4)]] * samples)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    row_1S = ids_BS.view(1, -1)
    inputs = {
        "input_ids": row_1S,
        "position_ids": torch.arange(length).repeat(4, 1, samples),
        "mm_token_type_ids": (row_1S == model.image_token_id).long(),
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), width),
        "image_grid_thw": grid,
    }
    labels = row_1S.where(row_1S != model.image_token_id, NO_LOSS)
    return Batch.of_packed(inputs, labels, [length] * samples, torch.ones(samples, dtype=torch.bool))


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    config, model = RunConfig(**plan["run"]), config_of(plan["model"])
    ranks = config.train.sequence_parallel
    topology = start_distributed(config.moe.ep_size, sequence_parallel=ranks)
    deepspeed.utils.logger.setLevel("ERROR")
    libraries = resident("VmRSS")
    ds = resolve_deepspeed(config, topology.world_size, on_cpu(), model.text_config.hidden_size)
    predicted = predict(build_outline(model), config, zero_plan(ds), topology.world_size, on_cpu())
    torch.manual_seed(0)
    trained = family_of(model).model_class._from_config(model, dtype=torch.float32).train()
    batch = long_row(config, model, plan["samples"])
    lighten_tower(trained)
    context = prepare_model(trained, config, topology)
    engine = build_engine(trained, config, ds, total_steps=plan["steps"])
    del trained
    if ranks > 1:
        unread = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), image_token_id=model.image_token_id)
        unread.image_processor = SimpleNamespace(merge_size=model.vision_config.spatial_merge_size)
        unread.tower_inputs = lambda grid: {}  # the tower makes them itself
        batch = part_of_row(batch, topology.part, ranks, unread)
    new_peak()
    parts, seconds, cpu_seconds, losses = TrainingParts(config, topology, engine, context), [], [], []
    for _ in range(plan["steps"]):
        dist.barrier()
        began, worked = time.perf_counter(), time.process_time()
        losses.append(optimizer_step(parts, Task(parts), [batch], Progress(plan["steps"])).loss)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(over_ranks(time.process_time() - worked))
    sizes = torch.tensor([libraries, resident("VmHWM")])
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    found = dict(zip(("libraries_bytes", "peak_bytes"), sizes.tolist(), strict=True))
    found |= {"seconds": seconds, "cpu_seconds": [sum(of_ranks) for of_ranks in cpu_seconds], "losses": losses}
    return found | {"predicted_bytes": predicted.device}


if __name__ == "__main__":
    write_result(measure(read_plan()))
    leave()
