"""Checkpoints from somebody else, whose manifest vouches for whatever they hold; and damaged ones of our own."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ds_moe.checkpoint.files import MANIFEST, STATE, Reader, file_table, incomplete, newest_complete, write_json
from ds_moe.cli import main
from ds_moe.export.model import export_checkpoint
from ds_moe.tasks.gate.files import read_gate
from tests.saved import ABOUT, RANK, RNG, save_untrained, seal

from .limits import Payload, refusal
from .safetensors_lies import LIES


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's output folder with one checkpoint."""
    return save_untrained(tmp_path_factory.mktemp("saved") / "run", "tiny-vl-dense").parents[1]


@pytest.fixture
def checkpoint(saved, tmp_path):
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    return run / "checkpoints" / "step_00000004"


def export(checkpoint: Path) -> Path:
    """Export the run that a checkpoint is of, as `ds-moe export` does."""
    return export_checkpoint(checkpoint.parents[1], checkpoint.parents[2] / "out").folder


def test_a_sound_checkpoint_passes(checkpoint):
    assert incomplete(checkpoint) is None
    assert (export(checkpoint) / "model.safetensors").is_file()


def entry(path: Path) -> dict:
    return next(iter(file_table(path.parent, [path]).values()))


def state(**values):
    def change(folder: Path) -> None:
        write_json(folder / STATE, ABOUT | values)
        seal(folder)

    return change


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def outside(name: str):
    """The manifest names a file that is there, and vouches for it."""
    return lambda folder: seal(folder, {name.format(folder=folder): entry(folder.parents[2] / "secret.txt")})


def link(name: str):
    """A link to the file outside in the place of `name`."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parents[2] / "secret.txt")
        seal(folder)

    return change


def flip(folder: Path) -> None:
    content = bytearray((folder / RANK).read_bytes())
    content[-5] ^= 1
    (folder / RANK).write_bytes(content)


def instead(make, file: str = MANIFEST):
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


OUTSIDE = "which lies outside of the checkpoint"
# name -> (what is done to a sound checkpoint, what is said of it)
CHANGES = {
    "a flipped bit": (flip, f"{RANK} is damaged: its SHA-256 is not the manifest's"),
    "a shard cut off": (lambda folder: os.truncate(folder / RANK, 1000), f"{RANK} has 1000 bytes instead of"),
    "no shard": (lambda folder: (folder / RANK).unlink(), f"{RANK} is missing"),
    "no random states": (lambda folder: (folder / RNG).unlink(), f"{RNG} is missing"),
    "no random states, sealed": (
        lambda folder: ((folder / RNG).unlink(), seal(folder)),
        f"manifest.json does not name {RNG}",
    ),
    "no state, sealed": (lambda folder: ((folder / STATE).unlink(), seal(folder)), "does not name state.json"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read (no such file)"),
    "a manifest that is a folder": (instead(os.mkdir), "manifest.json cannot be read"),
    "a manifest that is a pipe": (instead(os.mkfifo), "manifest.json cannot be read"),
    "a manifest that is a device": (instead(lambda path: path.symlink_to("/dev/zero")), "manifest.json cannot be read"),
    "a manifest cut off": (text(MANIFEST, "{"), "manifest.json cannot be read"),
    "a manifest of lists": (text(MANIFEST, "[" * 10**5), "manifest.json cannot be read"),
    "a pickled manifest": (lambda folder: (folder / MANIFEST).write_bytes(pickle.dumps({})), "manifest.json cannot be"),
    "a manifest that is a list": (text(MANIFEST, "[]"), "manifest.json is no JSON object"),
    "an empty manifest": (text(MANIFEST, "{}"), "manifest.json is no manifest of a checkpoint"),
    "another format": (text(MANIFEST, '{"format": 2}'), "manifest.json has format 2, this version reads 1"),
    "a format of 1 MB": (text(MANIFEST, json.dumps({"format": "x" * 10**6})), "manifest.json has format 'xxx"),
    "files as a list": (text(MANIFEST, '{"format": 1, "files": []}'), "manifest.json is no manifest of a checkpoint"),
    "a file without a size": (
        lambda folder: seal(folder, {RANK: {}}),
        "manifest.json is no manifest of a checkpoint ('size')",
    ),
    "a hash as a number": (
        lambda folder: seal(folder, {RANK: entry(folder / RANK) | {"sha256": 5}}),
        f"manifest.json has no SHA-256 of {RANK}",
    ),
    "a file above": (outside("../../../secret.txt"), OUTSIDE),
    "a file above, by way of model": (outside("model/../../../../secret.txt"), OUTSIDE),
    "an absolute path": (outside("{folder}/../../../secret.txt"), OUTSIDE),
    "a NUL byte": (lambda folder: seal(folder, {"a\0b": entry(folder / RANK)}), "null"),
    "a link in the place of weights": (link(RANK), OUTSIDE),
    "a link among the model's files": (link("model/notes.txt"), OUTSIDE),
    "a tensor in a file outside": (
        lambda folder: seal(folder, **{"weight/a": [["../../../secret.txt", 0, 1]]}),
        "places 'weight/a' in '../../../secret.txt', which is none of its files",
    ),
    "rows that run backwards": (
        lambda folder: seal(folder, **{"weight/a": [[RANK, 5, 2]]}),
        "gives 'weight/a' the rows [5, 2]",
    ),
    "negative rows": (lambda folder: seal(folder, **{"weight/a": [[RANK, -5, 2]]}), "the rows [-5, 2]"),
    "rows as text": (lambda folder: seal(folder, **{"weight/a": [[RANK, "0", "2"]]}), "the rows ['0', '2']"),
    "pieces as a number": (lambda folder: seal(folder, **{"weight/a": 5}), "is no manifest of a checkpoint"),
    "a state that is a list": (lambda folder: (write_json(folder / STATE, []), seal(folder)), "state.json is no JSON"),
    "a step as text": (state(step="4"), "state.json: step is '4'"),
    "a negative step": (state(step=-1), "state.json: step is -1"),
    "a step true": (state(step=True), "state.json: step is True"),
    "no data position": (state(data=None), "state.json: data is None"),
    "a billion ranks": (state(world_size=10**9), "manifest.json does not name rng-00001.safetensors"),
    "another precision": (state(precision="int4"), "precision is 'int4'; must be fp32 or bf16"),
    "more rows than the shard holds": (
        lambda folder: seal(folder, **{"weight/lm_head.weight": [[RANK, 0, 10**9]]}),
        "lm_head.weight has the shape",
    ),
    "a tensor that is not there": (
        lambda folder: seal(folder, **{"weight/a": [[RANK, 0, 1]]}),
        f"{RANK}: weight/a cannot be read",
    ),
    "a config of nothing": (
        lambda folder: ((folder / "model/config.json").write_text("{}"), seal(folder)),
        "cannot be read as a transformers checkpoint",
    ),
    "a run file that calls": (
        lambda folder: ((folder / "run.yaml").write_text("moe: !!python/name:os.mkdir"), seal(folder)),
        "run.yaml:1: the tag",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_export_refuses_it(checkpoint, tmp_path, name):
    change, says = CHANGES[name]
    (tmp_path / "secret.txt").write_text("secret")
    change(checkpoint)
    refusal(lambda: export(checkpoint), checkpoint, says)
    written = tmp_path / "out"
    assert not any("secret" in file.read_text(errors="ignore") for file in written.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", LIES)
def test_weights_that_lie_are_refused(checkpoint, name):
    """Sealed: the manifest's sizes and hashes are those of the lie."""
    (checkpoint / RANK).write_bytes(LIES[name])
    seal(checkpoint)
    refusal(lambda: export(checkpoint), checkpoint / RANK, "cannot be read", "use another checkpoint")


def test_pickles_beside_a_checkpoint_are_neither_opened_nor_exported(checkpoint, canary):
    for name in ("extra.pt", "mp_rank_00_model_states.pt", "model/pytorch_model.bin", "model/training_args.bin"):
        torch.save(Payload(canary), checkpoint / name)
    out = export(checkpoint)
    assert not [file.name for file in out.iterdir() if file.suffix in (".pt", ".bin")]


def test_code_beside_a_model_is_not_run(checkpoint, canary, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    (checkpoint / "model/evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    write_json(checkpoint / "model/config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    seal(checkpoint)
    refusal(lambda: export(checkpoint), checkpoint, "cannot be read as a transformers checkpoint")


def test_latest_is_for_people_and_leads_nowhere(checkpoint, tmp_path):
    for content in ('"/etc"', '"../../elsewhere"', "[", ""):
        (checkpoint.parent / "latest").write_text(content)
        assert newest_complete(checkpoint.parent) == checkpoint
    (checkpoint.parent / "latest").unlink()
    (checkpoint.parent / "latest").symlink_to(tmp_path)
    assert newest_complete(checkpoint.parent) == checkpoint


def test_a_bad_one_is_passed_over_with_its_reason(checkpoint):
    for number, name in enumerate(("a file above", "a step as text", "a manifest of lists"), start=5):
        newer = Path(shutil.copytree(checkpoint, checkpoint.parent / f"step_{number:08d}"))
        (newer.parents[2] / "secret.txt").write_text("secret")
        change, says = CHANGES[name]
        change(newer)
        notes: list[str] = []
        assert newest_complete(checkpoint.parent, notes.append) == checkpoint
        assert says in notes[0] and "\n" not in notes[0]


def test_a_gate_is_not_read_from_another_run(checkpoint):
    refusal(lambda: read_gate(checkpoint), checkpoint, "holds no gate: it is of a run of another task")


def test_rows_are_read_only_where_they_are(checkpoint):
    reader = Reader(checkpoint)
    refusal(lambda: reader.read("weight/lm_head.weight", (0, 10**9)), checkpoint, "only up to row")
    refusal(lambda: reader.read("weight/nothing"), checkpoint, "holds no weight/nothing")


@pytest.mark.parametrize("name", ["a flipped bit", "a file above"])
def test_the_command_says_it_in_one_line(checkpoint, tmp_path, capsys, name):
    (tmp_path / "secret.txt").write_text("secret")
    change, says = CHANGES[name]
    change(checkpoint)
    assert main(["export", str(checkpoint.parents[1]), str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and says in last
