"""Tiny and loaded processors: identical in every process and after saving, and readable errors."""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoTokenizer

from ds_moe.data.digits import ANSWERS, QUESTIONS
from ds_moe.errors import UserError
from ds_moe.models.processor import (
    SPECIAL_TOKENS,
    TextProcessor,
    load_processor,
    save_processor,
    special_token_ids,
    tiny_processor,
)
from ds_moe.models.vl_processors import Glm4vProcessor, Glm46VProcessor
from tests.models.tiny_families import build, glm_processor

TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which digit? é漢\r\n\n Don't 123<|im_end|>\n"
IMAGE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
HUB_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def inputs(processor):
    return processor(text=[TEXT], images=[IMAGE], return_tensors="pt")


def assert_same(one, other):
    first, second = inputs(one), inputs(other)
    assert sorted(first) == sorted(second) and all(first[key].equal(second[key]) for key in first)
    assert special_token_ids(one) == special_token_ids(other) and one.chat_template == other.chat_template


def test_a_16x16_image_is_4_image_tokens_and_anything_encodes():
    processor = tiny_processor("vl")
    made = inputs(processor)
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]] and made["pixel_values"].shape == (16, 96)
    assert made["mm_token_type_ids"].sum() == 4
    assert processor.decode(made["input_ids"][0]) == TEXT.replace("<|image_pad|>", "<|image_pad|>" * 4)
    every_byte = bytes(range(256)).decode("latin-1")
    assert processor.decode(processor.tokenizer(every_byte)["input_ids"]) == every_byte


def test_special_ids_are_distinct_and_within_the_vocabulary():
    processor = tiny_processor("vl")
    ids = special_token_ids(processor)
    assert sorted(ids) == sorted(
        f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end", "eos", "pad")
    )
    assert len(set(ids.values())) == 6 and max(ids.values()) < len(processor.tokenizer)
    assert processor.tokenizer.convert_ids_to_tokens([ids["eos_token_id"], ids["pad_token_id"]]) == [
        "<|im_end|>", "<|endoftext|>"]  # fmt: skip
    assert all(len(processor.tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)


def test_demo_words_are_short():
    tokenizer = tiny_processor("vl").tokenizer
    answers = {answer(digit) for answer in ANSWERS.values() for digit in range(10)}
    assert max(len(tokenizer(answer)["input_ids"]) for answer in answers) == 1
    wordings = [wording for kind in QUESTIONS.values() for wording in kind]
    assert max(len(tokenizer(wording)["input_ids"]) / len(wording.split()) for wording in wordings) < 1.5


def test_every_process_builds_the_same_vocabulary():
    """Pinned, so that it holds over processes and machines: another vocabulary orphans every saved tiny model."""
    vocabulary = json.dumps(sorted(tiny_processor().tokenizer.get_vocab().items()))
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:16] == "3ca80851487b09c2"


def test_saved_and_reloaded_is_identical_also_beside_a_model_config(tmp_path):
    processor = tiny_processor("vl")
    save_processor(processor, tmp_path)
    assert_same(processor, load_processor(tmp_path))
    CONFIG_MAPPING["qwen3_vl_moe"]().save_pretrained(tmp_path)
    reloaded = load_processor(tmp_path)
    assert_same(processor, reloaded)
    save_processor(reloaded, tmp_path / "again")
    assert_same(processor, load_processor(tmp_path / "again"))
    names = ("processor_config.json", "video_preprocessor_config.json")
    for name in names:  # what plain transformers with torchvision reads
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
    assert json.loads((tmp_path / names[0]).read_text())["processor_class"] == "Qwen3VLProcessor"
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT) == processor.tokenizer(TEXT)


def test_hub_form_is_read_and_its_video_settings_are_carried_along(tmp_path):
    processor = tiny_processor("vl")
    processor.tokenizer.save_pretrained(tmp_path)
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUB_IMAGES))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    loaded = load_processor(tmp_path)
    assert_same(processor, loaded)
    save_processor(loaded, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "video_preprocessor_config.json").read_text()) == video


def test_text_only_model_has_the_same_calls(tmp_path):
    processor = tiny_processor("text")
    save_processor(processor, tmp_path)
    CONFIG_MAPPING["qwen3_moe"]().save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert isinstance(loaded, TextProcessor) and loaded.image_processor is None
    assert loaded.tokenizer(TEXT) == processor.tokenizer(TEXT)
    conversation = [{"role": "user", "content": "Hi"}]
    rendered = loaded.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.batch_decode([[1, 2]]) == [loaded.decode([1, 2])]


def test_errors_name_the_folder_and_the_fix(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_processor(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no processor or tokenizer could be loaded") as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    processor = tiny_processor("text")
    processor.tokenizer.chat_template = None
    save_processor(processor, tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_processor(tmp_path)
    with pytest.raises(ValueError, match="kind 'audio'"):
        tiny_processor("audio")


@pytest.mark.parametrize("family", ["qwen3_5_moe", "glm4v_moe"])
def test_positions_are_those_that_the_model_makes(family):
    """Qwen3-VL's own method makes them for all."""
    processor = glm_processor() if family == "glm4v_moe" else tiny_processor()
    model, _ = build(family)
    image, start = processor.image_token_id, processor.vision_start_token_id
    ids_S = torch.tensor([7, 8, start, *[image] * 8, 9, start, *[image] * 4, 10])
    grid = torch.tensor([[1, 4, 8], [1, 4, 4]])
    types = (ids_S == image).int().unsqueeze(0)
    expected, _ = model.model.get_rope_index(ids_S.unsqueeze(0), mm_token_type_ids=types, image_grid_thw=grid)
    assert torch.equal(processor.position_ids(ids_S, grid)[1:], expected.squeeze(1))


@pytest.mark.parametrize("kind", [Glm4vProcessor, Glm46VProcessor])
def test_glm_s_processor_is_read_as_it_was_saved(tmp_path, kind):
    """Of GLM-4.5V and of GLM-4.6V, which make the same pixels; their names are those that plain transformers knows."""
    saved, name = glm_processor(), kind.__name__.replace("Processor", "ImageProcessor")
    save_processor(saved, tmp_path)
    file = next(file for file in tmp_path.iterdir() if "Glm4vImageProcessor" in file.read_text(errors="ignore"))
    file.write_text(file.read_text().replace("Glm4vImageProcessor", name))
    loaded = load_processor(tmp_path)
    assert type(loaded) is kind and type(loaded.image_processor).__name__ == f"{name}Pil"
    save_processor(loaded, tmp_path / "again")
    texts = " ".join(file.read_text(errors="ignore") for file in (tmp_path / "again").iterdir())
    assert f'"{kind.__name__}"' in texts and f'"{name}' in texts and hasattr(transformers, f"{name}Pil")
    text = "<|user|><|begin_of_image|><|image|><|end_of_image|>Which?"
    ours, theirs = (one(text=[text], images=[IMAGE], return_tensors="pt") for one in (loaded, saved))
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert (ours["input_ids"] == loaded.image_token_id).sum() == 4 and ours["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
