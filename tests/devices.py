"""Tests that run on the CPU and, marked `gpu`, on a GPU: what they make on the CPU they move to `device`.

No default device is set, because it would also reach the code under test, and hide a tensor that is made on the wrong
device there.
"""

import pytest

GPU = pytest.param("cuda", marks=pytest.mark.gpu)

by_device = pytest.mark.parametrize("device", ["cpu", GPU])
# For what starts a process: `make test` has other launches of the same code on the CPU.
by_device_launched = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
