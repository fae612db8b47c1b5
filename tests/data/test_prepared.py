"""Records that were encoded before: a run gets the tensors that it would make itself, whatever happens to the files."""

import json
import multiprocessing
import shutil
import socket
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ds_moe.data.encoder import Encoder
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.fingerprint import difference
from ds_moe.data.prepared import chunks, make
from ds_moe.data.prepared.find import find_prepared
from ds_moe.data.prepared.make import prepare
from ds_moe.data.prepared.report import read_report
from ds_moe.data.prepared.shards import Damaged, Stored, read_record, write_shard
from ds_moe.data.record_kind import CHAT
from ds_moe.data.records import open_records
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.replay.align import RoutingShape
from ds_moe.tasks.dpo.pairs import PAIRS
from ds_moe.tasks.gate.records import Routed
from ds_moe.tasks.rl.rollouts import Rollouts
from ds_moe.weights.files import MappedFiles
from tests.records import chat

STEPS = 10
SHAPE = RoutingShape(layers=2, moe_layers=(0, 1), experts=8, top_k=2)


@pytest.fixture
def file(folder, write_jsonl):
    """19 records, some with one or two images, in kinds."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + 9 * number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    records = []
    for number in range(19):
        images = [f"{number % 4}.png"] * (number % 3)
        record = chat("<image>" * len(images) + "Is this it? " * (1 + number % 5), f"number {number}")
        records.append({**record, "images": images, "kind": "odd" if number % 2 else "even"})
    return write_jsonl(records)


def made(config, processor, kind=CHAT, split="train", pixels=True, workers=0):
    notes = []
    skipping = config.data.model_copy(update={"on_bad_record": "skip"})
    path = config.data.train if split == "train" else config.data.eval
    records = open_records(path, split, skipping, record_kind=kind)
    found = prepare(config, split, records, processor, pixels, workers, notes.append)
    return found, notes


def batches(config, processor, steps=STEPS, kind=CHAT, **ranks):
    stream = TrainStream(config, processor, record_kind=kind, **({"rank": 0, "world_size": 1} | ranks))
    try:
        return [[batch.to(torch.device("cpu")) for batch in step] for step in islice(stream, steps)], stream
    finally:
        stream.close()


def same(one, other):
    """Whether two values hold equal tensors, however they are nested."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and same(vars(one), vars(other))
    return one == other


def reads_no_source(monkeypatch):
    """From now on neither an image nor a text can become tensors."""

    def refused(*args, **kwargs):
        raise AssertionError("a record was encoded")

    for name in ("ds_moe.data.encode.load_image", "ds_moe.data.encode.tokenize"):
        monkeypatch.setattr(name, refused)


GATED = [{**chat("Hi " * count), "adapter": "ab"[count % 2]} for count in range(1, 9)]
PAIR = {"prompt": "Better?", "chosen": "yes indeed", "rejected": "no"}
IDS = [5, 6, 7, 8, 9]
ROLLOUT = {"tokens": IDS, "completion_mask": [0, 0, 0, 1, 1], "logprobs": [-0.5, -1.5], "advantage": 0.3, "kind": "x"}
ROUTING = np.tile(np.array([1, 2], dtype=np.uint8), (len(IDS) - 1, 2, 1)).tolist()
KINDS = {
    "dpo": (PAIRS, [{**PAIR, "chosen": "yes " * count} for count in range(1, 9)]),
    "gate": (Routed(["a", "b"], labelled=True), GATED),
    "rl": (Rollouts(SHAPE), [ROLLOUT | {"routing": ROUTING}, ROLLOUT, *[ROLLOUT | {"advantage": -1 / 3}] * 6]),
}


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"num_workers": 1}], ids=str)
def test_ten_steps_are_those_of_a_run_without(options, file, run_config, processor, monkeypatch):
    config = run_config(file, options)
    expected, plain = batches(config, processor)
    prepared, _ = made(config, processor)
    assert plain.notes == [] and len(prepared) == 19
    if not options.get("num_workers"):
        reads_no_source(monkeypatch)
    found, stream = batches(config, processor)
    assert same(found, expected) and stream.notes == [f"prepared data.train: {prepared}"]


def test_processes_write_what_one_writes(file, run_config, processor, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(chunks, "SHARD_BYTES", 20_000)
    config = run_config(file)
    expected, _ = batches(config, processor, rank=1, world_size=2)
    contents = []
    for workers in (0, 2):
        prepared, _ = made(config, processor, workers=workers)
        contents.append({path.name: path.read_bytes() for path in prepared.folder.iterdir()})
        assert same(batches(config, processor, rank=1, world_size=2)[0], expected)
        shutil.rmtree(prepared.folder)
    assert contents[0] == contents[1] and len(contents[0]) == 8  # five of them shards


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_record_is_stored_whole(name, write_jsonl, run_config, processor, monkeypatch):
    kind, records = KINDS[name]
    for packing in (False, True):
        config = run_config(write_jsonl(records, f"{name}.jsonl"), {"packing": packing})
        expected, _ = batches(config, processor, kind=kind)
        made(config, processor, kind)
        with monkeypatch.context() as patched:
            reads_no_source(patched)
            found, stream = batches(config, processor, kind=kind)
        assert same(found, expected) and "prepared data.train" in stream.notes[0]


def test_images_that_are_not_stored_are_decoded(file, run_config, processor):
    config = run_config(file)
    expected, _ = batches(config, processor)
    small, _ = made(config, processor, pixels=False)
    assert "without images" in str(small)
    assert same(batches(config, processor)[0], expected)
    size = sum(path.stat().st_size for path in small.folder.iterdir())
    large, notes = made(config, processor, pixels=True)
    assert sum(path.stat().st_size for path in large.folder.iterdir()) > 2 * size and "without images" in notes[0]


def test_images_are_stored_where_their_bytes_are_no_more_than_the_limit(file, run_config, processor, monkeypatch):
    config = run_config(file)
    records = open_records(str(file), "train", config.data)
    encoded, _, _ = Encoder(config, records, processor).encode(list(range(len(records))))
    size = sum(one.pixel_values.nbytes for one in encoded if one.pixel_values is not None)
    for limit, stored in ((size, True), (size - 1, False)):
        monkeypatch.setattr(make, "STORED_UP_TO", limit)
        prepared, _ = made(config, processor, pixels=None)
        assert prepared.pixels is stored
        shutil.rmtree(prepared.folder)


def test_an_evaluation_uses_its_own(file, run_config, processor, monkeypatch):
    config = run_config(file, {"eval": str(file)})

    def evaluated():
        held_out = EvalSet(config, processor, rank=0, world_size=1)
        return [(one.batch.to(torch.device("cpu")), one.answers, one.weights) for one in held_out.batches()], held_out

    expected, _ = evaluated()
    made(config, processor, split="held-out")
    reads_no_source(monkeypatch)
    found, held_out = evaluated()
    assert same(found, expected) and "prepared data.eval" in held_out.notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_length": 1024}, "data.max_length was 2048 and is 1024"),
        ({"train_on": "last"}, "data.train_on was 'all' and is 'last'"),
        ({"max_pixels": 10**6}, "data.max_pixels was 16777216 and is 1000000"),
    ],
)
def test_other_limits_are_named_and_not_served(change, said, file, run_config, processor):
    made(run_config(file), processor)
    config = run_config(file, change)
    records = open_records(config.data.train, "train", config.data)
    prepared, note = find_prepared(config, "train", records, processor)
    assert prepared is None and said in note and "\n" not in note and "ds-moe data prepare" in note


def test_other_records_templates_and_versions_are_named(
    file, folder, run_config, processor, text_processor, monkeypatch
):
    config = run_config(file)
    made(config, processor)

    def note():
        records = open_records(config.data.train, "train", config.data)
        prepared, said = find_prepared(config, "train", records, processor)
        assert prepared is None
        return said

    with monkeypatch.context() as patched:
        patched.setattr(processor.tokenizer, "chat_template", processor.tokenizer.chat_template + " ")
        assert "the chat template changed" in note()
    pad, processor.tokenizer.pad_token = processor.tokenizer.pad_token, "<|im_end|>"
    try:
        assert pad != "<|im_end|>" and "special tokens of the tokenizer" in note()
    finally:
        processor.tokenizer.pad_token = pad
    with monkeypatch.context() as patched:
        patched.setattr(processor.image_processor, "image_mean", [0.4, 0.5, 0.5])
        assert "the image processor changed" in note()
    with monkeypatch.context() as patched:
        patched.setattr("ds_moe.data.fingerprint.version", lambda name: "0.1")
        assert "transformers was" in note() and "and is '0.1'" in note()
    Image.new("RGB", (200, 300)).save(folder / "1.png")
    assert "the sizes of images changed" in note()
    file.write_text(file.read_text() + json.dumps(chat("One more")) + "\n")
    assert "the records changed" in note()


def test_names_and_roots_of_sources_belong_to_what_records_follow_from(write_jsonl, folder, run_config, processor):
    plain = write_jsonl([chat("Hi")] * 8)
    first = {"path": str(plain), "name": "one"}
    made(run_config(plain, {"train": first}), processor)
    assert "prepared data.train" in batches(run_config(plain, {"train": first}), processor, 1)[1].notes[0]
    for change, said in (({"name": "two"}, "names of sources was"), ({"root": str(folder)}, "the roots of sources")):
        [step, stream] = batches(run_config(plain, {"train": first | change}), processor, 1)
        assert said in stream.notes[0] and step[0][0].kind_B.tolist() == [0, 0]


def test_nothing_prepared_is_said_only_where_it_was_asked_for(file, run_config, processor, tmp_path):
    assert batches(run_config(file), processor, 1)[1].notes == []
    _, stream = batches(run_config(file, {"prepared": str(tmp_path / "none")}), processor, 1)
    assert stream.notes == [f"no prepared data of data.train in {tmp_path / 'none'} (ds-moe data prepare makes them)"]


def test_an_image_that_has_changed_is_decoded_again(file, folder, run_config, processor, capfd):
    """Of the same size: nothing else shows it."""
    config = run_config(file)
    made(config, processor)
    for name in ("0.png", "1.png"):
        image = Image.open(folder / name)
        Image.fromarray(255 - np.asarray(image)).save(folder / name)
    found, _ = batches(config, processor)
    assert "prepared data are not used where they are not as they were: an image of record" in capfd.readouterr().out
    kept, _ = made(config, processor)
    shutil.rmtree(kept.folder)
    assert same(found, batches(config, processor)[0])
    prepared, notes = made(config, processor)
    assert notes == [] and len(prepared) == 19


@pytest.mark.parametrize("how", ["another folder", "a link"])
def test_images_of_other_folders_are_not_served(how, tmp_path, run_config, processor):
    """Data files and sizes of images are equal, and nothing but the pixels differs."""
    record = {**chat("<image>?"), "images": ["images/0.png"]}
    for name, value in (("a", 10), ("b", 200)):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (40, 24), (value,) * 3).save(tmp_path / name / "images" / "0.png")
        (tmp_path / name / "train.jsonl").write_text(json.dumps(record) + "\n")
    where, other = tmp_path / "a", tmp_path / "b"
    if how == "a link":
        where = other = tmp_path / "link"
        where.symlink_to(tmp_path / "a")
    made(run_config(where / "train.jsonl", {"prepared": str(tmp_path / "sets")}), processor)
    if how == "a link":
        where.unlink()
        where.symlink_to(tmp_path / "b")
    [step], stream = batches(run_config(other / "train.jsonl", {"prepared": str(tmp_path / "sets")}), processor, 1)
    assert "prepared data.train" in stream.notes[0]
    [expected], plain = batches(run_config(tmp_path / "b" / "train.jsonl"), processor, 1)
    assert plain.notes == [] and same(step, expected)


def test_an_image_that_is_not_stored_and_has_changed_is_noticed(file, folder, run_config, processor):
    """Its estimate is the same, and its tokens lie in another grid."""
    config = run_config(file)
    made(config, processor, pixels=False)
    Image.open(folder / "1.png").rotate(90, expand=True).save(folder / "1.png")
    _, notes = made(config, processor, pixels=False)
    assert "has changed since" in notes[0] and "an image of" in notes[0]
    assert "there already, and whole" in made(config, processor, pixels=False)[1][0]


def test_a_set_that_was_made_anew_serves_no_other_record(file, run_config, processor, monkeypatch):
    """A run goes on with an index of files that are others now."""
    config = run_config(file)
    records = open_records(str(file), "train", config.data)
    expected, _, _ = Encoder(config, records, processor).encode(list(range(len(records))))
    monkeypatch.setattr(chunks, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(chunks, "CHUNK", 8)
    running, _ = made(config, processor)
    shutil.rmtree(running.folder)
    monkeypatch.setattr(chunks, "SHARD_BYTES", 10_000)
    made(config, processor)
    reading = Encoder(config, records, processor, prepared=running)
    assert same(reading.encode(list(range(len(records))))[0], expected) and reading.aside is not None


def test_a_damaged_neighbour_hides_no_reason(file, run_config, processor):
    prepared, _ = made(run_config(file), processor)
    neighbour = prepared.folder.with_name("train-0000")
    shutil.copytree(prepared.folder, neighbour)
    (neighbour / "index.json").write_text("{")
    _, stream = batches(run_config(file, {"max_length": 1024}), processor, 1)
    assert "data.max_length was 2048 and is 1024" in stream.notes[0] and str(neighbour) in stream.notes[0]


def test_what_another_host_is_making_stays(file, run_config, processor):
    config = run_config(file)
    prepared, _ = made(config, processor)
    name = prepared.folder.name
    shutil.rmtree(prepared.folder)
    of_other, of_own = (
        prepared.folder.with_name(f".{name}.{host}.1.partial") for host in ("another-host", socket.gethostname())
    )
    of_other.mkdir()
    of_own.mkdir()
    made(config, processor)
    assert of_other.is_dir() and not of_own.is_dir()


def damage(path, how):
    if how == "a bit":
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
@pytest.mark.parametrize("what", ["index.json", "counts.safetensors", "00000-000.safetensors"])
def test_damage_is_found_and_made_again(what, how, file, run_config, processor, capfd):
    config = run_config(file)
    expected, _ = batches(config, processor)
    kept, _ = made(config, processor)
    contents = {path.name: path.read_bytes() for path in kept.folder.iterdir()}
    damage(kept.folder / what, how)
    found, stream = batches(config, processor)
    assert same(found, expected)
    assert stream.notes == [] or "not used" in stream.notes[0] or "is not what was written" in capfd.readouterr().out
    again, notes = made(config, processor)
    assert "made anew, because" in notes[0]
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == contents


def test_other_tokens_are_served_only_without_the_checksum(file, run_config, processor, monkeypatch):
    """Control: without the checksum the damaged record would be trained on."""
    config = run_config(file, {"shuffle": False})
    expected, _ = batches(config, processor, 1)
    kept, _ = made(config, processor)
    shard = kept.folder / "00000-000.safetensors"
    data = shard.read_bytes()
    ids = Encoder(config, open_records(str(file), "train", config.data), processor).encode([0])[0][0].input_ids
    at = data.index(ids.int().numpy().tobytes())
    shard.write_bytes(data[:at] + (ids.int() + 1).numpy().tobytes() + data[at + 4 * len(ids) :])
    assert same(batches(config, processor, 1)[0], expected)
    monkeypatch.setattr("ds_moe.data.prepared.shards._checksum", lambda values: crc)
    crc = int(MappedFiles(2**20).read(shard, "crc", 0, 1))
    served = read_record(MappedFiles(2**20), shard, 0, CHAT.encodes).encoded
    assert served.input_ids.equal(ids + 1)


def test_a_half_written_folder_is_none(file, run_config, processor, monkeypatch):
    config = run_config(file)
    monkeypatch.setattr(
        make, "write_tensors", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="cannot be written .No space left on device.: set data.prepared"):
        made(config, processor)
    assert batches(config, processor, 1)[1].notes == []
    place = make.prepared_in(config)
    assert [path.name for path in place.iterdir()] == ["prepare.lock"]
    monkeypatch.undo()
    (place / ".train-0000.1.partial").mkdir()
    made(config, processor)
    assert len([path for path in place.iterdir() if path.name.startswith("train-")]) == 1


def test_bad_records_are_found_by_every_run(file, folder, run_config, processor, write_jsonl):
    lines = file.read_text().splitlines()
    broken = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(broken[: len(broken) // 2])
    lines += [json.dumps({**chat("<image>?"), "images": ["cut.png"]}), json.dumps(chat("long " * 3000)), "{"]
    file = write_jsonl(lines)
    for packing in (False, True):
        config = run_config(file, {"on_bad_record": "skip", "packing": packing})
        expected, plain = batches(config, processor)
        prepared, _ = made(config, processor)
        report = read_report(prepared)
        assert report["records"] == 19 and report["bad"] == 3 and len(prepared.bad) == 2
        found, stream = batches(config, processor)
        assert same(found, expected) and set(stream.skipped) == set(plain.skipped)
        if not packing:
            first = prepared.folder.stat().st_mtime_ns
            again, notes = made(config, processor)
            assert again.folder.stat().st_mtime_ns == first and "there already, and whole" in notes[0]
    (folder / "cut.png").write_bytes(broken)  # repaired: its header says what it said, so the fingerprint is the same
    expected, _ = batches(config, processor)
    assert "was a bad record" in made(config, processor)[1][0]
    assert same(batches(config, processor)[0], expected)


def test_the_report_says_what_records_are_like(file, run_config, processor):
    config = run_config(file)
    prepared, _ = made(config, processor)
    report = read_report(prepared)
    records = open_records(str(file), "train", config.data)
    encoded, _, _ = Encoder(config, records, processor).encode(list(range(len(records))))
    lengths = [len(one.input_ids) for one in encoded]
    assert report["tokens"]["sum"] == sum(lengths) and report["tokens"]["max"] == max(lengths)
    assert report["tokens"]["labelled"] == sum(int((one.labels >= 0).sum()) for one in encoded)
    assert report["images"]["count"] == 18 and report["images"]["smallest"] == [50, 20]
    assert report["patches"] == sum(len(one.pixel_values) for one in encoded if one.pixel_values is not None)


def test_special_tokens_in_texts_are_counted(write_jsonl, run_config, processor):
    file = write_jsonl([chat("What does <|im_end|> mean, <|im_end|>?"), chat("Hi")])
    prepared, _ = made(run_config(file), processor)
    assert read_report(prepared)["special_tokens"] == {"<|im_end|>": 2}


def test_commands_at_the_same_time_make_it_once(file, run_config, processor):
    config = run_config(file)
    context = multiprocessing.get_context("fork")
    said = context.Queue()

    def work():
        said.put(made(config, processor)[1])

    workers = [context.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    notes = [said.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(note == [] for note in notes) == 1 and sum("there already" in str(note) for note in notes) == 2


def test_a_shard_holds_what_was_written(tmp_path, file, run_config, processor):
    config = run_config(file)
    records = open_records(str(file), "train", config.data)
    encoded, _, _ = Encoder(config, records, processor).encode(list(range(len(records))))
    write_shard(tmp_path / "x.safetensors", [Stored(one, number) for number, one in enumerate(encoded)], pixels=True)
    files = MappedFiles(2**10)  # lets go of its file again and again
    for number, one in enumerate(encoded):
        stored = read_record(files, tmp_path / "x.safetensors", number, type(one))
        assert stored.note == number
        assert all(same(getattr(stored.encoded, field.name), getattr(one, field.name)) for field in fields(one))
    for wrong in (-1, len(encoded), 10**6):
        with pytest.raises(Damaged):
            read_record(files, tmp_path / "x.safetensors", wrong, type(encoded[0]))


def test_what_an_earlier_build_did_not_note_is_not_said_to_have_changed():
    kept, now = {"data.max_length": 512}, {"data.max_length": 1024, "the records that are left out": "x"}
    said = "data.max_length was 512 and is 1024, an earlier build did not note the records that are left out"
    assert difference(kept, now) == said
