"""Plans to train a model on a number of GPUs, each turned into the run file that stands for it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, Qwen3VLMoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.errors import UserError
from ds_moe.memory.predict import Memory, predict
from ds_moe.models.load import build_outline, model_config
from ds_moe.tasks.registry import task_kind

ENGINE_FILES = Path(__file__).resolve().parents[1] / "ds_configs"  # a link in a checkout, files in a wheel
# As the config.json of these models on the hub has them.
_TEXT = {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936}
_LARGE = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}
_SMALL = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768}
_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
_VISION |= {"deepstack_visual_indexes": [8, 16, 24]}
Setting = int | bool | str | list[str]  # value of a key of the run file
BUNDLED = {"qwen3-vl-30b-a3b": _SMALL, "qwen3-vl-235b-a22b": _LARGE}


@dataclass(frozen=True)
class Plan:
    """One way to train a model."""

    gpus: int
    ep_size: int
    stage: int
    offload: bool = False
    lora: int = 0  # rank of the updates of attention and experts, the model being frozen; 0: all is trained


def read_model(name: str) -> PretrainedConfig:
    """A bundled geometry, or the config.json of a folder; `UserError` for neither, or a family that is not trained."""
    if name not in BUNDLED:
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: neither one of {', '.join(BUNDLED)} nor a folder with a config.json")
        return model_config(ModelConfig(path=name))
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
        "train": {"precision": "bf16", "micro_batch_size": 1, "steps": 1},
    }
    if hasattr(model.get_text_config(), "num_experts"):
        sections["moe"] = {"ep_size": plan.ep_size}
    if plan.lora:
        sections["lora"] = {"rank": plan.lora, "experts": "moe" in sections}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        sections[section][field] = value
    train = sections["train"]
    train["global_batch_size"] = plan.gpus * train["micro_batch_size"]
    engine = ENGINE_FILES / f"zero{plan.stage}{'_offload' if plan.offload else ''}.json"
    return RunConfig(**sections, deepspeed=str(engine))


def outline_of(config: RunConfig, model: PretrainedConfig) -> PreTrainedModel:
    """The model without storage, its trainable parameters marked as this run trains them."""
    outline = build_outline(model)
    task_kind(config).set_trainable(outline, config)
    return outline


def predicted(config: RunConfig, outline: PreTrainedModel, gpus: int) -> Memory:
    ds = resolve_deepspeed(config, gpus, on_cpu=False, hidden_size=outline.config.get_text_config().hidden_size)
    streams_weights = task_kind(config).streams_weights
    return predict(outline, config, zero_plan(ds), gpus, on_cpu=False, streams_weights=streams_weights)
