"""Four LoRA adapters of a tiny Qwen3-VL that differ in all that may differ, in the folders PEFT itself writes."""

from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_moe.models.presets import build_preset
from ds_moe.tasks.gate.adapters import Adapter, find_adapters, read_adapter

DECODER = "model.language_model.layers"
_PATTERNS = {"rank_pattern": {"layers.0.self_attn.o_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 11}}
ADAPTERS = {
    "mail": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "maps": {"r": 2, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "notes": {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj", "up_proj"], **_PATTERNS},
    "photos": {"r": 6, "lora_alpha": 3, "target_modules": rf".*{DECODER}\.1\..*(q|o|down)_proj"},  # its file is bf16
}


def base() -> PreTrainedModel:
    return build_preset("tiny-vl-dense", 3).eval()


def write(out: Path) -> Path:
    """out/<name> of each adapter, with a random B."""
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base(), peft.LoraConfig(**options, lora_dropout=0.1))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.03)
        (model.bfloat16() if name == "photos" else model).save_pretrained(out / name)
    return out


def read(folder: Path) -> list[Adapter]:
    return [read_adapter(name, path) for name, path in find_adapters({}, str(folder)).items()]


def logits(model: torch.nn.Module, ids_BS: Tensor, **more) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BS, use_cache=False, **more).logits


def of_peft(folder: Path, ids_BS: Tensor) -> Tensor:
    """The logits of one adapter under plain PEFT."""
    return logits(peft.PeftModel.from_pretrained(base(), folder).eval(), ids_BS)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()
