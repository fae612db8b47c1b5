"""Grounding as ms-swift writes it, and placeholders: what is filled in, and that nothing is left as text."""

import io
import json
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ds_moe.config.sections import DataConfig
from ds_moe.data.chat import parse_record
from ds_moe.data.encode import encode
from ds_moe.data.grounding import PARTS
from ds_moe.data.images import ImageSource, RecordError, load_image, shown_size
from ds_moe.data.records import read_records
from ds_moe.tasks.gate.records import Requests
from ds_moe.tasks.rl.rollout_record import parse_rollout

ORIENTATION = 0x0112


def grounded(question, answer, images=("room.png",), **objects):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), "objects": objects}


@pytest.fixture
def parsed(folder):
    """parsed(record) -> texts of its turns; room.png is 64 x 64, wide.png 400 x 100."""
    Image.new("RGB", (64, 64)).save(folder / "room.png")
    Image.new("RGB", (400, 100)).save(folder / "wide.png")
    return lambda record: [turn.text for turn in parse_record(record, "test:1", folder).turns]


def test_names_and_boxes_fill_their_own_placeholders(parsed):
    """The first two lines of the public reports; at e49d3ff the answer that was learned was `<bbox>`."""
    answer = '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]'
    record = grounded("<image>Where is the <ref-object>?", answer, ref=["lamp", "lamp"], bbox=[[12, 9, 40, 44]])
    assert parsed(record) == ["Where is the lamp?", '[{"bbox_2d": [188, 141, 625, 688], "label": "lamp"}]']
    record = grounded("<image>Where is the <ref-object>?", "<bbox>", ref=["chair"], bbox=[[5, 20, 30, 60]])
    assert parsed(record) == ["Where is the chair?", "[78, 312, 469, 938]"]


def swift(box, width, height):
    """The rule of ms-swift's `normalize_bbox` under norm1000, as its template for Qwen3-VL has it."""
    return [int(round(x / side * 1000)) for x, side in zip(box, (width, height) * 2, strict=False)]


@pytest.mark.parametrize("box", [[331.5, 76.4, 353.5, 99.8], [90.9, 16.8, 135, 21.2], [0, 0, 400, 100], [61.5, 22.6]])
def test_coordinates_of_an_image_that_is_not_square(parsed, box):
    """In thousandths of its width and of its height, which are not the same number of pixels."""
    assert parsed(grounded("<image>?", "<bbox>", ["wide.png"], bbox=[box])) == ["?", str(swift(box, 400, 100))]


def test_resizing_an_image_changes_no_coordinate(parsed, folder, processor):
    """wide.png has 40,000 pixels, ten times what the processor lets through."""
    sample = parse_record(grounded("<image>?", "<bbox>", ["wide.png"], bbox=[[100, 50, 200, 100]]), "test:1", folder)
    encoded = encode(sample, processor, 512, 10**6)
    assert encoded.image_grid_thw is not None
    _, rows, columns = (encoded.image_grid_thw[0] * 4).tolist()  # pixels after resizing
    assert columns < 400 and rows < 100
    assert processor.tokenizer.decode(encoded.labels[encoded.labels >= 0]) == "[250, 500, 500, 1000]<|im_end|>"


def test_norm1_image_id_points_reversed_corners_and_sizes(parsed):
    both = ["room.png", "wide.png"]
    boxes = {"bbox": [[0.1, 0.2, 0.5, 1], [0.5, 0.25]], "bbox_type": "norm1"}
    assert parsed(grounded("<image>?", "<bbox><bbox>", **boxes))[1] == "[100, 200, 500, 1000][500, 250]"
    boxes = {"bbox": [[32, 16], [200, 50]], "image_id": [0, 1], "width": [64, 400], "height": [64, 100]}
    assert parsed(grounded("<image><image>?", "<bbox> <bbox>", both, **boxes))[1] == "[500, 250] [500, 500]"
    assert parsed(grounded("<image>?", "<bbox>", bbox=[[32, 64, 16, 0]]))[1] == "[250, 0, 500, 1000]"
    assert parsed(grounded("<image><image>?", "<bbox>", both, bbox=[[32, 16]]))[1] == "[500, 250]"  # of the first


def test_typed_parts_system_and_several_turns_share_one_order(parsed):
    turns = [
        {"role": "system", "content": "Find <ref-object>."},
        {"role": "user", "content": [{"type": "image", "image": "room.png"}, {"type": "text", "text": "<bbox>?"}]},
        {"role": "assistant", "content": "<ref-object>"},
        {"role": "user", "content": "And <ref-object>?"},
        {"role": "assistant", "content": [{"type": "text", "text": "<bbox>"}]},
    ]
    objects = {"ref": ["a", "b", "c"], "bbox": [[0, 0], [64, 64]]}
    made = parsed({"messages": turns, "objects": objects})
    assert made == ["Find a.", "[0, 0]?", "b", "And c?", "[1000, 1000]"]


def test_a_name_that_looks_like_a_placeholder_stays_as_it_is(parsed):
    """Negative control: what was filled in is never filled again."""
    record = grounded("<image><ref-object>?", "<bbox>", ref=["<bbox> and <video>"], bbox=[[0, 0]])
    assert parsed(record) == ["<bbox> and <video>?", "[0, 0]"]


def turned(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (40, 20)).save(stream, form, exif=exif)
    return stream.getvalue()


def late(png: bytes) -> bytes:
    """The PNG with its EXIF data behind the pixels, where they may stand too."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", png[start : start + 4])[0]
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


TURNED = {f"{form} {turn}": turned(form, turn) for form in ("JPEG", "PNG", "WEBP", "TIFF") for turn in range(1, 9)}
TURNED |= {f"late PNG {turn}": late(turned("PNG", turn)) for turn in (1, 3, 6, 8)}


@pytest.mark.parametrize("name", TURNED)
def test_boxes_are_of_the_image_as_it_is_shown(folder, name):
    source = ImageSource(name, data=TURNED[name])
    assert shown_size(source) == load_image(source, 10**6).size
    record = grounded("<image>?", "<bbox>", [{"bytes": TURNED[name]}], bbox=[[10, 10]])
    sideways = int(name.split()[-1]) > 4
    assert parse_record(record, "test:1", folder).answer == ("[500, 250]" if sideways else "[250, 500]")


def test_the_size_of_a_png_without_exif_decodes_no_pixel(folder):
    """60 million pixels whose data are missing."""
    head = struct.pack(">IIBBBBB", 10_000, 6_000, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + head, b"IDAT" + zlib.compress(b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    assert shown_size(ImageSource("large", data=data)) == (10_000, 6_000)


def test_coordinates_stay_within_their_range(parsed):
    assert PARTS == 1000
    assert parsed(grounded("<image>?", "<bbox>", bbox=[[0, 0, 64, 64]]))[1] == "[0, 0, 1000, 1000]"
    assert parsed(grounded("<image>?", "<bbox>", bbox=[[-0.01, 0, 64.02, 64]]))[1] == "[0, 0, 1000, 1000]"
    with pytest.raises(RecordError, match="reaches beyond its image of 64x64"):
        parsed(grounded("<image>?", "<bbox>", bbox=[[0, 0, 65, 64]]))


def test_parquet_with_the_columns_that_arrow_fills(folder):
    """One row with boxes, one without: Arrow gives both all fields."""
    Image.new("RGB", (64, 64)).save(folder / "room.png")
    rows = [
        grounded("<image>?", "<bbox>", bbox=[[16.0, 32.0]], ref=None, image_id=None),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}], "tools": "[]"},
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    columns["objects"][1] = {"bbox": None, "ref": None, "image_id": None}
    columns |= {"videos": [None, []], "rejected_response": [None, None]}
    pq.write_table(pa.table(columns), folder / "grounded.parquet")
    records = read_records(str(folder / "grounded.parquet"), DataConfig(train="x"))
    assert [records.sample(index).answer for index in range(2)] == ["[250, 500]", "yes"]


def test_thoughts_and_calls_share_the_order_of_the_texts(folder):
    Image.new("RGB", (64, 64)).save(folder / "room.png")
    record = grounded("<image><ref-object>?", "<bbox>", ref=["a", "b", "c"], bbox=[[0, 0], [64, 64]])
    call = {"type": "function", "function": {"name": "tap", "arguments": {"at": "<bbox>", "what": ["<ref-object>"]}}}
    record["messages"][1] |= {"reasoning_content": "I see <ref-object>.", "tool_calls": [call]}
    turn = parse_record(record, "test:1", folder).turns[1]
    assert (turn.reasoning, turn.text) == ("I see b.", "[0, 0]")
    assert turn.calls[0]["function"] == {"name": "tap", "arguments": {"at": "[1000, 1000]", "what": ["c"]}}
    for key, value in {
        "reasoning_content": "<video>",
        "tool_calls": [{"name": "a", "arguments": {"<image>": 1}}],
    }.items():
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", key: value}]
        with pytest.raises(RecordError, match=r"message 2: <(video|image)> in a thought or a call \(remove it"):
            parse_record({"messages": turns}, "test:1", folder)
        assert parse_record({"messages": turns, "literal": ["<video>", "<image>"]}, "test:1", folder).turns[1]


# --- other placeholders


def test_an_image_between_tags_is_read_in_its_place(parsed, folder):
    """Qwen-VL's first dialect; at e49d3ff it was text, and the image was not read."""
    content = "Picture 1: <img>room.png</img>\nPicture 2: <img>wide.png</img>\nWhat is there?"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "<bbox>"}]
    sample = parse_record({"messages": turns, "objects": {"bbox": [[200, 50]], "image_id": [1]}}, "test:1", folder)
    parts = [part.name if isinstance(part, ImageSource) else part for part in sample.turns[0].parts]
    assert parts == ["Picture 1: ", "room.png", "\nPicture 2: ", "wide.png", "\nWhat is there?"]
    assert sample.answer == "[500, 500]"


LITERAL = ["<image>", "<video>", "<audio>", "<bbox>", "<ref-object>", "<image 1>", "<img>", "<start-image>"]


@pytest.mark.parametrize("name", LITERAL)
def test_a_literal_placeholder_needs_to_be_named(parsed, name):
    text = f"The tag {name} is text."
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    with pytest.raises(RecordError, match=rf'"literal": \["{name}"\]'):
        parsed({"messages": turns})
    assert parsed({"messages": turns, "literal": [name]}) == [text, text]


def test_text_that_only_resembles_a_placeholder_is_text(parsed):
    """Negative control."""
    text = "<img src='a.png'> <video controls></video> <ref>a</ref> <box>(1,2)</box> <images> <im> a < image >"
    assert (
        parsed({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}) == [text] * 2
    )


# --- keys


def typed(*parts, **columns):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}], **columns}


HI = {"type": "text", "text": "Hi"}


def test_absent_values_say_nothing(parsed):
    for key, values in {
        "tools": (None, [], "[]", "null", ""),
        "objects": (None, {}, {"ref": [], "bbox": []}, {"ref": None, "bbox": None, "bbox_type": None}),
        "videos": (None, []),
        "audios": (None, []),
        "rejected_response": (None, ""),
        "literal": (None, []),
    }.items():
        for value in values:
            assert parsed(typed(HI, **{key: value})) == ["Hi", "yes"], (key, value)
    assert parsed(typed(HI | {"image": None, "max_pixels": None})) == ["Hi", "yes"]
    assert parsed(typed({"type": "image", "text": None, "image": "room.png"}, HI)) == ["Hi", "yes"]
    assert parsed(typed({"type": "image", "image": None}, HI, images=["room.png"])) == ["Hi", "yes"]
    assert parsed(typed({"type": "image"}, HI, images=[], image="room.png")) == ["Hi", "yes"]


def test_an_empty_system_turn_is_what_the_template_makes_of_it(folder, processor):
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a"},
    ]
    encoded = encode(parse_record({"messages": turns}, "test:1", folder), processor, 512, 1)
    rendered = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    assert rendered.startswith("<|im_start|>system\n<|im_end|>\n")
    assert processor.tokenizer.decode(encoded.input_ids) == rendered


def test_a_gate_and_a_rollout_read_the_same_records(folder):
    Image.new("RGB", (64, 64)).save(folder / "room.png")
    record = grounded("<image>Where is the <ref-object>?", "<bbox>", ref=["lamp"], bbox=[[16, 32]])
    asked = {**record, "messages": record["messages"][:1], "objects": {"ref": ["lamp"]}}
    assert Requests(["a"]).parse(asked, "test:1", folder).last_question() == "Where is the lamp?"
    scored = {**record, "literal": [], "logprobs": [-0.5], "advantage": 1.0}
    assert parse_rollout(scored, "test:1", folder).prompt.answer == "[250, 500]"
    tokens = {"tokens": [1, 2], "completion_mask": [0, 1], "logprobs": [-0.5], "advantage": 1.0}
    with pytest.raises(RecordError, match="'objects' beside 'tokens'"):
        parse_rollout({**tokens, "objects": {"bbox": [[1, 2]]}}, "test:1", folder)


REFUSED = {
    "objects of a wrong type": (grounded("<image>?", "a") | {"objects": [1]}, "'objects' is [1], not an object"),
    "an unknown key": (grounded("<image>?", "a", points=[[1, 2]]), "'objects' has 'points', which is not read"),
    "no objects": (grounded("<image>?", "<bbox>"), "1 <bbox> placeholders for 0 entries of 'objects.bbox'"),
    "too many boxes": (grounded("<image>?", "<bbox>", bbox=[[1, 1]] * 2), "1 <bbox> placeholders for 2 entries"),
    "too few names": (grounded("<image><ref-object>?", "<ref-object>", ref=["a"]), "2 <ref-object> placeholders for 1"),
    "a name of a wrong type": (grounded("<image>?", "<ref-object>", ref=[5]), "entry 1 of 'objects.ref' is 5, no name"),
    "an empty name": (grounded("<image>?", "<ref-object>", ref=[" "]), "entry 1 of 'objects.ref' is ' ', no name"),
    "names of a wrong type": (grounded("<image>?", "<ref-object>", ref="a"), "'objects.ref' is 'a', not a list"),
    "three numbers": (grounded("<image>?", "<bbox>", bbox=[[1, 2, 3]]), "[1, 2, 3], is no point and no box"),
    "a box of text": (grounded("<image>?", "<bbox>", bbox=[["1", "2"]]), "is no point and no box"),
    "a box of booleans": (grounded("<image>?", "<bbox>", bbox=[[True, False]]), "is no point and no box"),
    "a flat box": (grounded("<image>?", "<bbox>", bbox=[1, 2, 3, 4]), "entry 1 of 'objects.bbox', 1, is no point"),
    "below zero": (grounded("<image>?", "<bbox>", bbox=[[-1, 2]]), "reaches beyond its image of 16x16"),
    "thousandths as pixels": (grounded("<image>?", "<bbox>", bbox=[[1, 2, 900, 900]]), "reaches beyond its image"),
    "pixels as norm1": (grounded("<image>?", "<bbox>", bbox=[[1, 2]], bbox_type="norm1"), "beyond its image of 1x1"),
    "an unknown unit": (grounded("<image>?", "<bbox>", bbox=[[1, 2]], bbox_type="none"), "bbox_type' is 'none'"),
    "an image that is not there": (
        grounded("<image>?", "<bbox>", bbox=[[1, 2]], image_id=[1]),
        "image_id' is [1] for 1",
    ),
    "an image from behind": (grounded("<image>?", "<bbox>", bbox=[[1, 2]], image_id=[-1]), "image_id' is [-1] for 1"),
    "too few images": (grounded("<image>?", "<bbox>", bbox=[[1, 2]], image_id=[]), "image_id' is [] for 1 boxes"),
    "another size": (grounded("<image>?", "<bbox>", bbox=[[1, 2]], width=[640]), "'objects.width' is [640], but the"),
    "no image": (
        {"messages": grounded("?", "<bbox>")["messages"], "objects": {"bbox": [[1, 2]]}},
        "'objects.bbox' in a record without an image",
    ),
    "a video tag": (typed(HI | {"text": "<video>What?"}), "1 <video> placeholders for 0 videos"),
    "an audio tag": (typed(HI | {"text": "<audio>What?"}), "message 1: the placeholder <audio> is not read"),
    "a numbered image": (typed(HI | {"text": "<image 1>?"}), "message 1: the placeholder <image 1> is not read"),
    "an open tag": (typed(HI | {"text": "<img>a.png?"}), "message 1: the placeholder <img> has no path"),
    "a path that leaves": (typed(HI | {"text": "<img>../x.png</img>"}), "image '../x.png' leaves the data root"),
    "a path of an answer": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<img>room.png</img>"}]},
        "message 2: an image in the assistant turn",
    ),
    "audios": (typed(HI, audios=["a.wav"]), "'audios' is not supported (only images, videos and text are"),
    "a rejected answer": (
        typed(HI, rejected_response="no"),
        "'rejected_response' is not supported (task dpo learns pairs",
    ),
    "settings of one record": (typed(HI, chat_template_kwargs={"max_pixels": 1}), "'chat_template_kwargs' is not"),
    "two kinds of images": (typed(HI, images=["room.png"], image="room.png"), "both 'images' and 'image'"),
    "a size of one image": (
        typed({"type": "image", "image": "room.png", "max_pixels": 9}),
        "message 1: the image part has 'max_pixels', which is not read (remove it; the model's",
    ),
    "an image in a text": (typed(HI | {"image": "room.png"}), "message 1: the text part has 'image', which is not"),
    "a text in an image": (typed({**HI, "type": "image"}), "message 1: the image part has 'text', which is not read"),
    "a path by another key": (typed({"type": "image", "path": "room.png"}), "message 1: the image part has 'path'"),
    "a size beside a path": (
        typed({"type": "image"}, images=[{"path": "room.png", "max_pixels": 9}]),
        "an image has 'max_pixels', which is not read",
    ),
    "two names of a role": (
        {"messages": [{"from": "human", "role": "user", "value": "?"}, {"role": "assistant", "content": "a"}]},
        "message 1 has both 'from' and 'role'",
    ),
    "literal of a wrong type": (typed(HI, literal="<bbox>"), "'literal' is '<bbox>', not a list of placeholders"),
    "literal text": (typed(HI, literal=["<b>"]), "'literal' names '<b>', which is no placeholder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(folder, write_jsonl, name):
    record, says = REFUSED[name]
    Image.new("RGB", (16, 16)).save(folder / "room.png")
    path = write_jsonl([typed(HI), json.dumps(record)])
    [bad] = read_records(str(path), DataConfig(train="x", on_bad_record="skip")).bad
    assert bad.where == f"{path}:2" and says in bad.reason, bad.reason
    assert bad.reason.endswith(")") and "\n" not in bad.reason
