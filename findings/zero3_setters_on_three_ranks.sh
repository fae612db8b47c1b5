#!/usr/bin/env bash
# Under ZeRO 3, `safe_set_full_fp32_param` and `safe_set_full_optimizer_state` fail where the ranks do not divide a tensor.
#
# One expects: what `safe_get_full_fp32_param` gives on a number of ranks, `safe_set_full_fp32_param` takes on it.
# (The guess written down before: the setters work wherever the getters do.)
# What happens: on two ranks a tensor of 30 values is read and written back. On three ranks one of 32 values is read, and
# writing it back raises "start (...) + length (...) exceeds dimension size (...)" on the last rank alone, and the others go on.
# Why: `set_full_hp_param` in deepspeed/runtime/zero/stage3.py narrows the value to the rank's piece by the padded length of
# a piece; the pieces are padded to a multiple of the ranks, the value is not, so the last piece reaches past its end.
# Who is hurt: whoever resumes or edits weights and moments through the public accessors on 3, 5, 6, 24, 40 or 48 ranks:
# saving works, and the job finds out after its first interruption. Powers of two hide it, since widths are such.
# Instead: `safe_set_local_fp32_param` and `safe_set_local_optimizer_state` with the rank's own padded piece.
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
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

deepspeed.init_distributed("gloo", verbose=False)
rank, world = dist.get_rank(), dist.get_world_size()
model = nn.Linear(8, 4, bias=False) if world == 3 else nn.Linear(10, 3, bias=False)
parameter = model.weight
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
inputs = torch.ones(1, model.in_features)
engine = deepspeed.initialize(model=model, model_parameters=[parameter], config=settings)[0]
engine.backward(engine(inputs).sum())
engine.step()
value = safe_get_full_fp32_param(parameter)
moment = safe_get_full_optimizer_state(parameter, "exp_avg")
assert value.numel() == moment.numel() in (30, 32)
refused = []
for name, put in (
    ("weights", lambda: safe_set_full_fp32_param(parameter, value + 1)),
    ("moments", lambda: safe_set_full_optimizer_state(parameter, moment + 1, "exp_avg")),
):
    try:
        put()
    except RuntimeError as error:
        refused.append((name, str(error).split("\n")[0]))
everywhere = [None] * world
dist.all_gather_object(everywhere, refused)
if rank == 0:
    print("deepspeed", deepspeed.__version__, "torch", torch.__version__, f"{world} ranks, {value.numel()} values")
    print(*everywhere, sep="\n")
    if world == 2:
        assert everywhere == [[], []]
    else:
        assert everywhere[:2] == [[], []] and [name for name, _ in everywhere[2]] == ["weights", "moments"]
        assert all("exceeds dimension size" in text for _, text in everywhere[2])
    print("as described")
PY
for ranks in 2 3; do
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 env/bin/torchrun --nproc_per_node "$ranks" check.py 2>&1 | grep -v -e INFO -e WARNING -e Warning -e "return func" -e "loss.backward"
done
