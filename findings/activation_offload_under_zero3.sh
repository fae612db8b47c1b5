#!/usr/bin/env bash
# DeepSpeed's offload of checkpointed inputs moves nothing under ZeRO-3, and nothing leaves the device before backward ends.
#
# One expects: inside `get_checkpoint_hidden_states_offloading_ctx_manager()` the input of every layer that transformers
# checkpoints goes to host memory (but for the newest) and comes back for its layer, whatever the ZeRO stage; so at
# 32,768 tokens of a 48-layer model of width 2,048 in bf16 6 GiB of the device are free.
# (The guess written down before: the same inputs move at every stage. The check of a ZeRO-3 run failed on it.)
# What happens: with transformers 5.23 under ZeRO-1 and 2 all move; under ZeRO-3 none does, without a word, though it counts
# all of them as marked. And where they move, every input that came back stays on the device until the context ends: when
# the backward pass reaches the first layer, all of them are there again, beside the gradients.
# Why: deepspeed/runtime/activation_checkpointing/offload_activations.py marks, by id(), the tensor that a layer's `__call__` gets.
# transformers 5.23 checkpoints `forward` inside of it (modeling_layers.py), so that hooks run before; ZeRO-3's forward
# pre-hook (parameter_offload.py, PostBackwardFunctionModule) gives `forward` another tensor, which nobody marked. And
# `_unpack_tensor` restores with cache=True, into `_restored`, which only the end of the context empties.
# Who is hurt: long-context training under ZeRO-3, which turns the offload on to fit and does not, or fits by luck.
# Instead: call the engine below it (`offload_input`, `restore_input`) around the checkpoint function itself:
# `layer._gradient_checkpointing_func`; there the tensor is the one that is saved.
# On a CPU DeepSpeed skips every tensor, so the check says that they lie on a device; hooks, marks and copies are its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
pip=(env/bin/python -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 transformers==5.23.0 setuptools==80.9.0 wheel==0.45.1 ninja
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation deepspeed==0.19.8
cat > check.py <<'PY'
import os

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29733", DS_ACCELERATOR="cpu")
import deepspeed
import torch
import transformers
from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
from transformers import Qwen3Config, Qwen3ForCausalLM

print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "transformers", transformers.__version__)
LAYERS = 6
deepspeed.init_distributed("gloo")


class Offload(CheckpointHiddenStatesOffload):
    _should_skip = staticmethod(lambda tensor: False)  # as if on a GPU


found = {}
for stage in (1, 2, 3):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(hidden_size=48, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=12, vocab_size=100)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    engine.train()
    ids, offload, there = torch.randint(0, 100, (2, 32)), Offload(), []
    engine.module.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: there.append(len(offload._restored)))
    with offload:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        stats = offload.stats
    found[stage] = stats.marked_tensors, stats.offloaded_tensors, there[-1]
    print(f"ZeRO-{stage}: {stats.marked_tensors} inputs marked, {stats.offloaded_tensors} moved; "
          f"{there[-1]} held on the device as the first layer's backward pass runs")
    engine.destroy()
assert found[1] == found[2] == (LAYERS, LAYERS - 1, LAYERS), found
assert found[3] == (LAYERS, 0, 0), found
print("as described")
PY
PATH="$folder/env/bin:$PATH" OMP_NUM_THREADS=1 env/bin/python check.py 2>&1 | grep -v -e INFO -e WARNING -e Warning -e "return func"
