"""What a run refuses to go on from, the doctor refuses in the same words before: all that is wrong, at once."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ds_moe.doctor.report import diagnose
from ds_moe.models.families import family_of
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor, tiny_processor
from tests.launcher import run_ranks

pytestmark = pytest.mark.slow
RUN = "tests/runs/resume.yaml"
BASE = ["moe.ep_size=1", "train.steps=2", "train.warmup_steps=1", "train.micro_batch_size=8", "model.freeze=[vision]"]
BASE += ["data.max_length=64", "checkpoint.every=1"]
FIRST, LAST = "step_00000001", "step_00000002"
CHANGES = ["train.lr=2e-4", "train.steps=3", "deepspeed=FOLDER/zero.json", "train.micro_batch_size=4"]
CHANGES += ["moe.balance=[{kind: aux, weight: 0.01}]", "monitor.log_every=2", "data.num_workers=1"]
CHANGED = [
    "train.steps 2 -> 3",
    "train.micro_batch_size 8 -> 4",
    "train.lr 0.0001 -> 0.0002",
    "moe.balance.0.kind not set -> aux",
    "moe.balance.0.weight not set -> 0.01",
    "moe.balance.0.scope not set -> micro_batch",
    "moe.balance.0.normalize_by_k not set -> false",
    "deepspeed.zero_optimization.reduce_bucket_size auto -> 1000000",
]
# name -> (overrides, with OUTPUT of the run and the FOLDER around it; what is refused, one pattern a line)
CASES = {
    "nothing": ([], []),
    "only what may change": (CHANGES, []),
    "never": (["train.resume=never"], [rf"train.resume=never, but .* holds {LAST}: choose another"]),
    "no folder": (["train.resume=FOLDER/none"], [r"train.resume is '.*/none'; must be auto, never or a checkpoint"]),
    "no checkpoint": (["train.resume=FOLDER"], [r"no usable checkpoint among"]),
    "an earlier one": (
        [f"train.resume=OUTPUT/checkpoints/{FIRST}"],
        [rf"train.resume=.*{FIRST}, but .* holds {LAST}: choose another"],
    ),
    "seed, batch and order": (
        ["train.seed=3", "train.global_batch_size=16", "data.shuffle=false", "data.length_grouping=false"],
        [
            "train.seed was 0 in the checkpoint and is 3 now",
            "train.global_batch_size was 8 in the checkpoint and is 16 now",
            "data.shuffle was True",
            "data.length_grouping was True",
        ],
    ),
    "other data": (["data.train=FOLDER/data.jsonl"], ["data.train sha256 was", "data.train records was 4311"]),
    "what was frozen": (
        ["model.freeze=[]"],
        [r"holds no Adam moments of model\.visual\..* and \d+ more, frozen there"],
    ),
    "less frozen, other batch": (
        ["model.freeze=[]", "train.global_batch_size=16"],
        ["holds no Adam moments", "train.global_batch_size was 8"],
    ),
    "a dense model": (["model.preset=tiny-vl-dense", "moe=null"], ["does not fit this model: missing .*mlp.down_proj"]),
    "more experts": (
        ["model.preset=null", "model.path=FOLDER/wide"],
        [r"does not fit this model: .*experts.* is \[8, .* there and \[9, .* here"],
    ),
    "a bias": (["moe.balance=[{kind: loss_free}]"], [r"missing \['buffer/.*bias_E'"]),
    "noise": (["moe.router.kind=noisy_topk"], [r"missing \['weight/.*noise_weight'"]),
    "lora": (
        ["lora.rank=8", "lora.experts=true"],
        [r"missing \['weight/.*lora", r"trained upon another model .*: None there, \{'preset': 'tiny-vl-moe'"],
    ),
    "another task": (["task=rl", "data.train=FOLDER/rollouts.jsonl"], [r"is of another task \(sft -> rl\): choose"]),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, dict[str, object], str]:
    """(folder, what the run said in each case: the step it goes on from, or its refusal; the log)."""
    folder = tmp_path_factory.mktemp("refusals")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(8)))
    rollout = {"tokens": [5, 6, 7], "completion_mask": [0, 1, 1], "logprobs": [-1.0, -1.0], "advantage": 1.0}
    (folder / "rollouts.jsonl").write_text("\n".join(json.dumps(rollout) for _ in range(8)))
    wide = preset_config("tiny-vl-moe")
    wide.text_config.num_experts = 9
    family_of(wide).model_class._from_config(wide).save_pretrained(folder / "wide")
    save_processor(tiny_processor("vl"), folder / "wide")
    (folder / "run.yaml").write_text((Path(RUN)).read_text().replace("../../", f"{Path.cwd()}/"))
    zero = json.loads(Path("ds_configs/zero3.json").read_text())
    zero["zero_optimization"]["reduce_bucket_size"] = 10**6
    (folder / "zero.json").write_text(json.dumps(zero))
    cases = {name: overrides(folder, name) for name in CASES}
    first = [*BASE, f"train.output_dir={folder / 'run'}"]
    what = json.dumps({"run": str(folder / "run.yaml"), "first": first, "cases": cases})
    run = run_ranks("tests/distributed/refusals_ranks.py", 1, [what])
    return folder, run.json, run.output


def overrides(folder: Path, name: str) -> list[str]:
    own = [text.replace("OUTPUT", f"{folder}/run").replace("FOLDER", str(folder)) for text in CASES[name][0]]
    unfrozen = any(text.startswith("lora.") for text in own)  # which refuses model.freeze
    base = [text for text in BASE if not (unfrozen and text.startswith("model.freeze"))]
    return [*base, f"train.output_dir={folder / 'run'}", *own]


def doctors(folder: Path, name: str, *more: str) -> list:
    return list(diagnose(folder / "run.yaml", [*overrides(folder, name), *more], world_size=1, samples=1))


@pytest.mark.parametrize("name", CASES)
def test_run_and_doctor_refuse_in_the_same_words(told, name):
    folder, said, _ = told
    refused = CASES[name][1]
    lines = said[name].splitlines() if isinstance(said[name], str) else []
    assert len(lines) == len(refused), said[name]
    assert all(re.search(pattern, line) for pattern, line in zip(refused, lines, strict=True)), said[name]
    found = doctors(folder, name)
    errors = [finding.text for finding in found if finding.level == "error"]
    assert [error.partition(": ")[2] for error in errors] == lines
    resumed = [finding for finding in found if finding.text.startswith("resume: from")]
    assert len(resumed) == (not refused)
    if resumed:
        assert resumed[0].text.endswith(f"{LAST} at step 2 (saved by 1 ranks with ep_size 1)") and said[name] == 2


def test_changed_keys_are_listed_and_bookkeeping_is_not(told):
    folder, _, log = told
    [resumed] = [one for one in doctors(folder, "only what may change") if one.text.startswith("resume: from")]
    assert sorted(resumed.details) == sorted(f"changed since the checkpoint: {line}" for line in CHANGED)
    before, _, after = log.partition("case only what may change")
    assert "changed since" not in before  # nothing has, in the case "nothing"
    assert all(f"changed since the checkpoint: {line}" in after for line in CHANGED)


def test_damage_that_sizes_show_is_named_and_an_older_one_taken(told, tmp_path):
    folder, _, _ = told
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "checkpoints")
    there = f"train.output_dir={tmp_path}"
    (tmp_path / "checkpoints" / LAST / "state.json").unlink()
    found = doctors(folder, "nothing", there)
    [warning] = [one.text for one in found if one.level == "warning" and "checkpoint" in one.text]
    assert warning.endswith(f"{LAST} cannot be used: state.json is missing")
    assert any(f"{FIRST} at step 1" in finding.text for finding in found)
    os.truncate(tmp_path / "checkpoints" / FIRST / "rank-00000.safetensors", 100)
    [error] = [one for one in doctors(folder, "nothing", there) if one.level == "error"]
    assert f"no usable checkpoint among ['{LAST}', '{FIRST}']" in error.text and len(error.details) == 2


def test_a_run_file_of_another_version_is_no_refusal(told, tmp_path):
    folder, _, _ = told
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / LAST
    run = yaml.safe_load((checkpoint / "run.yaml").read_text())
    run["train"]["an_old_key"] = 1
    old = yaml.safe_dump(run)
    (checkpoint / "run.yaml").write_text(old)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["run.yaml"]["size"] = len(old)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    [resumed] = [
        one for one in doctors(folder, "nothing", f"train.output_dir={tmp_path}") if "resume: from" in one.text
    ]
    [line] = resumed.details
    assert line.startswith("the run file was not compared with the checkpoint's: ") and "an_old_key" in line


def test_a_job_whose_ranks_ep_size_does_not_divide_is_told_what_would(tmp_path):
    """Before anything is distributed; 3 divides the 6 ranks, but not the 8 experts."""
    script = tmp_path / "rank.py"
    script.write_text('import os\nfrom ds_moe import train\nos.environ["WORLD_SIZE"] = "6"\ntrain.leave(train.main())')
    run = run_ranks(script, 1, [RUN, "moe.ep_size=4", "train.global_batch_size=24"], check=False)
    last = run.log(0).splitlines()[-1]
    assert "rank 0 ended with 2;" in run.output
    assert last == "error: moe.ep_size 4 does not divide the 6 ranks (1, 2 do, and the model's 8 experts)"
