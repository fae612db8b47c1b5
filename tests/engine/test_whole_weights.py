"""ds_moe/engine/whole_weights.py, on one rank; several ranks evaluate in `tests/distributed/test_evaluate.py`."""

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_moe.engine import whole_weights as module
from ds_moe.engine.whole_weights import evaluation_mode, whole_weights

pytestmark = pytest.mark.usefixtures("one_rank")
OF_STAGE_3 = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
X = torch.arange(12.0).view(2, 6) / 12


def engine_of(stage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 4, bias=False))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **(OF_STAGE_3 if stage == 3 else {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def step(engine):
    engine.backward(engine(X).square().sum())
    engine.step()


def gathered(engine):
    return [parameter.numel() for parameter in engine.module.parameters()]


def hooks(engine):
    return sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in engine.module.modules())


def test_weights_are_whole_inside_and_a_run_goes_on_as_without():
    engine, other = engine_of(3), engine_of(3)
    step(engine), step(other)
    before, linear, hooked = engine(X).detach(), F.linear, hooks(engine)
    with whole_weights(engine), torch.no_grad():
        assert gathered(engine) == [60, 10, 40] and hooks(engine) < hooked
        assert F.linear is torch._C._nn.linear is not linear
        assert torch.allclose(engine(X), before, rtol=0, atol=1e-6)
    assert gathered(engine) == [0, 0, 0] and hooks(engine) == hooked and F.linear is linear
    for _ in range(2):
        step(engine), step(other)
    assert torch.equal(engine(X), other(X)) and not torch.equal(engine(X), before)


def test_hooks_come_back_after_an_error():
    engine = engine_of(3)
    hooked = hooks(engine)
    with pytest.raises(KeyboardInterrupt), evaluation_mode(engine):
        assert not engine.module.training
        raise KeyboardInterrupt
    assert gathered(engine) == [0, 0, 0] and hooks(engine) == hooked and engine.module.training
    step(engine)


def test_nothing_changes_where_memory_is_short_or_weights_are_whole(monkeypatch):
    engine = engine_of(2)
    with whole_weights(engine):
        assert gathered(engine) == [60, 10, 40]
    engine = engine_of(3)
    monkeypatch.setattr(module, "_free_bytes", lambda device: 110 * 4 / module.SHARE - 1)
    hooked = hooks(engine)
    with whole_weights(engine):
        assert gathered(engine) == [0, 0, 0] and hooks(engine) == hooked
    monkeypatch.setattr(module, "_free_bytes", lambda device: 110 * 4 / module.SHARE)
    with whole_weights(engine):
        assert gathered(engine) == [60, 10, 40]
