"""The benchmark of loading: what it times is right, and a wrong loader is not timed."""

import json
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from tools.bench.data import bench
from tools.bench.data.loaders import cpu_seconds, digest, digests
from tools.bench.data.plot import draw
from tools.bench.mix.records import drawn, read_screens, write_records


def test_digests_tell_samples_apart_whatever_their_padding():
    ids, pixels = torch.arange(7), torch.arange(60.0).view(12, 5)
    batch = {
        "input_ids": torch.tensor([[0, 1, 2, 9], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]]),
        "pixel_values": pixels,
    }
    expected = [digest(ids[:3], pixels[:4]), digest(ids[3:], pixels[4:])]
    assert list(digests(batch)) == expected
    assert list(digests(batch | {"pixel_values": pixels + 1e-6})) != expected


def test_images_are_written_in_both_forms(tmp_path):
    for form in bench.FORMS:
        file = write_records(drawn(read_screens(), 3, 0), tmp_path / form, 0, form)
        [name, *_] = [json.loads(line)["messages"][0]["content"][0]["image"] for line in file.read_text().splitlines()]
        with Image.open(file.parent / name) as image:
            assert image.format == form.upper()


ROUNDS = [
    {
        name: {"samples": 100, "bytes": 2e8, "seconds": seconds, "cpu_seconds": 2 * seconds}
        for name, seconds in (("this", own), ("hf", its))
    }
    for own, its in ((1.0, 2.0), (2.0, 2.0), (1.0, 4.0))
]


def test_speeds_are_compared_round_by_round_and_drawn(tmp_path, capsys):
    results = [bench.result("png", 1, name, ROUNDS) for name in ("this", "hf")]
    assert [one["median"] for one in results] == [100, 50] and results[1]["speed_of_this"] == 2.0
    assert [one["cpu_ms"] for one in results] == [20, 40]
    found = {"problems": {}, "results": results, "claims": bench.claims(results, ["e49d3ff"])}
    assert found["claims"] == [
        {"claim": "png, 1 loading processes: 2.00 times the speed of hf, at least 1.5", "holds": True}
    ]
    bench.show_results(found)
    assert "holds: png" in capsys.readouterr().out
    draw(found, tmp_path / "data.png")
    assert Image.open(tmp_path / "data.png").size[0] > 500


def test_cpu_time_is_that_of_processes_too_also_of_those_that_have_ended():
    busy = [sys.executable, "-c", "import time; [0 for _ in iter(lambda: time.process_time() < 0.3, False)]; input()"]
    before = cpu_seconds()
    process = subprocess.Popen(busy, stdin=subprocess.PIPE)
    try:
        end = time.monotonic() + 30
        while cpu_seconds() - before < 0.3:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.communicate(b"\n")
        assert cpu_seconds() - before >= 0.3
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_every_loader_gives_what_the_plain_processor_gives(tmp_path):
    json_file = tmp_path / "data.json"
    few = ["--samples", "8", "--batch", "4", "--repeats", "1", "--workers", "1"]
    assert bench.main([*few, "--json", str(json_file)]) == 0
    found = json.loads(json_file.read_text())
    assert {one["contender"] for one in found["results"]} == {"this", "prepared", "hf", *bench.BEFORE}
    assert not found["problems"] and all(one["median"] > 0 for one in found["results"])
