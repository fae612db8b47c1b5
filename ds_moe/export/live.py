"""A running model -> plain Hugging Face folder in hub layout, for an inference engine that follows its training.

The weights are those that the next forward computes with; what the files of `model.path` hold beside them, such as
weights of multi-token prediction, goes along as it is. Every rank writes a share of the tensors: below ZeRO-3 it reads
these alone, under ZeRO-3 a group of parameters is gathered at a time, and of experts that are spread over ranks the
others send their rows to the one that writes.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.checkpoint.fit import persistent_buffers
from ds_moe.checkpoint.host_copy import HostCopy
from ds_moe.checkpoint.room import no_room
from ds_moe.config.run import RunConfig
from ds_moe.data.processor import Processor
from ds_moe.distributed import Topology, raise_together, together
from ds_moe.errors import UserError
from ds_moe.export.stored_form import TRAINING_ONLY, StoredForm, layout_of
from ds_moe.models.families import BIAS_SUFFIX, TRANSPOSED_ON_HUB, expert_state, full_shape
from ds_moe.models.load import build_outline
from ds_moe.models.lora import merged, scaling, stored_name, update_of
from ds_moe.models.processor import save_processor
from ds_moe.models.routing import routing_note
from ds_moe.models.stored_names import Carried
from ds_moe.models.ties import ties_of
from ds_moe.weights.files import INDEX, SafetensorsFiles, dtype_name, write_tensors
from ds_moe.weights.layouts import hub_layout_problem

PARTIAL = ".partial_"  # a folder that is being written has a name that begins with this
FILE_BYTES = 2**32  # of a rank's tensors that are in memory before they are written


@dataclass
class _Weight:
    """A weight of the plain model: the parameters that it is made of."""

    base: nn.Parameter | None = None
    halves: dict[str, nn.Parameter] = field(default_factory=dict)  # A and B of a low-rank update
    buffer: Tensor | None = None  # instead: equal on every rank, and keeps its dtype

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*([] if self.base is None else [self.base]), *self.halves.values()]


class LiveExport:
    """Writes the weights of one run's model as often as they are wanted.

    Args:
        dtype: of the weights in the files.

    Raises:
        UserError: a model that plain libraries could not repeat from such a folder.
    """

    def __init__(
        self, model: PreTrainedModel, topology: Topology, config: RunConfig, processor: Processor, dtype: torch.dtype
    ) -> None:
        self._model, self._topology, self._processor, self._dtype = model, topology, processor, dtype
        self._scaling = scaling(config.lora) if config.lora is not None else 1.0
        self._weights = _weights_of(model)
        problem = unlike_hub(config, model.config) or tied_update(model) or _tied_apart(model.config, self._weights)
        if problem is not None:
            raise UserError(f"{config.at('rl.engine')}: {problem}")
        self._form = StoredForm(model.config, layout_of(model.config, None))
        self._to_host = HostCopy(topology.device)
        path = config.model.path
        self._carried = Carried(build_outline(model.config), SafetensorsFiles.find(path) if path is not None else None)
        self.nbytes = folder_bytes(model, topology.ep_size, dtype, self._carried)  # of the tensors of a folder

    def write(self, folder: Path, progress: Callable[[], None] = lambda: None) -> None:
        """Write `folder`, which takes the place of one that is there when it is complete (collective).

        Raises `UserError` on every rank, if any could not write, or the disk has no room.
        """
        topology, partial = self._topology, folder.with_name(f"{PARTIAL}{folder.name}")
        what = f"write weights for the engine to {folder}"
        begin = (lambda: self._begin(partial)) if topology.rank == 0 else lambda: None
        raise_together(together(topology, what, begin)[topology.rank])
        files = _RankFiles(partial, topology.rank)
        failure: list[Exception] = []
        for number, group in enumerate(self._form.groups(self._weights)):
            progress()
            tensors = self._collect(group, number)
            try:  # the other ranks go on to collect with this one
                files.add(tensors if not failure else {})
            except Exception as error:
                failure.append(error)

        def finish() -> tuple[dict[str, str], int]:
            if failure:
                raise failure[0]
            for name, value in self._carried.share(topology.rank, topology.world_size).items():
                files.add({name: value})
            return files.close()

        shares = together(topology, what, finish)
        together(topology, what, lambda: self._complete(partial, folder, shares) if topology.rank == 0 else None)

    def _begin(self, partial: Path) -> str | None:
        """Make the folder to write in; if there is no room for the weights, return why, and make nothing."""
        for left in partial.parent.glob(f"{PARTIAL}*"):  # a run that was killed has left these
            shutil.rmtree(left)
        if (problem := no_room(partial.parent, self.nbytes, "a version of the weights")) is not None:
            return f"rl.engine.weights_dir {problem}"
        partial.mkdir(parents=True)
        return None

    @torch.no_grad()
    def _collect(self, group: list[str], number: int) -> dict[str, Tensor]:
        """The tensors of files that hold a group of weights, on the rank that writes them (collective)."""
        topology, weights = self._topology, {name: self._weights[name] for name in group}
        spread = topology.ep_size > 1 and any(expert_state(name) for name in group)
        writer = number % topology.world_size
        parameters = [one for weight in weights.values() for one in weight.parameters]
        with deepspeed.zero.GatheredParameters(parameters, enabled=any(hasattr(one, "ds_id") for one in parameters)):
            # Of a copy of the experts, which consecutive ranks share, that of the writer is taken.
            same_copy = topology.rank // topology.ep_size == writer // topology.ep_size
            if topology.rank != writer and not (spread and same_copy):
                return {}
            values = {name: self._value(weight) for name, weight in weights.items()}
            if spread:
                values = {name: self._rows_of_all(value, writer) for name, value in values.items()}
            if topology.rank != writer:
                return {}
            tensors = self._form.tensors(values)
            return {name: self._to_host(tensor) for name, tensor in tensors.items()}

    def _value(self, weight: _Weight) -> Tensor:
        """This rank's rows of a weight."""
        if weight.buffer is not None:
            return weight.buffer.detach()
        assert weight.base is not None
        value = weight.base.detach()
        if weight.halves:
            wide = value.to(torch.promote_types(value.dtype, self._dtype))  # `merged` rounds to what it is given
            value = merged(wide, weight.halves["A"].detach(), weight.halves["B"].detach(), self._scaling)
        return value.to(self._dtype) if value.is_floating_point() else value

    def _rows_of_all(self, value: Tensor, writer: int) -> Tensor:
        """The rows of all ranks that share a copy of the experts, on `writer`; the others send theirs."""
        value = value.contiguous()
        if self._topology.rank != writer:
            dist.send(value, writer)
            return value
        first = writer - writer % self._topology.ep_size
        rows = []
        for rank in range(first, first + self._topology.ep_size):
            rows.append(value if rank == writer else torch.empty_like(value))
            if rank != writer:
                dist.recv(rows[-1], rank)
        return torch.cat(rows)

    def _complete(self, partial: Path, folder: Path, shares: list[tuple[dict[str, str], int]]) -> None:
        model = self._model
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        saved = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(saved | {"dtype": dtype_name(self._dtype)}, indent=2))
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        save_processor(self._processor, partial)
        weight_map = {name: file for files, _ in shares for name, file in files.items()}
        index = {"metadata": {"total_size": sum(size for _, size in shares)}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        if folder.exists():  # of a process that was killed after it had written it
            before = folder.with_name(f"{PARTIAL}before_{folder.name}")
            os.replace(folder, before)
            os.replace(partial, folder)
            shutil.rmtree(before)
        else:
            os.replace(partial, folder)


class _RankFiles:
    """The files of one rank; what is added is written as soon as a file is full."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._number = folder, rank, 0
        self._tensors: dict[str, Tensor] = {}
        self._held = self._bytes = 0
        self._written: dict[str, str] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._tensors |= tensors
        self._held += sum(tensor.nbytes for tensor in tensors.values())
        if self._held >= FILE_BYTES:
            self._write()

    def close(self) -> tuple[dict[str, str], int]:
        """(the file of every tensor, bytes of all of them)."""
        if self._tensors:
            self._write()
        return self._written, self._bytes

    def _write(self) -> None:
        name = f"model-{self._rank:05d}-{self._number:05d}.safetensors"
        write_tensors(self._folder / name, self._tensors)
        self._written |= dict.fromkeys(self._tensors, name)
        self._bytes += self._held
        self._tensors, self._held, self._number = {}, 0, self._number + 1


def folder_bytes(model: nn.Module, ep_size: int, dtype: torch.dtype, carried: Carried) -> int:
    """Bytes of the tensors of such a folder.

    Args:
        model: of a rank, or an outline without values.
        ep_size: ranks that its experts are those of one of; 1 for an outline.
        carried: what goes along from the model's files.
    """
    return carried.nbytes + sum(
        weight.buffer.nbytes
        if weight.buffer is not None
        else math.prod(full_shape(name, weight.base, ep_size)) * dtype.itemsize
        for name, weight in _weights_of(model).items()
        if weight.buffer is not None or weight.base is not None
    )


def _weights_of(model: nn.Module) -> dict[str, _Weight]:
    weights: dict[str, _Weight] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(TRAINING_ONLY):
            continue
        if update := update_of(name):
            weights.setdefault(update.weight, _Weight()).halves[update.half] = parameter
        else:
            weights.setdefault(stored_name(name), _Weight()).base = parameter
    for name, buffer in persistent_buffers(model):
        if not name.endswith(BIAS_SUFFIX):
            weights[name] = _Weight(buffer=buffer)
    return weights


def unlike_hub(config: RunConfig, model: PretrainedConfig) -> str | None:
    """Why an engine would load weights of a run's model wrong or compute otherwise; None: it would not."""
    problem = hub_layout_problem(model, TRANSPOSED_ON_HUB)
    if problem is not None and model.model_type in TRANSPOSED_ON_HUB:
        return f"rl.engine cannot be given the weights of this model in hub layout: {problem}"
    if (note := routing_note(config.moe, model)) is not None:
        return f"rl.engine would sample from another model: {note.partition(';')[0]}"
    return None


def tied_update(model: PreTrainedModel) -> str | None:
    """Why an engine cannot be given the low-rank updates of a model, which may lack values; None: it can."""
    weights = _weights_of(model)
    for updated, other in ties_of(model.config).items():
        if updated in weights and weights[updated].base is None:
            text = f"lora.targets updates {updated}, which is tied to {other}: rl.engine is given one weight for both"
            return f"{text}, which cannot hold the update (leave {updated.split('.')[-2]} out of lora.targets)"
    return None


def _tied_apart(model: PretrainedConfig, weights: dict[str, _Weight]) -> str | None:
    for pair in ties_of(model).items():
        if all(name in weights for name in pair):
            text = f"config.json has tie_word_embeddings: true, but {' and '.join(pair)} are trained apart"
            return f"{text}, and rl.engine would load one for both: set it to false in model.path"
    return None
