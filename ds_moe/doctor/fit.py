"""The plan of a new run: of those that fit the one that gives up least, with the largest micro-batch that fits then."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from ds_moe.doctor import plans
from ds_moe.doctor.case import Device
from ds_moe.doctor.plans import Forecast, Plan, Setting
from ds_moe.errors import UserError
from ds_moe.memory.predict import BUSY, GIB

MICRO_BATCHES = (8, 4, 2)  # that are tried
LORA_RANK = 16
LEAST_BATCH = 8  # samples of a step


@dataclass(frozen=True)
class Job:
    """What will be trained, and where: a model's folder or hub id and config, and ranks on a device each."""

    name: str
    model: PretrainedConfig
    ranks: int
    device: Device


@dataclass(frozen=True)
class Fit:
    """A plan that fits, with its batch; `why` says what it does without, one line each."""

    plan: Plan
    micro_batch: int
    global_batch: int
    checkpointing: bool
    why: list[str]


@dataclass(frozen=True)
class Attempt:
    """All plans with a micro-batch of one sample, of up to so many samples a step."""

    checkpointing: bool
    samples: int
    asked: dict[str, Setting]
    forecasts: list[Forecast]

    def least(self, like: Callable[[Plan], bool] = lambda plan: True) -> float:
        """GiB that a rank needs under the plan that needs least, of those that are `like` what is asked about."""
        return min(one.total for one in self.forecasts if like(one.plan)) / GIB


def fit(job: Job, settings: dict[str, Setting], samples: int, lora: bool) -> Fit:
    """The plan for a run with these settings (by dotted key) and up to `samples` a step; `lora`: only with LoRA.

    All weights are better than LoRA, no offload than offload, no gradient checkpointing than that, and that than steps
    without sums of gradients. Raises `UserError` where nothing fits.
    """
    sizes = [(False, samples), (True, samples)]
    sizes += [(True, job.ranks)] if LEAST_BATCH <= job.ranks < samples else []
    tried: list[Attempt] = []
    fitting: list[tuple[bool, bool, int, Plan]] = []  # smaller is better
    for number, (checkpointing, size) in enumerate(sizes):
        tried.append(_attempt(job, settings, checkpointing, size, lora))
        if (best := plans.recommended(tried[number].forecasts)) is not None:
            fitting.append((best.plan.lora > 0, best.plan.offload, number, best.plan))
            if not best.plan.offload and (lora or not best.plan.lora):
                break
    if not fitting:
        there = f"{BUSY:.0%} of {job.device.memory / GIB:.1f} GiB may be planned with"
        ranks = "1 rank" if job.ranks == 1 else f"each of {job.ranks} ranks"
        text = f"nothing fits: {ranks} needs {tried[1].least():.1f} GiB even at its least, with LoRA, and {there}"
        fix = "free some, or give --gpus N" if job.device.on_cpu else "give more --gpus, or larger ones"
        raise UserError(f"{text}; {fix}")
    *_, number, plan = min(fitting, key=lambda one: one[:3])
    chosen = tried[number]
    asked = _largest_micro_batch(job, plan, chosen)
    sizes = asked["train.micro_batch_size"], asked["train.global_batch_size"]
    return Fit(plan, *sizes, chosen.checkpointing, _why(plan, chosen, tried, lora))


def _attempt(job: Job, settings: dict[str, Setting], checkpointing: bool, samples: int, lora: bool) -> Attempt:
    asked = settings | batch(1, job.ranks, samples) | {"train.gradient_checkpointing": checkpointing}
    found = plans.sweep(job.name, job.model, asked, [job.ranks], job.device, LORA_RANK)[job.ranks]
    return Attempt(checkpointing, samples, asked, [one for one in found if _allowed(one.plan, job, samples, lora)])


def _largest_micro_batch(job: Job, plan: Plan, attempt: Attempt) -> dict[str, Setting]:
    """The keys of an attempt with the largest micro-batch that fits."""
    outline = plans.outline_of(plans.run_of(plan, job.name, job.model, attempt.asked), job.model)
    for micro_batch in (size for size in MICRO_BATCHES if size * job.ranks <= attempt.samples):
        larger = attempt.asked | batch(micro_batch, job.ranks, attempt.samples)
        config = plans.run_of(plan, job.name, job.model, larger)
        if plans.forecast(plan, config, outline, job.device).fits:
            return larger
    return attempt.asked


def batch(micro_batch: int, ranks: int, samples: int) -> dict[str, Setting]:
    """The batch sizes of up to `samples` a step: a multiple of what all ranks take at a time, once at least."""
    step = micro_batch * ranks
    return {"train.micro_batch_size": micro_batch, "train.global_batch_size": step * max(1, samples // step)}


def _allowed(plan: Plan, job: Job, samples: int, lora: bool) -> bool:
    """Whether a plan is asked for and sound: ZeRO-1 sums the gradients of several micro-batches in bf16."""
    if job.device.on_cpu:
        return not plan.offload and (plan.lora > 0 or not lora)
    return (plan.stage > 1 or samples <= job.ranks) and (plan.lora > 0 or not lora)


def _why(plan: Plan, chosen: Attempt, tried: list[Attempt], lora: bool) -> list[str]:
    """What the plan gives up, with the memory that a rank would need otherwise."""

    def alike(other: Plan) -> bool:
        return bool(other.lora) == bool(plan.lora) and other.offload == plan.offload

    why = []
    if plan.lora and not lora:
        needed = chosen.least(lambda other: not other.lora)
        why.append(f"LoRA, because training all weights would take at least {needed:.1f} GiB a rank")
    if plan.offload:
        needed = chosen.least(lambda other: not other.lora and not other.offload)
        why.append(f"optimizer in host memory, because without that it would be at least {needed:.1f} GiB a rank")
    if chosen.samples < tried[0].samples:
        needed = tried[1].least(alike)
        why.append(f"small steps, because sums over more micro-batches would make it at least {needed:.1f} GiB a rank")
    if chosen.checkpointing:
        needed = tried[0].least(alike)
        why.append(f"gradient checkpointing, because without it would be at least {needed:.1f} GiB a rank")
    return why or [f"it fits without {'' if lora else 'LoRA, '}offload and gradient checkpointing"]
