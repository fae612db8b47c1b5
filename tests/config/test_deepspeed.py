"""DeepSpeed's JSON: "auto" is filled, contradictions name both files, and what is left out is as DeepSpeed has it."""

import json
from pathlib import Path

import pytest

from ds_moe.config.deepspeed import deepspeed_problems, resolve_deepspeed, summed_in_bf16, zero_plan
from ds_moe.config.deepspeed_json import json_text
from ds_moe.config.deepspeed_keys import ZERO_KEYS, ZERO_REFUSED
from ds_moe.config.divisors import accumulation_steps
from ds_moe.config.run_file import dump_yaml, load_run, write_run
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.errors import UserError
from tests.config.deepspeed_run import SHIPPED, complaint

SHIPPED_NAMES = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
def test_shipped_files_resolve_with_nothing_left_to_guess(with_json, path, on_cpu):
    resolved = resolve_deepspeed(with_json(path.read_text()), 4, on_cpu, hidden_size=4096)
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


def test_what_a_json_says_of_overlap_and_timers_stays(with_json):
    said = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "timers": {"throughput": {"enabled": True}}}
    resolved = resolve_deepspeed(with_json(said), 4, False, hidden_size=64)
    assert resolved["zero_optimization"]["overlap_comm"] is False and resolved["timers"] == said["timers"]
    assert not zero_plan(resolved).overlaps
    del said["zero_optimization"]["overlap_comm"]
    assert zero_plan(resolve_deepspeed(with_json(said), 4, False, hidden_size=64)).overlaps


def test_a_shipped_json_is_named_without_its_path(with_json):
    assert list(SHIPPED_NAMES) == [path.stem for path in SHIPPED]
    for path in SHIPPED:
        config = with_json(path.read_text())
        named = load_run("run.yaml", [f"deepspeed={path.stem}"])
        assert named.deepspeed == path.stem and json_text(named) == path.read_text()
        assert resolve_deepspeed(named, 4, False, 64) == resolve_deepspeed(config, 4, False, 64)


def test_a_name_goes_before_a_file_and_a_path_reaches_the_file(with_json):
    config = with_json({"zero_optimization": {"stage": 1}})
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
def test_what_is_neither_a_name_nor_a_file_is_answered_with_the_names(with_json, given, end):
    with_json({})
    with pytest.raises(UserError) as raised:
        load_run("run.yaml", [f"deepspeed={given}"])
    text = "which is neither a file beside the run file nor below the working directory"
    assert str(raised.value) == f"override deepspeed={given}: deepspeed is {given!r}, {text} {Path.cwd()}{end}"


def test_a_section_says_what_a_file_would(with_json, with_section):
    values = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"}
    config = with_section(values)
    assert resolve_deepspeed(config, 2, True, 64) == resolve_deepspeed(with_json(values), 2, True, 64)
    assert zero_plan(resolve_deepspeed(with_section(values, "deepspeed.zero_optimization.stage=1"), 2, True)).stage == 1
    Path("copy.yaml").write_text(dump_yaml(config))
    assert load_run("copy.yaml").model_dump() == config.model_dump()


def test_a_conflict_with_a_section_names_both_lines(with_section):
    message = complaint(with_section({"gradient_clipping": 0.5}))
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
def test_what_yaml_has_and_json_has_not_is_refused(with_section, override, says):
    lines = deepspeed_problems(with_section({}, override), 2, on_cpu=True)[1]
    assert lines[0].startswith(f"override {override}: deepspeed: {says}")


@pytest.mark.parametrize("value", ["3", "[zero3]", "null", "true"])
def test_what_is_neither_text_nor_a_section_is_one_complaint(with_json, value):
    with_json({})
    with pytest.raises(UserError) as raised:
        load_run("run.yaml", [f"deepspeed={value}"])
    [line] = str(raised.value).splitlines()
    assert line.endswith("; must be text (in quotes) or a section with the keys of a DeepSpeed JSON")


def test_a_checkpoint_keeps_what_the_run_had_whichever_way_it_was_written(
    with_json, with_section, tmp_path, monkeypatch
):
    values = {"zero_optimization": {"stage": 2}}
    configs = [with_section(values), with_json(values), load_run("run.yaml", ["deepspeed=zero2"])]
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


def test_deepspeed_accepts_what_is_resolved(with_json):
    from deepspeed.runtime.config import DeepSpeedConfig

    for path in SHIPPED:
        parsed = DeepSpeedConfig(
            resolve_deepspeed(with_json(path.read_text(), "moe.ep_size=1"), 1, False, hidden_size=64)
        )
        assert parsed.gradient_clipping == 1.0 and parsed.gradient_accumulation_steps == 8


def test_our_list_of_zero_keys_is_deepspeeds(with_json):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZERO_KEYS) | set(ZERO_REFUSED) <= fields


def test_an_empty_file_needs_only_a_stage(with_json):
    resolved = resolve_deepspeed(with_json({}), 2, on_cpu=False)
    assert resolved["train_batch_size"] == 32 and resolved["optimizer"]["type"] == "AdamW"


def test_no_clipping_means_none(with_json):
    assert resolve_deepspeed(with_json({}, "train.max_grad_norm=0"), 2, on_cpu=True)["gradient_clipping"] == 0


def test_buckets_follow_the_model_unless_given(with_json):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    wide = resolve_deepspeed(with_json({"zero_optimization": zero}), 2, True, hidden_size=8192)["zero_optimization"]
    assert wide["reduce_bucket_size"] == 8192**2 and wide["stage3_param_persistence_threshold"] == 81920
    unknown = resolve_deepspeed(with_json({"zero_optimization": zero}), 2, True)["zero_optimization"]
    assert unknown["reduce_bucket_size"] == 2**24 and "stage3_param_persistence_threshold" not in unknown
    given = {"stage": 3, "reduce_bucket_size": 5}
    assert (
        resolve_deepspeed(with_json({"zero_optimization": given}), 2, True)["zero_optimization"]["reduce_bucket_size"]
        == 5
    )


def test_the_plan_says_what_the_json_says_and_else_what_deepspeed_does(with_json):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    plain = zero_plan(resolve_deepspeed(with_json({}), 2, on_cpu=True))
    assert plain == ZeroPlan(stage=3) and plain.width == 4
    assert (plain.reduce_bucket, plain.sub_group) == (theirs["reduce_bucket_size"], theirs["sub_group_size"])
    assert (plain.reuse_distance, plain.max_live) == (theirs["max_reuse_distance"], theirs["max_live_parameters"])
    assert zero_plan({}).stage == theirs["stage"] == 0
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    sizes = {"reduce_bucket_size": 5, "sub_group_size": 6, "stage3_max_reuse_distance": 7}
    given = {"zero_optimization": {**zero, **sizes, "stage3_max_live_parameters": 8}}
    read = zero_plan(resolve_deepspeed(with_json(given), 2, on_cpu=False))
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
def test_a_conflict_names_both_files_and_keys(with_json, key):
    value, ours = CONFLICTS[key]
    nested = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    message = complaint(with_json(nested))
    line = 5 + len(key.split(".")) - 1  # after the four lines of zero_optimization
    assert message == (
        f'zero.json:{line}: {key} is {json.dumps(value)}, but {ours}; write "auto" in the JSON or make them agree'
    )


def test_equal_values_are_no_conflict(with_json):
    same = {"train_batch_size": 32, "gradient_clipping": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.003}}}
    assert resolve_deepspeed(with_json(same), 2, on_cpu=True)["train_batch_size"] == 32


def test_packing_decides_how_many_micro_batches_a_step_has(with_json):
    def packed(keys, **train):
        config = with_json(keys)
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


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_micro_batches_are_summed_in_fp32_where_the_json_leaves_it_to_the_run(
    with_json, stage, precision, accumulation
):
    values = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "auto"}}
    size = f"train.global_batch_size={8 * accumulation}"
    config = with_json(values, f"train.precision={precision}", size)
    resolved = resolve_deepspeed(config, 2, on_cpu=True)
    sums = precision == "bf16" and accumulation > 1 and stage > 1
    assert resolved["data_types"] == ({"grad_accum_dtype": "fp32"} if sums else {})
    assert zero_plan(resolved).fp32_sums is sums
    warned = precision == "bf16" and accumulation > 1 and stage == 1
    assert (summed_in_bf16(config, zero_plan(resolved), 2) is not None) is warned


def test_a_json_that_sums_in_bf16_is_warned_about(with_json):
    config = with_json({}, "train.precision=bf16")
    warning = summed_in_bf16(config, zero_plan(resolve_deepspeed(config, 2, on_cpu=True)), 2)
    assert "the gradients of 4 micro-batches are summed in bf16" in warning and "grad_accum_dtype" in warning


@pytest.mark.parametrize("name", SHIPPED_NAMES[:3])
def test_shipped_files_serve_muon(with_json, name):
    text = next(path for path in SHIPPED if path.stem == name).read_text()
    params = resolve_deepspeed(with_json(text, "train.optimizer=muon"), 2, on_cpu=True)["optimizer"]["params"]
    assert params == {"lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def test_fp32_optimizer_states_may_be_written(with_json):
    params = {"fp32_optimizer_states": True}
    resolved = resolve_deepspeed(with_json({"optimizer": {"type": "AdamW", "params": params}}), 2, on_cpu=True)
    assert resolved["optimizer"]["params"]["fp32_optimizer_states"] is True


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
def test_a_broken_json_names_its_line(with_json, text, expected):
    assert complaint(with_json(text)).startswith(expected)


def test_batch_arithmetic(with_json):
    assert accumulation_steps(with_json({}), 2) == 4
    assert accumulation_steps(with_json({}), 8) == 1
    assert complaint(with_json({}, "train.global_batch_size=36", "train.micro_batch_size=8")) == (
        "override train.global_batch_size=36: train.global_batch_size 36 is not a multiple of micro_batch_size 8 x 2 "
        "ranks = 16; global_batch_size 32 or 48 would work, or micro_batch_size 9"
    )
    assert "global_batch_size 40 would work" in complaint(with_json({}, "moe.ep_size=1"), world_size=10)


def test_ep_size_must_divide_the_ranks(with_json):
    message = complaint(with_json({}, "train.global_batch_size=36", "moe.ep_size=2"), world_size=9)
    assert message == "override moe.ep_size=2: moe.ep_size 2 does not divide the 9 ranks (1, 3, 9 do)"
