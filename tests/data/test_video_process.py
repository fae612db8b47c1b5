"""The process that decodes videos: its limits, by programs in its place that sleep, end or answer nonsense."""

import os
import time

import pytest

from ds_moe.data.images import RecordError
from ds_moe.data.video_process import VideoProcess
from ds_moe.errors import UserError

READY = """
import json, os, sys, time
settings = json.loads(sys.stdin.buffer.readline())
def write(told, behind=b""):
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\\n" + behind)
    sys.stdout.buffer.flush()
write({"ready": "a program of a test"})
def asked():
    for line in sys.stdin.buffer:
        yield json.loads(line)
"""
GOOD = {"frames": 3, "fps": 2.0, "height": 1, "width": 2}


@pytest.fixture
def process(tmp_path):
    """process(code, ...) -> a VideoProcess whose program is that code."""
    made = []

    def make(code, timeout_s=30.0, memory=2**30):
        program = tmp_path / f"program_{len(made)}.py"
        program.write_text(READY + code)
        made.append(VideoProcess(timeout_s, memory, program))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_one_process_answers_all_questions(process):
    decoder = process(f"""
for question in asked():
    if question["ask"] == "look":
        write({{**{GOOD}, "pid": os.getpid()}})
    else:
        for index in question["indices"]:
            write({{"height": 1, "width": 2}}, bytes([index] * 6))
""")
    first = decoder.look({"path": "a"}, None, "a")
    assert first["frames"] == 3
    for _ in range(2):
        frames = list(decoder.frames({"path": "a"}, None, "a", [1, 4]))
        assert [frame.tolist() for frame in frames] == [[[[1] * 3] * 2], [[[4] * 3] * 2]]
    assert decoder.look({"path": "a"}, None, "a")["pid"] == first["pid"]


def test_the_folder_of_the_trainer_has_no_say_in_what_is_imported(process, tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("")
    monkeypatch.chdir(tmp_path)
    found = "importlib.util.find_spec('av')"
    decoder = process(f"""
import importlib.util
for question in asked():
    write({{**{GOOD}, "path": getattr({found}, "origin", None)}})
""")
    assert decoder.look({"path": "a"}, None, "a")["path"] != str(tmp_path / "av.py")


def test_encoded_bytes_stand_behind_the_question(process):
    decoder = process("""
for line in iter(sys.stdin.buffer.readline, b""):
    data = sys.stdin.buffer.read(json.loads(line)["bytes"])
    write({"frames": len(data), "fps": 1.0, "height": 1, "width": 1})
""")
    assert decoder.look({}, b"\n" * 10_000, "a")["frames"] == 10_000
    assert decoder.look({}, b"", "a")["frames"] == 0


def test_one_that_sleeps_is_ended_and_the_next_file_is_read(process):
    decoder = process(f"""
for question in asked():
    if question["path"] == "bad":
        time.sleep(3600)
    write({GOOD})
""", timeout_s=0.5)  # fmt: skip
    assert decoder.look({"path": "good"}, None, "good")["frames"] == 3
    pid = decoder._worker.pid
    with pytest.raises(RecordError, match=r"^video 'bad' took more than data.video.timeout_s 0.5 to decode \(shorten"):
        decoder.look({"path": "bad"}, None, "bad")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert decoder.look({"path": "good"}, None, "good")["frames"] == 3


@pytest.mark.parametrize(
    ("dies", "how"),
    [("os._exit(3)", "with status 3"), ("os.kill(os.getpid(), 11)", "by signal SIGSEGV"), ("os.abort()", "SIGABRT")],
)
def test_one_that_crashes_costs_its_record(process, dies, how):
    decoder = process(f"""
for question in asked():
    if question["path"] == "bad":
        {dies}
    write({GOOD})
""")
    for _ in range(2):
        with pytest.raises(RecordError, match=rf"^video 'bad' ended its decoder .*{how}"):
            decoder.look({"path": "bad"}, None, "bad")
        assert decoder.look({"path": "good"}, None, "good")["frames"] == 3


def test_one_that_crashes_between_frames(process):
    decoder = process("""
for question in asked():
    write({"height": 1, "width": 1}, bytes(3))
    sys.stdout.buffer.write(b'{"height": 1000, "width": 1000}\\n' + bytes(50))
    sys.stdout.buffer.flush()
    os._exit(1)
""")
    frames = decoder.frames({"path": "a"}, None, "a", [0, 1])
    assert next(frames).shape == (1, 1, 3)
    with pytest.raises(RecordError, match="with status 1"):
        next(frames)


def test_a_reader_that_stops_leaves_nothing_for_the_next_question(process):
    decoder = process(f"""
for question in asked():
    if question["ask"] == "look":
        write({GOOD})
    for index in question.get("indices", ()):
        write({{"height": 1, "width": 2}}, bytes([index] * 6))
""")
    frames = decoder.frames({"path": "a"}, None, "a", [1, 2, 3])
    next(frames)
    frames.close()
    assert decoder.look({"path": "a"}, None, "a") == GOOD


def test_one_that_prints_without_end_is_ended(process):
    decoder = process("while True: os.write(1, b'x' * 65536)")
    with pytest.raises(RecordError, match="ended its decoder writing what is no answer"):
        decoder.look({"path": "a"}, None, "a")


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        *(("look", line) for line in ("no JSON", "[" * 9999, "[1]", '{"frames": 3}', '{"ready": "again"}')),
        ("look", '{"frames": 3, "fps": NaN, "height": 1, "width": 1}'),
        ("look", '{"frames": "3", "fps": 1.0, "height": 1, "width": 1}'),
        ("frames", '{"height": 1, "width": -1}'),
        ("frames", '{"height": 99999, "width": 99999}'),
        ("frames", '{"height": 11, "width": 10}'),  # beyond data.max_pixels
    ],
)
def test_a_line_that_is_no_answer_costs_its_record(process, ask, line):
    decoder = process(f"""
for question in asked():
    os.write(1, {line!r}.encode() + b"\\n" + bytes(330))
""")
    with pytest.raises(RecordError, match=r"^video 'a' ended its decoder writing what is no answer \("):
        if ask == "look":
            decoder.look({"path": "a"}, None, "a")
        else:
            list(decoder.frames({"path": "a", "max_pixels": 100}, None, "a", [0]))


def test_what_libraries_print_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("import os; os.write(1, b'noise'); raise ImportError('a stand-in')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="videos are decoded by PyAV: a stand-in"):
        VideoProcess(5.0, 2**30).look({"path": "a"}, None, "a")


def test_one_that_does_not_read_is_ended(process):
    decoder = process("time.sleep(3600)", timeout_s=0.5)
    with pytest.raises(RecordError, match=r"^video 'a' took more than data.video.timeout_s 0.5"):
        decoder.look({}, bytes(2**20), "a")  # more than a pipe holds


def test_the_reason_that_it_gives_is_the_record_s(process):
    decoder = process('for question in asked(): write({"error": "has no frame (remove it)"})')
    with pytest.raises(RecordError, match=r"^video 'a' has no frame \(remove it\)$"):
        decoder.look({"path": "a"}, None, "a")
    pid = decoder._worker.pid
    with pytest.raises(RecordError, match="has no frame"):
        next(decoder.frames({"path": "a"}, None, "a", [0, 1]))
    assert decoder._worker.pid == pid


def test_without_pyav_the_fix_is_named(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""import sys; print('{"error": "No module named av", "missing": true}', flush=True)""")
    with pytest.raises(UserError, match=r"videos are decoded by PyAV: No module named av \(pip install 'ds-moe\[video"):
        VideoProcess(5.0, 2**30, program).look({"path": "a"}, None, "a")
    program.write_text("raise SystemExit(7)")
    with pytest.raises(UserError, match="does not start: it ended with status 7"):
        VideoProcess(5.0, 2**30, program).look({"path": "a"}, None, "a")


def test_it_ends_with_its_trainer(process):
    decoder = process(f"for question in asked(): write({GOOD})")
    decoder.look({"path": "a"}, None, "a")
    worker = decoder._worker
    worker.stdin.close()  # as it is closed when the trainer ends
    worker.wait(30)
    assert worker.returncode == 0


def test_time_in_which_nobody_reads_is_not_the_decoder_s(process):
    decoder = process("""
for question in asked():
    for index in question["indices"]:
        write({"height": 500, "width": 500}, bytes(750_000))
""", timeout_s=1.0)  # fmt: skip
    for _ in decoder.frames({"path": "a"}, None, "a", range(4)):
        time.sleep(0.4)
