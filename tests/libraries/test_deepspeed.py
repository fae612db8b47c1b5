"""What DeepSpeed does that a reader of its manual would not expect. A test that fails here means that a guard may go.

`docs/libraries.md` lists them all. The engines are of one rank, in this process.
"""

import inspect
import warnings

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import constants
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    groups,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    set_z3_leaf_modules,
    z3_leaf_module,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.launcher import free_port, run_ranks

ADAM = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}
UNDER_ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**place, "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, str(value))
        deepspeed.init_distributed("gloo", verbose=False)
        yield
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_linear(monkeypatch):
    """Undo what stage 3 does to this process, see `test_stage_3_replaces_linear_in_the_whole_process`."""
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)


def engine_of(model, parameters=None, schedule=None, **config):
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": 2}, **config}
    # Left to itself an engine takes 2 GiB for a bucket, and then a test that comes later cannot fork this process.
    settings["zero_optimization"] = {"reduce_bucket_size": 2**16} | settings["zero_optimization"]
    parameters = parameters or [one for one in model.parameters() if one.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=settings, lr_scheduler=schedule)[0]


def step(engine, x=None):
    engine.backward(engine(torch.ones(1, 4) if x is None else x).sum())
    engine.step()


class Routed(nn.Module):
    """Its gate is trained, what comes before it is not."""

    def __init__(self):
        super().__init__()
        self.before, self.gate = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.before(x)
        return hidden * self.gate(hidden).sigmoid()


class ExpertLayer(AutoEPMoELayer):
    """The least that DeepSpeed takes for an expert layer."""

    def __init__(self, frozen=False):
        nn.Module.__init__(self)
        self.ep_size, self.ep_group_name, self.num_experts = 1, "ep_size_1", 2
        self.gate, self.weight = nn.Linear(4, 2), nn.Parameter(torch.ones(4, 4), requires_grad=not frozen)
        self.weight.allreduce, self.weight.group_name = False, "ep_size_1"
        self.weight.ds_zero_placement_family = "autoep_expert"
        self.weight.ds_zero_partition_group_name = "ep_size_1"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_=False, folding_group_handles=None):
        if "ep_size_1" not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(1)

    def forward(self, x):
        return x @ self.weight + self.gate(x).sum()


# --- the JSON


def test_what_a_json_leaves_out_clips_gradients_and_takes_gibibytes():
    """Guards: `_shared_values` and `_finish_zero` of config/deepspeed.py, which leave neither value out."""
    parsed = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 2}})
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_config.reduce_bucket_size == parsed.zero_config.allgather_bucket_size == 5e8


def test_an_unknown_key_is_refused_within_a_section_and_passed_over_at_the_root():
    """Guard: `check_keys` of config/deepspeed_json.py."""
    DeepSpeedConfig({"train_batch_size": 1, "gradient_cliping": 0.5})
    with pytest.raises(ValueError, match="reduce_buket_size"):
        DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 2, "reduce_buket_size": 1}})


def test_keys_of_stage_3_are_passed_over_at_stage_2():
    """Guard: `check_keys` of config/deepspeed_json.py."""
    DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}})


def test_fp32_sums_of_bf16_gradients_mean_another_optimizer_at_stage_1(monkeypatch):
    """Guards: `_other_optimizer` of config/deepspeed.py, `_check_invariants` of engine/build.py."""
    sums = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = engine_of(nn.Linear(4, 4), **sums)
    kinds = []
    for stage in (1, 2):
        monkeypatch.setattr(engine, "zero_optimization_stage", lambda stage=stage: stage)
        kinds.append(engine._do_optimizer_sanity_check(engine.optimizer.optimizer))
    assert kinds == [constants.BFLOAT16, ZERO_OPTIMIZATION]
    assert "single_partition_of_fp32_groups" not in inspect.getsource(BF16_Optimizer)


def test_on_a_cpu_its_own_adam_is_compiled_unless_torch_s_is_asked_for():
    """Guard: `_finish_optimizer` of config/deepspeed.py."""
    engine = engine_of(nn.Linear(4, 4))
    chosen = [engine.get_optimizer_configuration({"torch_adam": own}, True)[0] for own in (False, True)]
    assert [one.__module__.partition(".")[0] for one in chosen] == ["deepspeed", "torch"]


@pytest.mark.parametrize(
    ("key", "value"), [("zero_quantized_gradients", True), ("zero_hpz_partition_size", 2)], ids=["quantized", "hpz"]
)
def test_zero_3_with_experts_takes_no_quantized_gradients_and_no_hpz(key, value, monkeypatch):
    """Guard: `ZERO_REFUSED` of config/deepspeed_keys.py."""
    engine = engine_of(ExpertLayer(), zero_optimization={"stage": 3})
    monkeypatch.setattr(engine._config.zero_config, key, value)
    with pytest.raises(AssertionError, match=rf"does not support .*{'quantized' if value is True else 'hpZ'}"):
        engine._validate_zero3_moe_compatibility()


# --- expert layers


def test_expert_layers_are_told_by_inheritance_and_are_no_leaves():
    """Relied on: `BoundMoELayer` of engine/moe_binding.py. Guard: `_leaves` of engine/build.py."""
    engine = engine_of(ExpertLayer(), zero_optimization={"stage": 3})
    assert engine.has_moe_layers and engine.num_experts == [2]
    assert not z3_leaf_module(engine.module)


def test_below_stage_3_experts_must_not_all_be_frozen():
    """Guard: `build_engine` of engine/build.py, and `check_memory` of the doctor, which says it in advance."""
    with pytest.raises(AssertionError, match="MoE"):
        engine_of(ExpertLayer(frozen=True), zero_optimization={"stage": 2})


def test_optimizer_groups_need_a_name_where_there_are_experts():
    """Guard: `parameter_groups` of engine/build.py gives each one."""
    with pytest.raises(KeyError, match="name"):
        split_params_into_different_moe_groups_for_optimizer([{"params": [ExpertLayer().weight]}])


def test_a_leaf_whose_input_needs_no_gradient_is_partitioned_before_its_gradients_arrive():
    """Guards: `freeze` of models/freeze.py, `add_lora` of models/lora.py: embeddings need a gradient."""

    def first_step(x):
        model = nn.Sequential(Routed())
        set_z3_leaf_modules(model, [Routed])
        step(engine_of(model, zero_optimization=UNDER_ZERO_3), x)

    first_step(torch.ones(1, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="size of tensor"):
        first_step(torch.ones(1, 4))


# --- weights and moments


def test_moments_are_linked_to_the_parameters_of_the_first_group_alone():
    """Guard: `link_moments` of engine/masters.py."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    named = [{"params": [one.weight], "name": name} for name, one in (("first", first), ("second", second))]
    engine = engine_of(nn.Sequential(first.requires_grad_(True), second), named)
    for _ in range(2):
        step(engine)
        assert safe_get_full_optimizer_state(first.weight, "exp_avg").any()
        with pytest.raises(ValueError, match="exp_avg not found"):
            safe_get_full_optimizer_state(second.weight, "exp_avg")


def test_setters_of_full_values_read_past_the_end_where_the_ranks_do_not_divide_a_tensor():
    """Guard: `_write_shard` of engine/masters.py. The piece of the second of two ranks, of a tensor of three."""

    class Optimizer:
        _get_fp32_opt_state_partition = staticmethod(lambda *_, **__: (torch.zeros(2), 0))
        _get_param_partition_rank = staticmethod(lambda _: 1)

    parameter = nn.Parameter(torch.zeros(3))
    parameter.ds_numel = 3
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        DeepSpeedZeroOptimizer_Stage3.set_full_hp_param(Optimizer(), torch.ones(3), parameter)


def test_under_zero_3_a_state_dict_is_empty_and_small_parameters_stay_gathered_after_a_step():
    """Guards: `persistent_buffers` of checkpoint/save.py, `_write_shard` of engine/masters.py."""
    engine = engine_of(nn.Linear(4, 4), zero_optimization={"stage": 3})
    weight = engine.module.weight
    assert engine.module.state_dict()["weight"].numel() == weight.numel() == 0
    step(engine)
    assert weight.numel() == weight.ds_numel == 16


def test_in_bf16_parameters_are_cast_and_buffers_are_not():
    """Relied on: `LossFreeBalancing` of moe/loss_free.py keeps its bias in a buffer."""
    model = nn.Linear(4, 4)
    model.register_buffer("bias_E", torch.zeros(3))
    engine = engine_of(model, bf16={"enabled": True})
    assert engine.module.weight.dtype == torch.bfloat16 and engine.module.bias_E.dtype == torch.float32


# --- steps


def test_a_step_that_is_not_taken_holds_the_schedule_back():
    """Guard: `optimizer_step` of training/step.py."""
    engine = engine_of(nn.Linear(4, 4), schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)))
    rates = []
    for value in (1.0, float("nan"), 1.0):
        step(engine, torch.full((1, 4), value))
        rates.append((engine.was_step_applied(), *engine.get_lr()))
    assert rates == [(True, 0.05), (False, 0.05), (True, pytest.approx(0.1 / 3))]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_boundary_set_by_hand_is_what_counts(stage):
    """Relied on: `optimizer_step` of training/step.py, whose steps differ in their number of micro-batches."""
    engine = engine_of(nn.Linear(4, 4), zero_optimization={**UNDER_ZERO_3, "stage": stage})
    for count in (1, 3, 2):
        for number in range(1, count + 1):
            engine.set_gradient_accumulation_boundary(number == count)
            engine.backward(engine(torch.ones(1, 4)).sum() / count, scale_wrt_gas=False)
            gradient = safe_get_full_grad(engine.module.weight) if number == count else None
            engine.step()
        assert gradient is not None and gradient.equal(torch.ones(4, 4))
    assert engine.global_steps == 3


def test_collectives_are_called_by_names_that_torch_warns_about():
    """Guard: `filterwarnings` in `start_distributed` of engine/start.py."""
    engine = engine_of(nn.Linear(4, 4), zero_optimization={"stage": 3})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step(engine)
    assert any(one.category is FutureWarning and "torch.distributed" in str(one.message) for one in warned)


@pytest.mark.slow
def test_the_shared_memory_of_ranks_on_a_cpu_outlives_them():
    """Guard: `_unlink_shared_memory` of engine/start.py, which tests/engine/test_cpu.py tests. Only ranks of its own
    launcher, which says how many are on the host, have such memory."""
    ended = run_ranks("tests/libraries/shared_memory.py", 2, launcher="deepspeed")
    assert all(rank["files"] for rank in ended.json_by_rank)


def test_stage_3_replaces_linear_in_the_whole_process():
    """No guard: a frozen linear then keeps its input for the backward pass, which the memory plan does not count. Tests
    of what a layer keeps must run where no engine of stage 3 was built."""
    x, weight, kept = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3), []

    def keeps() -> bool:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            nn.functional.linear(x, weight)
        return any(one.data_ptr() == x.data_ptr() for one in kept)

    assert not keeps()
    engine_of(nn.Linear(4, 4), zero_optimization={"stage": 3, "memory_efficient_linear": False})
    assert not keeps()
    engine_of(nn.Linear(4, 4), zero_optimization={"stage": 3})
    assert keeps()


def test_its_muon_moves_an_idle_expert_by_full_steps():
    """Guard: `engine/muon.py`, which stands in its place."""
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    torch.manual_seed(0)
    momentum_eRC = torch.zeros(2, 8, 6)
    with torch.compiler.set_stance("force_eager"):
        first = muon_update(torch.randn(2, 8, 6), momentum_eRC, is_expert_group=True)[1].clone()
        for _ in range(150):
            grad_eRC = torch.randn(2, 8, 6)
            grad_eRC[1] = 0
            later = muon_update(grad_eRC, momentum_eRC, is_expert_group=True)[1]
    assert momentum_eRC[1].norm() < 1e-3 and torch.isclose(later.norm(), first.norm(), rtol=0.05)
