"""Engines without us, for benchmarks to compare with: a model of transformers under DeepSpeed."""

from typing import Any

import deepspeed
from transformers import PreTrainedModel

from ds_moe.distributed import Topology


def rival_engine(
    name: str, model: PreTrainedModel, ds_config: dict[str, Any], topology: Topology, block: str, **names: str
) -> deepspeed.DeepSpeedEngine:
    """The engine of "zero3", whose MoE blocks (of class `block`) are ZeRO-3 leaf modules, or of "autoep", DeepSpeed's
    AutoEP. `names` are where AutoEP finds experts in this family's config, beside what is the same in all of them."""
    if name == "zero3":
        ds_config["zero_optimization"]["leaf_module"] = {"classes": [block]}
    else:
        # AutoEP has no preset for Qwen3-VL-MoE. That for Qwen3-MoE crashes with transformers 5.23, whose registry of
        # recorders of router logits it reads by an outdated call. The preset mixtral describes the same block (layout
        # of weights, softmax before top-k, normalised weights applied after the experts) but for names, set here, and
        # looks for recorders of Mixtral, of which there are none. No router logits are recorded; all else is default.
        preset = {"preset_model": "mixtral", "num_experts_attr": "num_experts", **names}
        ds_config["expert_parallel"] = {"enabled": True, "autoep_size": topology.ep_size, **preset}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]
