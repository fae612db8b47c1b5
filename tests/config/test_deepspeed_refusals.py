"""What of a DeepSpeed JSON is refused: ds_moe cannot train with it, or would not use it."""

import re

import pytest

from ds_moe.config.deepspeed import deepspeed_problems, resolve_deepspeed, zero_plan
from ds_moe.config.deepspeed_keys import ADAM_KEYS, FILLED, PASSED_ON, REFUSED, ZERO_KEYS, ZERO_REFUSED
from ds_moe.errors import UserError
from tests.config.deepspeed_run import complaint

REFUSALS = {
    "unknown key": (
        {"gradient_cliping": 1},
        "zero.json:5: unknown key gradient_cliping (did you mean gradient_clipping?)",
    ),
    "unknown zero key": (
        {"zero_optimization": {"stage": 3, "reduce_bucket": 1}},
        "unknown key zero_optimization.reduce_bucket (did you mean reduce_bucket_size?)",
    ),
    "unknown optimizer key": (
        {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}},
        "unknown key optimizer.params.learning_rate",
    ),
    "expert_parallel": (
        {"expert_parallel": {"enabled": True}},
        "expert_parallel is not supported: ds_moe installs its own",
    ),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported: the learning rate follows train."),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled is True; ds_moe trains in bf16 or fp32"),
    "DeepSpeed's Muon": (
        {"optimizer": {"type": "Muon"}},
        "optimizer.type is 'Muon': DeepSpeed's takes an expert's gate and up rows for one matrix and clips finished "
        "updates; write train.optimizer: muon in the run file, and 'AdamW' here, which trains the rest",
    ),
    "optimizer": ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'; must be 'AdamW' or 'Adam'"),
    "no stage": ({"zero_optimization": {}}, "zero_optimization.stage is None; must be 1, 2 or 3"),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; must be 1, 2 or 3"),
    "stage-3 key at stage 2": (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}},
        "stage3_max_live_parameters would not be used: it needs stage 3, this is 2",
    ),
    "hpZ": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "zero_hpz_partition_size is not supported",
    ),
    "leaf_module": (
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["A"]}}},
        "zero.json:4: zero_optimization.leaf_module is not supported: ds_moe marks its layers itself",
    ),
    "optimizer on NVMe": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/ssd"}}},
        'zero.json:5: zero_optimization.offload_optimizer.device "nvme" is not supported: offload to NVMe was not',
    ),
    "parameters on NVMe": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        'zero.json:5: zero_optimization.offload_param.device "nvme" is not supported',
    ),
    "moments in bf16": (
        {"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": False}}},
        "zero.json:8: optimizer.params.fp32_optimizer_states false is not supported: checkpoints hold Adam's moments",
    ),
    "masters in bf16": (
        {"bf16": {"bf16_master_weights_and_grads": True}},
        "zero.json:6: bf16.bf16_master_weights_and_grads true is not supported",
    ),
    "bare bf16": ({"bf16": True}, "bf16 is True; must be an object"),
}


@pytest.mark.parametrize("values, expected", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_trained_with_is_refused(with_json, with_section, values, expected):
    assert expected in complaint(with_json(values))
    message = complaint(with_section(values))
    place, named, text = message.partition(": deepspeed: ")
    assert re.fullmatch(r"run\.yaml:1\d", place) and named and re.sub(r"zero\.json:\d+: ", "", expected) in text


@pytest.mark.parametrize("name", ["fp32", "float32", "torch.float32"])
def test_fp32_accumulation_is_refused_where_deepspeed_takes_another_optimizer_for_it(with_json, name):
    def problems(stage: int, precision: str = "bf16", **zero_options) -> list[str]:
        values = {"zero_optimization": {"stage": stage, **zero_options}, "data_types": {"grad_accum_dtype": name}}
        return deepspeed_problems(with_json(values, f"train.precision={precision}"), 2, on_cpu=True)[1]

    [line] = problems(stage=1)
    assert line.startswith(
        f"zero.json:6: data_types.grad_accum_dtype '{name}' is not supported with bf16 at ZeRO stage"
    )
    assert problems(2) == problems(3) == problems(1, "fp32") == []
    assert problems(1, offload_optimizer={"device": "cpu"}) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"optimizer": {"params": {"torch_adam": True}}},
            "zero.json:7: optimizer.params.torch_adam would not be used: override train.optimizer=muon train.optimizer "
            "is muon, whose AdamW is torch's; remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero.json:4: zero_optimization.offload_optimizer is not supported: override train.optimizer=muon "
            "train.optimizer is muon, whose step multiplies matrices, which would be slow on the host; remove one",
        ),
    ],
)
def test_what_muon_cannot_have_beside_it(with_json, values, expected):
    assert expected in complaint(with_json(values, "train.optimizer=muon"))


# What other trainers' files hold, at the values that switch it off.
SWITCHED_OFF = {
    "quantized weights": {"zero_optimization": {"stage": 3, "zero_quantized_weights": False}},
    "quantized gradients": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": False}},
    "hpZ over one rank": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}},
    "no leaf modules": {"zero_optimization": {"stage": 3, "leaf_module": {}}},
    "elastic checkpoint": {"zero_optimization": {"stage": 3, "elastic_checkpoint": False}},
    "the gradient norm": {"zero_optimization": {"stage": 3, "compute_grad_norm": True}},
    "no round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": False}},
    "no granularity": {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0}},
    "gathered 16-bit saves": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    "no gathered saves, stage 2": {
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": False}
    },
    "no ZenFlow": {"zero_optimization": {"stage": 3, "zenflow": None}},
    "no SuperOffload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": False}}
    },
    "parameters offloaded nowhere": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "none", "pin_memory": True}}
    },
    "the same at stage 2": {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
    "offloaded to null": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": None}}},
    "prescaling": {"prescale_gradients": False},
    "predivision by 1": {"gradient_predivide_factor": 1.0},
    "mean of gradients": {"gradient_allreduce_op": "mean"},
    "amp": {"amp": {"enabled": False, "opt_level": "O1"}},
    "torch autocast": {"torch_autocast": {"enabled": False}},
    "no scheduler": {"scheduler": None},
    "tensorboard": {"tensorboard": {"enabled": False, "output_path": "runs"}},
    "activation checkpointing": {
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False}
    },
    "sequence parallel of one": {"sequence_parallel_size": 1},
    "data efficiency": {"data_efficiency": {"enabled": False}},
    "hybrid engine": {"hybrid_engine": {"enabled": False}},
    "compile": {"compile": False},
    "drop last": {"dataloader_drop_last": False},
    "fp16 by the run": {"fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}},
    "fp16": {"fp16": {"enabled": False}},
}


@pytest.mark.parametrize("values", SWITCHED_OFF.values(), ids=SWITCHED_OFF)
def test_what_is_switched_off_passes_and_does_not_reach_deepspeed(with_json, values):
    resolved = resolve_deepspeed(with_json({**values}), 2, on_cpu=True)
    left_out = set(REFUSED) | set(ZERO_REFUSED) | {"stage3_gather_16bit_weights_on_model_save", "fp16"}
    assert not left_out & {*resolved, *resolved["zero_optimization"]}
    assert zero_plan(resolved).offload_param is False


SWITCHED_ON = {
    "quantized weights": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_quantized_weights",
    ),
    "hpZ over zero ranks": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}},
        "zero_hpz_partition_size",
    ),
    "round robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients is not supported: DeepSpeed then finds the fp32 weights of other parameters",
    ),
    "granularity": (
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 3000}},
        "stage3_module_granularity_threshold is not supported: it regroups the modules",
    ),
    "ZenFlow": ({"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow takes neither experts"),
    "SuperOffload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "SuperOffload takes neither experts",
    ),
    "prescaling, as a number": ({"prescale_gradients": 0}, "prescale_gradients is not supported"),
    "predivision": ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is not supported"),
    "sum of gradients": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is not supported"),
    "partitioned activations": (
        {"activation_checkpointing": {"partition_activations": True}},
        "activation_checkpointing is not supported",
    ),
    "the gradient norm": ({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, "compute_grad_norm"),
}


@pytest.mark.parametrize("values, expected", SWITCHED_ON.values(), ids=SWITCHED_ON)
def test_what_is_switched_on_is_refused_still(with_json, values, expected):
    assert expected in complaint(with_json(values))


def test_all_complaints_are_said_at_once(with_json):
    values = {"scheduler": {"type": "WarmupLR"}, "amp": {"enabled": True}, "train_batch_size": 7}
    with pytest.raises(UserError) as raised:
        resolve_deepspeed(with_json(values), 2, on_cpu=True)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[1].split(" is ")[0] for line in lines] == ["scheduler", "amp", "train_batch_size"]


def test_lists_of_keys_do_not_overlap():
    assert not set(FILLED + PASSED_ON) & set(REFUSED) and not set(ZERO_KEYS) & set(ZERO_REFUSED)
    assert len(set(ADAM_KEYS)) == len(ADAM_KEYS)
