"""What torch does that a reader of its manual would not expect. A test that fails here means that a guard may go.

`docs/libraries.md` lists them all.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

OFFSETS = torch.tensor([2, 4], dtype=torch.int32)
WEIGHT = torch.ones(2, 4, 4)


@pytest.mark.parametrize(
    ("rows", "weight", "reason"),
    [
        (torch.ones(4, 4).double(), WEIGHT.double(), "Double"),
        (torch.ones(4, 3), torch.ones(2, 3, 4), "multiple of 16 bytes"),
        (torch.ones(1, 1).expand(4, 4), WEIGHT, "Invalid strides"),
    ],
    ids=["float64", "rows of 12 bytes", "stride 0"],
)
def test_grouped_mm_refuses(rows, weight, reason):
    """Guards: `_takes` of moe/backends/grouped_mm.py, `grads[0].contiguous()` of moe/backends/base.py and swiglu.py."""
    with pytest.raises(RuntimeError, match=reason):
        F.grouped_mm(rows, weight, offs=OFFSETS)


def test_a_tensor_without_rows_is_contiguous_with_strides_that_grouped_mm_refuses():
    """Guard: `_takes` of moe/backends/grouped_mm.py. Such is the gradient of the sum of no rows."""
    empty = torch.ones(1, 1).expand(3, 8)[:0].contiguous()
    assert empty.stride() == (0, 0)
    with pytest.raises(RuntimeError, match="Invalid strides"):
        F.grouped_mm(empty, torch.ones(2, 8, 8), offs=torch.zeros(2, dtype=torch.int32))


def test_grouped_mm_wants_int32_offsets_and_autocast_passes_it_over():
    """Guards: `GroupedMM.product` of moe/backends/grouped_mm.py, `experts_forward` of models/hf_experts.py."""
    with pytest.raises(RuntimeError, match="int32"):
        F.grouped_mm(torch.ones(4, 4), WEIGHT, offs=OFFSETS.long())
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="same dtype"):
            F.grouped_mm(torch.ones(4, 8), torch.ones(2, 8, 8).bfloat16(), offs=OFFSETS)


def test_the_gradient_of_a_sum_has_stride_0():
    """Guard: `grads[0].contiguous()` of moe/backends/base.py, swiglu.py and moe/permute.py."""
    strides = []

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            strides.append(grad.stride())
            return grad

    Same.apply(torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert strides == [(0, 0)]


def test_embedding_bag_adds_bf16_up_in_fp32_and_rounds_once():
    """Relied on: `Backend.sum_per_token` of moe/backends/base.py."""
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16().expand(3, 8).contiguous()
    assert F.embedding_bag(torch.arange(3), rows, torch.tensor([0]), mode="sum")[0, 0] == 258
    assert (rows[0] + rows[1] + rows[2])[0] == 256


def test_casting_a_module_casts_its_buffers():
    """Guards: `_apply` of `LossFreeBalancing` (moe/loss_free.py) and of `BankedLinear` (tasks/gate/bank.py)."""
    module = nn.Module()
    module.register_buffer("bias", torch.tensor([0.501]))
    assert module.bfloat16().bias.item() == 0.5


def test_adam_counts_in_a_tensor_and_counts_a_shared_one_twice():
    """Guard: `start_adam` of engine/masters.py gives each partition a tensor of its own."""
    parameters, shared = [nn.Parameter(torch.ones(4)) for _ in range(2)], torch.tensor(3.0)
    adam = torch.optim.AdamW([{"params": [one]} for one in parameters], fused=True)
    for one in parameters:
        one.grad = torch.ones(4)
        adam.state[one] = {"step": shared, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    adam.step()
    assert shared == 5


def test_a_schedule_that_steps_before_its_optimizer_is_warned_about():
    """Guard: `_restore_progress` of checkpoint/restore.py, which computes the rate of a resumed step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


def test_a_data_loader_draws_from_the_default_generator_unless_it_is_given_one():
    """Guard: `TrainStream._loader` of data/stream.py gives it one."""
    states = [torch.get_rng_state()]
    for own in (torch.Generator(), None):
        iter(DataLoader([1, 2], generator=own))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_the_processes_of_a_data_loader_are_ended_by_a_private_method():
    """Relied on: `TrainStream.close` of data/stream.py, which does nothing where there is no such method."""
    assert not hasattr(iter(DataLoader([1])), "_shutdown_workers")
    loading = iter(DataLoader([1], num_workers=1))
    loading._shutdown_workers()
    assert not any(worker.is_alive() for worker in loading._workers)


class _Ends:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise SystemExit(1)


def test_a_loading_process_that_ends_is_a_runtime_error_of_the_iterator():
    """Relied on: `TrainStream._steps` of data/stream.py tells it by how the message begins."""
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):
        next(iter(DataLoader(_Ends(), num_workers=1)))


def test_what_is_made_like_a_tensor_on_meta_is_on_meta():
    """Guard: weights/unread.py, whose unread weights are on the CPU."""
    assert torch.zeros_like(torch.empty(2, device="meta")).is_meta


def test_reentrant_checkpointing_goes_back_through_what_is_no_input_once_a_region():
    """Guard: `_gated` of tasks/gate/model.py refuses it."""
    gate, y = torch.ones(1, requires_grad=True) * 2, torch.ones(1, requires_grad=True)
    for _ in range(2):
        y = checkpoint(lambda x: x * gate, y, use_reentrant=True)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_full_backward_hook_fires_before_the_gradients_where_no_input_needs_one():
    """What `freeze` of models/freeze.py and `add_lora` of models/lora.py guard against, below DeepSpeed."""
    order = []
    linear = nn.Linear(2, 2)
    linear.register_full_backward_hook(lambda *_: order.append("hook"))
    linear.weight.register_hook(lambda _: order.append("gradient"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        linear(torch.ones(1, 2)).sum().backward()
    linear(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert order == ["hook", "gradient", "gradient", "hook"]
