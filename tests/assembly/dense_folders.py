"""Small dense checkpoints on disk, real images to try models on, and the folders that are assembled of them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ds_moe.assembly.assemble import assemble
from ds_moe.assembly.plan import Assembly
from ds_moe.config.moe import MoEConfig
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode
from ds_moe.models.convert import convert
from ds_moe.models.families import family_of
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor, tiny_processor


def write_dense(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, sharded: bool = False, **text: Any
) -> str:
    """A tiny dense Qwen3-VL with weights larger than a fresh one's, so that its FFNs matter; the folder as a text."""
    config = preset_config("tiny-vl-dense")
    for key, value in text.items():
        setattr(config if key == "tie_word_embeddings" else config.text_config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_of(config).model_class(config)
        for parameter in model.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB" if sharded else "5GB")
    save_processor(tiny_processor(), folder)
    return str(folder)


@cache
def images(samples: int = 24) -> dict[str, Tensor]:
    """Held-out scans with questions of several lengths, as arguments of a forward."""
    processor = tiny_processor()
    encoded = [encode(sample, processor, 128, 10**6) for sample in digits_samples("held-out")[:samples]]
    return collate(encoded, processor).with_labels


def load(folder: str | Path) -> Any:
    """What plain transformers makes of a folder, every weight in its place."""
    model_class = family_of(AutoConfig.from_pretrained(folder)).model_class
    loaded: Any = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """(tokens, vocabulary) fp32, without padding, whose hidden states mean nothing."""
    batch = images()
    return model(**batch).logits[batch["attention_mask"].bool()].float()


def converted(model: Any) -> Any:
    convert(model, MoEConfig())
    return model


def make(folder: Path, spec: str, **options: Any) -> tuple[Path, Assembly]:
    """Write a spec, assemble it beside itself, quietly unless `note` is given."""
    (folder / "spec.yaml").write_text(spec)
    number = len(list(folder.glob("out*")))
    out = folder / f"out{number}"
    return out, assemble(folder / "spec.yaml", out, **{"note": lambda line: None, **options})


def upcycle(source: str, experts: int, top_k: int, split: int = 1, more: str = "") -> str:
    return f"upcycle:\n  source: {source}\n  experts: {experts}\n  top_k: {top_k}\n  split: {split}\n{more}"
