"""LoRA on sharded experts: as PEFT's `target_parameters` on the unconverted model, saved, resumed, exported."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3VLMoeForConditionalGeneration

from ds_moe.checkpoint.files import newest_complete
from ds_moe.config.run_file import load_run
from ds_moe.data.eval_set import EvalSet
from ds_moe.errors import UserError
from ds_moe.export.model import export_adapter, export_checkpoint
from ds_moe.models.lora import update_of
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from tests.distributed.test_parity import check_parity
from tests.distributed.test_resume import LAST, RUN, bit_equal, checkpoints, launch, start_from, tensors
from tests.launcher import run_ranks, start_ranks


@pytest.mark.parametrize(
    ("world_size", "cases", "rows"),
    [(2, "few", 6), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(2, "all", 12), (4, "all", 18)])],
)
def test_parity_with_peft(world_size, cases, rows, show):
    run = run_ranks("tests/distributed/lora_ranks.py", world_size, [cases])
    # W x + B (A x) here, (W + B A) x in PEFT; negative control: updates of the next expert
    check_parity(run, f"LoRA against PEFT, {world_size} ranks", rows, show)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    """A run of 24 steps upon a saved model, with dropout: its output folder is `run`, the model's `base`."""
    folder = tmp_path_factory.mktemp("lora")
    build_preset("tiny-vl-moe", seed=5).save_pretrained(folder / "base")
    save_processor(tiny_processor(), folder / "base")
    launch(2, [["never stopped", [*lora_run(folder), f"train.output_dir={folder / 'run'}"], "train"]])
    return folder


def lora_run(folder: Path) -> list[str]:
    model = ["model.preset=null", f"model.path={folder / 'base'}"]
    lora = "lora={rank: 8, alpha: 16, rslora: true, experts: true, dropout: 0.1}"
    return [*model, lora, "data.eval=digits", "train.eval_generate=false", "train.lr=1e-2"]


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(never_stopped):
    saved = tensors(checkpoints(never_stopped / "run") / LAST)
    weights = {key.partition("/")[2] for key in saved if key.startswith("weight/")}
    assert len(weights) == 2 * 2 * (4 + 2)  # halves x layers x (attention + experts)
    assert all(update_of(name) for name in weights)
    assert sum(key.startswith("exp_avg/") for key in saved) == len(weights)
    size = sum(file.stat().st_size for file in (checkpoints(never_stopped / "run") / LAST).glob("rank-*"))
    whole = (never_stopped / "base" / "model.safetensors").stat().st_size
    assert size < 3 * 0.5 * whole  # weights and two moments of the updates, not of the model


@pytest.mark.slow
def test_killed_and_restarted_equals_never_stopped_bit_for_bit(never_stopped, tmp_path):
    arguments = [RUN, *lora_run(never_stopped), f"train.output_dir={tmp_path}"]
    run = start_ranks("ds_moe.train", 2, arguments, launcher="deepspeed")
    run.wait_for("checkpoint ")
    run.kill()
    run.wait()
    first = newest_complete(checkpoints(tmp_path))
    assert first is not None and first.name != LAST, "the run had ended before it was killed"
    run = run_ranks("ds_moe.train", 2, arguments, launcher="deepspeed")
    assert f"resumed from {first}" in run.output
    ours, theirs = checkpoints(tmp_path) / LAST, checkpoints(never_stopped / "run") / LAST
    assert bit_equal(tensors(ours), tensors(theirs))
    for rank in range(2):
        name = f"rng-{rank:05d}.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_resharded(never_stopped, tmp_path, world_size):
    """What is loaded is bit-equal on any topology; without dropout training from it would drift by rounding only."""
    source = checkpoints(never_stopped / "run") / "step_00000016"
    topologies = {
        2: [
            ["moe.ep_size=1"],
            ["deepspeed=ds_configs/zero1.json"],
            ["moe.ep_size=1", "deepspeed=ds_configs/zero2.json"],
        ],
        4: [["moe.ep_size=4", "train.micro_batch_size=2"], ["train.micro_batch_size=2"]],
    }
    cases, folders = [], []
    for number, overrides in enumerate(topologies[world_size]):
        folders.append(start_from(tmp_path, source, str(number)))
        run = [*lora_run(never_stopped), f"train.output_dir={folders[-1]}", *overrides]
        cases.append([str(number), run, "load and save"])
    launch(world_size, cases)
    for folder in folders:
        assert bit_equal(tensors(checkpoints(folder) / source.name), tensors(source))


@pytest.mark.slow
def test_another_base_is_refused(never_stopped, tmp_path):
    """The updates of one model are no good on another, whose tensors have the same names and shapes."""
    build_preset("tiny-vl-moe", seed=6).save_pretrained(tmp_path / "other")
    save_processor(tiny_processor(), tmp_path / "other")
    output = start_from(tmp_path, checkpoints(never_stopped / "run") / LAST, "run")
    run = [RUN, *lora_run(never_stopped), f"model.path={tmp_path / 'other'}", f"train.output_dir={output}"]
    ranks = run_ranks("ds_moe.train", 1, [*run, "moe.ep_size=1"], check=False)
    assert ranks.returncode != 0 and "was trained upon another model" in ranks.output
    assert "Traceback" not in ranks.log(0)


@pytest.mark.slow
def test_both_exports_reproduce_the_trained_model(never_stopped, tmp_path, show):
    expected = json.loads((never_stopped / "run" / "result.json").read_text())["eval_loss"]
    losses = {"base": held_out_loss(Qwen3VLMoeForConditionalGeneration.from_pretrained(never_stopped / "base"))}
    for layout in ("memory", "hub"):
        export_checkpoint(never_stopped / "run", tmp_path / layout, layout)
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / layout)
        losses[f"merged, {layout} layout"] = held_out_loss(model)
    folder, parameters = export_adapter(never_stopped / "run", tmp_path / "adapter")
    base = Qwen3VLMoeForConditionalGeneration.from_pretrained(never_stopped / "base")
    losses["PEFT adapter"] = held_out_loss(PeftModel.from_pretrained(base, folder))
    show("\n".join([f"held-out loss {expected:.7f} in training", *(f"  {k:<22}{v:.7f}" for k, v in losses.items())]))
    assert parameters == sum(value.numel() for value in load_file(folder / "adapter_model.safetensors").values())
    assert abs(losses.pop("base") - expected) > 1e-2  # negative control: the updates are needed
    for name, loss in losses.items():
        assert abs(loss - expected) <= 1e-6, name


@torch.no_grad()
def held_out_loss(model) -> float:
    config = load_run(RUN, ["data.eval=digits", "train.eval_batch_size=60"])
    total, labelled = 0.0, 0
    for batch in EvalSet(config, tiny_processor(), rank=0, world_size=1).batches():
        total += model.eval()(**batch.batch.to(model.device).with_labels, num_items_in_batch=1).loss.item()
        labelled += int(batch.batch.label_tokens)
    return total / labelled


@pytest.mark.slow
def test_routers_trained_beside_lora_are_exported_merged_only(tmp_path):
    run = ["lora={rank: 8, train_router: true}", f"train.output_dir={tmp_path / 'run'}", "train.steps=8"]
    launch(1, [["short", [*run, "moe.ep_size=1", "train.warmup_steps=0"], "train"]])
    with pytest.raises(UserError, match="export the merged model instead"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")
    export_checkpoint(tmp_path / "run", tmp_path / "merged")
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "merged")
    trained = tensors(checkpoints(tmp_path / "run") / "step_00000008")
    name = "model.language_model.layers.1.mlp.gate.weight"
    assert torch.equal(model.get_parameter(name), trained[f"weight/{name}"])
    assert not torch.equal(model.get_parameter(name), build_preset("tiny-vl-moe").get_parameter(name))
