"""A model given videos as images, one for each group of frames, computes what it computes of videos."""

import numpy as np
import pytest
import torch

from ds_moe.data.chat import Sample, Turn
from ds_moe.data.encode import collate, encode
from ds_moe.data.images import ImageSource
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.tasks.gate.features import image_counts, mean_vision
from tests.data.clips import drawn, listed, png

PRESETS = ("tiny-vl-moe", "tiny-vl-dense", "tiny-qwen3.5-moe")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def sample(*parts):
    return Sample((Turn("user", (*parts, "?")), Turn("assistant", ("a",))), "test:1")


def encoded(processor, *parts):
    return encode(sample(*parts), processor, 4096, 10**6)


def as_transformers_has_it(one, processor, kinds):
    """The forward's arguments with names, tokens and types of videos; `kinds` of the media, in order: number of groups
    of a video, 0 for an image."""
    images, videos, patches = [], [], {"image": [], "video": []}
    grids, pixels = one.image_grid_thw, one.pixel_values.split(one.image_grid_thw.prod(-1).tolist())
    at = 0
    for groups in kinds:
        size = groups or 1
        (videos if groups else images).append(torch.cat([torch.tensor([size]), grids[at][1:]]))
        patches["video" if groups else "image"] += pixels[at : at + size]
        at += size
    ids = one.input_ids.unsqueeze(0)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["mm_token_type_ids"] = (ids == processor.image_token_id).long() + 2 * (ids == processor.video_token_id).long()
    for grid, name, kind in ((images, "image_grid_thw", "image"), (videos, "video_grid_thw", "video")):
        if grid:
            given |= {name: torch.stack(grid), f"pixel_values{'_videos' * (kind == 'video')}": torch.cat(patches[kind])}
    return given


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_and_positions(preset, processor):
    model = build_preset(preset).eval()
    video, other, image = listed(drawn(6)), listed(drawn(3, 16, 16), fps=1), ImageSource("i", data=png(drawn(1)[0]))
    for parts, kinds in (((video,), (3,)), ((video, "a", image, other), (3, 0, 2))):
        one = encoded(processor, *parts)
        theirs = as_transformers_has_it(one, processor, kinds)
        ours = collate([one], processor).inputs
        assert (theirs["input_ids"] == processor.video_token_id).any() and theirs["mm_token_type_ids"].max() == 2
        positions, _ = model.model.get_rope_index(**{k: v for k, v in theirs.items() if not k.startswith("pixel")})
        assert torch.equal(ours["position_ids"], positions)
        with torch.no_grad():
            expected, found = model(**theirs, use_cache=False).logits, model(**ours, use_cache=False).logits
        if len(kinds) == 1:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # the tower runs once, not twice
        # a control: frames in another order are another answer
        ours["pixel_values"] = ours["pixel_values"].flip(0)
        with torch.no_grad():
            assert not torch.allclose(model(**ours, use_cache=False).logits, expected, atol=1e-3)


def test_answers_are_generated_from_the_same_prompt(processor):
    from ds_moe.data.encode import collate_prompts

    model = build_preset("tiny-vl-moe", seed=5).eval()
    one = encoded(processor, listed(drawn(4)))
    ours = collate_prompts([one], processor).inputs
    theirs = as_transformers_has_it(one, processor, (2,))
    cut = {k: v[:, : one.prompt] if v.shape[:2] == one.input_ids.unsqueeze(0).shape else v for k, v in theirs.items()}
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    answers = [model.generate(**inputs, **given)[:, one.prompt :] for inputs in (ours, cut)]
    assert torch.equal(*answers) and answers[0].numel() == 8


def test_a_packed_row_of_videos_is_its_samples(processor):
    model = build_preset("tiny-vl-moe").eval()
    attend_by_sample(model)
    samples = [encoded(processor, listed(drawn(count, seed=count))) for count in (1, 4, 5)] + [encoded(processor)]
    row = collate(samples, processor, packed=True)
    assert row.inputs["image_grid_thw"].tolist() == [[1, 8, 12]] * 6
    with torch.no_grad():
        packed = model(**row.inputs, use_cache=False).logits[0]
        alone = [model(**collate([one], processor).inputs, use_cache=False).logits[0] for one in samples]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_gate_pools_the_frames_of_a_video(processor):
    ids = processor.image_token_id, processor.vision_start_token_id
    samples = [encoded(processor, listed(drawn(5))), encoded(processor), encoded(processor, listed(drawn(2)))]
    batch = collate(samples, processor)
    counts_B = image_counts(batch.inputs["input_ids"], *ids)
    assert counts_B.tolist() == [3, 0, 1]
    features = [torch.full((24, 4), float(number)) for number in range(4)]
    pooled, present = mean_vision(features, counts_B, 4)
    assert np.allclose(pooled[:, 0], [1, 0, 3]) and present.tolist() == [True, False, True]
