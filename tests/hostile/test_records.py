"""Data files: lines that are no record, files that are no data; each named by file, line and fix."""

import gzip
import os
import pickle
import shutil
import signal
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_moe.config.sections import DataConfig
from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import Chat
from ds_moe.data.records import read_records
from ds_moe.data.sources.jsonl import MAX_LINE
from ds_moe.errors import UserError

from .conftest import line
from .limits import Payload, refusal

MEGABYTE = b"x" * 10**6


def messages(content: bytes) -> bytes:
    """A record whose messages are this JSON."""
    return b'{"messages": ' + content + b"}"


def user(content: bytes) -> bytes:
    return messages(b'[{"role": "user", "content": ' + content + b'}, {"role": "assistant", "content": "a"}]')


def answer(keys: bytes) -> bytes:
    """A record whose answer also has these keys."""
    return messages(b'[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", ' + keys + b"}]")


def keyed(keys: bytes, content: bytes = b"?") -> bytes:
    """A record with these keys beside its messages."""
    return user(b'"' + content + b'"')[:-1] + b", " + keys + b"}"


def boxed(boxes: bytes) -> bytes:
    """A record with one image, one placeholder and these boxes."""
    return keyed(b'"images": ["good.png"], "objects": {"bbox": ' + boxes + b"}", b"<image><bbox>")


# name -> (line 2 of a file whose other lines are good, what its error says)
LINES = {
    "cut off": (line()[:40], "broken JSON"),
    "two records": (line() + line(), "broken JSON: Extra data"),
    "lines that end as on an old Mac": (line() + b"\r" + line(), "broken JSON: Extra data"),
    "NUL bytes": (b"\0" * 64, "broken JSON"),
    "a NUL in a text": (user(b'"a\0b"'), "broken JSON: Invalid control character"),
    "a lone surrogate": (user(b'"\\ud800"'), "message 1: text holds a lone surrogate"),
    "no UTF-8": (user(b'"\xff"'), "not UTF-8"),
    "UTF-16": (line().decode().encode("utf-16"), "not UTF-8"),
    "a pickle": (pickle.dumps({"messages": []}, protocol=5), "not UTF-8"),
    "nested 100,000 deep": (messages(b"[" * 100_000), "broken JSON: maximum recursion depth"),
    "closed 100,000 deep": (messages(b"[" * 100_000 + b"]" * 100_000), "broken JSON: maximum recursion depth"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "broken JSON: maximum recursion depth"),
    "a number of 5,000 digits": (messages(b"9" * 5000), "broken JSON: Exceeds the limit"),
    "a key twice": (b'{"messages": [], "messages": []}', "the key 'messages' stands twice"),
    "a key twice, deeper": (messages(b'[{"role": "user", "role": "system"}]'), "the key 'role' stands twice"),
    "NaN": (messages(b"NaN"), "'messages' is a number, not a list"),
    "Infinity as text": (user(b"Infinity"), "content is a number, not a string"),
    "true as a turn": (messages(b"[true]"), "message 1 is true or false, not an object"),
    "null": (b"null", "a record is null, not an object"),
    "a role of a megabyte": (messages(b'[{"role": "' + MEGABYTE + b'", "content": ""}]'), "unknown role 'xxx"),
    "a key of a megabyte": (
        messages(b'[{"role": "user", "content": "", "' + MEGABYTE + b'": 1}]'),
        "which is not read",
    ),
    "a part of a megabyte": (user(b'[{"type": "' + MEGABYTE + b'"}]'), "content part of type 'xxx"),
    "an image of a megabyte": (line("x" * 10**6), "missing image 'xxx"),
    # images that a record names where none is read
    "a path in another column": (keyed(b'"image_path": "good.png"'), "'image_path' names an image ('good.png'), and"),
    "a list of them": (keyed(b'"Screenshots": [{"path": "A.JPEG"}]'), "'Screenshots' names an image ('A.JPEG'), and"),
    "as datasets' image folders do": (keyed(b'"file_name": "good.webp"'), "'file_name' names an image"),
    "an address": (user(b'[{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]'), "is a URL"),
    "an address without one": (user(b'[{"type": "image_url"}]'), "an image is None, not a path"),
    "a resolution": (
        user(b'[{"type": "image_url", "image_url": {"url": "good.png", "detail": "low"}}]'),
        "message 1: the image_url has 'detail', which is not read (remove it)",
    ),
    # thoughts, tools and weights
    "a weight of a half": (answer(b'"weight": 0.5'), "message 2: 'weight' is 0.5 (write 0 or 1"),
    "a weight of NaN": (answer(b'"weight": NaN'), "message 2: 'weight' is nan"),
    "a weight as text": (answer(b'"weight": "1"'), "message 2: 'weight' is '1'"),
    "two weights": (answer(b'"weight": 1, "loss": 0'), "message 2 has 'weight' and 'loss'"),
    "a question to learn": (
        messages(b'[{"role": "user", "content": "q", "loss": true}, {"role": "assistant", "content": "a"}]'),
        "message 1: 'loss' is True on a user turn",
    ),
    "no answer to learn": (answer(b'"loss": false'), "no answer is learned: all have the weight 0"),
    "a thought that is a list": (answer(b'"reasoning_content": ["x"]'), "message 2: 'reasoning_content' is ['x']"),
    "half a surrogate in a thought": (answer(b'"reasoning_content": "\\ud800"'), "message 2: text holds a lone surr"),
    "a thought of a question": (
        messages(b'[{"role": "user", "content": "q", "reasoning_content": "x"}]'),
        "message 1 has 'reasoning_content', which is not read",
    ),
    "calls that are no list": (answer(b'"tool_calls": {"name": "f"}'), "message 2: 'tool_calls' is {'name': 'f'}"),
    "a call without a name": (answer(b'"tool_calls": [{"arguments": {}}]'), "message 2: tool call 1 has no 'name'"),
    "a call of something else": (
        answer(b'"tool_calls": [{"type": "shell", "function": {"name": "f"}}]'),
        "message 2: tool call 1 is no call of a function",
    ),
    "a call with a key more": (
        answer(b'"tool_calls": [{"function": {"name": "f", "run": "rm"}}]'),
        "message 2: tool call 1 has 'run', which is not read",
    ),
    "arguments that are no JSON": (
        answer(b'"tool_calls": [{"name": "f", "arguments": "{"}]'),
        "message 2: tool call 1: 'arguments' is a string that is no JSON",
    ),
    "arguments that are a list": (
        answer(b'"tool_calls": [{"name": "f", "arguments": [1]}]'),
        "message 2: tool call 1: 'arguments' is [1]",
    ),
    "arguments 400 deep": (
        answer(b'"tool_calls": [{"name": "f", "arguments": {"x": ' + b"[" * 400 + b"]" * 400 + b"}}]"),
        "message 2: tool call 1 is nested more than 64 deep",
    ),
    "arguments 100,000 deep, as text": (
        answer(b'"tool_calls": [{"name": "f", "arguments": "' + b"[" * 100_000 + b'"}]'),
        "message 2: tool call 1: 'arguments' is a string that is no JSON: maximum recursion depth",
    ),
    "NaN among arguments": (
        answer(b'"tool_calls": [{"name": "f", "arguments": {"x": NaN}}]'),
        "message 2: tool call 1 holds a number that is not finite",
    ),
    "a surrogate among arguments": (
        answer(b'"tool_calls": [{"name": "f", "arguments": {"\\udfff": 1}}]'),
        "message 2: tool call 1: text holds a lone surrogate",
    ),
    "tools of a number": (b'{"tools": 7, ' + line()[1:], "'tools' is 7, not a list"),
    "a tool without a name": (b'{"tools": [{"function": {}}], ' + line()[1:], "tool 1 has no name"),
    "a result that nothing asked for": (
        messages(b'[{"role": "user", "content": "q"}, {"role": "tool", "content": "7"},'
                 b'{"role": "assistant", "content": "a"}]'),
        "a tool turn behind a user turn",
    ),
    "a result with an id of a number": (
        messages(b'[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},'
                 b'{"role": "tool", "content": "7", "tool_call_id": 7}]'),
        "message 3: 'tool_call_id' is 7, not a string",
    ),
    # placeholders, boxes and parts
    "a path of a megabyte in a text": (user(b'"<img>' + MEGABYTE + b'</img>?"'), "missing image 'xxx"),
    "a path in a text that leaves": (
        user(b'"<img>../secret.png</img>?"'),
        "image '../secret.png' leaves the data root",
    ),
    "a URL in a text": (user(b'"<img>http://169.254.169.254/</img>?"'), "is a URL (download it below the data root)"),
    "300,000 open tags": (user(b'"' + b"<img>" * 300_000 + b'"'), "message 1: the placeholder <img> has no path"),
    "300,000 images in a text": (user(b'"' + b"<image>" * 300_000 + b'"'), "300000 <image> placeholders for 0 images"),
    "300,000 boxes in a text": (user(b'"' + b"<bbox>" * 300_000 + b'"'), "300000 <bbox> placeholders for 0 entries"),
    "a part with a key of a megabyte": (
        user(b'[{"type": "text", "text": "a", "' + MEGABYTE + b'": 1}]'),
        "message 1: the text part has 'xxx",
    ),
    "an image part of a deep value": (
        user(b'[{"type": "image", "image": {"path": {"path": {"path": 1}}}}]'),
        "an image is {'path': {'path': 1}}, not a path",
    ),
    "literal of a megabyte": (keyed(b'"literal": ["' + MEGABYTE + b'"]'), "'literal' names 'xxx"),
    "literal of other things": (keyed(b'"literal": [{"<bbox>": 1}]'), "'literal' is [{'<bbox>': 1}], not a list of"),
    "a box of NaN": (boxed(b"[[NaN, 1]]"), "'objects.bbox', [nan, 1], holds a number that is not finite"),
    "a box of infinities": (boxed(b"[[Infinity, -Infinity]]"), "[inf, -inf], holds a number that is not finite"),
    "a box beyond all images": (boxed(b"[[1e308, 1]]"), "holds a number that is not finite"),
    "a box of 300,000 numbers": (boxed(b"[[" + b"1," * 300_000 + b"1]]"), "is no point and no box"),
    "a box 900 deep": (boxed(b"[" * 900 + b"]" * 900), "is no point and no box"),
    "50,000 boxes": (boxed(b"[" + b"[1, 1]," * 50_000 + b"[1, 1]]"), "1 <bbox> placeholders for 50001 entries"),
    "image numbers as floats": (boxed(b'[[1, 1]], "image_id": [0.0]'), "'objects.image_id' is [0.0] for 1 boxes"),
    "an image number beyond 64 bits": (boxed(b'[[1, 1]], "image_id": [36893488147419103232]'), "'objects.image_id' is"),
    "sizes of a wrong type": (boxed(b'[[1, 1]], "width": {"a": 1}'), "'objects.width' is {'a': 1}, but the images"),
    "a name with half a character": (boxed(b'[], "ref": ["\\ud800"]'), "'objects.ref' holds a lone surrogate"),
    "an endless header": (
        keyed(b'"images": ["endless.ppm"], "objects": {"bbox": [[1, 1]]}', b"<image><bbox>"),
        "cannot be opened: a PPM header without a size",
    ),
}  # fmt: skip


# What only the chat template shows: the tiny model's has no thoughts and no tools.
SHAPES = {
    "a thought that is not shown": (answer(b'"reasoning_content": "x"'), "leaves out the 'reasoning_content' of mess"),
    "a call that is not shown": (answer(b'"tool_calls": [{"name": "f"}]'), "leaves out the tool calls of message 2"),
    "a tool that is not shown": (b'{"tools": [{"name": "f"}], ' + line()[1:], "leaves out 'tools'"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_a_record_that_the_template_cannot_show_is_named(stream, folder, name, workers):
    content, says = SHAPES[name]
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join([line(), content, line()]))
    loading = iter(stream(path, num_workers=workers))
    next(loading)
    refusal(lambda: next(loading), f"{path}:2: ", says)
    rest = stream(path, on_bad_record="skip", num_workers=workers)
    assert [batch.real_B.tolist() for [batch] in islice(rest, 3)] == [[True], [False], [True]]
    assert [bad.where for bad in rest.skipped] == [f"{path}:2"]


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_is_named(stream, folder, name):
    content, says = LINES[name]
    (folder / "endless.ppm").write_bytes(b"P6" + b" " * 10**5)
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join([line(), content, line(), b""]))
    message = refusal(lambda: stream(path), f"{path}:2: ", says, "data.on_bad_record: skip goes on without")
    assert message.rindex("(") > message.index(":2: ")  # the fix
    rest = stream(path, on_bad_record="skip")
    assert [bad.where for bad in rest.skipped] == [f"{path}:2"] and rest.steps_per_epoch == 2


def table(folder, **columns):
    """A Parquet file of one good record, or of these columns."""
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]
    pq.write_table(pa.table(columns or {"messages": [turns]}), folder / "good.parquet")
    return (folder / "good.parquet").read_bytes()


def pickled_type(folder, canary) -> bytes:
    """A Parquet file with an extension type whose definition is a pickle, as older versions of Arrow took them."""
    about = {"ARROW:extension:name": "arrow.py_extension_type"}
    about |= {"ARROW:extension:metadata": pickle.dumps(Payload(canary))}
    schema = pa.schema([pa.field("messages", pa.int64(), metadata=about)])
    pq.write_table(pa.table({"messages": [1]}, schema=schema), folder / "good.parquet")
    return (folder / "good.parquet").read_bytes()


# name -> (file name, content or what makes it, what the error says)
FILES = {
    "missing": ("train.jsonl", lambda path, canary: None, "does not exist"),
    "a folder": ("train.jsonl", lambda path, canary: path.mkdir(), "is no regular file"),
    "a pipe": ("train.jsonl", lambda path, canary: os.mkfifo(path), "is no regular file"),
    "a device": ("train.jsonl", lambda path, canary: path.symlink_to("/dev/zero"), "is no regular file"),
    "a dangling link": ("train.jsonl", lambda path, canary: path.symlink_to("nowhere"), "does not exist"),
    "a link to itself": ("train.jsonl", lambda path, canary: path.symlink_to(path), "does not exist"),
    "empty": ("train.jsonl", b"", "has no record to use (0 bad)"),
    "blank lines": ("train.jsonl", b"\n \n\r\n", "has no record to use (0 bad)"),
    "bad records only": ("train.jsonl", b"{\n", ":1: broken JSON"),
    "a JSON array": ("train.json", b"[" + line() + b"]", ":1: a JSON array, not one record a line"),
    "compressed": ("train.jsonl", gzip.compress(line()), ":1: broken JSON: not UTF-8"),
    "one endless line": (
        "train.jsonl",
        lambda path, canary: (path.touch(), os.truncate(path, 4 * MAX_LINE)),
        f":1: a line of more than {MAX_LINE} bytes",
    ),
    "of another kind": ("train.pkl", pickle.dumps([1]), "is neither .jsonl nor .parquet"),
    "a pickle named .parquet": ("train.parquet", pickle.dumps([1]), "is not a Parquet file that can be read"),
    "an empty Parquet file": ("train.parquet", b"", "is not a Parquet file that can be read"),
    "a Parquet file cut off": (
        "train.parquet",
        lambda path, canary: path.write_bytes(table(path.parent)[:-40]),
        "is not a Parquet file that can be read",
    ),
    "a Parquet file with zeros within": (
        "train.parquet",
        lambda path, canary: path.write_bytes(table(path.parent)[:20].ljust(600, b"\0") + table(path.parent)[600:]),
        "is not a Parquet file that can be read",
    ),
    "a Parquet file of something else": (
        "train.parquet",
        lambda path, canary: path.write_bytes(table(path.parent, price=[1.0, float("nan")])),
        ":1: the record has neither 'messages' nor 'conversations'",
    ),
    "a Parquet file with a pickled type": (
        "train.parquet",
        lambda path, canary: path.write_bytes(pickled_type(path.parent, canary)),
        ":1: 'messages' is a number, not a list",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_data_is_refused(stream, folder, canary, name):
    file, content, says = FILES[name]
    path = folder / file
    path.write_bytes(content) if isinstance(content, bytes) else content(path, canary)
    refusal(lambda: stream(path), path, says)


def test_good_files_pass(stream, folder):
    """Positive control: line ends of Windows, a byte order mark, no last line end, keys that are not read."""
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line("good.png") + b'\r\n\r\n{"id": NaN,' + line()[1:])
    (folder / "train.parquet").write_bytes(table(folder))
    for name, count in {"train.jsonl": 2, "train.parquet": 1}.items():
        assert len(list(islice(stream(folder / name), count))) == count


def test_the_payload_runs_where_pickles_are_loaded(tmp_path):
    """Positive control of all tests with a canary."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "fired")))
    assert (tmp_path / "fired").is_dir()


# --- in a loading process: whatever goes wrong there is one line here, too


class Failing(Chat):
    """Conversations whose encoding fails in this way."""

    def __init__(self, how):
        self.how = how

    def encode(self, *arguments):
        self.how()


def refuse():
    raise UserError("model: its chat template drops turns (use another one)")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (refuse, "model: its chat template drops turns (use another one)"),
        (die, "data.num_workers: a loading process died"),
    ],
    ids=["a UserError", "killed"],
)
def test_a_loading_process_never_fails_in_silence(stream, folder, how, says):
    (folder / "train.jsonl").write_bytes(line())
    loading = iter(stream(folder / "train.jsonl", Failing(how), num_workers=1))
    refusal(lambda: next(loading), says)


def test_a_record_that_breaks_after_the_check_is_skipped_in_a_loading_process(stream, folder):
    shutil.copy(folder / "good.png", folder / "gone.png")
    (folder / "train.jsonl").write_bytes(line("gone.png") + b"\n" + line())
    made = stream(folder / "train.jsonl", num_workers=1, on_bad_record="skip")
    (folder / "gone.png").unlink()
    first, second = (batch.real_B.tolist() for [batch] in islice(made, 2))
    assert (first, second) == ([False], [True])
    assert [bad.where for bad in made.skipped] == [f"{folder}/train.jsonl:1"]


def test_record_errors_are_values_of_the_data_and_never_end_the_reading(folder):
    """Negative control: what is no `RecordError` is not passed over, whatever `on_bad_record` says."""

    class Estimated(Chat):
        def estimate(self, sample, max_pixels):
            raise RecordError("bad") if sample.last_question() == "bad" else KeyError("ours")

    (folder / "train.jsonl").write_bytes(line(text="bad") + b"\n" + line(text="ours"))
    options = DataConfig(train="x", on_bad_record="skip")
    with pytest.raises(KeyError):
        read_records(str(folder / "train.jsonl"), options, record_kind=Estimated())
