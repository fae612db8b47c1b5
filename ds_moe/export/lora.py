"""LoRA checkpoints -> what plain libraries load: the base with the updates merged in, or a PEFT adapter."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_moe.checkpoint.files import Reader
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import LoRAConfig
from ds_moe.errors import UserError
from ds_moe.models.families import family_of
from ds_moe.models.load import load_model
from ds_moe.models.lora import UpdateHalf, merged, not_linear, peft_config, peft_value, scaling, update_of
from ds_moe.models.stored_names import CARRIED, sources_of, unused_tensors
from ds_moe.weights.files import SafetensorsFiles, write_tensors
from ds_moe.weights.layouts import stored_rows
from ds_moe.weights.unread import is_unread

WEIGHT = "weight/"


class MergedReader:
    """Reads the tensors of base and checkpoint as one model, by the keys of a checkpoint of the whole model.

    The base has the dtype it was trained in. Its weights stay in their files until they are read, and one that has an
    update is merged with it then. A preset, which has no files, is built complete.
    """

    def __init__(self, reader: Reader, config: RunConfig, lora: LoRAConfig, dtype: torch.dtype) -> None:
        # Nothing is computed with it: any attention will do, and every architecture has this one.
        eager = config.model.model_copy(update={"attention": "eager"})
        base = load_model(eager, dtype, config.train.seed, unread=True)
        self._base_files = SafetensorsFiles.find(config.model.path) if config.model.path is not None else None
        stored = self._base_files.shapes if self._base_files is not None else ()
        self._sources = sources_of(base, base.state_dict(), stored)
        self._reader, self._scaling = reader, scaling(lora)
        self._base = {f"{WEIGHT}{name}": parameter.detach() for name, parameter in base.named_parameters()}
        self._halves: dict[str, dict[str, str]] = {}  # key of a base weight -> A or B -> key of that half of its update
        whole = []
        for key in reader.tensors:
            if update := _update(key):
                self._halves.setdefault(f"{WEIGHT}{update.weight}", {})[update.half] = key
            elif key.startswith((WEIGHT, "buffer/")):
                whole.append(key)
        if lost := sorted(self._halves.keys() - self._base.keys()):
            name = lost[0].removeprefix(WEIGHT)
            text = f"lora.targets updates {name}, which model.path has no weight of its own for (it ties two of them)"
            raise UserError(f"{text}: no merged model can hold the update; export the adapter instead (--adapter)")
        if lost := sorted(_updated(reader, not_linear(base, lora.targets))):
            text = f"lora.targets updates {lost[0]}, a convolution, in this checkpoint of an earlier build"
            raise UserError(f"{text}: no merged model can hold the update; export the adapter instead (--adapter)")
        carried = [f"{CARRIED}{name}" for name in unused_tensors(base, stored)]
        self.tensors = [*self._base, *(key for key in whole if key not in self._base), *carried]
        self._whole = set(whole)

    def shape(self, key: str) -> list[int]:
        if key.startswith(CARRIED) and self._base_files is not None:
            return list(self._base_files.shapes[key.removeprefix(CARRIED)])
        return list(self._base[key].shape) if key in self._base else self._reader.shape(key)

    def read(self, key: str) -> Tensor:
        if key in self._whole:
            return self._reader.read(key)
        if key.startswith(CARRIED) and self._base_files is not None:
            return self._base_files.read(key.removeprefix(CARRIED))
        weight, halves = self._base_weight(key), self._halves.get(key)
        if halves is None:
            return weight
        return merged(weight, self._reader.read(halves["A"]), self._reader.read(halves["B"]), self._scaling)

    def _base_weight(self, key: str) -> Tensor:
        weight = self._base[key]
        if self._base_files is None or not is_unread(weight):
            return weight
        rows = stored_rows(self._base_files, self._sources.get(key.removeprefix(WEIGHT)), weight.shape)
        assert rows is not None  # otherwise `load_model` would not have left it unread
        return rows(0, weight.shape[0]).to(weight.dtype)


def _update(key: str) -> UpdateHalf | None:
    return update_of(key.removeprefix(WEIGHT)) if key.startswith(WEIGHT) else None


def _updated(reader: Reader, modules: list[str]) -> set[str]:
    """Those of these modules that have a low-rank update in a checkpoint."""
    updated = {update.weight for key in reader.tensors if (update := _update(key))}
    return {name for name in modules if f"{name}.weight" in updated}


def write_adapter(checkpoint: Path, out: Path, dtype: torch.dtype, outline: PreTrainedModel) -> int:
    """Write the updates of a checkpoint as a folder for `PeftModel.from_pretrained`; returns their number of elements.

    `outline` is of the model that was trained, without its values.

    Raises:
        UserError: a run without LoRA, or one that also trained routers, which an adapter has no place for.
    """
    config = load_run(str(checkpoint / "run.yaml"))
    lora = config.lora
    if lora is None:
        raise UserError(f"{checkpoint} is of a run without a lora section: there is no adapter in it")
    if lora.train_router:
        why = "lora.train_router trained the routers in full, which no adapter holds"
        raise UserError(f"{checkpoint}: {why}; export the merged model instead (without --adapter)")
    reader = Reader(checkpoint)
    tensors = {}
    for key in reader.tensors:
        if update := _update(key):
            tensors[update.peft] = peft_value(update, reader.read(key)).to(dtype).contiguous()
    moe = family_of(outline).moe
    experts = moe.lora_parameters if lora.experts and moe else None
    if experts is not None:  # PEFT's wrappers of parameters refuse dropout, which acts in training only
        lora = lora.model_copy(update={"dropout": 0.0})
    others = not_linear(outline, lora.targets)
    updated = _updated(reader, others)  # by an earlier build, as PEFT does it
    settings = peft_config(lora, lora.targets, experts, [name for name in others if name not in updated])
    settings.base_model_name_or_path = config.model.path
    settings.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(out))
    write_tensors(out / "adapter_model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())
