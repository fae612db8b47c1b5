"""`ds-moe eval`: what it measures equals what training reported, from any form of the weights, on any topology."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe.data.digits import write_digits
from tests.launcher import ROOT, run_ranks

pytestmark = pytest.mark.slow  # test_train.py has one evaluation of its own in `make test`
RUN = "tests/runs/resume.yaml"
LAST, BEFORE = "step_00000048", "step_00000024"
ROUNDING = 2e-6  # of a loss between batches of other sizes; summed in another order
TRAIN = [
    "train.steps=48",
    "checkpoint.every=24",
    "train.lr=3e-3",
    "train.warmup_steps=1",
    "train.max_new_tokens=6",
    "moe.balance=[{kind: loss_free}]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """mixed.jsonl: 25 records with and without images, so that whole micro-batches of a rank have none."""
    folder = tmp_path_factory.mktemp("evaluate")
    pictures = write_digits(folder)[0].read_text().splitlines()
    texts = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": str(n + 1)}]})
        for n in range(12)
    ]
    lines = [line for at in range(0, 12, 4) for line in [*pictures[at : at + 4], *texts[at : at + 4]]]
    (folder / "mixed.jsonl").write_text("\n".join([*lines, pictures[12]]))
    return folder


def words(folder: Path, *more: str, name: str = "run") -> list[str]:
    data = [f"data.train={folder / 'mixed.jsonl'}", f"data.eval={folder / 'mixed.jsonl'}"]
    return [*TRAIN, *data, f"train.output_dir={folder / name}", *more]


def launch(world: int, cases: list) -> dict:
    return run_ranks("tests/distributed/evaluate_ranks.py", world, [json.dumps(cases)]).json


def files_of(output: Path) -> dict[Path, tuple[int, int]]:
    """Every file of a run but evaluations, with size and time of its last change."""
    files = [file for file in output.rglob("*") if file.is_file() and not file.name.startswith("eval-")]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


SAME = {"two ranks": [], "as rl": ["task=rl", "data.train=not_read.jsonl"]}
OTHERWISE = {
    "ZeRO-2": ["deepspeed=ds_configs/zero2.json"],
    "EP 1": ["moe.ep_size=1"],
    "ZeRO-1, EP 1": ["deepspeed=ds_configs/zero1.json", "moe.ep_size=1"],
    "batches of three": ["train.eval_batch_size=3"],
}


@pytest.fixture(scope="module")
def run(folder) -> dict:
    """A run on two ranks with EP 2 under ZeRO-3, its export, and evaluations on the same ranks, by name."""
    output, out = folder / "run", folder / "out"
    last = str(output / "checkpoints" / LAST)
    cases = [
        ["trained", "train", words(folder)],
        ["", "export", str(output), str(folder / "exported")],
        ["folder", "eval", words(folder, name="other"), str(output), str(out / "folder.jsonl")],
        ["export", "eval", words(folder, name="other"), str(folder / "exported"), None],
        ["before", "eval", words(folder), str(output / "checkpoints" / BEFORE), str(out / "before.jsonl")],
        ["start", "eval", words(folder), "tiny-vl-moe", str(out / "start.jsonl"), 10],
    ]
    for name, more in {**SAME, **OTHERWISE}.items():
        cases.append([name, "eval", words(folder, *more), last, str(out / f"{name}.jsonl")])
    return launch(2, cases)


def test_an_evaluation_equals_what_training_reported(run, folder):
    """Bit for bit on the same topology: from the run's folder, a checkpoint and the export."""
    trained = run["trained"]
    assert 0 < trained["accuracy"]["mean"] < 1
    for name in ("folder", "export", *SAME):
        assert run[name]["eval_loss"] == trained["eval_loss"], name
        assert run[name]["accuracy"] == trained["accuracy"], name
        assert run[name]["samples"] == 25 and run[name]["bad_records"] == []
    for name in OTHERWISE:
        assert run[name]["eval_loss"] == pytest.approx(trained["eval_loss"], abs=ROUNDING), name
        assert run[name]["accuracy"] == trained["accuracy"], name
    assert run["folder"]["step"] == 48 and run["before"]["step"] == 24
    assert json.loads((folder / "other" / "eval-exported.json").read_text())["eval_loss"] == trained["eval_loss"]


def test_other_weights_are_told_apart(run):
    """Negative control: the step before, and the model before its first step."""
    assert run["before"]["eval_loss"] > run["trained"]["eval_loss"] + 0.1
    assert run["start"]["eval_loss"] > run["before"]["eval_loss"] + 1
    assert run["start"]["samples"] == 10 and "step" not in run["start"]


def test_no_optimizer_is_built(run):
    names = {name: one["engine"]["optimizer"] for name, one in run.items() if name != "trained"}
    sharded = {name for name, optimizer in names.items() if optimizer == "DeepSpeedZeRoOffload"}  # of weights alone
    assert {name for name in names if name not in sharded} == {"ZeRO-2", "ZeRO-1, EP 1"}
    assert all(names[name] == "NoneType" for name in set(names) - sharded)


def check_samples(file: Path, data: Path, result: dict, skipped: tuple[int, ...] = ()) -> None:
    """A line for every sample in the order of the data, whose answers add up to the result."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    records = list(enumerate(map(json.loads, data.read_text().splitlines()), start=1))
    records = [(number, record) for number, record in records if number not in skipped]
    assert [row["where"] for row in rows] == [f"{data}:{number}" for number, _ in records]
    for row, (_, record) in zip(rows, records, strict=True):
        question, answer = record["messages"][0]["content"], record["messages"][1]["content"]
        assert row["question"] == (question if isinstance(question, str) else question[1]["text"])
        assert row["answer"] == answer and row["kind"] == record.get("kind")
        assert row["right"] is (row["prediction"] == answer)
    kinds = {row["kind"] or "all" for row in rows}
    for kind in kinds:
        right = [row["right"] for row in rows if (row["kind"] or "all") == kind]
        assert result["asked"][kind] == len(right) and result["right"][kind] == sum(right)
        assert result["accuracy"][kind] == sum(right) / len(right)
    assert len(kinds) == 4 and sum(row["right"] for row in rows) > 0


def test_every_sample_is_written_in_the_order_of_the_data(run, folder):
    out = folder / "out"
    check_samples(out / "folder.jsonl", folder / "mixed.jsonl", run["folder"])
    assert (out / "folder.jsonl").read_text() == (out / "two ranks.jsonl").read_text()
    assert json.loads((out / "folder.json").read_text()) | {"engine": run["folder"]["engine"]} == run["folder"]
    chosen = [json.loads(line)["where"] for line in (out / "start.jsonl").read_text().splitlines()]
    everything = [json.loads(line)["where"] for line in (out / "folder.jsonl").read_text().splitlines()]
    assert len(chosen) == 10 and chosen == [where for where in everything if where in chosen]
    assert not list(out.glob("*.partial"))


def damage(folder: Path) -> Path:
    """The records, one of which has a picture that does not decode, and one no answer; the others as before."""
    first = json.loads((folder / "mixed.jsonl").read_text().splitlines()[0])
    name = first["messages"][0]["content"][0]["image"]
    whole = (folder / name).read_bytes()
    (folder / "digits" / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = (folder / "mixed.jsonl").read_text().splitlines()
    lines.insert(6, json.dumps(first).replace(name, "digits/cut.png"))
    lines.insert(11, json.dumps({"messages": first["messages"][:1]}))
    (folder / "bad.jsonl").write_text("\n".join(lines))
    return folder / "bad.jsonl"


def test_the_command_evaluates_on_three_ranks_and_leaves_the_run_as_it_was(run, folder):
    """A number of ranks that divides neither the samples nor the batch; bad records are named, and no sample moves."""
    bad, output = damage(folder), folder / "run"
    before = files_of(output)
    more = ["moe.ep_size=1", f"data.eval={bad}", "data.on_bad_record=skip", "train.eval_batch_size=2"]
    command = [Path(sys.executable).with_name("ds-moe"), "eval", RUN, *words(folder, *more), "--nproc", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(output) == before
    result = json.loads((output / f"eval-{LAST}.json").read_text())
    assert result["eval_loss"] == pytest.approx(run["trained"]["eval_loss"], abs=ROUNDING)
    assert result["accuracy"] == run["trained"]["accuracy"] and result["world_size"] == 3
    check_samples(output / f"eval-{LAST}.jsonl", bad, result, skipped=(7, 12))
    assert [record["where"] for record in result["bad_records"]] == [f"{bad}:7", f"{bad}:12"]
    assert all(f"{record['where']}: {record['reason']}" in done.stdout for record in result["bad_records"])
    assert f"{run['trained']['eval_loss']:.4f}" in done.stdout and "evaluated 25/26 samples" in done.stdout


# name -> overrides of a training on two ranks, and how far an export's loss may be from it
VARIANTS = {
    "ZeRO-1, EP 2": (["deepspeed=ds_configs/zero1.json"], 0),
    "ZeRO-2, EP 1": (["deepspeed=ds_configs/zero2.json", "moe.ep_size=1"], 0),
    "ZeRO-3, EP 1": (["moe.ep_size=1"], 0),
    "bf16, ZeRO-3": (["train.precision=bf16"], 0),
    "bf16, ZeRO-2": (["train.precision=bf16", "deepspeed=ds_configs/zero2.json"], 0),
    "offloaded": (["deepspeed=ds_configs/zero3_offload.json"], 0),
    "lora": (["lora={rank: 8, experts: true}"], 1e-5),  # of merged weights
    "dense": (["model.preset=tiny-vl-dense", "moe=null"], 0),
}
SHORT = ["train.steps=4", "checkpoint.every=null"]


@pytest.fixture(scope="module")
def variants(folder) -> dict:
    cases = []
    for name, (more, _) in VARIANTS.items():
        short = words(folder, *SHORT, *more, name=name)
        cases.append([name, "train", short])
        cases.append([f"{name} again", "eval", short, None, None])
        cases.append(["", "export", str(folder / name), str(folder / f"{name} exported")])
        cases.append([f"{name} exported", "eval", short, str(folder / f"{name} exported"), None])
    return launch(2, cases)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_is_evaluated_as_it_was_trained(variants, name):
    trained, again, exported = (variants[f"{name}{form}"] for form in ("", " again", " exported"))
    assert again["eval_loss"] == trained["eval_loss"] and again["accuracy"] == trained["accuracy"]
    assert exported["eval_loss"] == pytest.approx(trained["eval_loss"], abs=VARIANTS[name][1])


@pytest.mark.parametrize("world", [1, 3])
def test_every_kind_of_run_is_evaluated_on_any_number_of_ranks(variants, folder, world, show):
    cases = []
    for name, (more, _) in VARIANTS.items():
        for stage in (1, 3):
            topology = [
                f"deepspeed=ds_configs/zero{stage}.json",
                *(["moe.ep_size=1"] if "moe=null" not in more else []),
            ]
            short = words(folder, *SHORT, *more, *topology, name=name)
            cases.append([f"{name} at {stage}", "eval", short, None, str(folder / f"{world} {stage} {name}.jsonl")])
    found = launch(world, cases)
    lines = []
    for name in VARIANTS:
        for stage in (1, 3):
            drift = abs(found[f"{name} at {stage}"]["eval_loss"] - variants[name]["eval_loss"])
            lines.append(f"  {world} ranks, ZeRO-{stage}, trained on two as {name}: loss within {drift:.1e}")
            assert drift <= (5e-2 if "bf16" in name else ROUNDING), lines[-1]
    show("\n".join(lines))


def test_a_bad_record_ends_the_evaluation_on_every_rank(run, folder):
    lines = damage(folder).read_text().splitlines()
    (folder / "cut.jsonl").write_text("\n".join([*lines[:11], *lines[12:]]))
    out = folder / "never.jsonl"
    arguments = [RUN, *words(folder, f"data.eval={folder / 'cut.jsonl'}"), "--out", str(out)]
    ended = run_ranks("ds_moe.evaluate", 2, arguments, check=False)
    assert ended.returncode != 0 and not out.exists()
    for rank in range(2):
        assert f"{folder / 'cut.jsonl'}:7" in ended.log(rank) and "Traceback" not in ended.log(rank)
