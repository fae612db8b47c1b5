"""What `ds-moe eval` refuses, in one line, and what its words mean."""

import argparse

import pytest
import torch

from ds_moe import cli, evaluate
from ds_moe.checkpoint.changes import changes_of_evaluation
from ds_moe.config.run_file import load_run, write_run
from ds_moe.config.tasks import DPOConfig
from ds_moe.distributed import Topology
from ds_moe.errors import UserError
from ds_moe.models.presets import build_preset
from ds_moe.training.evaluation import find_weights

DEMO = "ds_configs/runs/demo.yaml"
ALONE = Topology(rank=0, world_size=1, local_rank=0, ep_size=1, device=torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    return load_run(DEMO, [f"train.output_dir={tmp_path / 'run'}", "lora={rank: 4}"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([DEMO, "data.eval=null", "train.eval_every=null", "train.eval_batch_size=null"], "data.eval is not set"),
        (["tests/runs/gate.yaml"], "task is gate; ds-moe gate eval"),
        ([DEMO, "--out", "result.json"], "--out result.json must end in .jsonl"),
        ([DEMO, "train.eval_size=3"], "unknown key train.eval_size"),
    ],
)
def test_a_wrong_word_is_refused_before_any_rank_starts(words, complaint, capsys):
    assert cli.main(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and said.count("\n") == 1


def test_the_command_gives_ranks_its_options(capsys):
    words = [DEMO, "--nproc", "2", "train.seed=3", "--from", "runs/a b", "--samples", "5", "--dry-run"]
    assert cli.main(["eval", *words]) == 0
    tail = f"--module ds_moe.evaluate {DEMO} train.seed=3 --from 'runs/a b' --samples 5\n"
    assert capsys.readouterr().out.endswith(tail)


def test_ranks_take_overrides_before_and_behind_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    evaluate.add_options(parser)
    options = parser.parse_intermixed_args(["r.yaml", "a=1", "--from", "x", "b=2", "--out", "o.jsonl"])
    assert options.words == ["r.yaml", "a=1", "b=2"]
    assert evaluate.words_of(options) == ["--from", "x", "--out", "o.jsonl"]


def test_weights_that_mean_nothing_are_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"run holds no checkpoint; name what to evaluate: --from"):
        find_weights(config, None, ALONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no whole checkpoint and no run with one"):
        find_weights(config, str(tmp_path / "empty"), ALONE)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter is a PEFT adapter, not a model: give the checkpoint"):
        find_weights(config, str(tmp_path / "adapter"), ALONE)
    with pytest.raises(UserError, match=r"^--from no/thing is no checkpoint, run, preset or model: "):
        find_weights(config, "no/thing", ALONE)


def test_a_model_takes_the_place_of_the_run_s_own(config, tmp_path):
    build_preset("tiny-vl-dense").save_pretrained(tmp_path / "dense")
    found = find_weights(config, str(tmp_path / "dense"), ALONE)
    assert (found.name, found.checkpoint, found.config.lora) == ("dense", None, None)
    assert (found.config.model.path, found.config.model.preset) == (str(tmp_path / "dense"), None)
    preset = find_weights(config, "tiny-moe", ALONE).config.model
    assert (preset.path, preset.preset) == (None, "tiny-moe")


def test_a_model_has_no_reference_to_be_compared_with(config):
    for dpo in ({}, {"reference": "stored"}, {"loss": "simpo"}):
        run = config.model_copy(update={"task": "dpo", "dpo": DPOConfig(**dpo)})
        if dpo.get("loss") == "simpo":
            assert find_weights(run, "tiny-moe", ALONE).config.lora is None
            continue
        with pytest.raises(UserError, match=r"^--from tiny-moe is a model, .* dpo .*: give a checkpoint of the run$"):
            find_weights(run, "tiny-moe", ALONE)


def test_updates_are_multiplied_by_the_factor_that_they_were_trained_with(config, tmp_path):
    """By another one a checkpoint is another model, and nothing in its tensors tells."""
    write_run(config, tmp_path)
    others = ["lora={rank: 4}", "train.lr=1e-9", "data.eval=x.jsonl"]
    assert changes_of_evaluation(tmp_path, load_run(DEMO, others)) == []
    more = ["lora={rank: 4, rslora: true, alpha: 16}", "moe.router.top_k=1"]  # the same factor, 8
    said = changes_of_evaluation(tmp_path, load_run(DEMO, more))
    keys = {line.partition(": ")[2].split()[0] for line in said}
    assert keys == {"lora.alpha", "lora.rslora", "moe.router.top_k"}
    for other in ("{rank: 4, alpha: 16}", "{rank: 4, rslora: true}"):
        with pytest.raises(UserError, match=r"updates by \S+; those of \S+ were trained with 8 \(set them to 32"):
            changes_of_evaluation(tmp_path, load_run(DEMO, [f"lora={other}"]))
    with pytest.raises(UserError, match=r"lora\.rank is 8; the updates of \S+ have rank 4 \(set it to 4\)$"):
        changes_of_evaluation(tmp_path, load_run(DEMO, ["lora={rank: 8}"]))
