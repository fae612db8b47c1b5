"""Families with images: what their processors and towers make of a record, against plain transformers."""

import copy

import pytest
import torch
from PIL import Image

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import ModelConfig, VideoConfig
from ds_moe.data.chat import parse_record
from ds_moe.data.encode import collate, encode, encode_images, tokens_of_images
from ds_moe.data.images import ImageSource, RecordError, load_image
from ds_moe.data.prepared.make import pixels_a_token
from ds_moe.errors import UserError
from ds_moe.models.convert import convert
from ds_moe.models.families import FAMILIES, IMAGE_BLOCKS, family_of
from ds_moe.models.head import at_labels
from ds_moe.models.load import processor_of
from ds_moe.models.processor import load_processor, save_processor
from ds_moe.models.tower import lighten_tower, outline_tower
from ds_moe.models.vision import encode_blank, keep_vision_in_step
from tests.models.test_families import slow_but
from tests.models.tiny_families import build
from tests.models.tiny_processors import PROCESSORS, adjust, plain_inputs

QUICK = {"kimi_k25", "gemma4"}
EVERY = slow_but(PROCESSORS, QUICK)
SIZES = {"wide.png": (40, 16), "small.png": (16, 16)}


@pytest.fixture
def records(tmp_path):
    """One record with two images, one with one, and one without."""
    for name, size in SIZES.items():
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    image = {name: {"type": "image", "image": name} for name in SIZES}
    questions = [
        [image["wide.png"], {"type": "text", "text": "which"}, image["small.png"]],
        [image["small.png"], {"type": "text", "text": "odd"}],
        "what",
    ]
    answers = ["one", "two", "three"]
    return [
        parse_record(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            f"file:{number}",
            tmp_path,
        )
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def tiny(family):
    processor = PROCESSORS[family]()
    tokenizer = processor.tokenizer
    model, _ = build(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    adjust(model, processor)
    if processor.ahead:
        processor.tower = outline_tower(model.config)
    return model, processor


def of_labels(logits_SV, labels_S):
    """Log-probabilities of the labelled tokens, each under the logits of the token before it."""
    kept = labels_S[1:] != -100
    return torch.log_softmax(logits_SV[:-1][kept].float(), -1).gather(1, labels_S[1:][kept].unsqueeze(1)).squeeze(1)


def test_every_family_whose_images_are_read_is_here():
    assert PROCESSORS.keys() == {name for name in IMAGE_BLOCKS if name in FAMILIES}
    assert all(type(make()).__name__ in FAMILIES[name].processors for name, make in PROCESSORS.items())


@pytest.mark.parametrize("family", EVERY)
def test_a_batch_of_ours_is_what_plain_transformers_makes_of_each_record(family, records):
    """Tokens, pixels, positions, types and the tower's inputs; one padded micro-batch against each record alone."""
    model, processor = tiny(family)
    plain = copy.deepcopy(model).eval()
    plain.set_experts_implementation("eager")
    lighten_tower(model)
    convert(model, MoEConfig())
    encoded = [encode(one, processor, 256, 10_000) for one in records]
    batch = collate(encoded, processor)
    with torch.no_grad():
        found = at_labels(model.eval(), batch.inputs, batch.labels).logits
        expected = []
        for record, one in zip(records, encoded, strict=True):
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in record.turns[0].parts
            ]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": record.answer}]
            text = processor.apply_chat_template(messages, tokenize=False)
            images = [load_image(source, 10_000) for source in record.images]
            made = plain_inputs(family, processor, text, images or None)
            ids_S = made["input_ids"][0]
            assert one.input_ids.tolist()[: len(ids_S)] == ids_S.tolist()  # GLM's answers end by the next turn's token
            made |= {"input_ids": one.input_ids.unsqueeze(0), "attention_mask": torch.ones_like(one.input_ids)[None]}
            if "mm_token_type_ids" in made:
                made["mm_token_type_ids"] = (made["input_ids"] == processor.image_token_id).int()
            expected.append(of_labels(plain(**made, use_cache=False).logits[0], one.labels))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=2e-6)
    for record, one in zip(records, encoded, strict=True):  # from the images' headers alone
        assert encode(record, processor, 256, 10_000, pixels=False).input_ids.tolist() == one.input_ids.tolist()


@pytest.mark.parametrize("family", EVERY)
def test_a_blank_image_reaches_the_weights_that_an_image_does(family, records):
    model, processor = tiny(family)
    lighten_tower(model)
    encoded = [encode(one, processor, 256, 10_000) for one in records[:2]]
    batch = collate(encoded, processor)
    at_labels(model, batch.inputs, batch.labels).loss.backward()
    reached = [{name for name, one in model.named_parameters() if one.grad is not None}]
    model.zero_grad()
    zero = encode_blank(model, torch.device("cpu"))
    zero.backward()
    reached.append({name for name, one in model.named_parameters() if one.grad is not None})
    of_vision = {name for name in reached[0] if family_of(model).is_vision(name)}
    assert zero.item() == 0 and of_vision and reached[1] == of_vision
    others = {name for name in reached[0] - of_vision if not name.startswith((family_of(model).decoder, "lm_head"))}
    assert not others  # what is neither of the decoder nor of vision


@pytest.mark.parametrize("family", slow_but(PROCESSORS, {*QUICK, "step3p7"}))
def test_the_tower_runs_as_often_whatever_images_a_rank_has(family, records, monkeypatch):
    """And what it sees of blank ones changes neither the loss nor a gradient."""
    model, processor = tiny(family)
    lighten_tower(model)
    passes, found = [], []
    model.get_submodule(family_of(model).vision).register_forward_hook(lambda *_: passes.append(1))
    encoded = [encode(one, processor, 256, 10_000) for one in records]
    monkeypatch.setattr("ds_moe.models.vision.parallel", lambda: True)
    for kept in (False, True):
        if kept:
            keep_vision_in_step(model)
        for one in ([encoded[0]], [encoded[1]], [encoded[2]]):
            batch = collate(one, processor)
            passes.clear()
            model.zero_grad()
            loss = at_labels(model, batch.inputs, batch.labels).loss
            loss.backward()
            gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
            found.append((len(passes), loss.item(), gradients))
    alone, kept = found[:3], found[3:]
    assert {count for count, *_ in kept} == {max(count for count, *_ in alone)}
    assert alone[-1][0] == 0 and (alone[0][0] > alone[1][0]) == (family == "step3p7")  # else nothing is shown
    for (_, loss, gradients), (_, same_loss, same_gradients) in zip(alone, kept, strict=True):
        assert loss == same_loss
        assert all(torch.equal(same_gradients[name], value) for name, value in gradients.items())
        assert not any(value.any() for name, value in same_gradients.items() if name not in gradients)


TURNED = [(22, 53), (36, 108), (40, 17), (8, 28)]  # of which some families make other tokens if they are turned


@pytest.mark.parametrize("family", slow_but(PROCESSORS, {*QUICK, "step3p7", "internvl", "glm5_next"}))
def test_headers_and_pixels_make_the_same_of_an_image_that_is_turned(family, tmp_path):
    processor, exif = PROCESSORS[family](), Image.Exif()
    exif[0x0112] = 6
    for width, height in TURNED:
        path = tmp_path / f"{width}.jpg"
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(path, exif=exif)
        given = [ImageSource(path.name, path)], processor, 10_000
        pixels, grid, ids = encode_images(*given)
        assert encode_images(*given, pixels=False) == (None, None, ids)
        numbers = 3 * pixels_a_token(processor.image_processor) * tokens_of_images(ids, processor)
        assert pixels.numel() in (numbers, 2 * numbers) and len(grid) == 1  # some show an image as two frames


@pytest.mark.parametrize("family", EVERY)
def test_a_processor_is_read_as_it_was_saved(family, records, tmp_path):
    saved = PROCESSORS[family]()
    save_processor(saved, tmp_path / "saved")
    loaded = load_processor(tmp_path / "saved")
    assert type(loaded) is type(saved) and type(loaded.image_processor) is type(saved.image_processor)
    for record in records:
        ours, theirs = (encode(record, one, 256, 10_000) for one in (loaded, saved))
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.pixel_values is None or torch.equal(ours.pixel_values, theirs.pixel_values)


def test_images_of_another_family_and_boxes_of_an_unknown_kind_are_refused(records, tmp_path):
    model, processor = tiny("kimi_k25")
    model.config.save_pretrained(tmp_path / "other")
    save_processor(PROCESSORS["qwen3_5_moe"](), tmp_path / "other")
    with pytest.raises(UserError, match="images for Qwen3VLProcessor, but a kimi_k25 model needs Kimi_K25Processor"):
        processor_of(ModelConfig(path=str(tmp_path / "other")), VideoConfig())
    grounded = copy.copy(records[1])
    object.__setattr__(grounded, "grounded", True)
    with pytest.raises(RecordError, match="how this model writes boxes is not known"):
        encode(grounded, processor, 256, 10_000)


def test_internvl_over_a_decoder_without_experts_is_refused(tmp_path):
    model, processor = tiny("internvl")
    model.config.text_config = type(model.config)().text_config  # Qwen2's
    model.config.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    with pytest.raises(UserError, match="internvl over qwen2 is not supported; over qwen3_moe it is"):
        processor_of(ModelConfig(path=str(tmp_path)), VideoConfig())
