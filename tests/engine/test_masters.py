"""ds_moe/engine/masters.py: what needs no engine. Engines: tests/distributed/test_resume.py."""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_moe.engine import masters


def engine_over(flats):
    """As much of a ZeRO-2 engine as `start_adam` touches."""
    adam = torch.optim.AdamW([torch.nn.Parameter(flat) for flat in flats], fused=True)
    partitions = adam.param_groups[0]["params"]
    for flat in partitions:
        flat.grad = torch.ones_like(flat)
    parts = {"optimizer": adam, "single_partition_of_fp32_groups": partitions}
    return SimpleNamespace(optimizer=SimpleNamespace(**parts, _lazy_init_hp_params_optimizer_state=lambda: None))


def kept(engine):
    states = engine.optimizer.optimizer.state.values()
    return [{name: (value.device, value.dtype, value.shape) for name, value in one.items()} for one in states]


def test_adams_state_lies_where_its_own_first_step_would_put_it_on_a_gpu():
    """Tensors without values stand for CUDA's on a machine without it."""
    with FakeTensorMode(), torch.no_grad():
        stepped, started = (engine_over([torch.zeros(5, device="cuda"), torch.zeros(3, device="cuda")]) for _ in "ab")
        stepped.optimizer.optimizer.step()
        masters.start_adam(started, 7)
    assert kept(started) == kept(stepped)
    assert {device.type for one in kept(started) for device, *_ in one.values()} == {"cuda"}


def test_adam_counts_on_from_the_step_in_every_group():
    engine = engine_over([torch.zeros(5), torch.zeros(3)])
    masters.start_adam(engine, 7)
    engine.optimizer.optimizer.step()
    assert [state["step"].item() for state in engine.optimizer.optimizer.state.values()] == [8, 8]
    assert masters.adam_step(engine) == 8
