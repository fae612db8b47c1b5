"""The one reader of model folders and hub ids: their config, and refusals of what a run could not train."""

import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import find_adapter_config_file

from ds_moe.errors import UserError, one_line, shown

# Endings of names that tell a quantized checkpoint from the one it was made of.
SUFFIXES = re.compile(
    r"([-_.](unsloth|bnb|[48]bits?|n?v?fp4|mxfp4|fp8|awq|gptq|autoround|int[48]|w\d+a\d+|quantized|dynamic|block))+$",
    re.IGNORECASE,
)


def read_model_config(path: str | Path, subject: str, offline: bool = False) -> PretrainedConfig:
    """The transformers config of a folder or hub id, of whatever family; no code of its own is run.

    Args:
        subject: the model as the message names it, such as a key of the run file with its value.
        offline: of a hub id, only take what is on this machine.

    Raises:
        UserError: a config that cannot be read, quantized weights, an adapter beside the model, or weights in a file
            that only transformers would look for.
    """
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=offline, trust_remote_code=False)
    except Exception as error:  # transformers looks into values before it looks at their types
        output = (Path(path) / "checkpoints").is_dir()
        hint = "it is a run's output folder; ds-moe export it first" if output else one_line(error)
        raise UserError(f"{subject} cannot be read as a transformers checkpoint: {hint}") from error
    if (kind := quantization(config.to_dict())) is not None:
        name = str(path).rstrip("/")
        twin = SUFFIXES.sub("", name)
        usually = f", usually {twin}" if twin != name else ""
        text = (
            f"has weights quantized by {kind}, which cannot be trained: take the checkpoint in bf16 they were made of"
        )
        raise UserError(f"{subject} {text}{usually}")
    if (named := getattr(config, "transformers_weights", None)) is not None:
        text = f"names its weights itself (transformers_weights: {shown(named)} in config.json)"
        raise UserError(f"{subject} {text}: call the file model.safetensors and remove the key")
    if find_adapter_config_file(str(path), local_files_only=offline) is not None:
        text = "holds a PEFT adapter beside the model, which transformers would load with it"
        raise UserError(
            f"{subject} {text}: move adapter_config.json away, or merge the adapter (PEFT: merge_and_unload)"
        )
    return config


def quantization(config: dict[str, object]) -> str | None:
    """How the weights of a config.json are quantized, in one of its parts at least, as its `quant_method` calls it."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            return _method(value)
        if isinstance(value, dict) and (found := quantization(value)) is not None:
            return found
    return None


def _method(settings: object) -> str:
    if not isinstance(settings, dict):
        return shown(settings)
    if isinstance(settings.get("quant_method"), str):
        return shown(settings["quant_method"])
    old = next((key for key in ("load_in_4bit", "load_in_8bit") if settings.get(key)), None)
    return f"bitsandbytes ({old})" if old else "a method that its quantization_config does not name"
