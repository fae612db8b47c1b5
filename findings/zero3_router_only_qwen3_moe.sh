#!/usr/bin/env bash
# Router-only tuning of Qwen3-MoE fails at the first backward pass of ZeRO 3: its blocks are leaf modules unasked.
#
# One expects: plain transformers under plain DeepSpeed trains the routers of a frozen Qwen3-MoE at any ZeRO stage. (The
# guess written down before: it works; only a block that one marks by `set_z3_leaf_modules` oneself might differ.)
# What happens: at ZeRO 2 it trains. At ZeRO 3 the first backward pass raises RuntimeError: the gradient of the first
# router meets a parameter of size 0. It works with the embeddings trained, with `leaf_module.classes: []` in the JSON, and
# with `model.enable_input_require_grads()`, and then all of them give the same gradient.
# Why: DeepSpeed marks the blocks of Mixtral, Qwen2-MoE and Qwen3-MoE as leaves by default
# (deepspeed/runtime/zero/leaf_module_config.py). A leaf reduces and partitions all its parameters in a full backward hook
# (`create_reduce_and_remove_grad_hooks` of runtime/zero/stage3.py). Where no input of a module needs a gradient, torch
# calls such a hook as soon as the gradient of the module's OUTPUT is there, before those of its parameters are
# (torch/utils/hooks.py, `BackwardHook`). With frozen embeddings and attention, nothing that the first block gets needs one.
# Who is hurt: tuning of routers, of experts or of adapters in the first block under ZeRO 3 with the rest frozen.
# Instead: `model.enable_input_require_grads()`, or the JSON key above; without leaves ranks whose tokens visit different
# experts gather out of step where the experts are modules of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
pip=(env/bin/python -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 transformers==5.23.0 setuptools==80.9.0 wheel==0.45.1
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation deepspeed==0.19.8
cat > check.py <<'PY'
import os

import deepspeed
import torch
import transformers
from deepspeed.utils import safe_get_full_grad
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29613")
deepspeed.init_distributed("gloo", verbose=False)
print("deepspeed", deepspeed.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
config = Qwen3MoeConfig(
    hidden_size=48, intermediate_size=80, moe_intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, vocab_size=100, num_experts=6, num_experts_per_tok=2,
)


def gradient(stage=3, leaves=None, inputs_need_gradients=False, trained="mlp.gate.weight"):
    """Of the first router; or what the backward pass raises."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate.weight" in name or trained in name)
    if inputs_need_gradients:
        model.enable_input_require_grads()
    router = model.model.layers[0].mlp.gate.weight
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if leaves is not None:
        settings["zero_optimization"]["leaf_module"] = {"classes": leaves}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]
    tokens = torch.arange(14).view(2, 7)
    try:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return safe_get_full_grad(router)


found = {
    "ZeRO 2": gradient(stage=2),
    "ZeRO 3, no leaves": gradient(leaves=[]),
    "ZeRO 3, inputs need gradients": gradient(inputs_need_gradients=True),
    "ZeRO 3, embeddings trained": gradient(trained="embed_tokens"),
    "ZeRO 3": gradient(),
}
for case, value in found.items():
    print(f"{case:30}", value if isinstance(value, str) else f"norm {value.norm():.6f}")
failed = found.pop("ZeRO 3")
reference = found.pop("ZeRO 2")
assert reference.any() and all(torch.allclose(reference, value, atol=1e-7) for value in found.values())
assert isinstance(failed, str) and "size of tensor a (0)" in failed
print("as described")
PY
DS_ACCELERATOR=cpu env/bin/python check.py 2>&1 | grep -v -e INFO -e WARNING -e Warning -e "return func" -e "loss.backward"
