"""What test_gate trains on: screens beside text-only records, bases, and of each four adapters of different ranks."""

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import peft
import torch
from PIL import Image
from transformers import PreTrainedModel

from ds_moe.models.families import family_of
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.processor import save_processor, tiny_processor
from tests.distributed.gate_ranks import NAMES
from tools.demos.gate import screens

TRAIN, HELD_OUT = 96, 24
PROJECTIONS = [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj", "down_proj"], ["up_proj"]]
# Of the layer without experts; PEFT takes bare names of projections for those of experts.
OF_ITS_MLP = [r".*layers\.(1\.mlp\.down_proj|\d\.self_attn\.o_proj)", r".*layers\.1\.mlp\.up_proj"]
MOE_PROJECTIONS = [*PROJECTIONS[:2], *OF_ITS_MLP]
# Two of them inside of blocks with experts, the first one's before anything else that is trained.
SHARED = r".*language_model.*shared_expert"
QWEN_PROJECTIONS = [*PROJECTIONS[:2], rf"{SHARED}\.(gate|up|down)_proj", rf"{SHARED}(\.up_proj|_gate)"]
EXPERTS = 6


def make(folder: Path) -> None:
    """base/, adapters/<name>/, the same with "moe " and with "qwen3.5 " before it, and the data files."""
    bases = {
        "": (dense_base, PROJECTIONS),
        "moe ": (moe_base, MOE_PROJECTIONS),
        "qwen3.5 ": (qwen_base, QWEN_PROJECTIONS),
    }
    for kind, (base, projections) in bases.items():
        base().save_pretrained(folder / f"{kind}base")
        save_processor(tiny_processor(), folder / f"{kind}base")
        for seed, (name, targets) in enumerate(zip(NAMES, projections, strict=True)):
            options = {"r": 2 + seed, "lora_alpha": 8, "target_modules": targets}
            write_adapter(folder / f"{kind}adapters" / name, seed, base, **options)
    data = folder / "data"
    screens.write_screens(data, TRAIN // 2, HELD_OUT // 2, base=1, seed=0)
    learnable(data)
    for split in ("train", "held_out"):
        pictures = [json.loads(line) for line in (data / f"routing-{split}.jsonl").read_text().splitlines()]
        records = mixed(pictures, random.Random(split))
        jsonl(data / f"mixed-{split}.jsonl", records)
        # Labels that no training agrees with: the held-out loss rises.
        wrong = [{**record, "adapter": NAMES[(NAMES.index(record["adapter"]) + 1) % 4]} for record in records]
        jsonl(data / f"wrong-{split}.jsonl", wrong)
        requests = [{"messages": record["messages"][:1]} for record in records[:5]]
        jsonl(data / f"requests-{split}.jsonl", [*requests, records[5]])


def jsonl(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def text_record(number: int, rng: random.Random) -> dict:
    """A request without a screen: read or act, each of two adapters."""
    name = NAMES[number % 4]
    family, replies = screens.ADAPTERS[name]
    answer = rng.choice(next(iter(replies.values())))
    turns = [("user", rng.choice(screens.wordings(family, "train"))), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "kind": f"text-{family}", "adapter": name}


def mixed(pictures: list[dict], rng: random.Random) -> list[dict]:
    """In every four records two neighbours are text: rank 0's micro-batch, then rank 1's, and so on."""
    texts, records = [text_record(number, rng) for number in range(len(pictures))], []
    for start in range(0, len(pictures), 2):
        parts = [pictures[start : start + 2], texts[start : start + 2]]
        records += sum(parts if start % 4 else parts[::-1], [])
    return records


def learnable(data: Path) -> None:
    """One of two texts beside one of two pictures; each pair has an adapter of its own."""
    records = []
    for shade in ("black", "white"):
        Image.new("RGB", (16, 16), shade).save(data / f"images/{shade}.png")
    for name, (text, shade) in zip(NAMES, product(("read this", "press it"), ("black", "white")), strict=True):
        content = [{"type": "image", "image": f"images/{shade}.png"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        records.append({"messages": messages, "adapter": name})
    jsonl(data / "learnable.jsonl", records * 2)


def dense_base() -> PreTrainedModel:
    return build_preset("tiny-vl-dense", seed=3)


def moe_base() -> PreTrainedModel:
    """Experts before and behind a layer without any, in a number that two ranks and three can share."""
    config = preset_config("tiny-vl-moe")
    config.text_config.num_hidden_layers, config.text_config.mlp_only_layers = 3, [1]
    config.text_config.num_experts = EXPERTS
    torch.manual_seed(3)
    return family_of(config).model_class(config)


def qwen_base() -> PreTrainedModel:
    """With a shared expert in its blocks, and linear attention."""
    return build_preset("tiny-qwen3.5-moe", seed=3)


def write_adapter(folder: Path, seed: int, base: Callable[[], PreTrainedModel] = dense_base, **options) -> None:
    """As PEFT saves it, with a B that is not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    model.save_pretrained(folder)
