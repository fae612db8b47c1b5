"""What test_gate trains on: screens beside text-only records, a base, four adapters of different ranks."""

import json
import random
from itertools import product
from pathlib import Path

import peft
import torch
from PIL import Image

from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from tests.distributed.gate_ranks import NAMES
from tools.demos.gate import screens

TRAIN, HELD_OUT = 96, 24
PROJECTIONS = [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj", "down_proj"], ["up_proj"]]


def make(folder: Path) -> None:
    """base/, adapters/<name>/ and the data files."""
    build_preset("tiny-vl-dense", seed=3).save_pretrained(folder / "base")
    save_processor(tiny_processor(), folder / "base")
    for seed, (name, targets) in enumerate(zip(NAMES, PROJECTIONS, strict=True)):
        write_adapter(folder / "adapters" / name, seed, r=2 + seed, lora_alpha=8, target_modules=targets)
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


def write_adapter(folder: Path, seed: int, **options) -> None:
    """As PEFT saves it, with a B that is not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(build_preset("tiny-vl-dense", seed=3), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    model.save_pretrained(folder)
