"""LoRA checkpoints -> what plain libraries load: the base with the updates merged in, or a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ds_moe.checkpoint.files import Reader
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import LoRAConfig
from ds_moe.errors import UserError
from ds_moe.models.load import load_model
from ds_moe.models.lora import TARGET_PARAMETERS, Update, merged, peft_config, peft_value, scaling, update_of
from ds_moe.weights.files import write_tensors
from ds_moe.weights.rows import WeightRows
from ds_moe.weights.unread import is_unread

WEIGHT = "weight/"


class MergedReader:
    """Reads the tensors of base and checkpoint as one model, by the keys of a checkpoint of the whole model.

    The base has the dtype it trained in; its weights stay in their files, and one with an update is merged, when it is
    read. That of a preset is built complete.

    Args:
        reader: of a checkpoint that leaves out its base.
        config: the run that wrote it.
        lora: its section.
        dtype: of the base.
    """

    def __init__(self, reader: Reader, config: RunConfig, lora: LoRAConfig, dtype: torch.dtype) -> None:
        base = load_model(config.model, dtype, config.train.seed, unread=True)
        self._base_files = WeightRows.find(config.model.path) if config.model.path is not None else None
        self._reader, self._scaling = reader, scaling(lora)
        self._base = {f"{WEIGHT}{name}": parameter.detach() for name, parameter in base.named_parameters()}
        self._halves: dict[str, dict[str, str]] = {}  # of updates: base weight -> half -> key
        whole = []
        for key in reader.tensors:
            if update := _update(key):
                self._halves.setdefault(f"{WEIGHT}{update.weight}", {})[update.half] = key
            elif key.startswith((WEIGHT, "buffer/")):
                whole.append(key)
        self.tensors = [*self._base, *(key for key in whole if key not in self._base)]
        self._whole = set(whole)

    def shape(self, key: str) -> list[int]:
        return list(self._base[key].shape) if key in self._base else self._reader.shape(key)

    def read(self, key: str) -> Tensor:
        if key in self._whole:
            return self._reader.read(key)
        weight, halves = self._base_weight(key), self._halves.get(key)
        if halves is None:
            return weight
        return merged(weight, self._reader.read(halves["A"]), self._reader.read(halves["B"]), self._scaling)

    def _base_weight(self, key: str) -> Tensor:
        weight = self._base[key]
        if self._base_files is None or not is_unread(weight):
            return weight
        rows = self._base_files.stored(key.removeprefix(WEIGHT), weight.shape)
        assert rows is not None  # or `load_model` had read it
        return rows(0, weight.shape[0]).to(weight.dtype)


def _update(key: str) -> Update | None:
    return update_of(key.removeprefix(WEIGHT)) if key.startswith(WEIGHT) else None


def write_adapter(checkpoint: Path, out: Path, dtype: torch.dtype) -> int:
    """Write the updates of a checkpoint as a folder for `PeftModel.from_pretrained`; the number of its parameters.

    Raises:
        UserError: a run without LoRA, or with routers trained beside it, which an adapter has no place for.
    """
    config = load_run(str(checkpoint / "run.yaml"))
    lora = config.lora
    if lora is None:
        raise UserError(f"{checkpoint} is of a run without a lora section: there is no adapter in it")
    if lora.train_router:
        raise UserError(
            f"{checkpoint}: lora.train_router trained the routers in full, which no adapter holds; export the merged "
            "model instead (without --adapter)"
        )
    reader = Reader(checkpoint)
    tensors = {
        update.peft: peft_value(update, reader.read(key)).to(dtype).contiguous()
        for key in reader.tensors
        if (update := _update(key))
    }
    more = {"target_parameters": TARGET_PARAMETERS} if lora.experts else {}
    if lora.experts:  # PEFT's wrappers of parameters have no dropout; it acts in training only
        lora = lora.model_copy(update={"dropout": 0.0})
    settings = peft_config(lora, lora.targets, **more)
    settings.base_model_name_or_path = config.model.path
    settings.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(out))
    write_tensors(out / "adapter_model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())
