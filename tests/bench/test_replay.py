"""tools/bench/replay/bench.py: it judges rightly, draws, and measures a tiny engine against a tiny trainer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tools.bench.replay import bench as bench_replay

MODES = ("live", "completion only", "prompt + completion", "shifted by one")
TINY = ["--prompts", "3", "--tokens", "8", "--layers", "2", "--experts", "8", "--top-k", "2", "--seeds", "5"]


@pytest.fixture(autouse=True)
def threads_as_before():
    """The benchmark sets torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(dtype: str, seed: int, scale: float, k3: tuple[float, ...]) -> dict:
    """The record of one model, whose k3 are those of `MODES`, growing with the seed."""
    modes = {
        mode: {"k3": value * (1 + seed), "large": 0.25, "max": 3.0 + seed}
        for mode, value in zip(MODES, k3, strict=True)
    }
    shares = {"routers": 0.1, "tokens": 0.4, "least_weight": 0.05, "nats": 3.0}
    return {"model": "Qwen3-MoE", "dtype": dtype, "scale": scale, "seed": seed, "modes": modes} | shares


def result(fp32: tuple[float, ...], bf16: tuple[float, ...]) -> dict:
    figures = {("fp32", 2.0): fp32, ("bf16", 2.0): bf16, ("fp32", 4.0): (1e-3, 9e-4, 9e-4, 1.0)}
    runs = [run(dtype, seed, scale, k3) for (dtype, scale), k3 in figures.items() for seed in (0, 1, 2)]
    return {"prompts": 16, "tokens": 64, "layers": 8, "experts": 64, "top_k": 8, "seconds": 60, "runs": runs}


@pytest.mark.parametrize(
    ("replayed", "shifted", "holding"),
    [
        (5e-4, 0.5, [True, True, True, True]),
        (7e-4, 0.5, [False, True, True, True]),  # within bf16's limit, beyond that of fp32
        (8e-4, 0.5, [False, True, False, True]),
        (5e-4, 2e-2, [True, False, True, False]),  # 40 times worse
    ],
)
def test_an_earlier_result_is_judged_and_drawn(capsys, tmp_path, replayed, shifted, holding):
    k3 = (1e-3, replayed, replayed, shifted)
    earlier, again, picture = tmp_path / "earlier.json", tmp_path / "new/again.json", tmp_path / "new/replay.png"
    earlier.write_text(json.dumps(result(k3, k3)))
    arguments = ["--show", earlier, "--json", again, "--plot", picture]
    assert bench_replay.main([str(argument) for argument in arguments]) == 0
    printed, written = capsys.readouterr().out, json.loads(again.read_text())
    assert [claim["holds"] for claim in written["claims"]] == holding
    assert printed.count("DOES NOT HOLD") == holding.count(False)
    assert "| Qwen3-MoE | fp32 | live | 2.00e-03 ± 1.0e-03 | 1.00 | 25.00% | 5.00 |" in printed
    assert "| Qwen3-MoE | fp32 | 4 | 5.0% | 10.0% | 40.0% | 2.00e-03 ± 1.0e-03 | 1.80e-03 ± 9.0e-04 |" in printed
    assert "| 0.90, above 0.6 |" in printed
    first = written["summary"][0]
    assert first["of_live"] == pytest.approx(replayed / 1e-3)
    assert first["of_live_by_seed"] == pytest.approx([replayed / 1e-3] * 3)
    assert first["shifted_times"] == pytest.approx(shifted / replayed)
    assert np.asarray(Image.open(picture).convert("RGB")).std() > 10


def test_the_options(capsys):
    options = bench_replay.parse(["--router-scales", "2", "0.5"])
    assert options.router_scales == [2.0, 0.5] and options.seeds == [0, 1, 2] and options.suite == "cpu"
    with pytest.raises(SystemExit):
        bench_replay.parse(["--experts", "4", "--top-k", "4"])
    assert "--top-k 4 of 4 --experts leaves a router nothing to choose" in capsys.readouterr().err


def test_the_run_file_replays():
    assert bench_replay.load_run(bench_replay.RUN).moe.replay.enabled


def rolled(kind: str, preset: str):
    options = bench_replay.parse(TINY)
    model = bench_replay.build(preset, 5, 2.0, options)
    processor = bench_replay.tiny_processor(kind)
    begins = bench_replay.prompts(kind, processor, 5, 3)
    return model, processor, begins, bench_replay.generate(model, processor, begins, 8, 5)


@pytest.mark.parametrize(("kind", "preset"), [("vl", "tiny-vl-moe"), ("text", "tiny-moe")])
def test_the_engine_brings_what_teacher_forcing_finds(kind, preset):
    """Trace and log-probs belong to their tokens: plain transformers on one sequence at a time finds the same."""
    model, _, begins, rollouts = rolled(kind, preset)
    assert len({one.prompt for one in begins}) > 1  # of different lengths: padding is taken off again
    for begin, one in zip(begins, rollouts, strict=True):
        ids = one.sequence.input_ids
        assert torch.equal(ids[: begin.prompt], begin.input_ids[: begin.prompt]) and len(ids) == begin.prompt + 8
        assert one.trace.ids.shape == (len(ids) - 1, 2, 2) and one.trace.start == 0
        inputs = {"input_ids": ids.unsqueeze(0)}
        if one.sequence.pixel_values is not None:
            config = model.config
            inputs |= {"pixel_values": one.sequence.pixel_values, "image_grid_thw": one.sequence.image_grid_thw}
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long()
        with torch.no_grad(), bench_replay.RoutingRecorder(model) as recorder:
            logits_SV = model(**inputs).logits[0]
        [ids_TLK] = recorder.take()
        found, recorded = ids_TLK[:-1].sort(-1).values.numpy(), np.sort(one.trace.ids, axis=-1)
        assert (found == recorded).mean() > 0.9
        assert (found == np.roll(recorded, 1, axis=0)).mean() < 0.7  # negative control: one row off
        found_N = (
            logits_SV.log_softmax(-1)[begin.prompt - 1 : -1].gather(1, ids[begin.prompt :].unsqueeze(1)).squeeze(1)
        )
        assert (found_N - one.logprob_N).abs().max() < 0.7  # bf16, and a flipped router


def test_what_each_mode_replays():
    model, _, begins, rollouts = rolled("text", "tiny-moe")
    length = max(len(one.sequence.input_ids) for one in rollouts) + 1
    given = bench_replay.replays(rollouts, bench_replay.RoutingShape.of(model.config), length)
    assert tuple(given) == MODES and given["live"] is None
    for row, (begin, one) in enumerate(zip(begins, rollouts, strict=True)):
        last = len(one.trace.ids)
        part, whole, shifted = (given[mode][row] for mode in MODES[1:])
        assert whole[:last].tolist() == one.trace.ids.tolist() and (whole[last:] == -1).all()
        assert (part[: begin.prompt] == -1).all() and torch.equal(part[begin.prompt :], whole[begin.prompt :])
        assert torch.equal(shifted[1:last], whole[: last - 1]) and (shifted[last:] == -1).all()


def test_end_to_end(tmp_path):
    file = tmp_path / "replay.json"
    assert bench_replay.main([*TINY, "--router-scales", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert [(one["model"], one["dtype"]) for one in written["runs"]] == [
        (model, dtype) for model in ("Qwen3-VL-MoE", "Qwen3-MoE") for dtype in ("fp32", "bf16")
    ]
    for one in written["runs"]:
        k3 = {mode: figures["k3"] for mode, figures in one["modes"].items()}
        assert 0 < k3["prompt + completion"] < 2e-3 and k3["shifted by one"] > 100 * k3["prompt + completion"]
        assert one["routers"] <= one["tokens"] < 0.2 and len(one["routers_by_layer"]) == 2
        assert 0.1 < one["least_weight"] < 0.5 and 1 < one["nats"] < 5.5
