"""The transformers class of each supported model family, imported when it is asked for."""

from collections.abc import Callable

import transformers
from transformers import PreTrainedModel

MODEL_CLASSES: dict[str, Callable[[], type[PreTrainedModel]]] = {
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeForConditionalGeneration,
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM,
    "qwen3_vl": lambda: transformers.Qwen3VLForConditionalGeneration,
}
