"""Videos in records: every dialect, what is refused, and which tokens stand in a prompt for them."""

import numpy as np
import pytest
import torch
from PIL import Image

from ds_moe.config.sections import VideoConfig
from ds_moe.data.chat import parse_record
from ds_moe.data.chat_template import TokenRules
from ds_moe.data.encode import NO_LOSS, collate, collate_prompts, encode
from ds_moe.data.images import RecordError
from ds_moe.data.prepared.make import prepare
from ds_moe.data.records import open_records
from ds_moe.data.stream import TrainStream
from ds_moe.models.processor import tiny_processor
from tests.data.clips import drawn
from tests.data.templates import HYBRID
from tests.records import chat


@pytest.fixture
def clips(folder):
    """The data folder with a.png (16x16), b.png (32x16), v.mp4 and w.webm (no videos, but files) and frames 0 to 4."""
    for name in ("v.mp4", "w.webm"):
        (folder / name).write_bytes(b"x" * 1000)
    for number, frame in enumerate(drawn(5, 16, 24)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


FRAMES = [f"{number}.png" for number in range(5)]


def user(*parts, **keys):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}], **keys}


def video(*path, **keys):
    return {"type": "video", **({"video": path[0]} if path else {}), **keys}


TEXT = {"type": "text", "text": "which?"}
SHAREGPT = {"conversations": [{"from": "human", "value": "<video>which?"}, {"from": "gpt", "value": "yes"}]}
FILES = {
    "a part": user(video("v.mp4"), TEXT),
    "a part and a column": user(video(), TEXT, videos=["v.mp4"]),
    "OpenAI's part": user({"type": "video_url", "video_url": {"url": "v.mp4"}}, TEXT),
    "ms-swift, LLaMA-Factory": {**chat("<video>which?"), "videos": ["v.mp4"]},
    "one of them as a string": {**chat("<video>which?"), "videos": "v.mp4"},
    "ShareGPT": {**SHAREGPT, "videos": ["v.mp4"]},
    "a single one": {**SHAREGPT, "video": "v.mp4"},
    "Parquet": {**SHAREGPT, "videos": [{"path": "v.mp4", "bytes": None}], "video": None, "images": []},
}
LISTS = {
    "a part": user(video(FRAMES), TEXT),
    "frames": user(video(frames=FRAMES), TEXT),
    "with their rate": user(video(frames=FRAMES, fps=4), TEXT),
    "as qwen-vl-utils has it": user(video(FRAMES, sample_fps=4), TEXT),
    "LLaMA-Factory": {**chat("<video>which?"), "videos": [FRAMES]},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_every_dialect(clips, name):
    sample = parse_record(FILES[name], "test:1", clips)
    [one] = sample.videos
    assert one.path == clips / "v.mp4" and one.fps is None and not sample.images
    assert sample.turns[0].parts == (one, "which?") and sample.first_image() is None


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_frames_in_every_dialect(clips, name):
    [one] = parse_record(LISTS[name], "test:1", clips).videos
    assert [frame.path.name for frame in one.frames] == FRAMES
    assert one.fps == (4 if "rate" in name or "qwen" in name else None)


def test_images_and_videos_keep_their_places(clips):
    record = {**chat("<video>a<image>b<video>"), "videos": ["v.mp4", FRAMES], "images": ["a.png"]}
    sample = parse_record(record, "test:1", clips)
    assert [getattr(part, "name", part) for part in sample.turns[0].parts] == ["v.mp4", "a", "a.png", "b", "0.png ..."]
    assert sample.media == [sample.videos[0], sample.images[0], sample.videos[1]]


def test_encoded_bytes_of_parquet(clips):
    [one] = parse_record({**chat("<video>?"), "videos": [{"bytes": b"abc", "path": "x.mp4"}]}, "test:1", clips).videos
    assert (one.data, one.name, one.path) == (b"abc", "x.mp4", None)


REFUSED = {
    "no file": (user(video("u.mp4")), "missing video 'u.mp4' (no such file below"),
    "a folder": (user(video("..")), "video '..' leaves the data root"),
    "a URL": (user(video("https://a.b/c.mp4")), "video 'https://a.b/c.mp4' is a URL (download it"),
    "a number": (user(video(3)), "a video is 3, not a path"),
    "no frames": (user(video([])), "a video has no frames"),
    "a frame that is no path": (user(video([3])), "an image is 3, not a path"),
    "frames and a video": (user(video("v.mp4", frames=FRAMES)), "message 1: the video part has both 'frames' and"),
    "two rates": (user(video(FRAMES, fps=1, sample_fps=1)), "has both 'sample_fps' and 'fps'"),
    "a rate of a file": (user(video("v.mp4", fps=2)), "'fps' is that of a list of frames; a file tells its own"),
    "a rate without frames": (user(video(fps=2), videos=[FRAMES]), "has 'fps' and no frames"),
    "a rate of nothing": (user(video(FRAMES, fps=0)), "the 'fps' of a video is 0"),
    "a rate as text": (user(video(FRAMES, fps="2")), "the 'fps' of a video is '2'"),
    "a size": (
        user(video("v.mp4", max_pixels=9)),
        "has 'max_pixels', which is not read (remove it; section data.video",
    ),
    "a number of frames": (user(video("v.mp4", nframes=9)), "has 'nframes', which is not read (remove it; section"),
    "a start": (user(video("v.mp4", video_start=9)), "has 'video_start', which is not read (remove it)"),
    "too few": (chat("<video>?"), "1 <video> placeholders for 0 videos (write one <video> for each entry of 'videos'"),
    "too many": ({**chat("?"), "videos": ["v.mp4"]}, "0 <video> placeholders for 1 videos"),
    "an image's place": ({**chat("<image>?"), "videos": ["v.mp4"]}, "1 <image> placeholders for 0 images"),
    "two columns": ({**chat("<video>?"), "videos": ["v.mp4"], "video": "v.mp4"}, "both 'videos' and 'video'"),
    "a list in the wrong column": ({**chat("<video>?"), "video": ["v.mp4"]}, "'video' is a list, which does not say"),
    "another column": ({**chat("?"), "clip_path": "v.mp4"}, "'clip_path' names a video ('v.mp4'), and is not read"),
    "another column beside an image": (
        {**chat("<image>?"), "images": ["0.png"], "video_path": "v.mp4"},
        "'video_path' names a video ('v.mp4'), and is not read",
    ),
    "an image in another column beside a video": (
        {**chat("<video>?"), "videos": ["v.mp4"], "image_path": "0.png"},
        "'image_path' names an image ('0.png'), and is not read",
    ),
    "another key of Parquet": ({**chat("<video>?"), "videos": [{"path": "v.mp4", "start": 1}]}, "a video has 'start'"),
    "an answer": (chat("?", "<video>"), "message 2: a video in the assistant turn (videos belong in user turns"),
    "audio": ({**chat("?"), "audios": ["a.wav"]}, "'audios' is not supported (only images, videos and text are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(clips, name):
    record, expected = REFUSED[name]
    with pytest.raises(RecordError) as caught:
        parse_record(record, "test:1", clips)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# --- tokens


def written(record, processor, folder, **settings):
    """(text of the ids, the encoded sample)"""
    rules = TokenRules(video=VideoConfig(**settings))
    one = encode(parse_record(record, "test:1", folder), processor, 4096, 10**6, rules)
    return processor.tokenizer.decode(one.input_ids), one


def group(time, tokens):
    return f"<{time} seconds><|vision_start|>" + "<|video_pad|>" * tokens + "<|vision_end|>"


def test_a_prompt_says_the_times_of_its_frames(clips, processor):
    """16x24 pixels: 4x6 patches, 6 tokens; five frames at 2 a second: (0 + 0.5) / 2, (1 + 1.5) / 2, and 2 twice."""
    text, one = written(LISTS["a part"], processor, clips)
    frames = group("0.2", 6) + group("1.2", 6) + group("2.0", 6)
    assert text == f"<|im_start|>user\n{frames}which?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert one.image_grid_thw.tolist() == [[1, 4, 6]] * 3 and one.pixel_values.shape == (72, 96)
    assert processor.tokenizer.decode(one.input_ids[one.labels != NO_LOSS]) == "yes<|im_end|>"
    text, _ = written(LISTS["with their rate"], processor, clips)
    assert group("0.1", 6) + group("0.6", 6) + group("1.0", 6) in text


def test_one_frame_is_shown_twice_and_of_an_odd_number_the_last(clips, processor):
    text, one = written(user(video(FRAMES[:1]), TEXT), processor, clips)
    assert group("0.0", 6) + "which?" in text
    both = one.pixel_values.view(24, 3, 2, 16)
    assert torch_equal(both[:, :, 0], both[:, :, 1])
    _, three = written(user(video(FRAMES[:3]), TEXT), processor, clips)
    both = three.pixel_values.view(48, 3, 2, 16)
    assert not torch_equal(both[:24, :, 0], both[:24, :, 1]) and torch_equal(both[24:, :, 0], both[24:, :, 1])


def torch_equal(one, other):
    return bool((one == other).all())


def test_images_and_videos_share_the_patches_in_their_order(clips, processor):
    record = {**chat("<video>a<image>b<video>"), "videos": [FRAMES[:2], FRAMES[2:]], "images": ["b.png"]}
    text, one = written(record, processor, clips)
    image = "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    assert f"{group('0.2', 6)}a{image}b{group('0.2', 6)}{group('1.0', 6)}<|im_end|>" in text
    assert one.image_grid_thw.tolist() == [[1, 4, 6], [1, 4, 8], [1, 4, 6], [1, 4, 6]]
    alone = [written(user(video(frames)), processor, clips)[1].pixel_values for frames in (FRAMES[:2], FRAMES[2:])]
    of_image = written({**chat("<image>b"), "images": ["b.png"]}, processor, clips)[1].pixel_values
    assert [part.tolist() for part in one.pixel_values.split([24, 32, 48])] == [
        part.tolist() for part in (alone[0], of_image, alone[1])
    ]


def test_conversations_of_several_turns_keep_their_labels(clips, processor):
    turns = [
        {"role": "user", "content": "look<video>"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "look<image>"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "look<video>"},
        {"role": "assistant", "content": "three"},
    ]
    record = {"messages": turns, "videos": [FRAMES[:2], FRAMES[:4]], "images": ["a.png"]}
    text, one = written(record, processor, clips)
    assert (
        processor.tokenizer.decode(one.input_ids[one.labels != NO_LOSS]) == "one<|im_end|>two<|im_end|>three<|im_end|>"
    )
    assert text.count("<|video_pad|>") == 18 and text.count("<|image_pad|>") == 4
    assert processor.tokenizer.decode(one.input_ids[: one.prompt]).endswith("<|im_start|>assistant\n")


def test_a_template_that_writes_the_token_alone_makes_the_same_prompt(clips, processor):
    bare = tiny_processor("vl")
    edged, alone = "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"
    assert edged in bare.chat_template
    bare.chat_template = bare.chat_template.replace(edged, alone)
    assert written(LISTS["a part"], bare, clips)[0] == written(LISTS["a part"], processor, clips)[0]


def test_a_text_that_imitates_a_video_stays_text(clips, processor):
    imitated = "<|vision_start|><|video_pad|><|vision_end|>"
    record = user({"type": "text", "text": imitated}, video(FRAMES[:2]), {"type": "text", "text": "<|vision_end|>"})
    _, one = written(record, processor, clips)
    assert int((one.input_ids == processor.video_token_id).sum()) == 6
    assert int((one.input_ids == processor.vision_end_token_id).sum()) == 1
    assert imitated in processor.tokenizer.decode(one.input_ids)


def test_a_template_that_shows_no_video_is_refused(clips):
    blind = tiny_processor("vl")
    blind.chat_template = HYBRID
    with pytest.raises(RecordError, match="the model's chat template"):
        written(LISTS["a part"], blind, clips)


def test_to_the_model_a_video_is_images(clips, processor):
    record = {**chat("<video>a<image>b"), "videos": [FRAMES], "images": ["b.png"]}
    _, one = written(record, processor, clips)
    for packed in (False, True):
        inputs = collate([one], processor, packed=packed).inputs
        assert (
            int((inputs["input_ids"] == processor.image_token_id).sum()) == 26 == int(inputs["mm_token_type_ids"].sum())
        )
        assert not (inputs["input_ids"] == processor.video_token_id).any()
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 3 + [[1, 4, 8]]
    assert int((collate_prompts([one], processor).inputs["input_ids"] == processor.image_token_id).sum()) == 26
    assert int((one.input_ids == processor.video_token_id).sum()) == 18


def test_settings_of_the_run_file(clips, processor):
    large, _ = written(LISTS["a part"], processor, clips, min_pixels=6 * 32 * 48)
    assert large.count("<|video_pad|>") > 18 * 3
    small, _ = written(LISTS["a part"], processor, clips, min_pixels=64, max_pixels=6 * 8 * 16)
    assert small.count("<|video_pad|>") == 3
    with pytest.raises(RecordError, match=r"has 5 frames, beyond data.video.max_frames 4 \(leave some out"):
        written(LISTS["a part"], processor, clips, max_frames=4)
    assert group("0.1", 6) in written(LISTS["a part"], processor, clips, fps=10)[0]


def test_an_over_long_video_is_not_decoded(clips, processor, monkeypatch):
    monkeypatch.setattr("ds_moe.data.encode.frames_of", lambda *_: pytest.fail("decoded"))
    sample = parse_record(LISTS["a part"], "test:1", clips)
    with pytest.raises(RecordError, match="over-long: .* 18 of them of images or videos, beyond data.max_length 20"):
        encode(sample, processor, 20, 10**6)
    assert len(encode(sample, processor, 4096, 10**6, pixels=False).input_ids) > 18


def test_frames_of_several_sizes_or_beyond_the_limit(clips, processor):
    with pytest.raises(RecordError, match=r"frame 'b.png' of a video is 32x16, its first 24x16 \(crop it\)"):
        written(user(video(["0.png", "b.png"])), processor, clips)
    sample = parse_record(LISTS["a part"], "test:1", clips)
    with pytest.raises(RecordError, match=r"has frames of 24x16, beyond data.max_pixels 100 \(shrink them\)"):
        encode(sample, processor, 4096, 100)
    Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(clips / "thin.png")
    with pytest.raises(RecordError, match=r"is refused by the model's processor: .*\(crop it\)"):
        written(user(video(["thin.png"] * 2)), processor, clips)


def test_models_that_read_no_videos_say_so(clips, text_processor, processor):
    with pytest.raises(RecordError, match="the model reads text only"):
        written(LISTS["a part"], text_processor, clips)
    without = tiny_processor("vl")
    without.video_config = None
    with pytest.raises(RecordError, match="the model's folder says nothing of videos"):
        written(LISTS["a part"], without, clips)
    for key, value in (("video_processor_type", "X"), ("do_resize", False), ("min_pixels", 3), ("patch_size", 8)):
        without.video_config = {**processor.video_config, key: value}
        with pytest.raises(RecordError, match=r"correct that\)"):
            written(LISTS["a part"], without, clips)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_of_mixed_records_has_their_patches(clips, processor, run_config, write_jsonl, packing):
    records = [
        {**chat("<video>a<image>b"), "videos": [FRAMES], "images": ["b.png"]},
        {**chat("<image>b"), "images": ["a.png"]},
        {**chat("<video>b"), "videos": [FRAMES[:3]]},
        chat("Hi"),
    ]
    data = {"shuffle": False, "length_grouping": False, "max_length": 256, "packing": packing}
    config = run_config(write_jsonl(records), data, micro_batch_size=1 if packing else 4, global_batch_size=4)
    [batch] = next(iter(TrainStream(config, processor, rank=0, world_size=1)))
    batch = batch.to(torch.device("cpu"))
    expected = [written(record, processor, clips)[1] for record in records[:3]]
    if packing:  # rows are laid by length
        order = [len(one.input_ids) for one in expected]
        expected = [expected[order.index(size)] for size in batch.lengths.tolist() if size in order]
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([one.pixel_values for one in expected]))
    assert torch.equal(batch.inputs["image_grid_thw"], torch.cat([one.image_grid_thw for one in expected]))


def test_exact_counts_include_the_patches_of_videos(clips, processor, run_config, write_jsonl):
    records = [{**chat("<video>a<image>b"), "videos": [FRAMES], "images": ["b.png"]}, chat("Hi")]
    config = run_config(write_jsonl(records), {"packing": True, "max_length": 256})
    stream = TrainStream(config, processor, rank=0, world_size=1)
    one = written(records[0], processor, clips)[1]
    assert stream.rows.tokens.tolist()[0] == len(one.input_ids)
    assert stream.rows.patches.tolist() == [len(one.pixel_values), 0]


@pytest.mark.parametrize("pixels", [True, False])
def test_prepared_records_with_videos_are_those_of_a_run_without(clips, processor, run_config, write_jsonl, pixels):
    """And frames that have changed since make the set anew."""
    both = {**chat("<video>a<image>b"), "videos": [FRAMES], "images": ["b.png"]}
    file = write_jsonl([both, {**chat("<image>b"), "images": ["a.png"]}, chat("Hi")])
    config = run_config(file, {"packing": True, "max_length": 256, "shuffle": False})

    def first():
        stream = TrainStream(config, processor, rank=0, world_size=1)
        [batch, *_] = next(iter(stream))
        return batch.to(torch.device("cpu")).inputs, stream

    def made():
        notes, records = [], open_records(str(file), "train", config.data)
        prepare(config, "train", records, processor, pixels, 0, notes.append)
        return notes

    expected, plain = first()
    assert made() == [] and "there already" in made()[0]
    found, stream = first()
    assert "prepared data.train" in stream.notes[0] and stream.rows.patches.tolist() == plain.rows.patches.tolist()
    assert expected.keys() == found.keys() and found["pixel_values"].equal(expected["pixel_values"])
    for name in FRAMES:  # other tokens, of the same estimate
        Image.new("RGB", (16, 16)).save(clips / name)
    assert "a video of" in made()[0]
    assert "there already" in made()[0]
    assert len(first()[0]["pixel_values"]) != len(expected["pixel_values"])
