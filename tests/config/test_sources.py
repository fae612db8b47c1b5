"""`data.train`, `data.eval` and `data.mixture`: a path, a section or a list of both; each mistake with line and key."""

from pathlib import Path

import pytest
import yaml

from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import dump_yaml, load_run, parse_run
from ds_moe.config.sections import sources_named, sources_of
from ds_moe.config.sources import source_names

HEAD = "model: {preset: tiny-vl-moe}\ndeepspeed: {}\nmoe: {}\ntrain: {steps: 3}\n"


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(YAML of `data`, override, ...) -> (config, complaints)"""
    monkeypatch.chdir(tmp_path)

    def parsed(data, *overrides, head=HEAD):
        Path("run.yaml").write_text(f"{head}data:\n" + "".join(f"  {line}\n" for line in data.splitlines()))
        return parse_run("run.yaml", list(overrides))

    return parsed


LIST = """\
train:
  - a.jsonl
  - path: b/*.parquet
    weight: 2
    columns: {messages: conversations}
eval: {path: c.tar, name: held_out}
mixture: {epoch: longest}
"""


def test_a_path_a_section_and_a_list_are_sources(parse):
    config, complaints = parse(LIST)
    assert complaints == []
    first, second = sources_of(config.data.train)
    assert (first.path, first.weight, second.weight, second.columns) == (
        "a.jsonl",
        None,
        2,
        {"messages": "conversations"},
    )
    assert source_names(config.data.train) == ["a", "b"] and source_names(config.data.eval) == ["held_out"]
    assert sources_named(config.data.train) == "a.jsonl, b/*.parquet"
    assert sources_of("digits")[0].path == "digits" and sources_of(None) == []


def test_what_is_dumped_is_what_was_written(parse):
    config, _ = parse(LIST)
    text = dump_yaml(config)
    assert "null" not in text and yaml.safe_load(text)["data"]["train"][0] == "a.jsonl"
    Path("again.yaml").write_text(text)
    assert dump_yaml(load_run("again.yaml")) == text
    assert RunConfig.model_validate(config.model_dump()).data == config.data


def test_overrides_reach_into_a_list(parse):
    config, complaints = parse(LIST, "data.train.1.weight=5", "data.eval=null")
    assert complaints == [] and sources_of(config.data.train)[1].weight == 5 and config.data.eval is None
    assert parse(LIST, "data.train=digits", "data.mixture=null")[1] != []  # a section is never null
    assert parse("train: [a, b]", "data.train=digits")[0].data.train == "digits"
    assert parse("train: digits\neval:")[0].data.eval is None


# YAML of `data` -> the complaint
WRONG = {
    "train:": "run.yaml:6: data.train is None; must be text (in quotes)",
    "train: 3": "run.yaml:6: data.train is 3; must be text (in quotes)",
    "train: []": "run.yaml:6: data.train is []; list should have at least 1 item after validation, not 0",
    "train: [a, 3]": "run.yaml:6: data.train.1 is 3; must be text (in quotes)",
    "train: [[a]]": "run.yaml:6: data.train.0 is ['a']; must be text (in quotes)",
    "train:\n- path: a\n  wieght: 3": "run.yaml:8: unknown key data.train.0.wieght (did you mean data.train.0.weight?)",
    "train: {path: a, nam: 3}": "run.yaml:6: unknown key data.train.nam (did you mean data.train.name?)",
    "train: {name: a}": "run.yaml:6: required key data.train.path is missing from section data.train",
    "train: [{path: a, weight: -1}, b]": "run.yaml:6: data.train.0.weight is -1; must be greater than 0",
    "train: {path: a, columns: {mesages: x}}": (
        "run.yaml:6: data.train.columns.mesages is 'mesages'; must be 'messages', "
    ),
    "train: [x/a.json, y/a.jsonl]": "run.yaml:6: data.train: 2 sources have the name 'a'; give each a name of its own",
    "train: {path: a, weight: 3}": (
        "run.yaml:6: data.train.weight would not be used: data.train is one source; remove it"
    ),
    "train: [{path: a, weight: 3}, {path: b, epochs: 2}]": (
        "run.yaml:6: data.train: source 0 has a weight and source 1 epochs; say all shares in one of the two"
    ),
    "train: [{path: a, weight: 3}, b]\nmixture: {temperature: 2}": (
        "run.yaml:7: data.mixture.temperature shares by the sizes of the sources, which have weights; remove one of "
        "them"
    ),
    "train: [a, b]\nmixture: {temperature: 0.5}": (
        "run.yaml:7: data.mixture.temperature is 0.5; must be greater than or equal to 1"
    ),
    "train: a\nmixture: {temperature: 2}": (
        "run.yaml:7: data.mixture would not be used: data.train is one source; remove it"
    ),
    "train: [a, b]\nmixture: {epoch: shortest}": (
        "run.yaml:7: data.mixture.epoch would not be used: without a weight or a temperature an epoch is every record "
        "once; remove it"
    ),
    "train: [a, {path: b, epochs: 2}]\nmixture: {epoch: shortest}": (
        "run.yaml:7: data.mixture.epoch would not be used: an epoch has as many records as `epochs` of the sources "
        "say; remove it"
    ),
    "train: a\neval: [{path: b, weight: 3}]": "run.yaml:7: unknown key data.eval.0.weight (",
    "train: [{path: a, revision: x}, b]": (
        "run.yaml:6: data.train.0.revision would not be used: 'a' is no dataset of the hub (hub:OWNER/NAME); remove it"
    ),
    "train: {path: digits, root: x}": (
        'run.yaml:6: data.train.root would not be used: the path is "digits", which reads no files; remove it'
    ),
    "train: [{path: a, name: mean}, b]": (
        "run.yaml:6: data.train: a source has the name mean, that of an evaluation's own row; give it another name"
    ),
    "train: a\ninterleave_probs: [1]": (
        "run.yaml:7: unknown key data.interleave_probs (write a weight for each source of data.train)"
    ),
}


@pytest.mark.parametrize("data", WRONG)
def test_mistakes_are_one_line(parse, data):
    _, [complaint] = parse(data)
    assert complaint.startswith(WRONG[data])


def test_what_tasks_cannot_read_is_said_before_the_data_are_opened(parse):
    head = HEAD.replace("moe: {}\n", "")
    rl, dpo = "task: rl\n", "task: dpo\ndpo: {reference: stored}\nlora: {}\n"
    for task, data, says in (
        (rl, "train: [a, b]", "run.yaml:6: data.train: task rl without rl.engine reads one rollout file, whose groups"),
        (rl, "train: {path: a, epochs: 2}", "run.yaml:6: data.train: task rl without rl.engine reads one rollout file"),
        (
            dpo,
            "train: [{path: a, weight: 2}, b]",
            "run.yaml:8: data.train: log-probs of a stored reference are computed",
        ),
        (dpo, "train: [digits, b]", 'run.yaml:8: data.train is "digits", whose records have one answer'),
    ):
        _, complaints = parse(data, head=task + head.replace("model: {preset: tiny-vl-moe}", "model: {path: x}"))
        assert any(one.startswith(says) for one in complaints), complaints
