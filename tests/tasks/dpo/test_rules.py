"""What a run file of task dpo may not say."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

import ds_moe
from ds_moe.config.check import problems
from ds_moe.config.rules.dpo import reference_of
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.presets import preset_config
from ds_moe.tasks.registry import task_kind

LOSS_FREE = {"balance": [{"kind": "loss_free"}]}
LORA = {"rank": 8}


def run(data=None, moe=None, lora=None, train=None, dense=False, **dpo):
    return RunConfig(
        task="dpo",
        model={"preset": "tiny-vl-moe"},
        data=data or {"train": "pairs.jsonl"},
        moe=None if dense else moe or {},
        lora=lora,
        dpo=dpo,
        train={"steps": 1, **(train or {})},
        deepspeed="none",
    )


def test_the_reference_is_the_base_where_that_is_left():
    assert reference_of(run()) == "stored"
    assert reference_of(run(lora=LORA)) == "base"
    assert reference_of(run(lora={"rank": 8, "train_router": True})) == "stored"
    assert reference_of(run(lora=LORA, moe=LOSS_FREE)) == "stored"
    assert reference_of(run(lora=LORA, reference="stored")) == "stored"
    assert reference_of(run(lora=LORA, loss="simpo")) == "none"


def test_replay_is_refused_for_families_it_has_not_been_held_against():
    for preset, refused in (("tiny-vl-moe", False), ("tiny-qwen3.5-moe", True)):
        config = run(lora=LORA, replay_reference=True)
        with pytest.raises(UserError, match="has not been held against qwen3_5_moe") if refused else nullcontext():
            task_kind(config).train_records(config, preset_config(preset))


GOOD = [
    run(),
    run(lora=LORA, replay_reference=True),
    run(loss="robust", label_smoothing=0.1, reference_dir="x"),
    run(loss="simpo", margin=1.0, label_smoothing=0.1),
]


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_good_runs_are_not_complained_of(number):
    assert problems(GOOD[number]) == []


BAD = {
    "digits": (run(data={"train": "digits"}), "data.train is \"digits\", whose records have one answer"),
    "held-out digits": (run(data={"train": "p.jsonl", "eval": "digits"}), "data.eval is \"digits\""),
    "robust without a share": (run(loss="robust"), "dpo.loss robust with dpo.label_smoothing 0 is dpo"),
    "no base": (run(reference="base"), "but there is no lora section; write stored"),
    "trained routers": (run(reference="base", lora={"rank": 8, "train_router": True}), "lora.train_router trains"),
    "moving biases": (run(reference="base", lora=LORA, moe=LOSS_FREE), "moe.balance loss_free moves"),
    "replay of stored": (run(replay_reference=True), "dpo.replay_reference needs dpo.reference base"),
    "replay, dense": (run(replay_reference=True, dense=True, lora=LORA), "there is no moe section"),
    "replay, capacity": (
        run(replay_reference=True, lora=LORA, moe={"router": {"capacity_factor": 1.0}}),
        "moe.router.capacity_factor routes otherwise in training",
    ),
    "generation": (
        run(data={"train": "p.jsonl", "eval": "q.jsonl"}, train={"eval_generate": True}),
        "train.eval_generate would not be used: task dpo compares",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_runs_are_answered_in_one_line(name):
    config, words = BAD[name]
    found = problems(config)
    assert any(words in line for line in found), found
    assert all("\n" not in line for line in found)


def test_five_files_know_of_it():
    """Beside its folder and the maps of folders: a task is a section, its rules, and a row."""
    root = Path(ds_moe.__file__).parent
    files = (file.relative_to(root).as_posix() for file in root.rglob("*.py") if file.name != "__init__.py")
    outside = (file for file in files if not file.startswith("tasks/dpo/"))
    knowing = [file for file in outside if re.search(r"dpo\b|\bdpo", (root / file).read_text(), re.IGNORECASE)]
    assert sorted(knowing) == [
        "config/check.py",
        "config/rules/dpo.py",
        "config/run.py",
        "config/tasks.py",
        "tasks/registry.py",
    ]
