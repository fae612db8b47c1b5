#!/usr/bin/env bash
# A tied checkpoint that also stores its output layer is tied when it is loaded on a CPU and untied on the meta device.
#
# One expects: `from_pretrained(folder)` and `from_pretrained(folder, device_map="meta")` build the same model, once with
# and once without memory; tie_word_embeddings: true decides. So parameters may be counted, sharded or planned on meta.
# What happens: where the files hold both `lm_head.weight` and the input embedding, as those of Qwen3-0.6B do, transformers
# ties them on a CPU if their VALUES are equal. On meta there are no values: it passes over the pair, without a warning,
# and leaves two parameters. Nothing ties them later: a program that fills the meta model from the same files
# (`load_state_dict(assign=True)`, FSDP, ZeRO-3 or expert parallel loading) trains two matrices, the config that it saves
# still says tied, and the next CPU load compares, finds them different and keeps both.
# Why: `PreTrainedModel.tie_weights` in transformers/modeling_utils.py, `continue` where both weights are on meta ("disk
# offloaded"); without the stored lm_head (it is then in missing_keys) the tie is made on meta too.
# Who is hurt: whoever counts parameters or memory on meta, and whoever streams weights into a sharded model.
# Instead: after a meta load compare the two stored weights, and set one parameter for both if they are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cat > check.py <<'PY'
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
config = Qwen3Config(
    hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=12, vocab_size=100, tie_word_embeddings=True,
)
Qwen3ForCausalLM(config).save_pretrained("model")
found = {}
for stored in (False, True):
    if stored:
        weights = load_file("model/model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    for device in ("cpu", "meta"):
        model = Qwen3ForCausalLM.from_pretrained("model", device_map=device)
        count = sum(parameter.numel() for parameter in model.parameters())
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        found[stored, device] = count, tied, model.config.tie_word_embeddings
        print(f"lm_head stored: {stored!s:5}  device {device:4}  {count:,} parameters, one matrix: {tied}, config: tied")
    if stored:  # fill the meta model as a sharded loader does
        model.load_state_dict(load_file("model/model.safetensors"), assign=True)
        print("filled from the files, one matrix:", model.lm_head.weight is model.model.embed_tokens.weight)
        found["filled"] = model.lm_head.weight is model.model.embed_tokens.weight
assert found[False, "cpu"] == found[False, "meta"] == found[True, "cpu"] and found[True, "cpu"][1:] == (True, True)
assert found[True, "meta"] == (found[True, "cpu"][0] + 100 * 48, False, True)
assert found["filled"] is False
print("as described")
PY
env/bin/python check.py
