#!/usr/bin/env bash
# At ZeRO 1 and 2, `safe_get_full_optimizer_state` knows the moments of the first optimizer group alone.
#
# One expects: after a step, DeepSpeed's accessor gives exp_avg of any parameter of a model whose optimizer has the two
# usual groups, matrices with weight decay and biases without. (The guess written down before: of all of them.)
# What happens: of the first group it does. Of every parameter of every other group it raises ValueError "exp_avg not
# found", after the first step and after any later one, although the optimizer holds these moments and trains with them.
# Why: `_optimizer_step(group_no)` in deepspeed/runtime/zero/stage_1_and_2.py takes one group's step at a time and then
# calls `_lazy_init_hp_params_optimizer_state`, which links the moments of ALL groups once and marks them as linked: after
# the step of the first group, when the optimizer state of the others is still empty.
# Who is hurt: whoever inspects, saves, reshards or transplants moments through the public accessors with more than one
# group, as HF Trainer makes them; with one group, and at ZeRO 3, the same program works.
# Instead: after the first step set `engine.optimizer._hp_optimizer_states_linked = False` and link once more, or read
# `engine.optimizer.optimizer.state` of the flat partitions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
pip=(env/bin/python -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 setuptools==80.9.0 wheel==0.45.1
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation deepspeed==0.19.8
cat > check.py <<'PY'
import os

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
deepspeed.init_distributed("gloo", verbose=False)
print("deepspeed", deepspeed.__version__, "torch", torch.__version__)


def readable(stage, grouped):
    """Names of the parameters whose first moment the accessor gives after each of two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    named = dict(model.named_parameters())
    matrices, biases = ([p for p in named.values() if p.dim() == dim] for dim in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if grouped else list(named.values()), lr=1e-2)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    found = []
    for _ in range(2):
        before = named["0.bias"].detach().clone() if stage < 3 else None
        engine.backward(engine(torch.randn(4, 6)).square().sum())
        engine.step()
        assert before is None or not torch.equal(before, named["0.bias"]), "the biases are trained"
        found.append([])
        for name, parameter in named.items():
            try:
                assert safe_get_full_optimizer_state(parameter, "exp_avg").any()
            except ValueError as error:
                last = str(error)
            else:
                found[-1].append(name)
    print(f"ZeRO {stage}, {'two groups' if grouped else 'one group '}:", *found, *([last] if len(found[-1]) < 4 else []))
    return found


every = ["0.weight", "0.bias", "2.weight", "2.bias"]
for stage in (1, 2):
    assert readable(stage, grouped=False) == [every, every]
    assert readable(stage, grouped=True) == [["0.weight", "2.weight"]] * 2
assert readable(3, grouped=True) == [every, every]
print("as described")
PY
DS_ACCELERATOR=cpu env/bin/python check.py 2>&1 | grep -v -e INFO -e WARNING -e Warning -e "return func" -e "loss.backward"
