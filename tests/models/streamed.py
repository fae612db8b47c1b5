"""Checkpoints in every form that a model can be streamed from, for the tests of streaming."""

import json

import torch
from safetensors.torch import load_file, save_file

from ds_moe.models.presets import build_preset

SHARD = "60KB"  # makes several files of a tiny model
FORMS = {  # name -> preset, transposed experts, one file, dtype of the files
    "vl memory": ("tiny-vl-moe", False, False, torch.float32),
    "vl hub": ("tiny-vl-moe", True, False, torch.bfloat16),
    "vl one file": ("tiny-vl-moe", True, True, torch.float32),
    "moe per expert": ("tiny-moe", False, False, torch.bfloat16),
    "moe stacked": ("tiny-moe", False, True, torch.float32),
    "dense": ("tiny-vl-dense", False, False, torch.float32),
    "tied": ("tiny-vl-moe", False, False, torch.float32),
}
HEAD = "lm_head.weight"
EMBEDDING = {"tiny-moe": "model.embed_tokens.weight", "tiny-vl-dense": "model.language_model.embed_tokens.weight"}


def write(folder, form, seed=5):
    """The model of a form as a folder of transformers; returns the folder."""
    preset, transposed, one_file, dtype = FORMS[form]
    model = build_preset(preset, seed).to(dtype)
    if form == "tied":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size="1GB" if one_file else SHARD)
    if form == "moe stacked":
        save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("*.safetensors") if transposed else ():
        change(file, lambda name, value: value.transpose(1, 2) if ".experts." in name else value)
    return folder


def tied_folder(folder, preset, stored):
    """A checkpoint whose config ties its output layer and whose file holds it nevertheless."""
    model = build_preset(preset, 3)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = weights[EMBEDDING[preset]].bfloat16().float()
    weights[EMBEDDING[preset]] = head.clone()
    if stored == "other":
        head = head.flip(0)
    elif stored == "last row":
        head[-1, -1] += 1
    elif stored == "close":
        head = head * (1 + 2**-12)  # the same in bf16
    save_file(weights | {HEAD: head.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(file, new_value):
    """Rewrite a file of weights; what becomes None is left out."""
    tensors = {name: new_value(name, value) for name, value in load_file(file).items()}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def file_of(folder, name):
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")
