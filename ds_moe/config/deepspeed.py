"""From a run's DeepSpeed JSON to the dictionary that DeepSpeed gets: "auto" filled, contradictions refused.

The JSON says how DeepSpeed works (ZeRO stage, buckets, offload), the run file what is trained. A value that both files
hold is "auto" in the JSON, or the same in both.
"""

import json
import os
from copy import deepcopy

from ds_moe.config import deepspeed_keys as keys
from ds_moe.config.deepspeed_json import (
    AUTO,
    DeepSpeedJson,
    check_keys,
    is_missing,
    read_deepspeed,
    section,
    without_switched_off,
)
from ds_moe.config.divisors import accumulation_steps, ep_size_problem, row_sharing_problem
from ds_moe.config.rules.rule import written
from ds_moe.config.run import RunConfig
from ds_moe.config.yaml_lines import Plain
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.errors import UserError, all_in_one

BATCH_KEYS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def resolve_deepspeed(
    config: RunConfig, world_size: int, on_cpu: bool, hidden_size: int | None = None, experts: int | None = None
) -> dict[str, Plain]:
    """The dictionary for `deepspeed.initialize`, with nothing "auto" left in it; `config` is from `load_run`.

    "auto" buckets are sized by `hidden_size`, the width of the text model, if it is known.

    Raises:
        UserError: broken JSON, an unknown or unsupported key, a contradiction with the run file, a batch size or an
            ep_size that does not divide.
    """
    resolved, complaints = deepspeed_problems(config, world_size, on_cpu, hidden_size, experts)
    if complaints:
        raise all_in_one(complaints)
    return resolved


def resolve_without_optimizer(config: RunConfig, on_cpu: bool, hidden_size: int | None = None) -> dict[str, Plain]:
    """The dictionary of `resolve_deepspeed` for an engine that only evaluates.

    At stage 3 it says how weights are sharded. Below it says nothing of ZeRO, which DeepSpeed refuses without an
    optimizer: every rank holds its share of the weights whole in training too. No batch size can contradict it.

    Raises:
        UserError: broken JSON, an unknown or unsupported key.
    """
    source = read_deepspeed(config)
    if complaints := check_keys(source):
        raise all_in_one(complaints)
    zero = section(without_switched_off(deepcopy(source.values)), "zero_optimization")
    resolved: dict[str, Plain] = {"train_micro_batch_size_per_gpu": 1}  # DeepSpeed wants one, and makes no use of it
    if zero["stage"] == 3:
        zero.pop("offload_optimizer", None)
        _finish_zero(zero, hidden_size, keeps_weights=False)
        resolved |= {"zero_optimization": zero, "bf16": {"enabled": precision(config, on_cpu) == "bf16"}}
    return resolved


def json_problems(config: RunConfig) -> list[str]:
    """The complaints of `deepspeed_problems` that hold for any number of ranks, without one about a missing file."""
    if is_missing(config):
        return []
    try:
        return check_keys(read_deepspeed(config))
    except UserError as error:
        return [str(error)]


def deepspeed_problems(
    config: RunConfig, world_size: int, on_cpu: bool, hidden_size: int | None = None, experts: int | None = None
) -> tuple[dict[str, Plain], list[str]]:
    """The dictionary of `resolve_deepspeed` and every complaint; where there is one, the dictionary is empty."""
    try:
        source = read_deepspeed(config)
    except UserError as error:
        return {}, [str(error)]
    complaints = check_keys(source)
    try:
        accumulation = accumulation_steps(config, world_size)
    except UserError as error:
        complaints.append(str(error))
        accumulation = 1
    if config.moe and (problem := ep_size_problem(config.moe.ep_size, world_size, experts, of="ranks")):
        complaints.append(f"{config.at('moe.ep_size')}: {problem}")
    if problem := row_sharing_problem(config.train.sequence_parallel, world_size):
        complaints.append(f"{config.at('train.sequence_parallel')}: {problem}")
    resolved = without_switched_off(deepcopy(source.values))
    if config.data.packing:
        complaints += _packed_batches(resolved, world_size, source)
    for key, yaml_key, value in _shared_values(config, accumulation, on_cpu):
        complaints += _fill(resolved, key, yaml_key, value, source, config)
    _finish_data_types(resolved, accumulates=accumulation != 1)
    complaints += _other_optimizer(resolved, source)
    muon = config.train.optimizer == "muon"
    complaints += _beside_muon(resolved, source, config) if muon else []
    if complaints:
        return {}, complaints
    _finish_optimizer(resolved, muon)
    _finish_timers(resolved)
    zero = section(resolved, "zero_optimization")
    if zero["stage"] == 2 and not on_cpu and zero.get("overlap_comm", AUTO) == AUTO:
        zero["overlap_comm"] = True  # reduce one bucket while the next is filled: DeepSpeed's default at stage 3 alone
    _finish_zero(zero, hidden_size, keeps_weights=not config.train.gradient_checkpointing)
    resolved.pop("fp16", None)
    return {key: value for key, value in resolved.items() if value != AUTO}, []  # left out: DeepSpeed's default


def zero_plan(resolved: dict[str, Plain]) -> ZeroPlan:
    """What a dictionary of `resolve_deepspeed` says. A key that it lacks has DeepSpeed's default; a stage's is 0."""
    zero = section(resolved, "zero_optimization")
    sizes = {
        "reduce_bucket": "reduce_bucket_size",
        "sub_group": "sub_group_size",
        "reuse_distance": "stage3_max_reuse_distance",
        "max_live": "stage3_max_live_parameters",
    }
    return ZeroPlan(
        stage=zero.get("stage", 0),
        offload_optimizer=section(zero, "offload_optimizer").get("device") not in ("none", None),
        offload_param=section(zero, "offload_param").get("device") not in ("none", None),
        bf16=section(resolved, "bf16").get("enabled", False),
        overlaps=zero.get("overlap_comm") is True,
        fp32_sums=section(resolved, "data_types").get("grad_accum_dtype") in keys.FP32_NAMES,
        **{name: zero[key] for name, key in sizes.items() if zero.get(key) is not None},
    )


def moves_nothing(config: RunConfig, on_cpu: bool) -> str | None:
    """That `train.offload_activations` has no effect on ranks that train on CPUs; None where it has, or is not set."""
    if not (config.train.offload_activations and on_cpu):
        return None
    at = config.at("train.offload_activations")
    return f"{at}: train.offload_activations moves nothing here: ranks on CPUs compute in host memory already"


def summed_in_bf16(config: RunConfig, zero: ZeroPlan, world_size: int) -> str | None:
    """A warning where the gradients of several micro-batches are summed with the 8 bits of a bf16's mantissa."""
    count = accumulation_steps(config, world_size)
    if count == 1 or zero.sum_width == 4:
        return None
    several, larger = f"{count} micro-batches", "train.micro_batch_size"
    if count is None:
        several, larger = "several packed rows", "train.tokens_per_micro_batch"
    fix = 'set data_types.grad_accum_dtype to "auto" or "fp32" in it'
    if zero.stage == 1:
        fix = "use stage 2 or 3, whose shipped JSONs sum in fp32"
    return (
        f"{config.at('deepspeed')}: the gradients of {several} are summed in bf16, where what is less than "
        f"1/256 of the sum is lost: {fix}, or make {larger} larger"
    )


def precision(config: RunConfig, on_cpu: bool) -> str:
    """ "fp32" or "bf16": what the run says, else what suits the device."""
    return config.train.precision or ("fp32" if on_cpu else "bf16")


def trains_on_cpu() -> bool:
    """Whether DeepSpeed would train on CPUs here: DS_ACCELERATOR says so, or this machine has no accelerator."""
    if told := os.environ.get("DS_ACCELERATOR"):
        return told == "cpu"
    import torch  # here, because its import takes a second that reading a JSON does not need

    return not torch.accelerator.is_available()


def _packed_batches(resolved: dict[str, Plain], world_size: int, source: DeepSpeedJson) -> list[str]:
    """Tell DeepSpeed of one micro-batch a step; returns complaints about other numbers in the JSON.

    DeepSpeed wants a number that is always the same. It makes no use of it, because `training.step` says which
    micro-batch of a step is the last one.
    """
    complaints = []
    for key, value in zip(BATCH_KEYS, (world_size, 1, 1), strict=True):
        given = resolved.get(key, AUTO)
        if given != AUTO:
            why = "under data.packing a step has as many micro-batches as its tokens need"
            complaints.append(f'{source.at(key)}: {key} is {given!r}, but {why}; write "auto" in {source.noun}')
        resolved[key] = value
    return complaints


def _shared_values(config: RunConfig, accumulation: int | None, on_cpu: bool) -> list[tuple[str, str, Plain]]:
    """(key of the JSON, key of the run file, value) of what the run file gives and the JSON may repeat."""
    train = config.train
    names = "train.global_batch_size", "train.micro_batch_size", "train.global_batch_size"
    sizes = train.global_batch_size, train.micro_batch_size, accumulation
    return [
        *(zip(BATCH_KEYS, names, sizes, strict=True) if accumulation is not None else ()),
        ("gradient_clipping", "train.max_grad_norm", train.max_grad_norm),  # left out, DeepSpeed clips at 1.0
        ("bf16.enabled", "train.precision", precision(config, on_cpu) == "bf16"),
        ("optimizer.params.lr", "train.lr", train.lr),
        ("optimizer.params.betas", "train.betas", list(train.betas)),
        ("optimizer.params.weight_decay", "train.weight_decay", train.weight_decay),
    ]


def _fill(
    resolved: dict[str, Plain], key: str, yaml_key: str, value: Plain, source: DeepSpeedJson, config: RunConfig
) -> list[str]:
    """Set a value where the JSON has "auto" or no such key; a complaint where it has another value."""
    *parents, name = key.split(".")
    holder = resolved
    for parent in parents:
        holder = holder.setdefault(parent, {})
        if not isinstance(holder, dict):
            return []  # `check_keys` has complained about it
    given = holder.get(name, AUTO)
    if given == AUTO:
        holder[name] = value
    elif given != value or isinstance(given, bool) != isinstance(value, bool):
        ours = "'bf16'" if value is True else "'fp32'" if value is False else f"{value!r}"
        what = "works out to" if name == "gradient_accumulation_steps" else "is"
        default = "" if written(config, yaml_key) else " by default"
        theirs = f"{key} is {json.dumps(given, default=str)}"
        ours = f"{config.at(yaml_key)} {yaml_key} {what} {ours}{default}"
        return [f'{source.at(key)}: {theirs}, but {ours}; write "auto" in {source.noun} or make them agree']
    return []


def _finish_data_types(resolved: dict[str, Plain], accumulates: bool) -> None:
    """Sum the gradients of several bf16 micro-batches in fp32, where the JSON leaves it to the run: "auto".

    One micro-batch has no sums; ZeRO-1 has no optimizer of ours that keeps them in fp32.
    """
    types = section(resolved, "data_types")
    if types.get("grad_accum_dtype") != AUTO:
        return
    stage, bf16 = section(resolved, "zero_optimization").get("stage"), section(resolved, "bf16").get("enabled") is True
    if accumulates and bf16 and stage in (2, 3):
        types["grad_accum_dtype"] = "fp32"
    else:
        del types["grad_accum_dtype"]


def _other_optimizer(resolved: dict[str, Plain], source: DeepSpeedJson) -> list[str]:
    """A complaint where DeepSpeed would replace its ZeRO-1 optimizer by one that our checkpoints cannot read."""
    zero, key = zero_plan(resolved), "data_types.grad_accum_dtype"
    if zero.stage != 1 or zero.offload_optimizer or not zero.bf16 or not zero.fp32_sums:
        return []
    dtype = section(resolved, "data_types")["grad_accum_dtype"]
    text = f"{key} {dtype!r} is not supported with bf16 at ZeRO stage 1: DeepSpeed's BF16_Optimizer, which it chooses"
    return [f"{source.at(key)}: {text}, has no checkpoints of ours; remove it, or use stage 2 or 3"]


def _beside_muon(resolved: dict[str, Plain], source: DeepSpeedJson, config: RunConfig) -> list[str]:
    """Complaints about what a run by Muon would not use or cannot do."""
    params, found = section(section(source.values, "optimizer"), "params"), []
    at = f"{config.at('train.optimizer')} train.optimizer is muon"
    for key in params:
        if key in keys.ADAM_KEYS and key not in keys.BESIDE_MUON:
            dotted = f"optimizer.params.{key}"
            found.append(f"{source.at(dotted)}: {dotted} would not be used: {at}, whose AdamW is torch's; remove it")
    if zero_plan(resolved).offload_optimizer:
        key = "zero_optimization.offload_optimizer"
        why = "whose step multiplies matrices, which would be slow on the host"
        found.append(f"{source.at(key)}: {key} is not supported: {at}, {why}; remove one of them")
    return found


def _finish_optimizer(resolved: dict[str, Plain], muon: bool) -> None:
    """Let torch's fused AdamW step wherever the optimizer state lies beside the weights.

    DeepSpeed's own Adam would be compiled at the first start: on a GPU with nvcc, which images of torch lack. The one
    for offloaded state needs g++ alone, and is several times as fast there as torch's. `engine/muon.py` asks for the
    same of torch itself.
    """
    optimizer = section(resolved, "optimizer")
    optimizer.setdefault("type", "AdamW")
    params = section(optimizer, "params")
    if params.get("eps", AUTO) == AUTO:
        params["eps"] = 1e-8
    if not muon and not zero_plan(resolved).offload_optimizer:
        params.setdefault("torch_adam", True)
        if params["torch_adam"]:
            params["fused"] = True  # torch then makes one pass over weights and moments, without temporary copies


def _finish_timers(resolved: dict[str, Plain]) -> None:
    """Switch off DeepSpeed's count of samples a second unless the JSON asks for it: nothing here reads it, and it waits
    for the device before every forward pass."""
    resolved.setdefault("timers", {})
    section(resolved, "timers").setdefault("throughput", {"enabled": False})


def _finish_zero(zero: dict[str, Plain], hidden_size: int | None, keeps_weights: bool) -> None:
    """Size "auto" buckets (in elements) as transformers does, but with a floor, for models so small that each
    collective would move next to nothing; and choose the linear function of stage 3.

    DeepSpeed's own, in Python, keeps no gathered weight from forward to backward. It is slower than torch's, which
    does, and has nothing to spare where the backward pass computes every layer again or where there is none.

    Args:
        keeps_weights: whether torch's linear function would keep weights of many layers at a time.
    """
    bucket = max((hidden_size or 0) ** 2, 2**24)  # DeepSpeed's own default of 5e8 takes 2 GiB of each rank
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero["stage"] == 3:
        if zero.get("memory_efficient_linear", AUTO) == AUTO:
            zero["memory_efficient_linear"] = keeps_weights
        sizes["stage3_prefetch_bucket_size"] = bucket * 9 // 10
        if hidden_size:
            sizes["stage3_param_persistence_threshold"] = 10 * hidden_size
    for key in [key for key, value in zero.items() if value == AUTO]:
        if key in sizes:
            zero[key] = sizes[key]
        else:
            del zero[key]
