"""Run files: what is read, where each mistake is said to be, and that no key is ever passed over."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from ds_moe.config.check import problems, unused_keys
from ds_moe.config.complaints import Schema
from ds_moe.config.rules.rule import written
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import dump, dump_yaml, load_run, parse_run
from ds_moe.config.sections import Section
from tests.config.run_text import BASE, complaint

RUNS = sorted(Path("ds_configs/runs").glob("*.yaml"))


def test_yaml_then_overrides_then_defaults(run):
    config = load_run(run(), ["train.lr=1e-4", "moe.ep_size=4", "moe.balance=[{kind: aux, weight: 1e-2}]"])
    assert config.model.preset == "tiny-vl-moe" and config.train.steps == 10
    assert config.train.lr == 1e-4 and config.moe and config.moe.ep_size == 4
    assert [(one.kind, one.weight) for one in config.moe.balance] == [("aux", 0.01)]  # type: ignore[union-attr]
    assert config.train.betas == (0.9, 0.95) and config.checkpoint.keep == 2
    assert config.deepspeed == "zero.json"


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1E4", 1e4), ("-1.5e+3", None), (".5", 0.5), ("3", 3.0)])
def test_numbers_are_read_as_a_newcomer_writes_them(run, text, value):
    if value is None:
        assert "train.lr is -1500.0; must be greater than 0" in complaint(run(), f"train.lr={text}")
    else:
        assert load_run(run(), [f"train.lr={text}"]).train.lr == value


def test_an_override_reaches_into_a_list_and_makes_sections(run):
    text = BASE.replace("  ep_size: 2\n", "  ep_size: 2\n  balance:\n  - kind: aux\n    weight: 1\n")
    config = load_run(run(text), ["moe.balance.0.weight=0.5", "checkpoint.keep=3"])
    assert config.moe and config.moe.balance[0].weight == 0.5 and config.checkpoint.keep == 3  # type: ignore[union-attr]


def test_an_empty_section_is_a_section_and_null_takes_one_away(run):
    assert load_run(run(BASE.replace("moe:\n  ep_size: 2\n", "moe:\n"))).moe is not None
    assert load_run(run(), ["moe=null"]).moe is None


MISTAKES = {
    "unknown key": ("  ep_sise: 2", "run.yaml:6: unknown key moe.ep_sise (did you mean moe.ep_size?)"),
    "key of another section": ("  lr: 3", "run.yaml:6: unknown key moe.lr (did you mean train.lr?)"),
    "text for a number": ("  ep_size: two", "run.yaml:6: moe.ep_size is 'two'; must be a valid integer"),
    "quoted number": ("  ep_size: '2'", "run.yaml:6: moe.ep_size is '2'; must be a valid integer"),
    "fraction": ("  ep_size: 1.5", "run.yaml:6: moe.ep_size is 1.5; must be a valid integer"),
    "out of range": ("  ep_size: 0", "run.yaml:6: moe.ep_size is 0; must be greater than 0"),
    "not an option": (
        "  dispatch: {kind: magic}",
        "run.yaml:6: moe.dispatch.kind is 'magic'; must be 'auto', 'local' or 'all_to_all'",
    ),
    "unknown kind": (
        "  balance: [{kind: zen}]",
        "run.yaml:6: moe.balance.0.kind is 'zen'; must be one of 'none', 'aux', 'z_loss', 'loss_free'",
    ),
    "no kind": (
        "  balance: [{weight: 1}]",
        "run.yaml:6: moe.balance.0.kind is None; must be one of 'none', 'aux', 'z_loss', 'loss_free'",
    ),
    "unknown key of a kind": (
        "  balance:\n  - kind: aux\n    wight: 1",
        "run.yaml:8: unknown key moe.balance.0.wight (did you mean moe.balance.0.weight?)",
    ),
    "value for a section": ("  dispatch: 3", "run.yaml:6: moe.dispatch is 3; must be a section with keys kind, chunks"),
    "unknown kind of router": (
        "  router: {kind: zen}",
        "run.yaml:6: moe.router.kind is 'zen'; must be one of "
        "'topk', 'noisy_topk', 'expert_choice', 'hash', 'balanced'",
    ),
    "key of another kind": (
        "  router:\n    kind: hash\n    scores: sigmoid",
        "run.yaml:8: moe.router.scores would not be used: the kind of moe.router has no such key; remove it",
    ),
    "unknown key of the kind that is left out": (
        "  router: {topk: 2}",
        "run.yaml:6: unknown key moe.router.topk (did you mean moe.router.top_k?)",
    ),
    "wrong value of a kind": (
        "  router: {kind: hash, top_k: two}",
        "run.yaml:6: moe.router.top_k is 'two'; must be a valid integer",
    ),
    "duplicate": (
        "  ep_size: 2\n  ep_size: 4",
        "run.yaml:7: duplicate key moe.ep_size (first at run.yaml:6); keep one of them",
    ),
    "broken": ("  ep_size: [1", "run.yaml:7: not valid YAML (expected ',' or ']', but got ':')"),
    "tab": ("\tep_size: 2", "run.yaml:6: not valid YAML (found character '\\t' that cannot start any token)"),
}


@pytest.mark.parametrize("lines, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_line(run, lines, expected):
    assert complaint(run(BASE.replace("  ep_size: 2", lines))) == expected


def test_a_kind_left_out_is_answered_with_those_of_its_own_section():
    class Sun(Section):
        kind: Literal["sun"] = "sun"

    class Rain(Section):
        kind: Literal["rain"] = "rain"

    class Sky(Section):
        weather: list[Annotated[Sun | Rain, Field(discriminator="kind")]]

    with pytest.raises(ValidationError) as raised:
        Sky.model_validate({"weather": [{"kind": "sun"}, {}]})
    [line] = Schema(Sky, "sky").complaints(raised.value, {"weather.1": "sky.yaml:3"}, "sky.yaml")
    assert line == "sky.yaml:3: weather.1.kind is None; must be one of 'sun', 'rain'"


def test_required_keys_are_named(run):
    assert complaint(run(BASE.replace("  train: digits", "  eval: digits"))) == (
        "run.yaml:3: required key data.train is missing from section data"
    )
    assert complaint(run(BASE.replace("deepspeed: zero.json\n", ""))) == "run.yaml: required key deepspeed is missing"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("moe.ep_sise=4", "override moe.ep_sise=4: unknown key moe.ep_sise (did you mean moe.ep_size?)"),
        ("mow.ep_size=4", "override mow.ep_size=4: unknown key mow.ep_size (did you mean moe.ep_size?)"),
        ("lr=1", "override lr=1: unknown key lr (did you mean train.lr?)"),
        ("train.lr=fast", "override train.lr=fast: train.lr is 'fast'; must be a valid number"),
        ("train.lr=.inf", "override train.lr=.inf: train.lr is inf; must be a finite number"),
        ("train.lr", "override train.lr: write it as dotted.key=value, e.g. train.lr=1e-4"),
        ("train..lr=1", "override train..lr=1: write it as dotted.key=value, e.g. train.lr=1e-4"),
        ("train.steps.x=1", "override train.steps.x=1: train.steps is 10, not a section"),
        ("moe={ep_sise: 1}", "override moe={ep_sise: 1}: unknown key moe.ep_sise (did you mean moe.ep_size?)"),
        ("train.betas=[0.9,1]", "override train.betas=[0.9,1]: train.betas.1 is 1; must be less than 1"),
        ("model.freeze=['(']", "override model.freeze=['(']: model.freeze: '(' is no regular expression"),
    ],
)
def test_an_override_is_named_instead_of_a_line(run, override, expected):
    assert complaint(run(), override).startswith(expected)


def test_the_file_itself(run, tmp_path):
    assert complaint("none.yaml") == "none.yaml: cannot read the run file (No such file or directory)"
    assert "a run file is a mapping" in complaint(run("- a\n"))
    assert complaint(run(), "deepspeed=zero9.json") == (
        "override deepspeed=zero9.json: deepspeed is 'zero9.json', which is neither a file beside the run file nor "
        f"below the working directory {tmp_path}"
    )


def test_all_mistakes_are_found_at_once_in_the_order_of_the_file(run):
    text = BASE.replace("  ep_size: 2", "  ep_sise: 2").replace("digits", "7").replace("steps: 10", "steps: 0")
    config, complaints = parse_run(run(text))
    assert config is None
    assert [line.split(":")[1] for line in complaints] == ["4", "6", "8"]


def test_a_key_set_to_null_is_not_set(run):
    assert load_run(run(), ["train.eval_every=null", "data.root=null"]).train.eval_every is None


def test_a_tree_made_without_a_file_is_checked_too():
    config = RunConfig.model_validate(
        {
            "model": {"preset": "x"},
            "data": {"train": "digits", "prefetch_factor": 2},
            "train": {"steps": 1},
            "deepspeed": "z",
        }
    )
    assert written(config, "data.prefetch_factor") and not written(config, "train.lr")
    assert problems(config)[0].startswith("run file: data.prefetch_factor would not be used")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_dumped_tree_reads_back_as_the_same_run(path, tmp_path):
    config = load_run(path, ["train.seed=7"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    reloaded = load_run(again)
    assert dump(reloaded) == dump(config) and reloaded.model_dump() == config.model_dump()
    text = yaml.safe_load(again.read_text())
    assert text["train"]["seed"] == 7 and text["train"]["weight_decay"] is not None


def test_a_dump_holds_every_used_default_and_no_unused_key(run):
    config = load_run(run())
    tree = dump(config)
    expected = {"kind": "topk", "temperature": 1}
    assert tree["moe"]["router"] == expected | {"expert_dropout": 0, "jitter_noise": 0} and tree["train"]["lr"] == 1e-5
    assert {"eval_every", "max_new_tokens"} & set(tree["train"]) == set()
    assert all(key.rpartition(".")[2] not in tree.get(key.partition(".")[0], ()) for key in unused_keys(config))
