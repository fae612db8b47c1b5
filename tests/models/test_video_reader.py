"""Token ids, patches and positions of videos are those of transformers' own processor, which needs torchvision.

The values that it made are kept beside this file; where torchvision is installed, it makes them anew.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ds_moe.config.sections import VideoConfig
from ds_moe.data.chat import Turn
from ds_moe.data.chat_template import tokenize
from ds_moe.data.encode import seen
from ds_moe.data.images import RecordError
from ds_moe.data.videos import Film, VideoSource
from ds_moe.models.load import processor_of as run_s_processor
from ds_moe.models.processor import load_processor, save_processor, tiny_processor
from ds_moe.models.video_reader import Qwen3VLVideoReader
from tests.models.video_cases import CASES, Case, digest, facts, frames_of_case, processor_of, stored


def by_ours(case: Case):
    """(ids, patches, grid, positions) of the same conversation."""
    processor = processor_of(case)
    reader = processor.video_reader(VideoConfig())
    films = [Film(frames, fps, height, width, case.chosen) for frames, height, width, fps in case.videos]
    plans = [reader.plan(film, "a") for film in films]
    patches = []
    for plan, frames in zip(plans, frames_of_case(case), strict=True):
        patches.append(reader.patches((frames[index] for index in dict.fromkeys(plan.indices)), plan))
    video = [VideoSource(name, Path(name)) for name in "ab"[: len(plans)]]
    question = Turn("user", ("In ", video[0], ", what! ", *video[1:], "moves?"))
    ids = tokenize((question, Turn("assistant", ("a",))), processor, [], videos=plans).ids
    end = ids.index(processor.tokenizer.eos_token_id) + 2  # <|im_end|> and a line break
    ids_S = torch.tensor(ids[:end])
    grid = torch.tensor([[1, rows, columns] for plan in plans for rows, columns in [plan.grid[1:]] * plan.grid[0]])
    return ids_S, torch.cat(patches), [list(plan.grid) for plan in plans], processor.position_ids(ids_S, grid)[1:]


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_processor_makes_them(name):
    values, pixels = stored()
    expected = values[name]
    ids_S, patches, grid, positions = by_ours(CASES[name])
    assert ids_S.tolist() == expected["ids"] and grid == expected["grid"]
    processor = processor_of(CASES[name])
    types = 2 * (ids_S == processor.video_token_id).long()
    assert types.tolist() == expected["types"] and torch.equal(types > 0, seen(ids_S, processor))
    assert positions.tolist() == expected["rope"]
    if name in pixels:
        assert torch.equal(patches, pixels[name])
    assert digest(patches) == expected["sha256"]  # every bit


@pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' processor of videos needs torchvision")
@pytest.mark.parametrize("name", CASES)
def test_the_kept_values_are_what_it_makes_today(name):
    assert facts(CASES[name]) == stored()[0][name]


def test_the_values_differ_from_case_to_case():
    values, _ = stored()
    assert len({one["sha256"] for one in values.values()}) == len(values) == len(CASES)
    assert any(max(map(max, one["rope"])) < len(one["ids"]) - 1 for one in values.values())


def test_a_video_of_one_frame_is_read_as_two():
    """transformers refuses it; here its one frame is shown twice, at its time."""
    reader = tiny_processor().video_reader(VideoConfig())
    for chosen in (True, False):
        plan = reader.plan(Film(1, 25.0, 16, 24, chosen), "a")
        assert (plan.indices, plan.grid, plan.times) == ((0, 0), (1, 4, 6), ("<0.0 seconds>",))


def test_sizes_that_no_patches_fill_are_refused():
    reader = tiny_processor().video_reader(VideoConfig())
    with pytest.raises(RecordError, match=r"video 'a' is refused by the model's processor: absolute aspect ratio"):
        reader.plan(Film(4, 2.0, 10, 4000), "a")


def test_what_the_run_file_says_is_saved_with_the_processor(tmp_path):
    given = VideoConfig(fps=4, min_frames=2, max_frames=6, max_pixels=16384)
    save_processor(tiny_processor(), tmp_path / "model")
    from ds_moe.config.sections import ModelConfig

    for config in (ModelConfig(preset="tiny-vl-moe"), ModelConfig(path=str(tmp_path / "model"))):
        if config.path is not None:
            (tmp_path / "model/config.json").write_text('{"model_type": "qwen3_vl_moe"}')
        processor = run_s_processor(config, given)
        save_processor(processor, tmp_path / "saved")
        saved = load_processor(tmp_path / "saved")
        assert saved.video_config["size"] == {"shortest_edge": 512, "longest_edge": 16384}
        assert (
            saved.video_reader(VideoConfig()) == tiny_processor().video_reader(given) == processor.video_reader(given)
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_sample_frames", False), ("num_frames", 8), ("resample", 2), ("rescale_factor", 1.0), ("max_pixels", 9)],
)
def test_settings_of_a_folder_that_are_not_read_are_refused(key, value):
    config = {**tiny_processor().video_config, key: value}
    with pytest.raises(ValueError, match=f"its video settings have {key}"):
        Qwen3VLVideoReader.of(config)


def test_a_folder_that_says_little_means_transformers_defaults():
    reader = Qwen3VLVideoReader.of({"video_processor_type": "Qwen3VLVideoProcessor"})
    assert (reader.fps, reader.min_frames, reader.max_frames, reader.patch_size) == (2, 4, 768, 16)
    assert (reader.min_pixels, reader.max_pixels) == (131072, 786432) and not reader.cap_pixels_per_frame
