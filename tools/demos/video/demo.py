"""`make video-demo`: a tiny Qwen3-VL-MoE learns from clips which way a digit moves, and says so of new ones.

One run of `ds-moe train` (2 processes, EP 2, ZeRO-3, fp32) on encoded clips and on lists of frames. The export is read
by plain transformers, which is given the clips as videos; as a control, also in reverse.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.config.sections import DataConfig
from ds_moe.data.encode import Encoded, answer_text, encode
from ds_moe.data.processor import Processor
from ds_moe.data.records import read_records
from ds_moe.models.families import family_of
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import load_processor, save_processor, special_token_ids, tiny_processor
from ds_moe.monitor.plot import finish_axes
from tools.demos.running import EXECUTABLE, ROOT, finish, run, start_anew
from tools.demos.video.clips import DIRECTIONS, QUESTIONS, moving, write_clips
from tools.results import Claim, command_line, judged

FOLDER = Path("runs/video_demo")
CLIPS = {"train": 1200, "held-out": 240}
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}


def main() -> int:
    options = command_line(__doc__, "--plot", "--json").parse_args()
    began = time.monotonic()
    start_anew(FOLDER)
    files = {split: write_clips(FOLDER / "data", split, count) for split, count in CLIPS.items()}
    make_model(FOLDER / "untrained")
    print(f"{sum(CLIPS.values())} clips in {time.monotonic() - began:.0f} s", flush=True)
    data = f"data.train={files['train']}", f"data.eval={files['held-out']}"
    command = (EXECUTABLE, "train", ROOT / "ds_configs/runs/video_demo.yaml", "--nproc", "2", *data)
    run(*command, f"train.output_dir={FOLDER}", log=FOLDER / "log.txt", settings={})
    run(EXECUTABLE, "export", FOLDER, FOLDER / "export", settings={})
    trained = json.loads((FOLDER / "result.json").read_text())["accuracy"]
    plain = {way: answers(FOLDER / "export", files["held-out"], way == "reversed") for way in ("forward", "reversed")}
    result: dict[str, Any] = {"trained": trained, "plain": plain, "curves": curves()}
    result |= {"seconds": time.monotonic() - began, "claims": claims(trained, plain)}
    rows = {f"right answers, {kind}: trained": f"{share:.3f}" for kind, share in trained.items()}
    rows |= {f"plain transformers, {way}": f"{found['right']:.3f}" for way, found in plain.items()}
    return finish(options, result, rows, "ds_moe: which way a digit moves", lambda file: write_figure(result, file))


def make_model(folder: Path) -> None:
    """The tiny preset with a vocabulary of these texts, and patches of 8 x 8 pixels: two frames are 4 tokens."""
    times = [f"<{tenths / 10:.1f} seconds>" for tenths in range(20)]
    processor = tiny_processor("vl", (*QUESTIONS, *DIRECTIONS, *times), patch_size=8)
    config: Any = preset_config("tiny-vl-moe")
    ids = special_token_ids(processor)
    config.text_config.vocab_size = len(processor.tokenizer)
    for key in ("pad_token_id", "eos_token_id"):
        setattr(config.text_config, key, ids.pop(key))
    for key, value in ids.items():
        setattr(config, key, value)
    config.vision_config.patch_size = 8
    torch.manual_seed(0)
    family_of(config).model_class(config).save_pretrained(folder)
    save_processor(processor, folder)


def as_video(one: Encoded, processor: Processor) -> dict[str, torch.Tensor]:
    """The prompt of a clip as plain transformers takes a video."""
    ids = one.input_ids[: one.prompt].unsqueeze(0)
    groups, (_, rows, columns) = len(one.image_grid_thw), one.image_grid_thw[0].tolist()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == processor.video_token_id).long(),
        "pixel_values_videos": one.pixel_values,
        "video_grid_thw": torch.tensor([[groups, rows, columns]]),
    }


def backwards(one: Encoded, processor: Processor) -> Encoded:
    """The same clip with its frames in reverse, and the times where they were."""
    groups, patch = len(one.image_grid_thw), processor.image_processor.patch_size
    pixels = one.pixel_values.view(groups, -1, 3, 2, patch * patch).flip(0, 3)
    return Encoded(one.input_ids, one.labels, one.prompt, pixels.reshape(one.pixel_values.shape), one.image_grid_thw)


@torch.inference_mode()
def answers(folder: Path, data: Path, reverse: bool) -> dict[str, Any]:
    """Of the answers of plain transformers: the share that is right, and how often each direction was said."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    processor, records = load_processor(folder), read_records(str(data), DataConfig(train=str(data)))
    right, opposite = 0, 0
    said: Counter[str] = Counter()
    for index in range(len(records)):
        one = encode(records.sample(index), processor, 512, 10**6)
        expected = answer_text(one, processor)
        inputs = as_video(backwards(one, processor) if reverse else one, processor)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, one.prompt :]
        [answer] = (text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True))
        right += answer == expected
        opposite += answer == BACK[expected]
        said[answer] += 1
    return {"right": right / len(records), "opposite": opposite / len(records), "said": dict(said)}


def curves() -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(FOLDER / "tensorboard"))
    board.Reload()
    known = board.Tags()["scalars"]
    wanted = [tag for tag in known if tag == "train/loss" or tag.startswith(("eval/accuracy", "eval/loss"))]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in wanted}


def claims(trained: dict[str, float], plain: dict[str, dict[str, Any]]) -> list[Claim]:
    forward, back = plain["forward"], plain["reversed"]
    return judged(
        [
            (f"held out, {trained['mp4']:.3f} of the encoded clips are answered right", trained["mp4"] >= 0.95),
            (f"held out, {trained['frames']:.3f} of the lists of frames", trained["frames"] >= 0.95),
            (f"plain transformers, given videos, answers {forward['right']:.3f} right", forward["right"] >= 0.95),
            (f"control: of reversed clips it says the opposite, {back['opposite']:.3f}", back["opposite"] >= 0.9),
        ]
    )


def write_figure(result: dict[str, Any], file: Path) -> None:
    import random

    import numpy as np

    figure = Figure(figsize=(9, 3.4), dpi=150, facecolor="white", layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    scan = np.zeros((16, 16), np.uint8)
    scan[2:14, 7:9] = 255
    shown = [moving(scan, direction, random.Random(1))[::2] for direction in DIRECTIONS]
    left.imshow(np.concatenate([np.concatenate(list(film), axis=1) for film in shown]))
    left.set_yticks([16 + 32 * number for number in range(4)], list(DIRECTIONS))
    for number in range(1, 4):
        left.axvline(32 * number - 0.5, color="white", linewidth=1)
        left.axhline(32 * number - 0.5, color="white", linewidth=1)
    left.set_xticks([])
    left.set_title("every other frame", fontsize=10)
    for tag, points in result["curves"].items():
        if tag in ("train/loss", "eval/loss"):
            middle.plot(*zip(*points, strict=True), label={"train/loss": "training", "eval/loss": "held out"}[tag])
        elif tag != "eval/accuracy":  # the mean
            right.plot(*zip(*points, strict=True), marker="o", label=tag.rsplit("_", 1)[1])
    right.axhline(0.25, color="0.6", linewidth=0.8)
    for axes, title in ((middle, "Loss"), (right, "Right answers, held out")):
        finish_axes(axes, title, "step")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
