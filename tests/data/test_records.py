"""Reading data files: the accepted forms, and file:line, reason and fix for everything else."""

import io
import json
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ds_moe.config.sections import DataConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import encode
from ds_moe.data.images import ImageSource, RecordError
from ds_moe.data.records import read_records
from ds_moe.errors import UserError

ANSWER = {"role": "assistant", "content": "red"}
TYPED = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Colour?"}]}


def openai(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "Colour?"}]}


def read(path, **options):
    return read_records(str(path), DataConfig(train=str(path), **options))


def parts(sample, turn=0):
    return [part.name if isinstance(part, ImageSource) else part for part in sample.turns[turn].parts]


ONE_IMAGE_FORMS = {
    "typed content": {"messages": [TYPED, ANSWER]},
    "images column": {"messages": [{"role": "user", "content": "<image>Colour?"}, ANSWER], "images": ["a.png"]},
    "single image": {"messages": [{"role": "user", "content": "<image>Colour?"}, ANSWER], "images": "a.png"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "red"}],
        "images": ["a.png"],
    },
    "llava": {
        "id": 7,
        "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "red"}],
        "image": "a.png",
    },
    "trl": {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}, ANSWER],
        "images": ["a.png"],
    },
    "openai": {"messages": [openai({"url": "a.png", "detail": "auto"}), ANSWER], "file_name": "b.png"},
    "openai, a path alone": {"messages": [openai("a.png"), ANSWER]},
    "turn after the last answer": {"messages": [TYPED, ANSWER, {"role": "user", "content": "Thanks"}]},
}


@pytest.mark.parametrize("form", ONE_IMAGE_FORMS)
def test_every_form_reads_as_the_same_sample(write_jsonl, form):
    records = read(write_jsonl([ONE_IMAGE_FORMS[form]]))
    sample = records.sample(0)
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert parts(sample) == ["a.png", "Colour?"]
    assert (sample.last_question(), sample.answer) == ("Colour?", "red")
    assert sample.first_image().getpixel((0, 0)) == (250, 10, 10)
    assert records.where(0) == sample.where == f"{records._file.name}:1"


def test_images_fill_placeholders_in_order_over_turns(write_jsonl):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> and <image>?"},
        ANSWER,
        {"role": "user", "content": "Again: <image>"},
        ANSWER,
    ]
    sample = read(write_jsonl([{"messages": messages, "images": ["a.png", "b.png", "a.png"]}])).sample(0)
    assert parts(sample, 1) == ["a.png", " and ", "b.png", "?"]
    assert parts(sample, 3) == ["Again: ", "a.png"]


def test_text_only_system_column_kind_blank_lines_and_bom(write_jsonl, folder):
    record = {"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}, ANSWER], "kind": "greeting"}
    path = write_jsonl(["", record, "", record])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().lstrip())
    records = read(path)
    assert len(records) == 2 and records.where(1).endswith(":3")
    assert [turn.role for turn in records.sample(1).turns] == ["system", "user", "assistant"]
    assert records.sample(1).kind == "greeting"


def test_root_elsewhere_and_absolute_path_below_it(write_jsonl, folder, tmp_path):
    (folder / "a.png").rename(tmp_path / "moved.png")
    absolute = {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": [str(tmp_path / "moved.png")]}
    assert len(read(write_jsonl([absolute]), root=str(tmp_path))) == 1


def user(content, **columns):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **columns}


BAD = {
    "broken JSON": ('{"messages": [', "broken JSON"),
    "not an object": ("[1, 2]", "a record is a list, not an object"),
    "no turns": ({"text": "hello"}, "neither 'messages' nor 'conversations'"),
    "two kinds of turns": ({"messages": [TYPED, ANSWER], "conversations": []}, "both 'messages'"),
    "messages of a wrong type": ({"messages": "hello"}, "'messages' is a string, not a list"),
    "empty messages": ({"messages": []}, "'messages' is empty"),
    "a message of a wrong type": ({"messages": ["hello"]}, "message 1 is a string, not an object"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, "message 1 has no 'content'"),
    "content of a wrong type": (user(5), "message 1: content is a number"),
    "a part of a wrong type": (user([5]), "a content part is a number"),
    "a part of an unknown type": (user([{"type": "audio", "audio": "a.wav"}]), "content part of type 'audio'"),
    "text of a wrong type": (user([{"type": "text", "text": 5}]), "'text' of a text part is a number"),
    "unknown role": ({"messages": [{"role": "judge", "content": "x"}, ANSWER]}, "unknown role 'judge'"),
    "a role of a wrong type": ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown role ['user']"),
    "unread key": ({"messages": [TYPED, {**ANSWER, "mask": False}]}, "message 2 has 'mask', which is not read"),
    "no assistant turn": ({"messages": [TYPED]}, "no assistant turn"),
    "assistant first": ({"messages": [ANSWER, TYPED]}, "an assistant turn before any user turn"),
    "late system": ({"messages": [TYPED, {"role": "system", "content": "x"}, ANSWER]}, "not the first message"),
    "empty turn": (user("  "), "message 1 (user) is empty"),
    "empty answer": ({"messages": [TYPED, {"role": "assistant", "content": ""}]}, "message 2 (assistant) is empty"),
    "lone surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    "too few images": (user("<image><image>?", images=["a.png"]), "2 <image> placeholders for 1 images"),
    "too many images": (user("<image>?", images=["a.png", "b.png"]), "1 <image> placeholders for 2 images"),
    "placeholder without images": (user("<image>?"), "1 <image> placeholders for 0 images"),
    "image of the assistant": (
        {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}],
            "images": ["a.png"],
        },
        "an image in the assistant turn",
    ),
    "images of a wrong type": (user("<image>?", images=5), "'images' is a number, not a list"),
    "an image of a wrong type": (user("<image>?", images=[5]), "an image is 5, not a path"),
    "missing image": (user("<image>?", images=["none.png"]), "missing image 'none.png'"),
    "a folder as image": (user("<image>?", images=["."]), "missing image '.'"),
    "a null byte": (user("<image>?", images=["a\0.png"]), "missing image 'a\\x00.png'"),
    "a URL": (user("<image>?", images=["http://host/a.png"]), "is a URL"),
    "leaves the root": (user("<image>?", images=["../secret.png"]), "leaves the data root"),
    "leaves it by a typed part": (user([{"type": "image", "image": "../secret.png"}]), "leaves the data root"),
    "absolute": (user("<image>?", images=["/etc/hostname"]), "leaves the data root"),
    "leaves it by a symlink": (user("<image>?", images=["link.png"]), "leaves the data root"),
    "no image": (user("<image>?", images=["text.png"]), "'text.png' is not an image that can be read"),
    "beyond the pixel limit": (user("<image>?", images=["big.png"]), "is 40x50, beyond data.max_pixels 1999"),
    "decompression bomb": (user("<image>?", images=["bomb.png"]), "decompression bomb"),
    "sound": (user("hi", audios=["a.wav"]), "'audios' is not supported"),
    "a kind of a wrong type": (user("hi", kind=3), "'kind' is a number"),
    "the kind of records without one": (user("hi", kind="all"), "'kind' is 'all', the name of an evaluation's own row"),
    "the kind of the mean": (user("hi", kind="mean"), "'kind' is 'mean', the name of an evaluation's own row"),
}


def bomb():
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(folder):
    """Files that bad records point to."""
    Image.new("RGB", (16, 16)).save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "text.png").write_text("hello")
    Image.new("RGB", (40, 50)).save(folder / "big.png")
    (folder / "bomb.png").write_bytes(bomb())


@pytest.mark.parametrize("name", BAD)
def test_bad_structure_names_file_line_reason_and_fix(write_jsonl, hostile, name):
    record, reason = BAD[name]
    path = write_jsonl([user("hi"), user("hi"), record, user("hi")])
    with pytest.raises(UserError) as caught:
        read(path, max_pixels=1999)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message and "\n" not in message
    assert message.count("(") >= 1 and message.index("(") > message.index(":3: ")  # the fix
    records = read(path, max_pixels=1999, on_bad_record="skip")
    assert [bad.where for bad in records.bad] == [f"{path}:3"]
    assert len(records) == 3 and records.where(2) == f"{path}:4"


def test_stop_counts_the_other_bad_records(write_jsonl):
    path = write_jsonl(["{", user("hi"), "{"])
    with pytest.raises(UserError, match=r"train\.jsonl:1: broken JSON.* \[and 1 more bad records\]"):
        read(path)


def test_pixel_limit_is_inclusive(write_jsonl):
    assert len(read(write_jsonl([ONE_IMAGE_FORMS["typed content"]]), max_pixels=256)) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "does not exist"),
        ("table.csv", "a,b\n", "neither .jsonl nor .parquet"),
        ("array.json", "[{}]", "a JSON array, not one record a line"),
        ("empty.jsonl", "\n", "no record to use"),
        ("broken.parquet", "hello", "not a Parquet file"),
    ],
)
def test_files_that_are_no_data(folder, name, content, reason):
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read(folder / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_root_must_be_a_folder(write_jsonl, folder):
    with pytest.raises(UserError, match=r"data\.root: .* is not a folder"):
        read(write_jsonl([user("hi")]), root=str(folder / "nowhere"))


TRUNCATING = {"png": lambda data: data[:-200], "jpg": lambda data: data[: len(data) // 2]}


@pytest.mark.parametrize("suffix", TRUNCATING)
def test_truncated_image_is_found_when_it_is_decoded(write_jsonl, folder, processor, suffix):
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"cut.{suffix}")
    whole = (folder / f"cut.{suffix}").read_bytes()
    (folder / f"cut.{suffix}").write_bytes(TRUNCATING[suffix](whole))
    sample = read(write_jsonl([user("<image>?", images=[f"cut.{suffix}"])])).sample(0)
    with pytest.raises(RecordError, match=f"truncated image 'cut.{suffix}'"):
        encode(sample, processor, 512, 10**6)


def test_extreme_aspect_ratio_is_a_bad_record(write_jsonl, folder, processor):
    Image.new("RGB", (1000, 2)).save(folder / "thin.png")
    sample = read(write_jsonl([user("<image>?", images=["thin.png"])])).sample(0)
    with pytest.raises(RecordError, match="aspect ratio"):
        encode(sample, processor, 512, 10**6)


def test_image_deleted_after_indexing_is_a_bad_record(write_jsonl, folder):
    records = read(write_jsonl([ONE_IMAGE_FORMS["typed content"]]))
    (folder / "a.png").unlink()
    with pytest.raises(RecordError, match=r"missing image 'a\.png'"):
        records.sample(0)


def png(color):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(stream, "PNG")
    return stream.getvalue()


def test_parquet_with_bytes_paths_typed_content_and_bad_rows(folder, tmp_path):
    chat = [[{"role": "user", "content": "<image>Colour?"}, ANSWER]] * 3
    images = [[{"bytes": png((1, 2, 3)), "path": None}], [{"bytes": None, "path": "a.png"}], [{"path": "none.png"}]]
    pq.write_table(pa.table({"messages": chat, "images": images}), folder / "chat.parquet")
    with pytest.raises(UserError, match=r"chat\.parquet:3: missing image 'none\.png'"):
        read(folder / "chat.parquet")
    records = read_records(
        str(folder / "chat.parquet"), DataConfig(train="x", on_bad_record="skip"), cache_dir=tmp_path / "cache"
    )
    assert [records.sample(index).first_image().getpixel((0, 0)) for index in range(2)] == [(1, 2, 3), (250, 10, 10)]
    assert records.bad == [BadRecord(f"{folder}/chat.parquet:3", records.bad[0].reason)] and len(records) == 2
    assert any((tmp_path / "cache").iterdir())  # the memory map is where it was asked to be
    # Typed content: Arrow gives every part both keys, null where the part has none.
    pq.write_table(pa.table({"messages": [[{**TYPED, "name": None}, {"role": "assistant", "content": [
        {"type": "text", "text": "red"}]}]]}), folder / "typed.parquet")  # fmt: skip
    assert parts(read(folder / "typed.parquet").sample(0)) == ["a.png", "Colour?"]


def test_parquet_saved_by_datasets_with_an_image_column(folder):
    import datasets

    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "images": [datasets.Image()]})  # fmt: skip
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>?"}, ANSWER],
            "images": [Image.new("RGB", (16, 16), (9, 8, 7))],
        }
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "hf.parquet"))
    assert read(folder / "hf.parquet").sample(0).first_image().getpixel((0, 0)) == (9, 8, 7)


def test_content_decides_the_hash_not_the_name(write_jsonl, folder):
    first = read(write_jsonl([user("hi")], "one.jsonl"))
    same = read(write_jsonl([user("hi")], "two.jsonl"))
    other = read(write_jsonl([user("ho")], "three.jsonl"))
    assert first.sha256 == same.sha256 != other.sha256


def test_longer_records_have_longer_estimates(write_jsonl, folder):
    Image.new("RGB", (512, 512)).save(folder / "large.png")
    texts = [user("hi"), user("hi " * 500), user("<image>?", images=["a.png"]), user("<image>?", images=["large.png"])]
    short, long, small, large = read(write_jsonl(texts)).lengths
    assert short < long and small < large
    assert json.dumps([int(short)])  # plain numbers


def test_the_advice_for_a_json_array_never_writes_over_the_file(tmp_path):
    path = tmp_path / "array.jsonl"
    path.write_text('[{"messages": []}]')
    with pytest.raises(UserError) as caught:
        read_records(str(path), DataConfig(train=str(path)))
    source, target = str(caught.value).split("jq -c '.[]' ")[1].rstrip(")").split(" > ")
    assert source == str(path) and target != source
