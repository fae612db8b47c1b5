"""References: the base under LoRA, and log-probs that are stored; on one process, without an engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ds_moe.config.run import RunConfig
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.convert import convert_for
from ds_moe.models.freeze import set_trainable
from ds_moe.models.lora import without_updates
from ds_moe.models.presets import build_preset
from ds_moe.tasks.dpo import stored
from ds_moe.tasks.dpo.pairs import PAIRS
from ds_moe.tasks.dpo.reference import BaseReference, pair_logprobs
from ds_moe.tasks.dpo.stored import StoredReference
from ds_moe.tasks.task import TrainingParts
from tests.distributed.packing_ranks import fill_lora
from tests.tasks.dpo.test_pairs import record
from tests.tasks.dpo.tiny_policy import CPU, Bare

LORA = {"rank": 8, "alpha": 24, "experts": True, "targets": ["q_proj", "lm_head"]}
RECORDS = 7


@pytest.fixture
def parts(write_jsonl, tmp_path, processor):
    """parts(lora=None, **more sections) -> what a task is made from, its model on one process."""
    file = write_jsonl([record(rejected="no " * (1 + n % 3)) for n in range(RECORDS)])
    held_out = write_jsonl([record(rejected="no " * (1 + n)) for n in range(3)], "held_out.jsonl")

    def make(lora=None, dpo=None, data=None, train=None, evaluates=True):
        config = RunConfig(
            task="dpo",
            model={"preset": "tiny-vl-moe"},
            data={"train": str(file), "eval": str(held_out), "max_length": 128, **(data or {})},
            moe={},
            lora=lora,
            dpo=dpo or {},
            train={"output_dir": str(tmp_path / "run"), "global_batch_size": 2, "steps": 5, **(train or {})},
            deepspeed="none",
        )
        model = build_preset("tiny-vl-moe").train()
        set_trainable(model, config)
        context = convert_for(model, config)
        ranks = {"rank": 0, "world_size": 1, "record_kind": PAIRS, "raise_errors": False}
        stream = TrainStream(config, processor, **ranks)
        eval_set = EvalSet(config, processor, **ranks) if evaluates else None
        return TrainingParts(config, CPU, Bare(model), context, processor, stream, eval_set, note=lambda text: None)

    return make


def a_batch(parts, count=2):
    indices = list(range(count))
    [encoded, _, _] = parts.stream._maker.encoder.encode(indices)
    return PAIRS.collate(encoded, parts.processor).to(CPU.device)


def plain(parts, batch):
    model = parts.engine.module
    with torch.no_grad():
        return pair_logprobs(model.eval(), batch)[0]


def test_the_base_is_bit_equal_to_a_model_without_updates(parts):
    of_lora, base = parts(LORA), parts()
    fill_lora(of_lora.engine.module)
    batch = a_batch(of_lora)
    expected = plain(base, batch)
    assert not torch.equal(plain(of_lora, batch), expected)
    scored = BaseReference(of_lora).added_to(batch, "train")
    assert torch.equal(scored.reference_P2, expected)
    assert scored.reference_routing.shape == (*batch.labels.shape, 2, 2) and "routing" not in scored.inputs
    assert (scored.reference_routing[batch.sequence_of_token < 0] == -1).all()
    assert of_lora.engine.module.training and not torch.equal(plain(of_lora, batch), expected)  # all is as it was


def test_updates_are_back_after_an_error(parts):
    made = parts(LORA)
    fill_lora(made.engine.module)
    batch = a_batch(made)
    before = plain(made, batch)
    with pytest.raises(RuntimeError), without_updates(made.engine.module):
        raise RuntimeError
    assert torch.equal(plain(made, batch), before)


@pytest.mark.parametrize("packing", [False, True])
def test_stored_log_probs_are_those_of_the_first_model(parts, packing):
    made = parts(data={"packing": packing})
    before = made.stream.state_dict()
    reference = StoredReference(made)
    assert made.stream.state_dict() == before and made.stream.fill is None
    batch = a_batch(made, RECORDS)
    with torch.no_grad():
        for parameter in made.engine.module.parameters():
            parameter.mul_(1.1)
    scored = reference.added_to(batch, "train")
    assert torch.allclose(scored.reference_P2, plain(parts(), batch), atol=1e-5)
    assert not torch.allclose(scored.reference_P2, plain(made, batch), atol=1e-2)
    again = StoredReference(made)  # by now the model is another one: it must come from the file
    assert torch.equal(again.added_to(batch, "train").reference_P2, scored.reference_P2)
    for one in made.eval_set.batches():
        assert reference.added_to(one.batch, "held-out").reference_P2.isfinite().all()


def test_a_pass_that_was_stopped_goes_on_where_it_was(parts, monkeypatch):
    made = parts(evaluates=False)
    whole = StoredReference(made)._files["train"]
    with np.load(whole.path) as kept:
        logprobs = kept["logprobs"].copy()
    order = [[one for micro in made.stream.rows.of_step(step) for row in micro for one in row] for step in range(4)]
    missing = [one for step in order[2:] for one in step if one >= 0]
    cut = logprobs.copy()
    cut[missing] = np.nan
    np.savez(whole.path.with_suffix(""), logprobs=cut, complete=np.array(False))
    scored_pairs = []
    own = stored.scored
    monkeypatch.setattr(
        stored, "scored", lambda engine, batch: scored_pairs.append(len(batch.number_P)) or own(engine, batch)
    )
    again = StoredReference(made)._files["train"]
    assert sum(scored_pairs) == 4 and again.complete  # the last two steps of two pairs, one of them a filler
    assert np.array_equal(again.logprob_R2, logprobs)


def test_only_the_steps_of_the_run_are_scored_and_more_steps_complete_the_file(parts, monkeypatch):
    scored_pairs, own = [], stored.scored
    monkeypatch.setattr(
        stored, "scored", lambda engine, batch: scored_pairs.append(len(batch.number_P)) or own(engine, batch)
    )

    def known(steps, **dpo):
        scored_pairs.clear()
        made = parts(evaluates=False, train={"steps": steps}, dpo=dpo)
        before = made.stream.state_dict()
        file = StoredReference(made)._files["train"]
        assert made.stream.state_dict() == before
        return file.count, file.complete, sum(scored_pairs), file.logprob_R2

    assert known(2)[:3] == (4, False, 4)
    assert known(2)[:3] == (4, False, 0)
    *figures, logprobs = known(5)
    assert figures == [RECORDS, True, 4]  # the last two steps of two pairs, one of them a filler
    assert np.array_equal(logprobs, known(5, reference_dir=str(parts().config.train.output_dir) + "-at-once")[3])


def test_a_folder_that_cannot_be_written_is_named_before_the_pass(parts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(stored, "scored", None)
    with pytest.raises(UserError, match=r"^dpo.reference_dir \S+/file cannot be written \(File exists\); choose"):
        StoredReference(parts(dpo={"reference_dir": str(tmp_path / "file")}, evaluates=False))


def test_a_disk_that_fills_during_the_pass_is_one_line(parts, monkeypatch):
    def full(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.np, "savez", full)
    with pytest.raises(UserError, match=r"^rank 0 could not write \S+\.npz: OSError: .*No space left"):
        StoredReference(parts(evaluates=False))


def test_other_ranks_do_not_read(tmp_path, monkeypatch):
    file = stored.LogprobFile(tmp_path / "kept.npz")
    np.savez(file.path, logprobs=np.zeros((3, 2)), complete=np.array(True))
    file.read(replace(CPU, rank=1))
    assert not file.complete
    file.read(CPU)
    assert file.complete and file.count == 3


def test_an_edited_config_is_another_reference(parts, tmp_path):
    made, names = parts(evaluates=False), []
    for folder, eps in (("a", 1e-6), ("moved", 1e-6), ("edited", 1e-5)):
        model = build_preset("tiny-vl-moe")
        model.config.text_config.rms_norm_eps = eps
        model.save_pretrained(tmp_path / folder)
        section = made.config.model.model_copy(update={"preset": None, "path": str(tmp_path / folder)})
        config = made.config.model_copy(update={"model": section})
        names.append(stored._fingerprint(replace(made, config=config), made.stream.made_of))
    assert names[0] == names[1] != names[2]


def test_other_data_models_and_limits_have_other_files(parts, write_jsonl):
    made = parts()

    def name(config):
        stream = TrainStream(config, made.processor, rank=0, world_size=1, record_kind=PAIRS)
        return stored._fingerprint(replace(made, config=config), stream.made_of)

    config = made.config
    other_data = write_jsonl([record()] * 3, "other.jsonl")
    changed = {
        "data": config.model_copy(update={"data": config.data.model_copy(update={"train": str(other_data)})}),
        "answers": config.model_copy(update={"data": config.data.model_copy(update={"train_on": "last"})}),
        "seed": config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})}),
        "precision": config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})}),
        "experts": config.model_copy(
            update={"moe": config.moe.model_copy(update={"router": config.moe.router.model_copy(update={"top_k": 1})})}
        ),
    }
    assert len({name(config), *map(name, changed.values())}) == 1 + len(changed)
    same = config.model_copy(update={"dpo": config.dpo.model_copy(update={"beta": 0.7})})
    assert name(same) == name(config)


def test_an_evaluation_without_the_file_says_where_it_is(parts):
    made = parts(dpo={"reference_dir": "elsewhere"})
    with pytest.raises(UserError, match="not in elsewhere: set dpo.reference_dir to the folder data_cache of the run"):
        StoredReference(replace(made, stream=None))


def test_an_evaluation_says_so_where_the_files_are_of_another_build_or_of_other_data(parts, tmp_path):
    (tmp_path / "reference_held-out_0123456789abcdef.npz").touch()
    made = parts(dpo={"reference_dir": str(tmp_path)})
    with pytest.raises(UserError, match=rf"in {tmp_path} are of another .*earlier build \(start their run once more"):
        StoredReference(replace(made, stream=None))


def test_a_record_that_was_bad_when_the_file_was_written_is_named(parts):
    made = parts(evaluates=False)
    reference = StoredReference(made)
    reference._files["train"].logprob_R2[0] = np.nan
    with pytest.raises(UserError, match="lacks a record"):
        reference.added_to(a_batch(made), "train")


def stored_and_now(made):
    """The first records' log-probs as they are stored, and as the same model computes them from what it is given."""
    batch = a_batch(made, 3)
    stored_P2 = StoredReference(made).added_to(batch, "train").reference_P2
    return stored_P2, plain(made, batch)


def test_a_record_that_is_left_out_gives_no_other_the_log_probs_of_its_neighbour(parts, write_jsonl, folder):
    """Records are known by their index, which is another one where an earlier record cannot be used any more."""
    Image.new("RGB", (64, 64), "red").save(folder / "large.png")
    records = [record(image="large.png"), *(record(rejected="no " * (1 + n % 3)) for n in range(1, RECORDS))]
    data = {"train": str(write_jsonl(records, "mixed.jsonl")), "on_bad_record": "skip"}
    for limit in (4096, 2048):
        made = parts(evaluates=False, data={**data, "max_pixels": limit})
        assert len(made.stream._records) == RECORDS - (limit < 4096)
        first, now = stored_and_now(made)
        assert torch.allclose(first, now, atol=1e-5)


def test_another_record_of_the_same_length_that_is_left_out_is_noticed(parts, write_jsonl, folder):
    Image.new("RGB", (16, 16), "blue").save(folder / "b.png")
    asked = [record(image="a.png", rejected="no"), record(image="b.png", rejected="ye")]
    file = write_jsonl([*asked, *[record("Odd?", image=None)] * 5], "two.jsonl")
    data = {"train": str(file), "on_bad_record": "skip"}
    for missing in ("a.png", "b.png"):
        (folder / missing).rename(folder / "away")
        first, now = stored_and_now(parts(evaluates=False, data=data))
        assert torch.allclose(first, now, atol=1e-5)
        (folder / "away").rename(folder / missing)


def test_images_of_another_root_have_log_probs_of_their_own(parts, write_jsonl, folder):
    for name, colour in (("light", "white"), ("dark", "black")):
        (folder / name).mkdir()
        Image.new("RGB", (32, 32), colour).save(folder / name / "a.png")
    file, found = str(write_jsonl([record()] * RECORDS, "same.jsonl")), []
    for name in ("light", "dark"):
        source = {"path": file, "root": str(folder / name)}
        first, now = stored_and_now(parts(evaluates=False, data={"train": source}))
        assert torch.allclose(first, now, atol=1e-5)
        found.append(now)
    assert not torch.allclose(*found, atol=1e-4)


def test_other_settings_of_videos_have_log_probs_of_their_own(parts, write_jsonl, folder):
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(folder / f"{number}.png")
    video = {"type": "video", "frames": [f"{number}.png" for number in range(4)]}
    question = [video, {"type": "text", "text": "Up?"}]
    file = write_jsonl([record(question, image=None)] * RECORDS, "clips.jsonl")
    found = []
    for settings in ({}, {"fps": 8.0}):
        made = parts(evaluates=False, data={"train": str(file), "max_length": 512, "video": settings})
        first, now = stored_and_now(made)
        assert torch.allclose(first, now, atol=1e-5)
        found.append(now)
    assert not torch.allclose(*found, atol=1e-4)
