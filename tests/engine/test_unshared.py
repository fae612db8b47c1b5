"""ds_moe/engine/unshared.py, on one rank, whose gradients nobody shares: bit for bit DeepSpeed's own optimizer.

Gradients of some ranks and of all are held against transformers in `tests/distributed/test_parity.py`.
"""

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from ds_moe.engine.unshared import NORM_BLOCK, Unshared, _norm, spare_copies

pytestmark = pytest.mark.usefixtures("one_rank")
# Left to itself DeepSpeed takes 2 GiB an engine, and then a test that comes later cannot fork this process.
SMALL = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}


def trained(spared, steps=3, clipping=0.0, bf16=False, micro_batches=2, **zero):
    """Weights and norms after steps of some micro-batches, with a second weight that a step may not use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 4, bias=False))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        **{"gradient_accumulation_steps": micro_batches, "gradient_clipping": clipping},
        **{"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **SMALL, **zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
    if spared:
        spare_copies(engine)
    norms, data = [], torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(micro_batches):
            x = torch.randn(3, 6, generator=data).to(torch.bfloat16 if bf16 else torch.float32)
            engine.backward(engine(x).square().sum())
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return engine, [parameter.detach().clone() for parameter in model.parameters()], norms


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"clipping": 1e9}, {"sub_group_size": 60}, OFFLOAD, OFFLOAD | {"bf16": True}],
    ids=str,
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_are_bit_for_bit_those_of_deepspeed(settings, micro_batches):
    engine, weights, norms = trained(True, micro_batches=micro_batches, **settings)
    plain, expected, expected_norms = trained(False, micro_batches=micro_batches, **settings)
    assert type(engine.optimizer) is Unshared and type(plain.optimizer) is DeepSpeedZeroOptimizer_Stage3
    assert all(map(torch.equal, weights, expected))
    assert norms == pytest.approx(expected_norms, rel=1e-12) and norms[0] > 0


def test_gradients_are_clipped_by_the_norm_of_all():
    _, weights, norms = trained(True, clipping=1e-3)
    _, expected, _ = trained(False, clipping=1e-3)
    _, unclipped, _ = trained(False)
    assert min(norms) > 1e-3
    for weight, same, other in zip(weights, expected, unclipped, strict=True):
        assert torch.allclose(weight, same, rtol=0, atol=1e-6) and not torch.equal(weight, other)


def test_gradients_are_read_where_they_were_written(monkeypatch):
    """No bucket, no reduction, no flat copy: neither is called."""

    def unwanted(*_):
        raise AssertionError("a copy that nobody needs")

    private = "_DeepSpeedZeroOptimizer_Stage3__"
    for name in (f"{private}add_grad_to_ipg_bucket", f"{private}avg_scatter_grads", "_prepare_fp32_grad_for_sub_group"):
        monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, name, unwanted)
    engine, _, _ = trained(True)
    buffer = engine.optimizer.grad_partitions_flat_buffer
    assert buffer.any() and buffer.numel() == sum(parameter.ds_numel for parameter in engine.module.parameters())
    with pytest.raises(AssertionError, match="nobody needs"):
        trained(False)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_offloaded_gradient_is_stored_only_between_micro_batches(bf16):
    engine, _, _ = trained(True, micro_batches=1, bf16=bf16, **OFFLOAD)
    assert not engine.optimizer.grad_partitions_flat_buffer.any()
    assert all(flat.grad.any() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    engine, _, _ = trained(True, micro_batches=2, bf16=bf16, **OFFLOAD)
    assert engine.optimizer.grad_partitions_flat_buffer.any()


@pytest.mark.parametrize("size", [0, 1, NORM_BLOCK - 1, NORM_BLOCK + 1, 3 * NORM_BLOCK])
def test_the_norm_is_taken_in_fp64(size):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-20
    assert _norm(grad).dtype == torch.float64
    assert float(_norm(grad)) == pytest.approx(float(grad.double().norm()), rel=1e-12)
    assert not size or _norm(torch.cat([grad, torch.tensor([torch.nan])])).isnan()
