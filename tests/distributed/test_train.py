"""Whole runs of every kind on two ranks, and what plain transformers makes of their exports."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from ds_moe.checkpoint.files import Reader, newest_complete
from ds_moe.config.run import RunConfig
from ds_moe.data.digits import write_digits
from ds_moe.data.eval_set import EvalSet
from ds_moe.errors import UserError
from ds_moe.export.model import export_checkpoint
from ds_moe.models.families import TRANSPOSED_ON_HUB
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.processor import load_processor
from ds_moe.weights.layouts import hub_layout_problem
from tests.launcher import run_ranks

SHORT = ["train.steps=6", "train.lr=1e-3", "train.warmup_steps=1", "checkpoint.every=null", "train.eval_every=3"]
GENERATE = ["train.max_new_tokens=3"]  # in batches of which one rank's have no image
DENSE = ["model.preset=tiny-vl-dense", "moe=null"]
# name -> overrides of tests/runs/resume.yaml; MIXED and TEXT stand for data files
RUNS = {
    "moe": ["data.train=MIXED", "deepspeed=zero3"],
    "accumulated": [
        "data.train=MIXED",
        "train.micro_batch_size=2",
        "deepspeed={zero_optimization: {stage: 3, reduce_bucket_size: auto}}",
    ],
    "dense": ["data.train=MIXED", *DENSE],
    "text only": ["model.preset=tiny-moe", "data.train=TEXT", "data.eval=TEXT"],
    "bf16": ["data.train=MIXED", "train.precision=bf16"],
    "parts frozen": ["data.train=MIXED", "model.freeze=[vision, router]"],
    "experts frozen": ["data.train=MIXED", "model.freeze=[experts]"],
    "lora, bf16": ["data.train=MIXED", "lora={rank: 8, experts: true}", "train.precision=bf16"],
    "dense lora": ["data.train=MIXED", *DENSE, "lora={rank: 4, targets: [q_proj, up_proj]}", "train.lr=1e-2"],
    "aux loss, ZeRO-2": [
        "data.train=MIXED",
        "moe.balance=[{kind: aux, weight: 0.01}]",
        "deepspeed=ds_configs/zero2.json",
    ],
}
GENERATING = ("moe", "text only", "aux loss, ZeRO-2")
QUICK = ("moe", "accumulated", "dense", "lora, bf16")  # in `make test`


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records with and without images, ordered so that whole micro-batches of a rank have none."""
    folder = tmp_path_factory.mktemp("data")
    train, _ = write_digits(folder)
    pictures = train.read_text().splitlines()[:24]
    words = [
        {"messages": [{"role": "user", "content": f"{n} plus one?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(24)
    ]
    texts = [json.dumps(record) for record in words]
    mixed = [line for at in range(0, 24, 4) for line in [*pictures[at : at + 4], *texts[at : at + 4]]]
    (folder / "mixed.jsonl").write_text("\n".join(mixed))
    (folder / "text.jsonl").write_text("\n".join(texts))
    return {"mixed": str(folder / "mixed.jsonl"), "text": str(folder / "text.jsonl")}


@pytest.fixture(scope="module")
def run_of(files, tmp_path_factory):
    """run_of(name) -> output folder and rank 0's result; the quick runs are one launch, all others another."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def launch(names):
        cases = []
        for name in names:
            data = ["data.eval=MIXED", *RUNS[name], "data.shuffle=false", f"train.output_dir={folder / name}"]
            data = [override.replace("MIXED", files["mixed"]).replace("TEXT", files["text"]) for override in data]
            generate = GENERATE if name in GENERATING else ["train.eval_generate=false"]
            cases.append([name, [*SHORT, *generate, *data], "train"])
            if name == "moe":
                cases.append([name, [*SHORT, *generate, *data], "evaluate"])
        run_ranks("tests/distributed/resume_ranks.py", 2, [json.dumps(cases)])
        for name in names:
            done[name] = folder / name, json.loads((folder / name / "result.json").read_text())

    def run_of(name):
        if name not in done:
            launch([other for other in RUNS if (other in QUICK) == (name in QUICK)])
        return done[name]

    return run_of


def plain_loss(export, data):
    """Held-out loss of an exported folder with plain transformers."""
    config = json.loads((export / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(export).eval()
    run = RunConfig(
        model={"path": str(export)}, data={"train": str(data), "eval": str(data)}, train={"steps": 1}, deepspeed="none"
    )
    total, labels = 0.0, 0
    for batch in EvalSet(run, load_processor(str(export)), rank=0, world_size=1).batches():
        with torch.no_grad():
            total += model(**batch.batch.to(model.device).with_labels, num_items_in_batch=1).loss.item()
        labels += int(batch.batch.label_tokens)
    return total / labels


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_run_trains_and_its_export_is_the_trained_model(run_of, files, tmp_path, name):
    output, result = run_of(name)
    assert math.isfinite(result["loss"]) and result["step"] == 6
    assert bool(result["accuracy"]) == (name in GENERATING)
    data = files["text" if name == "text only" else "mixed"]
    layouts = ["memory"] if name in ("dense", "dense lora", "text only") else ["memory", "hub"]
    for layout in layouts:
        exported = export_checkpoint(output, tmp_path / layout, layout, max_shard_bytes=500_000)
        assert len(exported.files) > 1
        # bf16 rounds activations, and batches of one are padded otherwise than batches of four
        tolerance = 2e-2 if "bf16" in name else 1e-5
        assert plain_loss(tmp_path / layout, data) == pytest.approx(result["eval_loss"], abs=tolerance), layout


def test_an_evaluation_of_its_own_equals_the_last_one_of_the_training(run_of):
    """Bit for bit. Other topologies and forms of the weights: test_evaluate.py, which is slow."""
    output, result = run_of("moe")
    evaluated = json.loads((output / "eval-step_00000006.json").read_text())
    assert evaluated["eval_loss"] == result["eval_loss"] and evaluated["accuracy"] == result["accuracy"]
    assert evaluated["samples"] == len((output / "eval-step_00000006.jsonl").read_text().splitlines())


def test_accumulation_equals_one_batch(run_of):
    """Two micro-batches of 2 a rank against one of 4: the same mean over the global batch's tokens."""
    weights = []
    for name in ("moe", "accumulated"):
        reader = Reader(newest_complete(run_of(name)[0] / "checkpoints"))
        weights.append({key: reader.read(key) for key in reader.tensors if key.startswith("weight/")})
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=2e-5, msg=key)


@pytest.mark.slow
def test_frozen_parts_stay_as_they_were(run_of):
    frozen = {"parts frozen": (".visual.", ".mlp.gate."), "experts frozen": (".experts.",)}
    before = Reader(newest_complete(run_of("moe")[0] / "checkpoints"))
    fresh = build_preset("tiny-vl-moe").state_dict()
    for name, parts in frozen.items():
        reader = Reader(newest_complete(run_of(name)[0] / "checkpoints"))
        assert set(before.tensors) > set(reader.tensors), "a frozen weight has no Adam moments"
        for key in [key for key in reader.tensors if key.startswith("weight/")]:
            same = torch.equal(reader.read(key), fresh[key.removeprefix("weight/")])
            assert same == any(part in key for part in parts), (name, key)


def test_hub_layout_is_transposed_and_refused_where_it_is_ambiguous(run_of, tmp_path):
    output, _ = run_of("moe")
    export_checkpoint(output, tmp_path / "hub", "hub")
    with safe_open(tmp_path / "hub" / "model.safetensors", framework="pt") as file:
        name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
        assert file.get_slice(name).get_shape() == [8, 64, 96]  # (E, H, 2I); in memory (E, 2I, H)
    with pytest.raises(UserError, match="not empty"):
        export_checkpoint(output, tmp_path / "hub")
    with pytest.raises(UserError, match="only qwen3_vl_moe"):
        export_checkpoint(run_of("dense")[0], tmp_path / "dense", "hub")


def test_export_refuses_the_hub_layout_where_a_square_would_be_loaded_wrong():
    config = preset_config("tiny-vl-moe")
    assert hub_layout_problem(config, TRANSPOSED_ON_HUB) is None
    config.text_config.moe_intermediate_size = config.text_config.hidden_size // 2
    assert "twice moe_intermediate_size" in str(hub_layout_problem(config, TRANSPOSED_ON_HUB))
    config.text_config.moe_intermediate_size = config.text_config.hidden_size  # down_proj is the square one
    assert "hidden_size 64 is moe_intermediate_size" in str(hub_layout_problem(config, TRANSPOSED_ON_HUB))


@pytest.mark.slow
def test_a_bad_record_on_one_rank_stops_every_rank_with_its_line(files, tmp_path):
    """The picture is found truncated while it is loaded, by one rank, in the middle of the run."""
    lines = Path(files["mixed"]).read_text().splitlines()
    root = Path(files["mixed"]).parent
    broken = root / "digits" / "truncated.png"
    picture = json.loads(lines[0])["messages"][0]["content"][0]["image"]
    whole = (root / picture).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    lines[16] = lines[0].replace(picture, "digits/truncated.png")
    data = root / "bad.jsonl"
    data.write_text("\n".join(lines))
    arguments = ["tests/runs/resume.yaml", f"data.train={data}", "data.shuffle=false", f"train.output_dir={tmp_path}"]
    run = run_ranks("ds_moe.train", 2, arguments, check=False)
    assert run.returncode != 0
    for rank in range(2):
        assert f"{data}:17" in run.log(rank) and "Traceback" not in run.log(rank), run.log(rank)
