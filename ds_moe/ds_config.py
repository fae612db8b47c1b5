"""The DeepSpeed JSON of a run: "auto" values filled from the run file, contradictions between the two refused.

The JSON holds how DeepSpeed works (ZeRO stage, buckets, offload); what is trained stands in the run file. A key that
both can hold is either "auto" in the JSON or equal in both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe.checks import written
from ds_moe.config import RunConfig
from ds_moe.ds_keys import ADAM_KEYS, FILLED, PASSED_ON, REFUSED, STAGE_3_ONLY, ZERO_KEYS, ZERO_REFUSED
from ds_moe.errors import UserError
from ds_moe.lines import compose_lines, nearest

AUTO = "auto"


@dataclass
class Json:
    """A DeepSpeed JSON as written: its values and "file:line" of each dotted key."""

    file: str
    values: dict[str, Any]
    origins: dict[str, str]

    def at(self, key: str) -> str:
        return self.origins.get(key, self.file)


def resolve_deepspeed(
    config: RunConfig, world_size: int, on_cpu: bool, hidden_size: int | None = None
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, with nothing "auto" left in it.

    Args:
        config: from `load_run`, so that `config.deepspeed` is the path of an existing file.
        world_size: number of ranks; each is a data-parallel rank, whatever `moe.ep_size` is.
        on_cpu: whether the ranks train on CPUs.
        hidden_size: width of the text model, to size "auto" buckets; None leaves them to DeepSpeed.

    Raises:
        UserError: broken JSON, an unknown or unsupported key, a contradiction with the run file, a batch size or an
            ep_size that does not divide.
    """
    resolved, complaints = deepspeed_problems(config, world_size, on_cpu, hidden_size)
    if complaints:
        raise UserError(complaints[0])
    return resolved


def deepspeed_problems(
    config: RunConfig, world_size: int, on_cpu: bool, hidden_size: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """As `resolve_deepspeed`, but every complaint instead of the first. The dictionary is only good without any."""
    try:
        source = read_json(config.deepspeed)
    except UserError as error:
        return {}, [str(error)]
    complaints = _unknown_keys(source)
    try:
        accumulation = accumulation_steps(config, world_size)
    except UserError as error:
        complaints.append(str(error))
        accumulation = 1
    if config.moe and world_size % config.moe.ep_size:
        fits = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        text = f"moe.ep_size {config.moe.ep_size} does not divide the {world_size} ranks ({fits} do)"
        complaints.append(f"{config.at('moe.ep_size')}: {text}")
    filled = {
        "train_batch_size": ("train.global_batch_size", config.train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", config.train.micro_batch_size),
        "gradient_accumulation_steps": ("train.global_batch_size", accumulation),
        "gradient_clipping": ("train.max_grad_norm", config.train.max_grad_norm),  # left out, DeepSpeed clips at 1.0
        "bf16.enabled": ("train.precision", precision(config, on_cpu) == "bf16"),
        "optimizer.params.lr": ("train.lr", config.train.lr),
        "optimizer.params.betas": ("train.betas", list(config.train.betas)),
        "optimizer.params.weight_decay": ("train.weight_decay", config.train.weight_decay),
    }
    resolved = json.loads(json.dumps(source.values))
    for key, (yaml_key, value) in filled.items():
        complaints += _fill(resolved, key, value, yaml_key, source, config)
    if complaints:
        return {}, complaints
    _finish_optimizer(resolved, on_cpu)
    _finish_zero(resolved["zero_optimization"], hidden_size)
    resolved.pop("fp16", None)
    resolved = {key: value for key, value in resolved.items() if value != AUTO}  # what is left has DeepSpeed's default
    return resolved, []


def read_json(path: str | Path) -> Json:
    """Read a DeepSpeed JSON; `UserError` with the line where it is none."""
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the DeepSpeed JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a DeepSpeed JSON is an object, this is a {type(values).__name__}")
    _, origins = compose_lines(text.replace("\t", " "), file)  # JSON is YAML but for tabs; also refuses duplicates
    return Json(file, values, origins)


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches that one optimizer step accumulates on each rank: global / (micro x ranks), exactly."""
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    step = micro * world_size
    if total % step == 0:
        return total // step
    fits = [size for size in (total // step * step, (total // step + 1) * step) if size]
    micros = [size for size in range(1, total // world_size + 1) if total % (size * world_size) == 0]
    advice = f"global_batch_size {' or '.join(map(str, fits))} would work"
    if micros:
        advice += f", or micro_batch_size {min(micros, key=lambda size: abs(size - micro))}"
    raise UserError(
        f"{config.at('train.global_batch_size')}: train.global_batch_size {total} is not a multiple of "
        f"micro_batch_size {micro} x {world_size} ranks = {step}; {advice}"
    )


def precision(config: RunConfig, on_cpu: bool) -> str:
    """ "fp32" or "bf16": what the run says, else what suits the device."""
    return config.train.precision or ("fp32" if on_cpu else "bf16")


def trains_on_cpu() -> bool:
    """Whether DeepSpeed would train on CPUs on this machine: it was told so, or there is no accelerator."""
    if told := os.environ.get("DS_ACCELERATOR"):
        return told == "cpu"
    import torch  # a second of import that reading a JSON does not need

    return not torch.accelerator.is_available()


def _unknown_keys(source: Json) -> list[str]:
    """Complaints about keys that ds_moe does not pass on, and about values that it cannot train with."""
    values = source.values
    found = _check_keys(source, "", values, FILLED + PASSED_ON, REFUSED)
    fp16 = _section(values, "fp16").get("enabled", False)
    if fp16 not in (False, AUTO):
        found.append(f"{source.at('fp16.enabled')}: fp16.enabled is {fp16!r}; ds_moe trains in bf16 or fp32")
    for key in ("optimizer", "zero_optimization", "bf16", "fp16"):
        if not isinstance(values.get(key, {}), dict):
            found.append(f"{source.at(key)}: {key} is {values[key]!r}; must be an object")
    optimizer = _section(values, "optimizer")
    found += _check_keys(source, "optimizer", optimizer, ["type", "params"], {})
    found += _check_keys(source, "optimizer.params", _section(optimizer, "params"), ADAM_KEYS, {})
    kind = optimizer.get("type", "AdamW")
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        found.append(f"{source.at('optimizer.type')}: optimizer.type is {kind!r}; must be 'AdamW' or 'Adam'")
    zero = _section(values, "zero_optimization")
    found += _check_keys(source, "zero_optimization", zero, ZERO_KEYS, ZERO_REFUSED)
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        where = source.at("zero_optimization.stage" if "stage" in zero else "zero_optimization")
        return [*found, f"{where}: zero_optimization.stage is {stage!r}; must be 1, 2 or 3"]
    for key, value in zero.items():
        if stage < 3 and value != AUTO and (key.startswith("stage3_") or key in STAGE_3_ONLY):
            where = source.at(f"zero_optimization.{key}")
            found.append(f"{where}: zero_optimization.{key} would not be used: it needs stage 3, this is {stage}")
    return found


def _check_keys(source: Json, parent: str, values: Any, known: Sequence[str], refused: dict[str, str]) -> list[str]:
    found = []
    for key in values:
        dotted = f"{parent}.{key}" if parent else key
        if key in refused:
            found.append(f"{source.at(dotted)}: {dotted} is not supported: {refused[key]}")
        elif key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"keys here: {', '.join(sorted(known))}"
            found.append(f"{source.at(dotted)}: unknown key {dotted} ({hint})")
    return found


def _fill(resolved: dict[str, Any], key: str, value: Any, yaml_key: str, source: Json, config: RunConfig) -> list[str]:
    """Set dotted `key` where it is "auto" or absent; a complaint where it says something else than `value`."""
    *parents, name = key.split(".")
    holder = resolved
    for parent in parents:
        holder = holder.setdefault(parent, {})
        if not isinstance(holder, dict):
            return []  # `_unknown_keys` has complained
    given = holder.get(name, AUTO)
    if given == AUTO:
        holder[name] = value
    elif given != value or isinstance(given, bool) != isinstance(value, bool):
        ours = "'bf16'" if value is True else "'fp32'" if value is False else f"{value!r}"
        what = "works out to" if name == "gradient_accumulation_steps" else "is"
        default = "" if written(config, yaml_key) else " by default"
        theirs, ours = f"{key} is {json.dumps(given)}", f"{config.at(yaml_key)} {yaml_key} {what} {ours}{default}"
        return [f'{source.at(key)}: {theirs}, but {ours}; write "auto" in the JSON or make them agree']
    return []


def _finish_optimizer(resolved: dict[str, Any], on_cpu: bool) -> None:
    optimizer = resolved["optimizer"]
    optimizer.setdefault("type", "AdamW")
    params = optimizer["params"]
    if params.get("eps", AUTO) == AUTO:
        params["eps"] = 1e-8
    offloaded = _section(resolved["zero_optimization"], "offload_optimizer").get("device", "none") != "none"
    if on_cpu and not offloaded:  # otherwise DeepSpeed compiles its fused Adam for a minute and a half
        params.setdefault("torch_adam", True)


def _finish_zero(zero: dict[str, Any], hidden_size: int | None) -> None:
    """Size "auto" buckets (in elements) as transformers does, but not so small that tiny models send crumbs."""
    bucket = max((hidden_size or 0) ** 2, 2**24)  # DeepSpeed's own 5e8 would hold 2 GiB of each rank
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero["stage"] == 3:
        sizes["stage3_prefetch_bucket_size"] = bucket * 9 // 10
        if hidden_size:
            sizes["stage3_param_persistence_threshold"] = 10 * hidden_size
    for key in [key for key, value in zero.items() if value == AUTO]:
        if key in sizes:
            zero[key] = sizes[key]
        else:
            del zero[key]


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}
