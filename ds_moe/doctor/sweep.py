"""The memory of every way to train a model on some numbers of GPUs, and which way to choose."""

from dataclasses import dataclass

from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.doctor.plans import Plan, Setting, outline_of, predicted, run_of
from ds_moe.memory.predict import BUSY, GIB, Memory

NODE = 8  # GPUs of a host, between which rows travel fast
COLUMNS = {  # column of the table -> purposes of `Memory.device` that it sums up
    "weights": ("weights", "gathered weights"),
    "gradients": ("gradients", "gradient buckets", "fp32 gradient of step"),
    "optimizer": ("optimizer",),
    "activations": ("activations", "layer at work"),
    "all-to-all": ("all-to-all buffers",),
    "logits": ("logits",),
}


@dataclass(frozen=True)
class Forecast:
    """The memory that a plan needs of one GPU, and whether a GPU has it."""

    plan: Plan
    memory: Memory
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.memory.device.values())


def sweep(
    name: str, model: PretrainedConfig, settings: dict[str, Setting], gpus: list[int], memory: float, lora: int
) -> dict[int, list[Forecast]]:
    """For each number of GPUs: every EP size that is a power of two, with ZeRO 1, 2, 3, 3 with offload, 3 with LoRA.

    `memory` is that of a GPU in bytes, `lora` the rank of the updates.
    """
    outlines: dict[int, PreTrainedModel] = {}
    found = {}
    for count in gpus:
        found[count] = []
        for ep_size in ep_sizes(model, count):
            for plan in plans(count, ep_size, lora):
                config = run_of(plan, name, model, settings)
                outline = outlines.get(plan.lora) or outlines.setdefault(plan.lora, outline_of(config, model))
                needed = predicted(config, outline, count)
                found[count].append(Forecast(plan, needed, sum(needed.device.values()) <= BUSY * memory))
    return found


def ep_sizes(model: PretrainedConfig, gpus: int) -> list[int]:
    """Powers of two that divide both the number of GPUs and that of experts; only 1 for a dense model."""
    experts = getattr(model.get_text_config(), "num_experts", 1)
    return [2**power for power in range(experts.bit_length()) if experts % 2**power == gpus % 2**power == 0]


def plans(gpus: int, ep_size: int, lora: int) -> list[Plan]:
    return [
        *(Plan(gpus, ep_size, stage) for stage in (1, 2, 3)),
        Plan(gpus, ep_size, 3, offload=True),
        Plan(gpus, ep_size, 3, lora=lora),
    ]


def recommended(forecasts: list[Forecast]) -> Forecast | None:
    """The best plan that fits; None if none does.

    Training all weights is better than LoRA, no offload better than offload. Then experts are best spread over as many
    GPUs of one node as there are, which keeps their weights from travelling, and the lowest ZeRO stage is best.
    """

    def order(forecast: Forecast) -> tuple:
        plan = forecast.plan
        return plan.lora > 0, plan.offload, plan.ep_size > NODE, -min(plan.ep_size, NODE), plan.stage, plan.ep_size

    return min((forecast for forecast in forecasts if forecast.fits), key=order, default=None)


def described(plan: Plan) -> str:
    lora = f", LoRA of rank {plan.lora}" if plan.lora else ""
    return f"EP {plan.ep_size}, ZeRO-{plan.stage}{' with offload' if plan.offload else ''}{lora}"


def cells(forecast: Forecast) -> list[str]:
    """GiB of each column of the table, then of other purposes, in total, and of host memory."""
    device = forecast.memory.device
    sizes = {column: sum(device.get(name, 0) for name in names) for column, names in COLUMNS.items()}
    values = [*sizes.values(), forecast.total - sum(sizes.values()), forecast.total, sum(forecast.memory.host.values())]
    return [f"{value / GIB:,.1f}" if value else "" for value in values]


def sweep_table(count: int, forecasts: list[Forecast], title: str) -> Table:
    table = Table("plan", title=f"{count} GPUs: {title}; predicted GiB of one rank")
    for column in (*COLUMNS, "other", "total", "host"):
        table.add_column(column, justify="right")
    table.add_column("")
    best = recommended(forecasts)
    for forecast in forecasts:
        mark = "fits, recommended" if forecast is best else "fits" if forecast.fits else "does not fit"
        table.add_row(described(forecast.plan), *cells(forecast), mark)
    return table


def as_json(forecast: Forecast) -> dict[str, object]:
    """What the command writes of a plan to its JSON file; sizes are bytes of one rank, on its GPU and on its host."""
    memory = forecast.memory
    return {
        "plan": vars(forecast.plan),
        "device_bytes": memory.device,
        "host_bytes": memory.host,
        "total_bytes": forecast.total,
        "moment": memory.moment,
        "fits": forecast.fits,
    }
