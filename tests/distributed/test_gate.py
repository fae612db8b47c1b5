"""The gate over ranks: three stages in a row, parity with plain PyTorch, saved and resumed, and its commands.

Text-only records stand among the screens so that, in every micro-step, one rank has images and the other has none.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import peft
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.checkpoint.files import newest_complete
from ds_moe.cli import main
from ds_moe.config.run_file import load_run
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import load_processor
from ds_moe.tasks.gate.commands import load_gated
from ds_moe.tasks.gate.files import start_gate
from ds_moe.tasks.gate.model import install_gate
from ds_moe.tasks.gate.records import Routed
from tests.distributed.gate_data import HELD_OUT, PROJECTIONS, make, screens, write_adapter
from tests.distributed.gate_ranks import FEW, KL, NAMES, PARITY, RUN
from tests.distributed.test_resume import LAST, bit_equal, checkpoints, differences, position, start_from, tensors
from tests.launcher import Ranks, run_ranks, start_ranks

LOSS, GRADIENT = 1e-6, 5e-6  # fp32 sums in another order
FAMILIES = ("read", "act")
BASELINES = {"text only", "vision only"}
ROUTER = {f"adapter_gate.{name}" for name in ("no_image", "out.weight", "out.bias", "text_in.weight", "text_in.bias")}
ROUTER |= {"adapter_gate.vision_in.weight"}
ROUTER |= {f"adapter_gate.{side}_norm.{kind}" for side in ("text", "vision") for kind in ("weight", "bias")}
SCALES = {f"adapter_gate.{side}_scale.{kind}" for side in ("text", "vision") for kind in ("mean", "std")}
GENERATE = "train.max_new_tokens=3"
JOINT = ["gate.stage=joint", "gate.select=hard", "gate.adapter_lr=1e-3", "gate.entropy_weight=0.01"]
JOINT += [f"gate.kl_weight={KL}", "train.gradient_checkpointing=true", "checkpoint.every=8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/, adapters/<name>/ and the data files, see gate_data.py."""
    folder = tmp_path_factory.mktemp("gate")
    make(folder)
    return folder


def overrides(made: Path, output: str | Path, *more: str) -> list[str]:
    """Of tests/runs/gate.yaml; `output` is a folder beside base/, or any."""
    data = [f"data.train={made / 'data/mixed-train.jsonl'}", f"data.eval={made / 'data/mixed-held_out.jsonl'}"]
    places = [f"model.path={made / 'base'}", f"gate.adapters_in={made / 'adapters'}"]
    return [*places, *data, f"train.output_dir={made / output}", *more]


def over_experts(made: Path, output: str | Path, *more: str, kind: str = "moe") -> list[str]:
    """As `overrides`, of a base with experts: "moe" or "qwen3.5"."""
    places = [f"model.path={made / kind} base", f"gate.adapters_in={made / kind} adapters"]
    return [*overrides(made, output), *places, *more]


def launch(world_size: int, cases: list) -> Ranks:
    return run_ranks("tests/distributed/gate_ranks.py", world_size, [json.dumps(cases)])


def start(made: Path, run: str) -> str:
    return f"gate.start={made / run}"


@pytest.fixture(scope="module")
def supervised(made) -> tuple[Path, Ranks]:
    """What two ranks do anew in `make test`: (folder, the launch)."""
    short = ["train.steps=6", "gate.class_weights=balanced"]
    few = [
        ["supervised", overrides(made, "supervised", "train.steps=8"), "train"],
        ["padded", overrides(made, "padded", *short), "train"],
        ["packed", overrides(made, "packed", *short), "train packed"],
        ["parity", overrides(made, "none", start(made, "supervised")), "parity of a few"],
        ["one hot", over_experts(made, "none"), "one hot, checkpointed"],
        ["Qwen3.5, one hot", over_experts(made, "none", kind="qwen3.5"), "one hot, all at once"],
    ]
    return made, launch(2, few)


@pytest.fixture(scope="module")
def trained(supervised) -> tuple[Path, Ranks]:
    """All else that two ranks do anew, in the same folder."""
    made, _ = supervised
    zero1, zero2 = "deepspeed=ds_configs/zero1.json", "deepspeed=ds_configs/zero2.json"
    joint, learnable = [start(made, "end_to_end"), *JOINT], made / "data/learnable.jsonl"
    soft = [*joint, "gate.select=soft", "train.steps=6"]  # with select hard, ranks draw apart
    answers = [f"gate.kl_weight={KL}", "gate.entropy_weight=0.05", GENERATE, "train.steps=8"]
    cases = [
        [
            "end_to_end",
            overrides(made, "end_to_end", start(made, "supervised"), "gate.stage=end_to_end", *answers),
            "train",
        ],
        ["joint", overrides(made, "joint", *joint, GENERATE), "train"],
        ["joint, padded", overrides(made, "joint-padded", *soft), "train"],
        ["joint, packed", overrides(made, "joint-packed", *soft), "train packed"],
        ["joint, ZeRO 2", overrides(made, "joint-2", *joint, GENERATE, zero2, "train.steps=8"), "train"],
        ["collapsed", overrides(made, "collapsed", "gate.text=first", "gate.modalities=text", zero1), "train"],
        ["patience", overrides(made, "patience", *patience(made)), "train"],
        [
            "learnable",
            overrides(made, "learnable", f"data.train={learnable}", f"data.eval={learnable}", "train.steps=40"),
            "train",
        ],
        ["parity", overrides(made, "none", start(made, "supervised")), "parity"],
    ]
    return made, launch(2, cases)


def patience(made: Path) -> list[str]:
    return [f"data.eval={made / 'data/wrong-held_out.jsonl'}", "train.eval_every=2", "train.patience=2"]


def same_run(results: dict, padded: str, packed: str) -> None:
    """Both have taken the same steps over the same samples: losses, held-out losses, and what the gate reports."""
    theirs, ours = results[padded], results[packed]
    assert ours["step"] == theirs["step"] == 6 and ours["gate"].keys() == theirs["gate"].keys()
    for found, expected in ((ours, theirs), (ours["gate"], theirs["gate"])):
        for name in {"loss", "eval_loss", "entropy", "routing_accuracy", "kl_to_supervised"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_run_in_packed_rows_is_that_in_padded_rows(supervised):
    same_run(supervised[1].json, "padded", "packed")


@pytest.mark.slow
def test_gate_and_adapters_learn_alike_in_packed_rows(trained):
    same_run(trained[1].json, "joint, padded", "joint, packed")


def test_one_rank_has_images_where_the_other_has_none(made):
    config = load_run(RUN, overrides(made, "none"))
    record_kind, processor = Routed(NAMES, labelled=True), load_processor(made / "base")
    ranks = [
        iter(TrainStream(config, processor, rank=rank, world_size=2, record_kind=record_kind)) for rank in range(2)
    ]
    for _ in range(4):
        for one, other in zip(*map(next, ranks), strict=True):
            assert ("pixel_values" in one.inputs) != ("pixel_values" in other.inputs)


def test_parity_with_one_plain_process(supervised, show):
    check_parity(supervised[1].json["parity"], len(FEW), show)


@pytest.mark.slow
def test_parity_of_every_stage_with_one_plain_process(trained, show):
    check_parity(trained[1].json["parity"], len(PARITY), show)


def check_parity(found, rows, show):
    lines = ["a gate, 2 ranks (one has images, the other none) against one plain process on the joined batch"]
    lines.append(
        "  stage       ZeRO  text        checkpointing  rows     loss difference   gradient difference / largest"
    )
    for stage, zero, text, checkpointing, packed, loss, gradient, _ in found["rows"]:
        on, laid = "on" if checkpointing else "off", "packed" if packed else "padded"
        lines.append(f"  {stage:<10}  {zero:>4}  {text:<10}  {on:>13}  {laid}   {loss:15.1e}   {gradient:19.1e}")
    show("\n".join(lines))
    assert len(found["rows"]) == 2 * rows and len(found["broken"]) == 3
    for row in found["rows"]:
        assert row[-3] <= LOSS and row[-2] <= GRADIENT and row[-1] == 0, row
    for breakage, (loss, gradient, _) in found["broken"].items():  # negative controls
        assert loss > LOSS and gradient > GRADIENT, breakage


def test_over_experts_one_hot_is_that_adapter_under_peft(supervised, show):
    check_one_hot(supervised[1].json["one hot"], 1, show)


def test_one_hot_is_that_adapter_inside_of_blocks_with_experts(supervised, show):
    check_one_hot(supervised[1].json["Qwen3.5, one hot"], 1, show, layouts=1, controls=False)


def check_one_hot(found, rows, show, layouts=2, controls=True):
    lines = ["one adapter over experts, frozen and sharded (ZeRO 3), against plain PEFT on plain transformers"]
    lines.append("  EP  text        checkpointing  rows     loss difference   gradient difference / largest")
    for ep_size, text, checkpointing, packed, loss, gradient, _ in found["rows"]:
        on, laid = "on" if checkpointing else "off", "packed" if packed else "padded"
        lines.append(f"  {ep_size:>2}  {text:<10}  {on:>13}  {laid}   {loss:15.1e}   {gradient:19.1e}")
    show("\n".join(lines))
    assert len(found["rows"]) == layouts * rows
    for row in found["rows"]:  # each real token is counted once at each layer of experts
        assert row[-3] <= LOSS and row[-2] <= GRADIENT and row[-1] == 0, row
    if controls:
        broken = found["broken"]
        for breakage in ("scale", "another adapter"):
            assert broken[breakage][0] > 10 * LOSS and broken[breakage][1] > 10 * GRADIENT, breakage
        assert broken["counted twice"][2] > 0


@pytest.mark.slow
def test_the_stages_follow_one_another(supervised, trained):
    made, run = trained
    first, end_to_end, joint = supervised[1].json["supervised"], run.json["end_to_end"], run.json["joint"]
    assert "kl_to_supervised" not in first["gate"]
    assert 0 < end_to_end["gate"]["kl_to_supervised"] and 0 < joint["gate"]["kl_to_supervised"]
    assert joint["gate"]["entropy"] == 0  # one adapter a sample
    kinds = {"text-read", "text-act", *(f"{screen}-{family}" for screen in screens.SCREENS for family in FAMILIES)}
    for result in (first, end_to_end, joint, run.json["joint, ZeRO 2"]):
        assert result["eval_loss"] > 0 and result["accuracy"].keys() == {*kinds, "mean"}
    # Each began where the one before it had ended: a gate that began anew would differ by far more.
    before = tensors(checkpoints(made / "supervised") / "step_00000008")
    after = tensors(checkpoints(made / "end_to_end") / "step_00000008")
    moved = {key: (after[key] - before[key]).abs().max() for key in before if key.startswith("weight/")}
    assert 0 < max(moved.values()) < 8 * 1e-2


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(trained):
    made, _ = trained
    for name in ("supervised", "end_to_end"):
        assert kept(checkpoints(made / name) / "step_00000008") == ROUTER
    outline = build_preset("tiny-vl-dense")
    install_gate(outline, load_run(RUN, overrides(made, "none")).gate)
    banked = {f"{layer}.lora_{side}" for layer in outline.adapter_bank.layers for side in "AB"}
    assert len(banked) == 2 * 2 * 6  # halves x layers x (q, k, v, o, down, up)
    for name, step in {"joint": LAST, "joint-2": "step_00000008"}.items():
        assert kept(checkpoints(made / name) / step) == ROUTER | banked


def kept(checkpoint: Path) -> set[str]:
    """Names of the parameters of which a checkpoint holds the weight and both moments; else it may hold SCALES only."""
    names: dict[str, set[str]] = {}
    for key in tensors(checkpoint):
        kind, _, name = key.partition("/")
        names.setdefault(kind, set()).add(name)
    assert names.pop("buffer") == SCALES
    assert names.keys() == {"weight", "exp_avg", "exp_avg_sq"} and len(set(map(frozenset, names.values()))) == 1
    return names["weight"]


@pytest.mark.slow
def test_a_supervised_gate_learns_from_text_and_screen_together(trained):
    """Two texts, two pictures, an adapter for each pair: either of them alone leaves one half to chance."""
    assert trained[1].json["learnable"]["accuracy"]["mean"] > 0.9


@pytest.mark.slow
def test_patience_keeps_the_best_evaluation(trained):
    made, run = trained
    result = json.loads((made / "patience/result.json").read_text())
    assert result == run.json["patience"]
    best = newest_complete(checkpoints(made / "patience"))
    assert best is not None and str(best) == result["checkpoint"] and best.name == f"step_{result['step']:08d}"
    ended = result["step"] + 2 * 2
    assert f"step {ended}: 2 evaluations without a better one" in run.output and ended < 24
    gated = load_gated(RUN, overrides(made, "patience", *patience(made)), None)
    again = gated.survey(str(gated.config.data.eval), Routed(NAMES, labelled=True))
    assert abs(again.loss - result["eval_loss"]) < LOSS


@pytest.fixture(scope="module")
def resumed(trained) -> tuple[Path, Ranks]:
    """A run that is killed, through the deepspeed launcher, and everything that two ranks then go on with."""
    made, _ = trained
    joint = [start(made, "end_to_end"), *JOINT, "data.eval=null"]  # an evaluation must change nothing
    run = start_ranks("ds_moe.train", 2, [RUN, *overrides(made, "killed", *joint)], launcher="deepspeed")
    run.wait_for("checkpoint ")
    run.kill()
    run.wait()
    first = newest_complete(checkpoints(made / "killed"))
    assert first is not None and first.name != LAST, "the run had ended before it was killed"
    cases = [["killed", overrides(made, "killed", *joint), "train"]]
    source = checkpoints(made / "joint") / "step_00000016"
    for lost in ("data position", "random state"):
        cases.append([lost, overrides(made, start_from(made, source, lost), *joint), f"forget {lost}"])
    for zero in (1, 2):
        output = start_from(made, source, f"ZeRO {zero}")
        more = [*joint, f"deepspeed=ds_configs/zero{zero}.json"]
        cases.append([output.name, overrides(made, output, *more), "load and save"])
    source = newest_complete(checkpoints(made / "patience"))
    for name, mode in {"patience again": "train", "best loss": "forget best loss"}.items():
        output = start_from(made, source, name)
        cases.append([name, overrides(made, output, *patience(made)), mode])
    return made, launch(2, cases)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(resumed):
    made, run = resumed
    assert "resumed from" in run.output
    ours, theirs = checkpoints(made / "killed") / LAST, checkpoints(made / "joint") / LAST
    assert bit_equal(tensors(ours), tensors(theirs))
    assert position(ours) == position(theirs)
    for rank in range(2):
        name = f"rng-{rank:05d}.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    for lost in ("data position", "random state"):  # negative controls
        ours = tensors(checkpoints(made / lost) / LAST)
        assert differences(ours, tensors(theirs), "weight/") > 1e-6, lost


@pytest.mark.slow
def test_the_count_of_patience_goes_on_from_the_best(trained, resumed):
    made, run = resumed
    assert run.json["patience again"] == trained[1].json["patience"] | {"checkpoint": ANY}
    step = run.json["patience again"]["step"]
    assert [path.name for path in checkpoints(made / "patience again").glob("step_*")] == [f"step_{step:08d}"]
    assert f"step {step + 4}: 2 evaluations without a better one" in run.output
    assert run.json["best loss"]["step"] > step  # negative control: the first evaluation after it is taken for the best


@pytest.fixture(scope="module")
def alone(resumed) -> tuple[Path, dict]:
    """The joint run's checkpoint on one rank, and upon adapters that are not the same: what it reported."""
    made, _ = resumed
    joint = [start(made, "end_to_end"), *JOINT]
    source = checkpoints(made / "joint") / "step_00000016"
    shutil.copytree(made / "adapters", made / "other weights")
    write_adapter(made / "other weights/pointer", seed=9, r=5, lora_alpha=8, target_modules=PROJECTIONS[3])
    shutil.copytree(made / "adapters", made / "other scale")
    write_adapter(made / "other scale/pointer", seed=3, r=5, lora_alpha=9, target_modules=PROJECTIONS[3])
    places = {name: str(made / "adapters" / name) for name in reversed(NAMES)}
    explicit = ["gate.adapters_in=null", f"gate.adapters={json.dumps(places)}"]
    cases = [["alone", overrides(made, start_from(made, source, "alone"), *joint), "load and save"]]
    for name in ("other weights", "other scale"):
        output = start_from(made, source, f"run upon {name}")
        cases.append([name, overrides(made, output, *joint, f"gate.adapters_in={made / name}"), "refused"])
    output = start_from(made, checkpoints(made / "supervised") / "step_00000008", "run in another order")
    cases.append(["another order", overrides(made, output, *explicit), "refused"])
    return made, launch(1, cases).json


@pytest.mark.slow
def test_what_another_topology_loads_is_bit_equal(resumed, alone):
    made, _ = resumed
    source = tensors(checkpoints(made / "joint") / "step_00000016")
    for name, world_size in {"ZeRO 1": 2, "ZeRO 2": 2, "alone": 1}.items():
        path = checkpoints(made / name) / "step_00000016"
        assert json.loads((path / "state.json").read_text())["world_size"] == world_size
        assert bit_equal(tensors(path), source), name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["other weights", "other scale", "another order"])
def test_other_adapters_under_the_same_names_are_refused(alone, what):
    assert "was trained upon another model" in alone[1].get(what, "nothing was refused")


@pytest.mark.slow
def test_a_stage_that_keeps_the_adapters_does_not_start_where_others_trained_them(trained):
    """Its checkpoints would not hold them, nor its exports: the adapters must be named as they are exported."""
    made, _ = trained
    config = load_run(RUN, overrides(made, "none", start(made, "joint"), "gate.stage=end_to_end"))
    model = build_preset("tiny-vl-dense", seed=3)
    install_gate(model, config.gate)
    with pytest.raises(UserError, match="trained its adapters"):
        start_gate(model, config.gate)


def test_eval_prints_a_table_and_writes_json_and_figures(supervised, tmp_path, capsys):
    made, _ = supervised
    run, file = overrides(made, "supervised", "monitor.tensorboard=true"), tmp_path / "eval.json"
    assert main(["gate", "eval", RUN, *run, "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    for part in ("routing accuracy", "majority (", "text only", "vision only", "asked for \\ routed to", *NAMES):
        assert part in printed
    assert found["total"] == HELD_OUT and found["names"] == NAMES and set(found["baselines"]) >= BASELINES
    beaten = max(found["baselines"].values()) > found["accuracy"]
    assert ("advice: " in printed) == (found["advice"] is not None) == beaten
    assert sum(found["confusion_pairs"].values()) == HELD_OUT and 0 <= found["ece"] <= 1
    pairs = [pair.split("->") for pair in found["confusion_pairs"] for _ in range(found["confusion_pairs"][pair])]
    assert sum(asked == routed for asked, routed in pairs) == found["correct"]
    images = EventAccumulator(str(made / "supervised/tensorboard")).Reload().Tags()["images"]
    assert {"gate/confusion_final", "gate/weights_final"} <= set(images)
    # The run's own last evaluation, on two ranks, found the same.
    of_run = json.loads((made / "supervised/result.json").read_text())["accuracy"]
    gated = load_gated(RUN, run, None)
    assert gated.survey(str(gated.config.data.eval), Routed(NAMES, labelled=True)).accuracy == of_run


@pytest.mark.slow
def test_eval_of_a_collapsed_gate_fails_after_the_table(trained, capsys):
    made, _ = trained
    run = overrides(made, "collapsed", "gate.text=first", "gate.modalities=text")
    with pytest.warns(UserWarning, match="content-free"):
        assert main(["gate", "eval", RUN, *run]) == 2
    printed = capsys.readouterr()
    assert "asked for \\ routed to" in printed.out
    assert f"for all {HELD_OUT} requests" in printed.err and "the gate predicts" in printed.err


@pytest.mark.slow
def test_predict_answers_requests_with_and_without_an_answer(trained, capsys):
    made, _ = trained
    file = made / "data/requests-held_out.jsonl"
    assert main(["gate", "predict", RUN, *overrides(made, "joint", *JOINT[:2]), "--requests", str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["request"] for line in lines] == [f"{file}:{number}" for number in range(1, 7)]
    assert all(line["adapter"] in NAMES and 1 / 4 <= line["probability"] <= 1 for line in lines)


@pytest.mark.slow
def test_export_holds_router_adapters_and_manifest(trained, tmp_path, capsys):
    made, _ = trained
    out, requests = tmp_path / "out", made / "data/requests-held_out.jsonl"
    assert main(["gate", "export", str(made / "joint"), str(out), "--manifest", str(requests)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    folders = {entry["lora_name"]: entry["lora_path"] for entry in manifest["adapters"]}
    assert folders == {name: str(out / "adapters" / name) for name in NAMES}
    capsys.readouterr()
    run = overrides(made, "joint", *JOINT[:2])
    assert main(["gate", "predict", RUN, *run, "--requests", str(requests)]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["request"], entry["lora_name"]) for entry in manifest["requests"]] == [
        (line["request"], line["adapter"]) for line in predicted
    ]
    # The trained adapters are in it, and the gate routes as it did.
    key, saved = "model.language_model.layers.1.self_attn.o_proj", tensors(checkpoints(made / "joint") / LAST)
    rows = saved[f"weight/{key}.lora_A"][:3]  # of auditor (rank 3), the first of the two with an o_proj
    written = load_file(out / "adapters/auditor/adapter_model.safetensors")[f"base_model.model.{key}.lora_A.weight"]
    as_read = load_file(made / "adapters/auditor/adapter_model.safetensors")
    assert torch.equal(written, rows) and not torch.equal(written, as_read[f"base_model.model.{key}.lora_A.weight"])
    evaluations = []
    for number, source in enumerate((made / "joint", out)):
        file = tmp_path / f"{number}.json"
        assert main(["gate", "eval", RUN, *run, "--from", str(source), "--json", str(file)]) in (0, 2)
        evaluations.append(json.loads(file.read_text()))
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_frozen_weights_are_one_plain_adapter(trained, tmp_path):
    """It adds what the exported adapters add, each merged by PEFT, times its weight."""
    made, _ = trained
    weights = {"auditor": 0.7, "operator": 0.5}
    words = [f"{name}={weight}" for name, weight in weights.items()]
    assert main(["gate", "freeze", str(made / "joint"), str(tmp_path / "frozen"), "--weights", *words]) == 0
    assert main(["gate", "export", str(made / "joint"), str(tmp_path / "out")]) == 0
    base = build_preset("tiny-vl-dense", seed=3).state_dict()
    expected = dict(base)
    for name, weight in weights.items():
        merged = with_adapter(tmp_path / "out/adapters" / name)
        expected = {key: value + weight * (merged[key] - base[key]) for key, value in expected.items()}
    found = with_adapter(tmp_path / "frozen")
    assert max((found[key] - value).abs().max() for key, value in expected.items()) < 1e-6
    assert max((found[key] - value).abs().max() for key, value in base.items()) > 1e-3  # negative control


def with_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the base with an adapter merged by PEFT."""
    model = peft.PeftModel.from_pretrained(build_preset("tiny-vl-dense", seed=3), folder)
    return model.merge_and_unload().state_dict()
