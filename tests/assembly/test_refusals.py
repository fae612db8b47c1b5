"""What cannot be assembled is said in one line: where in the spec, what, and what would fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe.assembly.assemble import assemble
from ds_moe.cli import main
from ds_moe.errors import UserError
from ds_moe.models.presets import build_preset
from tests.assembly.dense_folders import write_dense

UPCYCLE = "upcycle:\n  source: a\n  experts: 8\n  top_k: 2\n"
BRANCHES = "branches:\n  parent: a\n  experts: {x: a, y: b}\n  top_k: 2\n"
AVERAGE = "average:\n  models: {x: a, y: b}\n"
HIDDEN = BRANCHES + "  router:\n    init: hidden_mean\n"

MISTAKES = {
    "unknown key": (UPCYCLE + "  topk: 2\n", "spec.yaml:5: unknown key upcycle.topk (did you mean upcycle.top_k?)"),
    "key of another section": (UPCYCLE + "  rest: parent\n", "spec.yaml:5: unknown key upcycle.rest (did you mean"),
    "missing key": ("upcycle:\n  source: a\n", "spec.yaml:1: required key upcycle.experts is missing"),
    "wrong type": (UPCYCLE.replace("8", "eight"), "spec.yaml:3: upcycle.experts is 'eight'; must be a valid integer"),
    "none": ("seed: 1\n", "spec.yaml: no section: write exactly one of upcycle, branches, average"),
    "two": (UPCYCLE + AVERAGE, "spec.yaml:5: upcycle and average: write exactly one of"),
    "no mapping": ("- a\n", "spec.yaml: a spec is a mapping with the sections upcycle, branches, average, seed"),
    "experts": (UPCYCLE + "  split: 3\n", "spec.yaml:3: upcycle.experts 8 must be a multiple of upcycle.split 3"),
    "cut group": (UPCYCLE + "  split: 4\n", "spec.yaml:4: upcycle.top_k 2 must be a multiple of upcycle.split 4"),
    "top_k": (UPCYCLE.replace("top_k: 2", "top_k: 9"), "spec.yaml:4: upcycle.top_k 9 is more than upcycle.experts 8"),
    "width": (
        UPCYCLE.replace("8", "10").replace("top_k: 2", "top_k: 5") + "  split: 5\n",
        "spec.yaml:5: upcycle.split 5 does not divide the FFN's width 96",
    ),
    "one branch": (BRANCHES.replace(", y: b", ""), "spec.yaml:3: branches.experts has 1 checkpoint(s); at least 2"),
    "more top_k": (BRANCHES.replace("top_k: 2", "top_k: 3"), "spec.yaml:4: branches.top_k 3 is more than the 2 expert"),
    "name": (BRANCHES.replace("x: a", "parent: a"), "spec.yaml:3: branches.experts.parent: an expert may not be"),
    "unused data": (
        BRANCHES + "  router:\n    samples: 8\n",
        "spec.yaml:6: branches.router.samples would not be used: branches.router.init is random; remove it",
    ),
    "domains": (HIDDEN + "    data: {x: digits}\n", "spec.yaml:7: branches.router.data must name the same"),
    "no data": (
        HIDDEN + "    data: {x: digits, y: no.jsonl}\n",
        "spec.yaml:7: data: no.jsonl does not exist",
    ),
    "seed of an average": (AVERAGE + "seed: 3\n", "spec.yaml:3: seed would not be used"),
    "no source": (
        UPCYCLE.replace(" a\n", " ./nowhere\n"),
        "upcycle.source ./nowhere is no folder, and no hub id",
    ),
    "MoE": (
        UPCYCLE.replace(" a\n", " moe\n"),
        "upcycle.source moe is a qwen3_vl_moe, which has 8 experts",
    ),
    "a run": (UPCYCLE.replace(" a\n", " run\n"), "it is a run's output folder; ds-moe export it first"),
    "wider": (
        AVERAGE.replace(": b", ": wide"),
        "spec.yaml:2: average.models.y wide does not fit a: text_config.intermediate_size is 80, not 96",
    ),
    "other tokens": (BRANCHES.replace(": b", ": tokens"), "branches.experts.y tokens does not fit a: their tokenizer"),
    "weights lack": (AVERAGE.replace(": b", ": lacks"), "lacks does not fit its own config: lm_head.weight is missing"),
    "weights left": (AVERAGE.replace(": b", ": more"), "more does not fit its own config: extra.weight is unexpected"),
    "misshapen": (AVERAGE.replace(": b", ": bent"), "lm_head.weight is (64, 381) and should be (381, 64)"),
    "damaged": (UPCYCLE.replace(" a\n", " torn\n"), "upcycle.source torn/model.safetensors is broken"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of which each but a and b has something wrong."""
    folder = tmp_path_factory.mktemp("refusals")
    write_dense(folder / "a", 0)
    for name in ("b", "tokens", "lacks", "more", "bent", "torn"):
        shutil.copytree(folder / "a", folder / name)
    write_dense(folder / "wide", 0, intermediate_size=80)
    build_preset("tiny-vl-moe").save_pretrained(folder / "moe")
    (folder / "run/checkpoints").mkdir(parents=True)
    tokenizer = json.loads((folder / "tokens/tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] += 1
    (folder / "tokens/tokenizer.json").write_text(json.dumps(tokenizer))

    def change(name: str, key: str, value: torch.Tensor | None) -> None:
        weights = {**load_file(folder / name / "model.safetensors"), key: value}
        kept = {key: weight for key, weight in weights.items() if weight is not None}
        save_file(kept, folder / name / "model.safetensors", metadata={"format": "pt"})

    change("lacks", "lm_head.weight", None)
    change("more", "extra.weight", torch.zeros(2))
    change("bent", "lm_head.weight", torch.zeros(64, 381))
    (folder / "torn/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, monkeypatch, capsys, name):
    text, expected = MISTAKES[name]
    monkeypatch.chdir(folder)
    Path("spec.yaml").write_text(text)
    assert main(["assemble", "spec.yaml", "out"]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.startswith("error: ") and said.count("\n") == 1
    assert not Path("out").exists()


def test_a_folder_in_the_way_is_left_alone(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "spec.yaml").write_text(UPCYCLE)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not empty"):
            assemble(tmp_path / "spec.yaml", out, note=print)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (AVERAGE, "only qwen3_vl_moe checkpoints have it"),
        (UPCYCLE.replace("8", "6").replace("top_k: 2", "top_k: 3") + "  split: 3\n", "twice moe_intermediate_size"),
    ],
)
def test_a_layout_that_would_load_wrong_is_refused(folder, tmp_path, monkeypatch, spec, reason):
    monkeypatch.chdir(folder)
    (tmp_path / "spec.yaml").write_text(spec)
    with pytest.raises(UserError, match=reason):
        assemble(tmp_path / "spec.yaml", tmp_path / "out", "hub", note=print)
