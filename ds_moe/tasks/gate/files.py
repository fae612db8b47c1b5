"""Reads gates from checkpoints and exported folders, exports them, and freezes one into a single adapter.

An exported gate is gate.json (adapters, settings, what it reads), router.safetensors, and adapters/<name>/, each a
plain PEFT folder. Writing one does not load the base model.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_moe.checkpoint.base import base_identity
from ds_moe.checkpoint.files import STATE, Reader, find_checkpoint, write_json
from ds_moe.config.run import RunConfig, other_task
from ds_moe.config.run_file import load_run
from ds_moe.config.tasks import GateConfig
from ds_moe.errors import UserError, shown
from ds_moe.models.load import build_outline, model_config
from ds_moe.tasks.gate.adapters import adapter_files
from ds_moe.tasks.gate.bank import Bank
from ds_moe.tasks.gate.model import ROUTER, GatedModel, hold_reference, install_gate
from ds_moe.weights.files import check_empty, write_tensors

FORMAT = 1
READS = ("text", "text_layer", "vision", "modalities", "per", "select", "top_k", "temperature")
MUST_AGREE = READS[:5]  # the other settings may change from stage to stage
GATE, ROUTER_FILE = "gate.json", "router.safetensors"


@dataclasses.dataclass(frozen=True)
class SavedGate:
    """A gate as read from a folder."""

    path: Path
    adapters: list[str]  # names, in the order of the router's outputs
    router: dict[str, Tensor]
    reads: dict[str, object]  # the keys READS of the run's `gate` section: what the gate looks at, and how
    reader: Reader | None = None  # reads the checkpoint, which may hold trained adapters; None: an exported gate

    def trained(self, name: str) -> Tensor | None:
        """The trained value of a bank's parameter, by its name in the model; None if it was not trained."""
        key = f"weight/{name}"
        return self.reader.read(key) if self.reader is not None and key in self.reader.tensors else None


def read_gate(source: Path) -> SavedGate:
    """Read the gate of an exported folder, a checkpoint, or a run (its newest checkpoint).

    Raises:
        UserError: the folder is none of these, or belongs to a run of another task.
    """
    if (source / GATE).is_file():
        return _read_exported(source)
    path = find_checkpoint(source)
    reader = Reader(path)
    own = re.compile(rf"(?:weight|buffer)/{ROUTER}\.(.+)")
    router = {match[1]: reader.read(key) for key in reader.tensors if (match := own.fullmatch(key))}
    if not router:
        raise UserError(f"{path} holds no gate: it is of a run of another task")
    config = _run_of(path).gate
    reads = {key: getattr(config, key) for key in READS}
    return SavedGate(path, _base_of(path)["order"], router, reads, reader)


def _base_of(path: Path) -> dict[str, Any]:
    """The base on which a checkpoint's gate was trained, see `base_identity`."""
    base = json.loads((path / STATE).read_text()).get("base")
    named = isinstance(base, dict) and isinstance(base.get("adapters"), dict) and isinstance(base.get("order"), list)
    if not named:
        lack = "which names no adapters: it is of a run of another task"
        raise UserError(f"{path / STATE}: base is {shown(base)}, {lack}")
    return base


def _read_exported(folder: Path) -> SavedGate:
    try:
        about = json.loads((folder / GATE).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UserError(f"{folder / GATE} has format {shown(about['format'])}, this version reads {FORMAT}")
        return SavedGate(folder, list(about["adapters"]), load_file(folder / ROUTER_FILE), dict(about["reads"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder} is no exported gate that can be read ({error}); export it again") from error


def load_gate(model: GatedModel, saved: SavedGate) -> None:
    """Load a saved gate into a gated model, with the adapters that were trained.

    Raises:
        UserError: the saved gate is for other adapters, of another size, or for other features.
    """
    names = model.adapter_bank.names
    if saved.adapters != names:
        raise UserError(f"{saved.path} gates {', '.join(saved.adapters)}; the run's adapters are {', '.join(names)}")
    for key in MUST_AGREE:
        if (there := saved.reads.get(key)) != (here := getattr(model.reads, key)):
            raise UserError(f"gate.{key} is {here!r}, but the gate in {saved.path} was trained with {there!r}")
    router = model.adapter_gate
    shapes = {name: tuple(value.shape) for name, value in saved.router.items()}
    state = router.state_dict(keep_vars=True)
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != wanted:
        raise UserError(f"{saved.path} has a gate of other sizes (gate.width, gate.per, the model): {shapes}, {wanted}")
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(saved.router[name])
        for name, parameter in _bank_parameters(model.adapter_bank).items():
            if (value := saved.trained(name)) is not None:
                parameter.copy_(value)


def start_gate(model: GatedModel, config: GateConfig) -> None:
    """Begin a stage with the gate of `gate.start`; with `gate.kl_weight`, also keep that gate as the reference.

    Raises:
        UserError: as `load_gate`, or `gate.start` has trained adapters that this stage would not save.
    """
    if config.start is None:
        return
    saved = read_gate(Path(config.start))
    trained = [name for name in _bank_parameters(model.adapter_bank) if saved.trained(name) is not None]
    if trained and config.stage != "joint":
        raise UserError(
            f"gate.start {config.start} trained its adapters, which stage {config.stage} would not save: export it "
            "(ds-moe gate export), and name what that wrote in gate.start and gate.adapters_in"
        )
    load_gate(model, saved)
    if config.kl_weight:
        hold_reference(model)


def _bank_parameters(bank: Bank) -> dict[str, nn.Parameter]:
    return {
        f"{module}.lora_{side}": getattr(layer, f"lora_{side}")
        for module, layer in bank.layers.items()
        for side in "AB"
    }


def _bank_of(saved: SavedGate, config: RunConfig) -> tuple[GatedModel, Callable[[nn.Parameter], Tensor]]:
    """The gated model without storage, and a function that gives the values of its bank's parameters."""
    outline = install_gate(build_outline(model_config(config.model)), config.gate)
    bank = outline.adapter_bank
    values: dict[int, Tensor] = {}
    for name, parameter in _bank_parameters(bank).items():
        module, _, side = name.rpartition(".lora_")
        pairs = [adapter.pair(module) for adapter in bank.adapters if module in adapter.modules]
        as_read = torch.cat([pair["AB".index(side)] for pair in pairs], dim="AB".index(side))
        trained = saved.trained(name)
        values[id(parameter)] = as_read if trained is None else trained
    return outline, lambda parameter: values[id(parameter)]


def _run_of(path: Path) -> RunConfig:
    config = load_run(str(path / "run.yaml"))
    if other := other_task(config, "gate"):
        raise UserError(f"{path} is of a run of task {other}, not gate")
    return config


def check_base(path: Path, config: RunConfig) -> None:
    """Raise UserError if model or adapters have changed since the checkpoint at `path` was trained on them."""
    then, now = _base_of(path), base_identity(config, adapter_files(config.gate))
    changed = [name for name, files in now["adapters"].items() if then["adapters"].get(name) != files]
    if then != now:
        what = f"adapter {changed[0]!r} has" if changed else "the model, or the order of its adapters, has"
        raise UserError(f"{path}: {what} changed since the gate was trained: give the files of then, or train it anew")


def export_gate(source: Path, out: Path) -> SavedGate:
    """Write the gate of a checkpoint, or of a run's newest one, as a folder.

    Raises:
        UserError: `out` is not empty, or `source` holds no checkpoint of a gate.
    """
    check_empty(out)
    saved = read_gate(source)
    if saved.reader is None:
        raise UserError(f"{source} is an exported gate already")
    config = _run_of(saved.path)
    check_base(saved.path, config)
    outline, values = _bank_of(saved, config)
    out.mkdir(parents=True, exist_ok=True)
    outline.adapter_bank.export(out / "adapters", values)
    write_tensors(out / ROUTER_FILE, {name: value.contiguous() for name, value in saved.router.items()})
    sizes = {key: getattr(outline.adapter_gate.settings, key) for key in ("hidden_size", "vision_size", "width")}
    about = {"format": FORMAT, "adapters": saved.adapters, "reads": saved.reads, "sizes": sizes}
    write_json(out / GATE, {**about, "base": config.model.path or config.model.preset, "stage": config.gate.stage})
    return read_gate(out)


def freeze_gate(source: Path, out: Path, weights: dict[str, float]) -> None:
    """Write one PEFT adapter that adds what the gate's adapters add at constant weights.

    Args:
        weights: by adapter; adapters without one have weight 0.

    Raises:
        UserError: an unknown adapter, no weight at all, `out` is not empty, or `source` holds no checkpoint of a gate.
    """
    saved = read_gate(source)
    if saved.reader is None:
        raise UserError(f"{source} is an exported gate, which does not know its run: give the run or a checkpoint")
    unknown = [name for name in weights if name not in saved.adapters]
    if unknown or not any(weights.values()):
        what = f"{unknown[0]!r} is none of them" if unknown else "none has a weight"
        raise UserError(f"--weights: the gate's adapters are {', '.join(saved.adapters)}; {what}")
    config = _run_of(saved.path)
    check_base(saved.path, config)
    outline, values = _bank_of(saved, config)
    outline.adapter_bank.merged(torch.tensor([weights.get(name, 0.0) for name in saved.adapters]), out, values)
