"""Plans to train a model on numbers of GPUs: the run file that stands for each, and the memory that it needs."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel, Qwen3VLMoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.config.divisors import fitting_ep_sizes
from ds_moe.config.rules.model import expert_count
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.doctor.case import Device
from ds_moe.errors import UserError
from ds_moe.memory.predict import BUSY, GIB, Memory, predict
from ds_moe.memory.rows import largest_row
from ds_moe.models.families import family_of
from ds_moe.models.load import build_outline, model_config
from ds_moe.tasks.registry import task_kind

# As the config.json of these models on the hub has them.
_TEXT = {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936}
_LARGE = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}
_SMALL = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768}
_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
_VISION |= {"deepstack_visual_indexes": [8, 16, 24]}
Setting = int | bool | str | list[str]  # value of a key of the run file
BUNDLED = {"qwen3-vl-30b-a3b": _SMALL, "qwen3-vl-235b-a22b": _LARGE}
NODE = 8  # GPUs of a host, between which rows travel fast
COLUMNS = {  # column of the table -> purposes of `Memory.device` that it sums up
    "weights": ("weights", "gathered weights"),
    "gradients": ("gradients", "gradient buckets", "fp32 gradient of step", "fp64 copy of a gradient"),
    "optimizer": ("optimizer",),
    "activations": ("activations", "layer at work"),
    "all-to-all": ("all-to-all buffers",),
    "logits": ("logits",),
}


@dataclass(frozen=True)
class Plan:
    """One way to train a model."""

    gpus: int
    ep_size: int
    stage: int
    offload: bool = False
    lora: int = 0  # rank of the updates of attention and experts, the model being frozen; 0: all is trained

    @property
    def engine(self) -> str:
        """The shipped DeepSpeed JSON that a run file with this plan names."""
        return f"zero{self.stage}{'_offload' if self.offload else ''}"


def read_model(name: str) -> PretrainedConfig:
    """A bundled geometry, or the config.json of a folder; `UserError` for neither, or a family that is not trained."""
    if name not in BUNDLED:
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: neither one of {', '.join(BUNDLED)} nor a folder with a config.json")
        found = model_config(ModelConfig(path=name))
        if not family_of(found).measured:
            raise UserError(
                f"{name}: the memory of {found.model_type} models has not been measured, so there is no plan"
            )
        return found
    text = {**_TEXT, **BUNDLED[name], "max_position_embeddings": 262_144, "tie_word_embeddings": False}
    vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def run_of(plan: Plan, name: str, model: PretrainedConfig, settings: dict[str, Setting]) -> RunConfig:
    """The run file that a plan stands for, with `settings` (by dotted key) in place of its defaults.

    Raises `UserError` for offload with another stage than 3, which DeepSpeed is given no JSON for here.
    """
    if plan.offload and plan.stage != 3:
        raise UserError(f"--offload with ZeRO-{plan.stage}: optimizer state is offloaded with ZeRO-3 only")
    sections: dict[str, dict[str, Setting]] = {
        "model": {"path": name},
        "data": {"train": "data.jsonl"},
        "train": {"precision": "bf16", "steps": 1},
    }
    if expert_count(model):
        sections["moe"] = {"ep_size": plan.ep_size}
    if plan.lora:
        sections["lora"] = {"rank": plan.lora, "experts": "moe" in sections}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        sections[section][field] = value
    train = sections["train"]
    train.setdefault("global_batch_size", plan.gpus * train.get("micro_batch_size", 1))
    return RunConfig(**sections, deepspeed=plan.engine)


def outline_of(config: RunConfig, model: PretrainedConfig) -> PreTrainedModel:
    """The model without storage, its trainable parameters marked as this run trains them."""
    outline = build_outline(model)
    task_kind(config).set_trainable(outline, config)
    return outline


def predicted(config: RunConfig, outline: PreTrainedModel, ranks: int, on_cpu: bool = False) -> Memory:
    ds = resolve_deepspeed(config, ranks, on_cpu, hidden_size=outline.config.get_text_config().hidden_size)
    return predict(outline, config, zero_plan(ds), ranks, on_cpu)


@dataclass(frozen=True)
class Forecast:
    """The memory that a plan needs of one GPU, and whether a GPU has it."""

    plan: Plan
    memory: Memory
    fits: bool
    row: int | None = None  # tokens of the longest packed rows that would fit; None: samples are padded, or none fit

    @property
    def total(self) -> int:
        return sum(self.memory.device.values())


def sweep(
    name: str, model: PretrainedConfig, settings: dict[str, Setting], gpus: list[int], device: Device, lora: int
) -> dict[int, list[Forecast]]:
    """For each number of GPUs: every EP size that is possible, with ZeRO 1, 2, 3, 3 with offload, 3 with LoRA.

    `lora` is the rank of the updates. Muon's states cannot be offloaded.
    """
    outlines: dict[int, PreTrainedModel] = {}
    found = {}
    for count in gpus:
        found[count] = []
        for plan in (plan for ep_size in ep_sizes(model, count) for plan in plans(count, ep_size, lora)):
            if plan.offload and settings.get("train.optimizer") == "muon":
                continue
            config = run_of(plan, name, model, settings)
            outline = outlines.get(plan.lora) or outlines.setdefault(plan.lora, outline_of(config, model))
            found[count].append(forecast(plan, config, outline, device))
    return found


def forecast(plan: Plan, config: RunConfig, outline: PreTrainedModel, device: Device) -> Forecast:
    """The memory of a plan, of which `config` is the run file, on such devices."""

    def needed(config: RunConfig) -> Memory:
        return predicted(config, outline, plan.gpus, device.on_cpu)

    def fits(memory: Memory) -> bool:
        return sum(memory.device.values()) <= BUSY * device.memory

    row = largest_row(config, lambda other: fits(needed(other))) if config.data.packing else None
    return Forecast(plan, needed(config), fits(needed(config)), row)


def ep_sizes(model: PretrainedConfig, gpus: int) -> list[int]:
    """Those that divide both the number of GPUs and that of experts; only 1 for a dense model."""
    return fitting_ep_sizes(gpus, expert_count(model) or 1)


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
        mark += f"; rows up to {forecast.row:,}" if forecast.row else ""
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
        "longest_row": forecast.row,
    }
