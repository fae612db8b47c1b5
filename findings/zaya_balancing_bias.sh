#!/usr/bin/env bash
# `from_pretrained` of Zaya overwrites one selection bias a layer that the file holds, and reports nothing.
#
# One expects: a saved model that is loaded again has the values of the file, as for every other tensor whose name is
# found. (The guess written down before: equal, since `output_loading_info` names no missing key.)
# What happens: the last of each router's `balancing_biases`, that of the expert which skips the layer, is -1.0 after
# every load, whatever was saved; the other entries are the file's. Logits differ from the saved model's. Missing,
# unexpected and mismatched keys are all empty.
# Why: `_init_weights` runs on a router after its tensors were loaded. The functions of `transformers.initialization`
# leave alone what was loaded, but `balancing_biases[-1] = -1.0` in models/zaya/modeling_zaya.py is an assignment.
# Who is hurt: whoever moves these biases, which balancing without an auxiliary loss does at every step, then saves and
# loads: the share of tokens that skip layers changes without a word, in evaluation as in a resumed run.
# Instead: after loading, copy `balancing_biases` from the file, or compare all tensors with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cat > check.py <<'PY'
import torch
import transformers
from transformers import ZayaConfig, ZayaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = ZayaConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    moe_intermediate_size=48, num_experts=4, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = ZayaForCausalLM(config).eval()
for layer in model.model.layers:
    layer.mlp.gate.balancing_biases.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
model.save_pretrained("saved")
loaded, info = ZayaForCausalLM.from_pretrained("saved", output_loading_info=True)
assert not any(info.values()), info
print("loading info:", {key: len(value) for key, value in info.items()})
before, after = model.state_dict(), loaded.state_dict()
changed = [name for name in before if not torch.equal(before[name], after[name])]
for name in changed:
    print(f"{name}: saved {before[name].tolist()}, loaded {after[name].tolist()}")
assert changed == [f"model.layers.{number}.mlp.gate.balancing_biases" for number in range(2)]
for name in changed:
    assert torch.equal(before[name][:-1], after[name][:-1]) and after[name][-1] == -1.0
tokens = torch.arange(3, 40)[None]
with torch.no_grad():
    off = (model(tokens).logits - loaded.eval()(tokens).logits).abs().max().item()
print(f"logits off by {off:.4f}")
assert off > 0
print("as described")
PY
HF_HUB_OFFLINE=1 env/bin/python check.py 2>&1 | grep -v -e "Writing model shards" -e "Loading weights"
