"""The benchmark's ranks: train a model from a config on this CPU and read the peak of the process.

The peak is VmHWM of /proc/self/status, the largest resident memory of the process, from its beginning or from the
first step. Model, engine and loss are those of a run (`ds_moe.train`); tokens and pixels are random.
"""

import gc
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, Qwen3MoeConfig, Qwen3VLMoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.config.divisors import accumulation_steps
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import sample_bounds
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.memory.predict import predict
from ds_moe.models.families import family_of
from ds_moe.models.freeze import set_trainable
from ds_moe.models.head import at_labels
from ds_moe.models.load import build_outline
from ds_moe.models.tower import lighten_tower
from tools.bench.launched import leave, read_plan, write_result
from tools.bench.resident import resident

import_module("ds_moe.train")  # its libraries belong to what a rank of a run has

STEPS = 2  # in the second Adam's moments are there


def config_of(model: dict[str, Any]) -> PretrainedConfig:
    """A Qwen3-MoE, or with a `vision` section a Qwen3-VL-MoE."""
    text = {"tie_word_embeddings": False, "norm_topk_prob": True} | {k: v for k, v in model.items() if k != "vision"}
    if "vision" not in model:
        return Qwen3MoeConfig(**text)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True}
    text["rope_parameters"]["mrope_section"] = [text["head_dim"] // 4] + 2 * [text["head_dim"] // 8]
    vision = model["vision"] | {"out_hidden_size": text["hidden_size"]}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=4, vision_start_token_id=2)


def batch_of(config: RunConfig, model: PretrainedConfig) -> dict[str, Tensor]:
    """Random samples of the full length, every token labelled; the first half of each is one image where the model
    sees."""
    if config.data.packing:
        return packed_batch(config.tokens_per_row, model)
    B, S = config.train.micro_batch_size, config.data.max_length
    ids_BS = torch.randint(5, model.get_text_config().vocab_size, (B, S))
    batch = {"input_ids": ids_BS, "labels": ids_BS.clone(), "attention_mask": torch.ones_like(ids_BS)}
    vision = getattr(model, "vision_config", None)
    if vision is None:
        return batch
    image_BS = torch.arange(S).expand(B, S) < S // 2
    ids_BS[image_BS] = model.image_token_id
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = B * (S // 2) * side**2
    grid = torch.tensor([[1, side, side * (S // 2)]] * B)
    return batch | {
        "mm_token_type_ids": image_BS.int(),
        "pixel_values": torch.randn(patches, width),
        "image_grid_thw": grid,
    }


def packed_batch(tokens: int, model: PretrainedConfig) -> dict[str, Any]:
    """A row of random samples of 128, 256 and 512 tokens, each third of the row in one length."""
    lengths = [length for length in (128, 256, 512) for _ in range(tokens // 3 // length)]
    lengths.append(tokens - sum(lengths))
    ids_1S = torch.randint(5, model.get_text_config().vocab_size, (1, tokens))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": ids_1S,
        "labels": ids_1S.clone(),
        "position_ids": positions.unsqueeze(0),
        **sample_bounds(lengths),
    }


def measure(case: dict[str, Any]) -> dict[str, Any]:
    config, model = RunConfig(**case["run"]), config_of(case["model"])
    topology = start_distributed(config.moe.ep_size if config.moe else 1)
    deepspeed.utils.logger.setLevel("ERROR")
    baseline, libraries = resident("VmRSS"), resident("RssFile")
    ds = resolve_deepspeed(config, topology.world_size, on_cpu(), model.get_text_config().hidden_size)
    outline = build_outline(model)
    set_trainable(outline, config)
    predicted = predict(outline, config, zero_plan(ds), topology.world_size, on_cpu())
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    trained = family_of(model).model_class._from_config(model, dtype=dtype).train()
    lighten_tower(trained)
    prepare_model(trained, config, topology)
    engine = build_engine(trained, config, ds, total_steps=STEPS)
    del trained
    gc.collect()
    if not case["kept"]:
        Path("/proc/self/clear_refs").write_text("5")  # a new peak: that of the steps, which predictions are of
    batch = batch_of(config, model)
    labels = batch.pop("labels")
    accumulation = accumulation_steps(config, topology.world_size) or 1
    for _ in range(STEPS * accumulation):
        loss = at_labels(engine, batch, labels, num_items=labels.numel()).loss
        engine.backward(loss)
        del loss
        engine.step()
    # A machine short of memory takes back pages of libraries: the peak is then not what the run would have had.
    sizes = torch.tensor([baseline, resident("VmHWM"), libraries - resident("RssFile")])
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    found = dict(zip(("baseline_bytes", "peak_bytes", "reclaimed_bytes"), sizes.tolist(), strict=True))
    found["parameters"] = sum(parameter.numel() for parameter in outline.parameters())
    return found | {"predicted_bytes": predicted.device, "moment": predicted.moment}


if __name__ == "__main__":
    write_result(measure(read_plan()))
    leave()
