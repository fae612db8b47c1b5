"""Host memory of loading: a checkpoint streamed into the shards of two ranks, and the same one loaded complete.

Two ranks (EP 2, ZeRO-3, CPU) load a Qwen3-VL-MoE of random weights as the hub has them: they must find one loss.
peak: VmHWM from the imports on, which counts touched pages of mapped files; `anonymous` leaves them out (the largest of
samples 5 ms apart); `libraries` is what Python and its imports take, part of both.
loaded: the weights are where DeepSpeed finds them: streamed, in the shards; else complete, but for others' experts.
engine: DeepSpeed has sharded what was not, and made what training needs before its first step: with all weights trained
five times this rank's share of the fp32 weights, with the routers alone next to nothing.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, Qwen3VLMoeConfig

from ds_moe.engine.cpu import cpu_settings
from ds_moe.models.families import expert_state
from ds_moe.models.load import build_outline
from ds_moe.models.presets import preset_config
from tools.bench.launched import run_plan
from tools.results import command_line, new_table, show, write_json

GIB = 2**30
RANKS = 2
FILE_BYTES = GIB // 2
PATHS = ("streamed", "complete")
TRAINED = {"router_only": "the routers", "all": "all weights"}
NEEDED = {("streamed", "router_only"): 1.1, ("complete", "router_only"): 2.8}  # memory of all ranks / the model
NEEDED_TO_TRAIN = 6.0  # the same where all weights are trained
LIBRARIES = 1.0  # GiB, of all ranks
TEXT = {
    **{"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"head_dim": 128, "vocab_size": 32768, "tie_word_embeddings": False},
    **{"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 384, "norm_topk_prob": True},
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    runs = [measure(size, options) for size in options.size]
    facts = {
        **{"dtype": "float32", "ranks": RANKS, "ep_size": RANKS, "zero": 3, "largest_file_bytes": FILE_BYTES},
        **{"cores": len(os.sched_getaffinity(0)), "load_average": round(os.getloadavg()[0], 1)},
    }
    show(facts, *(table(run["results"], run["model_bytes"]) for run in runs if run["results"]))
    for line in [line for run in runs for line in run["left_out"]]:
        print(f"left out: {line}")
    write_json({**facts, "runs": runs}, options.json, indent=1)
    if wrong := [run["model_bytes"] for run in runs if not run["same_loss"]]:
        print(f"error: the ways of loading do not give the same loss, with models of {wrong} bytes", file=sys.stderr)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json")
    parser.add_argument("--size", type=float, action="append", metavar="GIB", help="default 4 (repeatable)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, and removed (default: temporary)")
    parser.add_argument("--trained", choices=TRAINED, action="append", help="only this (default: one after the other)")
    options = parser.parse_args(arguments)
    options.size, options.trained = options.size or [4.0], options.trained or list(TRAINED)
    return options


def measure(size: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the ranks find of one checkpoint of `size` GiB; what this machine has no memory for is left out."""
    run: dict[str, Any] = {"results": [], "left_out": []}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_load_") as folder:
        if shutil.disk_usage(folder).free < 1.1 * size * GIB:
            sys.exit(f"error: {folder} has no room for {size:g} GiB: give another --folder")
        run["model_bytes"], run["files"] = write_checkpoint(Path(folder, "model"), size * GIB, torch.float32)
        for trained, path in product(options.trained, PATHS):
            needed = NEEDED.get((path, trained), NEEDED_TO_TRAIN) * size + LIBRARIES
            available = psutil.virtual_memory().available / GIB
            if available < needed:
                case = f"{path}, {TRAINED[trained]} trained, {size:g} GiB"
                run["left_out"].append(f"{case}: may need {needed:.1f} GiB of memory, {available:.1f} are available")
                continue
            plan = {"folder": str(Path(folder, "model")), "path": path, "trained": trained, "ranks": RANKS}
            found = launch(plan, Path(folder))
            run["results"].append({"path": path, "trained": trained, **most_of_ranks(found["ranks"])})
            run["environment"] = found["environment"]
    return {**run, "same_loss": len({tuple(result["loss"]) for result in run["results"]}) <= 1}


def layers(size: float, dtype: torch.dtype) -> int:
    """As many as fill `size` bytes, at least one."""
    one, two = (sum(parameter.numel() for parameter in build_outline(model_config(n)).parameters()) for n in (1, 2))
    return max(1, round((size / dtype.itemsize - one) / (two - one)) + 1)


def model_config(layers: int) -> PretrainedConfig:
    tiny = preset_config("tiny-vl-moe")
    text = {**tiny.text_config.to_dict(), **TEXT, "num_hidden_layers": layers}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [24, 20, 20]}
    vision = {**tiny.vision_config.to_dict(), "out_hidden_size": TEXT["hidden_size"]}
    ids = {key: getattr(tiny, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id")}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)


def write_checkpoint(folder: Path, size: float, dtype: torch.dtype) -> tuple[int, int]:
    """A checkpoint of about `size` bytes, one file's tensors in memory at a time; its exact bytes and files."""
    folder.mkdir()
    config = model_config(layers(size, dtype))
    config.dtype = dtype
    config.save_pretrained(folder)
    shapes = {name: parameter.to(dtype) for name, parameter in build_outline(config).named_parameters()}
    seeds = {name: number for number, name in enumerate(shapes)}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=FILE_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: random_weight(name, shapes[name].shape, dtype, seeds[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return split.metadata["total_size"], len(split.filename_to_tensors)


def random_weight(name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype) if "norm" in name else torch.zeros(shape, dtype=dtype)
    stored = (shape[0], shape[2], shape[1]) if expert_state(name) else shape
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(stored, dtype=dtype).normal_(std=1 / math.sqrt(shape[-1]), generator=generator)


def launch(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    return run_plan("tools.bench.load.ranks", plan, RANKS, cpu_settings(RANKS), folder)


def most_of_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    most = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key != "loss"}
    return {**most, "loss": [rank["loss"] for rank in ranks]}


def table(results: list[dict[str, Any]], size: int) -> Table:
    title = f"{size / GIB:.2f} GiB: peak host memory of a rank in GiB, and as a share of the model"
    columns = [f"{when}\n{what}" for when in ("loaded", "engine") for what in ("peak", "anonymous")]
    table = new_table(["loading", "trained"], [*columns, "libraries", "loaded\ns", "engine\ns", "loss"], title)
    for result in results:
        keys = ("loaded_bytes", "loaded_anonymous_bytes", "built_bytes", "built_anonymous_bytes", "imported_bytes")
        sizes = [f"{result[key] / GIB:.2f} ({result[key] / size:.2f})" for key in keys]
        seconds = [f"{result[key]:.0f}" for key in ("loaded_s", "built_s")]
        losses = " ".join(f"{loss:.6f}" for loss in result["loss"])
        table.add_row(result["path"], TRAINED[result["trained"]], *sizes, *seconds, losses)
    return table


if __name__ == "__main__":
    sys.exit(main())
