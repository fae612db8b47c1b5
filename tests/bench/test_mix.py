"""The benchmark of the real mix: its records are as long as they should be, its model weighs as the real one, what is
wrong is not timed."""

import json
import statistics

import pytest
from PIL import Image

from ds_moe.data.chat import parse_record
from ds_moe.data.encode import encode
from ds_moe.distributed import Topology
from ds_moe.errors import UserError
from tools.bench.mix import bench as bench_mix
from tools.bench.mix import report
from tools.bench.mix.flops import forward_flops
from tools.bench.mix.model import real_config, small_config
from tools.bench.mix.plot import draw
from tools.bench.mix.records import build_processor, drawn, read_screens, write_records
from tools.bench.mix.rivals import global_batches, own_micro_batches
from tools.bench.mix.turns import Step, Turn


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """96 screens and their samples."""
    screens, processor = drawn(read_screens(), 96, 0), build_processor()
    file = write_records(screens, tmp_path_factory.mktemp("mix"), 0)
    lines = file.read_text().splitlines()
    records = [parse_record(json.loads(line), f"{file}:{number}", file.parent) for number, line in enumerate(lines)]
    return screens, [encode(record, processor, 4096, 2**24) for record in records]


def test_records_are_as_long_as_the_screens_say(encoded):
    """1,807 screens have a median of 136 tokens, 4.1% of them labelled; images of at least 64."""
    screens, samples = encoded
    for screen, sample in zip(screens, samples, strict=True):
        of_image = int(sample.image_grid_thw.prod()) // 4
        of_request, of_answer = (round(1.4 * words) for words in (screen.request_words, max(screen.answer_words, 1)))
        assert len(sample.input_ids) == of_image + of_request + of_answer + 12  # the template's
        assert int((sample.labels >= 0).sum()) == of_answer + 1
        assert of_image >= 64
    tokens = [len(sample.input_ids) for sample in samples]
    labelled = sum(int((sample.labels >= 0).sum()) for sample in samples) / sum(tokens)
    assert 125 <= statistics.median(tokens) <= 150 and 0.035 < labelled < 0.05


def test_head_decoder_and_tower_have_the_real_models_shares_of_the_flops(encoded):
    lengths = [(len(sample.input_ids), int(sample.image_grid_thw.prod()) // 4) for sample in encoded[1]]
    real = forward_flops(real_config(), lengths)
    small = forward_flops(small_config(), lengths)
    assert real.shares["head"] < real.shares["vision"] < real.shares["decoder"]
    for part, share in real.shares.items():
        assert small.shares[part] == pytest.approx(share, abs=0.03), part
    per_token = sum(real) / sum(tokens for tokens, _ in lengths)
    assert 2 * 3.0e9 < per_token < 2 * 6.0e9  # 3.3 billion weights a token, and the tower


def test_draws_are_as_large_and_as_small_as_all(encoded):
    screens = read_screens()
    areas = [one.width * one.height for one in screens]
    drawn_areas = [one.width * one.height for one in drawn(screens, 96, 1)]
    assert statistics.mean(drawn_areas) == pytest.approx(statistics.mean(areas), rel=0.05)
    assert drawn(screens, 96, 1) != drawn(screens, 96, 2) and set(drawn(screens, len(screens), 0)) == set(screens)


def test_rivals_share_out_every_sample_once(encoded):
    samples = encoded[1]
    batches = global_batches(samples, 32)
    assert [len(batch) for batch in batches] == [32, 32, 32]
    own = [own_micro_batches(batches[0], 4, Topology(rank, 2, rank, 2, "cpu")) for rank in range(2)]
    assert [len(micro) for of_rank in own for micro in of_rank] == [4] * 8
    lengths = [[len(sample.input_ids) for sample in micro] for pair in zip(*own, strict=True) for micro in pair]
    assert sum(lengths, []) == sorted((len(sample.input_ids) for sample in samples[:32]), reverse=True)


EXPECTED = [{"loss": 7.5, "grad_norm": 2.0, "tokens": 100}]


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (Step(7.5 + 1e-6, 2.0, 100, 1), None),
        (Step(7.5 + 1e-4, 2.0, 100, 1), "loss off by 1.0e-04"),
        (Step(7.5, 2.001, 100, 1), "gradients by 5.0e-04"),
        (Step(float("nan"), 2.0, 100, 1), "loss off by nan"),
        (Step(7.5, 2.0, 99, 1), "99 tokens instead of 100"),
    ],
)
def test_what_is_not_plain_transformers_is_not_timed(step, problem):
    bench = object.__new__(bench_mix.Bench)
    bench.expected = EXPECTED
    found = bench.problem(Turn([step], [1, 1]))
    assert found is None if problem is None else problem in found


def result(contender: str, size: int, speed: float, peak: int, **more: object) -> dict:
    figures = {"median": speed, "min": speed - 1, "max": speed + 1, "peak_bytes": peak, "micro_steps": [1]}
    return {"contender": contender, "size": size, "problem": None, "loss_difference": 1e-8, **figures, **more}


def test_the_quickest_right_setting_of_each_contender_takes_part():
    scanned = [result("packed", 2048, 90, 1), result("packed", 4096, 99, 1), result("before", 1, 50, 1)]
    wrong = {"contender": "before", "size": 2, "problem": "loss off by 1"}
    assert bench_mix.quickest([*scanned, wrong]) == [("packed", 4096), ("before", 1)]


def test_speed_and_memory_are_judged_and_drawn(tmp_path, capsys):
    rounds = [result("packed", 4096, 300, 100), result("before", 4, 100, 101, speed_of_packed=3.0)]
    rounds += [result("zero3", 4, 100, 99, speed_of_packed=3.0)]
    claims = report.claims(rounds)
    assert [claim["holds"] for claim in claims] == [True, True, False, False]
    found = {"batch": 32, "scan": rounds, "rounds": rounds, "claims": claims}
    report.show_results(found)
    said = capsys.readouterr().out
    assert "DOES NOT HOLD: 3.00 times the speed of ZeRO-3" in said and "holds: 3.00 times the speed of ds_moe" in said
    draw(found, tmp_path / "mix.png")
    assert Image.open(tmp_path / "mix.png").size[0] > 500


def test_a_build_that_the_history_lacks_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--before 0000000"):
        bench_mix.check_out("0000000", tmp_path / "earlier")


@pytest.mark.slow
def test_every_contender_computes_what_plain_transformers_computes(tmp_path):
    """One small global batch, all five in turns."""
    json_file = tmp_path / "mix.json"
    few = ["--batch", "4", "--batches", "1", "--repeats", "1", "--micro-batch", "1", "--tokens", "2048"]
    assert bench_mix.main([*few, "--max-area", "100000", "--json", str(json_file)]) == 0
    found = json.loads(json_file.read_text())
    assert {one["contender"] for one in found["rounds"]} == set(report.CONTENDERS)
    for one in found["rounds"]:
        assert one["loss_difference"] < 1e-5 and one["norm_difference"] < 1e-4 and min(one["tokens_per_s"]) > 0
        assert one["micro_steps"] == ([1] if one["contender"] == "packed" else [2])
