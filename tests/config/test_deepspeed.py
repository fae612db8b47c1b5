"""DeepSpeed's JSON: "auto" is filled, contradictions name both files, what ds_moe cannot train with is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ds_moe.config.deepspeed import deepspeed_problems, resolve_deepspeed, summed_in_bf16, zero_plan
from ds_moe.config.deepspeed_json import json_text
from ds_moe.config.deepspeed_keys import ADAM_KEYS, FILLED, PASSED_ON, REFUSED, ZERO_KEYS, ZERO_REFUSED
from ds_moe.config.divisors import accumulation_steps
from ds_moe.config.run_file import dump_yaml, load_run, write_run
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.errors import UserError

SHIPPED_NAMES = ("zero1", "zero2", "zero3", "zero3_offload")
SHIPPED = sorted(Path("ds_configs").resolve().glob("*.json"))
BASE = """\
model: {preset: tiny-vl-moe}
data: {train: digits}
moe: {ep_size: 2}
train:
  steps: 10
  micro_batch_size: 4
  global_batch_size: 32
  lr: 3e-3
  weight_decay: 0.1
deepspeed: zero.json
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(json, *overrides)` is a config whose zero.json holds `json` (text, or values with ZeRO stage 3 added)."""
    monkeypatch.chdir(tmp_path)

    def make(values: dict | str, *overrides: str):
        if isinstance(values, dict):
            values = json.dumps({"zero_optimization": {"stage": 3}, **values}, indent=2)
        Path("zero.json").write_text(values)
        Path("run.yaml").write_text(BASE)
        return load_run("run.yaml", list(overrides))

    return make


def complaint(config, world_size: int = 2) -> str:
    with pytest.raises(UserError) as raised:
        resolve_deepspeed(config, world_size, on_cpu=True)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
def test_shipped_files_resolve_with_nothing_left_to_guess(run, path, on_cpu):
    resolved = resolve_deepspeed(run(path.read_text()), 4, on_cpu, hidden_size=4096)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 32
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["bf16"]["enabled"] is not on_cpu
    params = resolved["optimizer"]["params"]
    assert resolved["optimizer"]["type"] == "AdamW"
    assert {key: params[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 3e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    assert params.get("torch_adam", False) is params.get("fused", False) is ("offload" not in path.stem)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 4096**2
    assert resolved["timers"]["throughput"]["enabled"] is False
    assert (resolved["zero_optimization"].get("overlap_comm") is True) == (path.stem == "zero2" and not on_cpu)


def test_what_a_json_says_of_overlap_and_timers_stays(run):
    said = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "timers": {"throughput": {"enabled": True}}}
    resolved = resolve_deepspeed(run(said), 4, False, hidden_size=64)
    assert resolved["zero_optimization"]["overlap_comm"] is False and resolved["timers"] == said["timers"]
    assert not zero_plan(resolved).overlaps
    del said["zero_optimization"]["overlap_comm"]
    assert zero_plan(resolve_deepspeed(run(said), 4, False, hidden_size=64)).overlaps


def test_a_shipped_json_is_named_without_its_path(run):
    assert list(SHIPPED_NAMES) == [path.stem for path in SHIPPED]
    for path in SHIPPED:
        config = run(path.read_text())
        named = load_run("run.yaml", [f"deepspeed={path.stem}"])
        assert named.deepspeed == path.stem and json_text(named) == path.read_text()
        assert resolve_deepspeed(named, 4, False, 64) == resolve_deepspeed(config, 4, False, 64)


def test_a_name_goes_before_a_file_and_a_path_reaches_the_file(run):
    config = run({"zero_optimization": {"stage": 1}})
    Path("zero.json").rename("zero3")
    assert zero_plan(resolve_deepspeed(load_run("run.yaml", ["deepspeed=zero3"]), 2, True)).stage == 3
    config = load_run("run.yaml", ["deepspeed=./zero3"])
    assert zero_plan(resolve_deepspeed(config, 2, True)).stage == 1 and json_text(config) == Path("zero3").read_text()


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("zero4", ", nor one of the names zero1, zero2, zero3, zero3_offload"),
        ("ds_configs/zero3.json", "; did you mean zero3, which ds_moe ships?"),
        ("zero2.json", "; did you mean zero2, which ds_moe ships?"),
        ("other/ds.json", ""),
    ],
)
def test_what_is_neither_a_name_nor_a_file_is_answered_with_the_names(run, given, end):
    run({})
    with pytest.raises(UserError) as raised:
        load_run("run.yaml", [f"deepspeed={given}"])
    text = "which is neither a file beside the run file nor below the working directory"
    assert str(raised.value) == f"override deepspeed={given}: deepspeed is {given!r}, {text} {Path.cwd()}{end}"


@pytest.fixture
def inline(run):
    """`inline(values, *overrides)`: a config with these values in a section `deepspeed` of run.yaml, from line 10."""

    def make(values: dict, *overrides: str):
        run({})
        section = {"deepspeed": {"zero_optimization": {"stage": 3}, **values}}
        Path("run.yaml").write_text(BASE.replace("deepspeed: zero.json\n", yaml.safe_dump(section, sort_keys=False)))
        return load_run("run.yaml", list(overrides))

    return make


def test_a_section_says_what_a_file_would(run, inline):
    values = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"}
    config = inline(values)
    assert resolve_deepspeed(config, 2, True, 64) == resolve_deepspeed(run(values), 2, True, 64)
    assert zero_plan(resolve_deepspeed(inline(values, "deepspeed.zero_optimization.stage=1"), 2, True)).stage == 1
    Path("copy.yaml").write_text(dump_yaml(config))
    assert load_run("copy.yaml").model_dump() == config.model_dump()


def test_a_conflict_with_a_section_names_both_lines(inline):
    message = complaint(inline({"gradient_clipping": 0.5}))
    theirs = "run.yaml:13: deepspeed: gradient_clipping is 0.5, but run.yaml:4 train.max_grad_norm is 1.0 by default"
    assert message == f'{theirs}; write "auto" in that section or make them agree'


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("deepspeed.gradient_clipping=2026-11-30", "gradient_clipping is datetime.date(2026, 11, 30); must be text"),
        ("deepspeed.wandb={project: !!binary aGk=}", "wandb.project is b'hi'; must be text (in quotes), a number"),
        ("deepspeed.optimizer={params: {betas: [0.9, .inf]}}", "optimizer.params.betas.1 is inf; must be finite"),
    ],
)
def test_what_yaml_has_and_json_has_not_is_refused(inline, override, says):
    lines = deepspeed_problems(inline({}, override), 2, on_cpu=True)[1]
    assert lines[0].startswith(f"override {override}: deepspeed: {says}")


@pytest.mark.parametrize("value", ["3", "[zero3]", "null", "true"])
def test_what_is_neither_text_nor_a_section_is_one_complaint(run, value):
    run({})
    with pytest.raises(UserError) as raised:
        load_run("run.yaml", [f"deepspeed={value}"])
    [line] = str(raised.value).splitlines()
    assert line.endswith("; must be text (in quotes) or a section with the keys of a DeepSpeed JSON")


def test_a_checkpoint_keeps_what_the_run_had_whichever_way_it_was_written(run, inline, tmp_path, monkeypatch):
    values = {"zero_optimization": {"stage": 2}}
    configs = [inline(values), run(values), load_run("run.yaml", ["deepspeed=zero2"])]
    resolved = [resolve_deepspeed(config, 2, True, 64) for config in configs]
    for number, config in enumerate(configs):
        folder = tmp_path / f"step_{number}"
        folder.mkdir()
        write_run(config, folder)
    monkeypatch.chdir("/")  # found again from any working directory
    for number, config in enumerate(configs):
        kept = load_run(tmp_path / f"step_{number}/run.yaml")
        assert kept.model_dump(exclude={"deepspeed"}) == config.model_dump(exclude={"deepspeed"})
        assert resolve_deepspeed(kept, 2, True, 64) == resolved[number]


def test_deepspeed_accepts_what_is_resolved(run):
    from deepspeed.runtime.config import DeepSpeedConfig

    for path in SHIPPED:
        parsed = DeepSpeedConfig(resolve_deepspeed(run(path.read_text(), "moe.ep_size=1"), 1, False, hidden_size=64))
        assert parsed.gradient_clipping == 1.0 and parsed.gradient_accumulation_steps == 8


def test_our_list_of_zero_keys_is_deepspeeds(run):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZERO_KEYS) | set(ZERO_REFUSED) <= fields


def test_an_empty_file_needs_only_a_stage(run):
    resolved = resolve_deepspeed(run({}), 2, on_cpu=False)
    assert resolved["train_batch_size"] == 32 and resolved["optimizer"]["type"] == "AdamW"


def test_no_clipping_means_none(run):
    assert resolve_deepspeed(run({}, "train.max_grad_norm=0"), 2, on_cpu=True)["gradient_clipping"] == 0


def test_buckets_follow_the_model_unless_given(run):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    wide = resolve_deepspeed(run({"zero_optimization": zero}), 2, True, hidden_size=8192)["zero_optimization"]
    assert wide["reduce_bucket_size"] == 8192**2 and wide["stage3_param_persistence_threshold"] == 81920
    unknown = resolve_deepspeed(run({"zero_optimization": zero}), 2, True)["zero_optimization"]
    assert unknown["reduce_bucket_size"] == 2**24 and "stage3_param_persistence_threshold" not in unknown
    given = {"stage": 3, "reduce_bucket_size": 5}
    assert resolve_deepspeed(run({"zero_optimization": given}), 2, True)["zero_optimization"]["reduce_bucket_size"] == 5


def test_the_plan_says_what_the_json_says_and_else_what_deepspeed_does(run):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    plain = zero_plan(resolve_deepspeed(run({}), 2, on_cpu=True))
    assert plain == ZeroPlan(stage=3) and plain.width == 4
    assert (plain.reduce_bucket, plain.sub_group) == (theirs["reduce_bucket_size"], theirs["sub_group_size"])
    assert (plain.reuse_distance, plain.max_live) == (theirs["max_reuse_distance"], theirs["max_live_parameters"])
    assert zero_plan({}).stage == theirs["stage"] == 0
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    sizes = {"reduce_bucket_size": 5, "sub_group_size": 6, "stage3_max_reuse_distance": 7}
    given = {"zero_optimization": {**zero, **sizes, "stage3_max_live_parameters": 8}}
    read = zero_plan(resolve_deepspeed(run(given), 2, on_cpu=False))
    assert read == ZeroPlan(3, True, False, 5, 6, 7, 8, bf16=True) and read.width == 2


CONFLICTS = {
    "train_micro_batch_size_per_gpu": (8, "run.yaml:6 train.micro_batch_size is 4"),
    "train_batch_size": (64, "run.yaml:7 train.global_batch_size is 32"),
    "gradient_accumulation_steps": (1, "run.yaml:7 train.global_batch_size works out to 4"),
    "gradient_clipping": (0.5, "run.yaml:4 train.max_grad_norm is 1.0 by default"),
    "bf16.enabled": (True, "run.yaml:4 train.precision is 'fp32' by default"),
    "optimizer.params.lr": (0.001, "run.yaml:8 train.lr is 0.003"),
    "optimizer.params.betas": ([0.9, 0.999], "run.yaml:4 train.betas is [0.9, 0.95] by default"),
    "optimizer.params.weight_decay": (0.0, "run.yaml:9 train.weight_decay is 0.1"),
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_a_conflict_names_both_files_and_keys(run, key):
    value, ours = CONFLICTS[key]
    nested = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    message = complaint(run(nested))
    line = 5 + len(key.split(".")) - 1  # after the four lines of zero_optimization
    assert message == (
        f'zero.json:{line}: {key} is {json.dumps(value)}, but {ours}; write "auto" in the JSON or make them agree'
    )


def test_equal_values_are_no_conflict(run):
    same = {"train_batch_size": 32, "gradient_clipping": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.003}}}
    assert resolve_deepspeed(run(same), 2, on_cpu=True)["train_batch_size"] == 32


def test_packing_decides_how_many_micro_batches_a_step_has(run):
    def packed(keys, **train):
        config = run(keys)
        data = config.data.model_copy(update={"packing": True})
        train = config.train.model_copy(update={"global_batch_size": 7, **train})  # no multiple of anything
        return config.model_copy(update={"data": data, "train": train})

    resolved = resolve_deepspeed(packed({}), 4, on_cpu=True)
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [resolved[key] for key in batches] == [4, 1, 1]  # what DeepSpeed must be told, and makes no use of
    assert accumulation_steps(packed({}), 4) is None
    auto = resolve_deepspeed(packed({"gradient_accumulation_steps": "auto"}), 4, on_cpu=True)
    assert auto["gradient_accumulation_steps"] == 1
    assert complaint(packed({"gradient_accumulation_steps": 2})) == (
        "zero.json:5: gradient_accumulation_steps is 2, but under data.packing a step has as many micro-batches as its "
        'tokens need; write "auto" in the JSON'
    )
    sums = {"data_types": {"grad_accum_dtype": "auto"}}
    bf16 = resolve_deepspeed(packed(sums, precision="bf16"), 2, on_cpu=False)
    assert bf16["data_types"]["grad_accum_dtype"] == "fp32"  # a step may have several rows


REFUSALS = {
    "unknown key": (
        {"gradient_cliping": 1},
        "zero.json:5: unknown key gradient_cliping (did you mean gradient_clipping?)",
    ),
    "unknown zero key": (
        {"zero_optimization": {"stage": 3, "reduce_bucket": 1}},
        "unknown key zero_optimization.reduce_bucket (did you mean reduce_bucket_size?)",
    ),
    "unknown optimizer key": (
        {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}},
        "unknown key optimizer.params.learning_rate",
    ),
    "expert_parallel": (
        {"expert_parallel": {"enabled": True}},
        "expert_parallel is not supported: ds_moe installs its own",
    ),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported: the learning rate follows train."),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled is True; ds_moe trains in bf16 or fp32"),
    "DeepSpeed's Muon": (
        {"optimizer": {"type": "Muon"}},
        "optimizer.type is 'Muon': DeepSpeed's takes an expert's gate and up rows for one matrix and clips finished "
        "updates; write train.optimizer: muon in the run file, and 'AdamW' here, which trains the rest",
    ),
    "optimizer": ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'; must be 'AdamW' or 'Adam'"),
    "no stage": ({"zero_optimization": {}}, "zero_optimization.stage is None; must be 1, 2 or 3"),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; must be 1, 2 or 3"),
    "stage-3 key at stage 2": (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}},
        "stage3_max_live_parameters would not be used: it needs stage 3, this is 2",
    ),
    "hpZ": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "zero_hpz_partition_size is not supported",
    ),
    "leaf_module": (
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["A"]}}},
        "zero.json:4: zero_optimization.leaf_module is not supported: ds_moe marks its layers itself",
    ),
    "optimizer on NVMe": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/ssd"}}},
        'zero.json:5: zero_optimization.offload_optimizer.device "nvme" is not supported: offload to NVMe was not',
    ),
    "parameters on NVMe": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        'zero.json:5: zero_optimization.offload_param.device "nvme" is not supported',
    ),
    "moments in bf16": (
        {"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": False}}},
        "zero.json:8: optimizer.params.fp32_optimizer_states false is not supported: checkpoints hold Adam's moments",
    ),
    "masters in bf16": (
        {"bf16": {"bf16_master_weights_and_grads": True}},
        "zero.json:6: bf16.bf16_master_weights_and_grads true is not supported",
    ),
    "bare bf16": ({"bf16": True}, "bf16 is True; must be an object"),
}


@pytest.mark.parametrize("values, expected", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_trained_with_is_refused(run, inline, values, expected):
    assert expected in complaint(run(values))
    message = complaint(inline(values))
    place, named, text = message.partition(": deepspeed: ")
    assert re.fullmatch(r"run\.yaml:1\d", place) and named and re.sub(r"zero\.json:\d+: ", "", expected) in text


@pytest.mark.parametrize("name", ["fp32", "float32", "torch.float32"])
def test_fp32_accumulation_is_refused_where_deepspeed_takes_another_optimizer_for_it(run, name):
    def problems(stage: int, precision: str = "bf16", **zero_options) -> list[str]:
        values = {"zero_optimization": {"stage": stage, **zero_options}, "data_types": {"grad_accum_dtype": name}}
        return deepspeed_problems(run(values, f"train.precision={precision}"), 2, on_cpu=True)[1]

    [line] = problems(stage=1)
    assert line.startswith(
        f"zero.json:6: data_types.grad_accum_dtype '{name}' is not supported with bf16 at ZeRO stage"
    )
    assert problems(2) == problems(3) == problems(1, "fp32") == []
    assert problems(1, offload_optimizer={"device": "cpu"}) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_micro_batches_are_summed_in_fp32_where_the_json_leaves_it_to_the_run(run, stage, precision, accumulation):
    values = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "auto"}}
    size = f"train.global_batch_size={8 * accumulation}"
    config = run(values, f"train.precision={precision}", size)
    resolved = resolve_deepspeed(config, 2, on_cpu=True)
    sums = precision == "bf16" and accumulation > 1 and stage > 1
    assert resolved["data_types"] == ({"grad_accum_dtype": "fp32"} if sums else {})
    assert zero_plan(resolved).fp32_sums is sums
    warned = precision == "bf16" and accumulation > 1 and stage == 1
    assert (summed_in_bf16(config, zero_plan(resolved), 2) is not None) is warned


def test_a_json_that_sums_in_bf16_is_warned_about(run):
    config = run({}, "train.precision=bf16")
    warning = summed_in_bf16(config, zero_plan(resolve_deepspeed(config, 2, on_cpu=True)), 2)
    assert "the gradients of 4 micro-batches are summed in bf16" in warning and "grad_accum_dtype" in warning


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"optimizer": {"params": {"torch_adam": True}}},
            "zero.json:7: optimizer.params.torch_adam would not be used: override train.optimizer=muon train.optimizer "
            "is muon, whose AdamW is torch's; remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero.json:4: zero_optimization.offload_optimizer is not supported: override train.optimizer=muon "
            "train.optimizer is muon, whose step multiplies matrices, which would be slow on the host; remove one",
        ),
    ],
)
def test_what_muon_cannot_have_beside_it(run, values, expected):
    assert expected in complaint(run(values, "train.optimizer=muon"))


@pytest.mark.parametrize("name", SHIPPED_NAMES[:3])
def test_shipped_files_serve_muon(run, name):
    text = next(path for path in SHIPPED if path.stem == name).read_text()
    params = resolve_deepspeed(run(text, "train.optimizer=muon"), 2, on_cpu=True)["optimizer"]["params"]
    assert params == {"lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def test_fp32_optimizer_states_may_be_written(run):
    params = {"fp32_optimizer_states": True}
    resolved = resolve_deepspeed(run({"optimizer": {"type": "AdamW", "params": params}}), 2, on_cpu=True)
    assert resolved["optimizer"]["params"]["fp32_optimizer_states"] is True


# What other trainers' files hold, at the values that switch it off.
SWITCHED_OFF = {
    "quantized weights": {"zero_optimization": {"stage": 3, "zero_quantized_weights": False}},
    "quantized gradients": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": False}},
    "hpZ over one rank": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}},
    "no leaf modules": {"zero_optimization": {"stage": 3, "leaf_module": {}}},
    "elastic checkpoint": {"zero_optimization": {"stage": 3, "elastic_checkpoint": False}},
    "the gradient norm": {"zero_optimization": {"stage": 3, "compute_grad_norm": True}},
    "no round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": False}},
    "no granularity": {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0}},
    "gathered 16-bit saves": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    "no gathered saves, stage 2": {
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": False}
    },
    "no ZenFlow": {"zero_optimization": {"stage": 3, "zenflow": None}},
    "no SuperOffload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": False}}
    },
    "parameters offloaded nowhere": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "none", "pin_memory": True}}
    },
    "the same at stage 2": {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
    "offloaded to null": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": None}}},
    "prescaling": {"prescale_gradients": False},
    "predivision by 1": {"gradient_predivide_factor": 1.0},
    "mean of gradients": {"gradient_allreduce_op": "mean"},
    "amp": {"amp": {"enabled": False, "opt_level": "O1"}},
    "torch autocast": {"torch_autocast": {"enabled": False}},
    "no scheduler": {"scheduler": None},
    "tensorboard": {"tensorboard": {"enabled": False, "output_path": "runs"}},
    "activation checkpointing": {
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False}
    },
    "sequence parallel of one": {"sequence_parallel_size": 1},
    "data efficiency": {"data_efficiency": {"enabled": False}},
    "hybrid engine": {"hybrid_engine": {"enabled": False}},
    "compile": {"compile": False},
    "drop last": {"dataloader_drop_last": False},
    "fp16 by the run": {"fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}},
}


@pytest.mark.parametrize("values", SWITCHED_OFF.values(), ids=SWITCHED_OFF)
def test_what_is_switched_off_passes_and_does_not_reach_deepspeed(run, values):
    resolved = resolve_deepspeed(run({**values}), 2, on_cpu=True)
    left_out = set(REFUSED) | set(ZERO_REFUSED) | {"stage3_gather_16bit_weights_on_model_save", "fp16"}
    assert not left_out & {*resolved, *resolved["zero_optimization"]}
    assert zero_plan(resolved).offload_param is False


SWITCHED_ON = {
    "quantized weights": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_quantized_weights",
    ),
    "hpZ over zero ranks": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}},
        "zero_hpz_partition_size",
    ),
    "round robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients is not supported: DeepSpeed then finds the fp32 weights of other parameters",
    ),
    "granularity": (
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 3000}},
        "stage3_module_granularity_threshold is not supported: it regroups the modules",
    ),
    "ZenFlow": ({"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow takes neither experts"),
    "SuperOffload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "SuperOffload takes neither experts",
    ),
    "prescaling, as a number": ({"prescale_gradients": 0}, "prescale_gradients is not supported"),
    "predivision": ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is not supported"),
    "sum of gradients": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is not supported"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported"),
    "partitioned activations": (
        {"activation_checkpointing": {"partition_activations": True}},
        "activation_checkpointing is not supported",
    ),
    "the gradient norm": ({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, "compute_grad_norm"),
}


@pytest.mark.parametrize("values, expected", SWITCHED_ON.values(), ids=SWITCHED_ON)
def test_what_is_switched_on_is_refused_still(run, values, expected):
    assert expected in complaint(run(values))


def test_all_complaints_are_said_at_once(run):
    values = {"scheduler": {"type": "WarmupLR"}, "amp": {"enabled": True}, "train_batch_size": 7}
    with pytest.raises(UserError) as raised:
        resolve_deepspeed(run(values), 2, on_cpu=True)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[1].split(" is ")[0] for line in lines] == ["scheduler", "amp", "train_batch_size"]


def test_fp16_switched_off_is_fine(run):
    assert "fp16" not in resolve_deepspeed(run({"fp16": {"enabled": False}}), 2, on_cpu=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{\n "a": 1,\n}', "zero.json:3: not valid JSON"),
        ("[1]", "zero.json: a DeepSpeed JSON is an object, this is a list"),
        (
            '{\n\t"steps_per_print": 1,\n\t"steps_per_print": 2\n}',
            "zero.json:3: duplicate key steps_per_print (first at zero.json:2)",
        ),
    ],
)
def test_a_broken_json_names_its_line(run, text, expected):
    assert complaint(run(text)).startswith(expected)


def test_batch_arithmetic(run):
    assert accumulation_steps(run({}), 2) == 4
    assert accumulation_steps(run({}), 8) == 1
    assert complaint(run({}, "train.global_batch_size=36", "train.micro_batch_size=8")) == (
        "override train.global_batch_size=36: train.global_batch_size 36 is not a multiple of micro_batch_size 8 x 2 "
        "ranks = 16; global_batch_size 32 or 48 would work, or micro_batch_size 9"
    )
    assert "global_batch_size 40 would work" in complaint(run({}, "moe.ep_size=1"), world_size=10)


def test_ep_size_must_divide_the_ranks(run):
    message = complaint(run({}, "train.global_batch_size=36", "moe.ep_size=2"), world_size=9)
    assert message == "override moe.ep_size=2: moe.ep_size 2 does not divide the 9 ranks (1, 3, 9 do)"


def test_lists_of_keys_do_not_overlap():
    assert not set(FILLED + PASSED_ON) & set(REFUSED) and not set(ZERO_KEYS) & set(ZERO_REFUSED)
    assert len(set(ADAM_KEYS)) == len(ADAM_KEYS)
