"""Ranks of test_kept: `ds_moe.train`, and which of torch's kernels they take."""

import torch

from ds_moe import train
from tests.launcher import report

report(kernels=torch.backends.cpu.get_cpu_capability())
train.leave(train.main())
