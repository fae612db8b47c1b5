"""Packed rows: every sample comes out as it would alone, with its own positions; what would mix them is caught."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash
from transformers.masking_utils import create_sliding_window_causal_mask

from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.data.batch import sample_bounds
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, encode, filler
from ds_moe.errors import UserError
from ds_moe.models.attention import BY_SAMPLE, attend_by_sample, check_packable
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import FAMILIES
from ds_moe.models.load import load_model
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.processor import tiny_processor
from ds_moe.moe.tape import checkpoint_contexts
from tests.models import tiny_families
from tests.samples import joined, losses, without_image

LOSS, GRADIENT = 1e-6, 5e-6
PRESETS = [family.preset for family in FAMILIES.values() if family.packs]


def samples(preset, count=5):
    """Real scans, two of which are joined to one sample of two images, and texts; every label position has a loss."""
    vision = FAMILIES[next(name for name, family in FAMILIES.items() if family.preset == preset)].vision
    processor = tiny_processor("vl")
    encoded = [encode(sample, processor, 256, 2**20) for sample in digits_samples("train")[:count]]
    for place in range(len(encoded)) if vision is None else (1, 3):
        encoded[place] = without_image(encoded[place], processor.image_token_id)
    if vision is not None:
        encoded[2:4] = [joined(encoded[2], encoded[0])]
    return encoded, processor if vision is not None else tiny_processor("text")


def prepared(preset, *, train=True, checkpointing=False, moe=True):
    model = build_preset(preset).train(train)
    attend_by_sample(model)
    if moe and "moe" in preset:
        convert(model, MoEConfig())
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    return model


def alone(preset, encoded, processor, train=True):
    """(losses, gradients) of plain transformers, each sample in a forward of its own."""
    model = build_preset(preset).train(train)
    found = []
    for one in encoded:
        batch = collate([one], processor)
        loss = losses(model(**batch.inputs, use_cache=False).logits, batch).sum()
        loss.backward()
        found.append(loss.detach())
    return torch.stack(found), {name: parameter.grad for name, parameter in model.named_parameters()}


def differences(model, batch, expected, **options):
    """(of the losses, of the gradients relative to each tensor's largest entry)"""
    model.zero_grad()
    own = losses(model(**batch.inputs, **options).logits, batch)
    own.sum().backward()
    gradients = [
        (parameter.grad - expected[1][name]).abs().max() / expected[1][name].abs().max().clamp_min(1e-12)
        for name, parameter in model.named_parameters()
        if expected[1][name] is not None
    ]
    return float((own.detach() - expected[0]).abs().max() / expected[0].max()), float(torch.stack(gradients).max())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["train", "checkpointing", "eval"])
def test_a_packed_row_is_its_samples_alone(preset, mode):
    encoded, processor = samples(preset)
    expected = alone(preset, encoded, processor, train=mode != "eval")
    model = prepared(preset, train=mode != "eval", checkpointing=mode == "checkpointing")
    batch = collate(encoded, processor, packed=True)
    for options in ({"use_cache": False}, {}):  # a cache, which evaluation makes by default, would hide positions
        loss, gradient = differences(model, batch, expected, **options)
        assert loss <= LOSS and gradient <= GRADIENT, options
    in_two = collate(encoded[:2], processor, packed=True), collate(encoded[2:], processor, packed=True)
    model.zero_grad()
    parts = torch.cat([losses(model(**one.inputs, use_cache=False).logits, one) for one in in_two])
    assert (parts - expected[0]).abs().max() <= LOSS * expected[0].max()


def test_lengths_come_from_the_bounds_where_the_host_does_not_know_them():
    encoded, processor = samples("tiny-vl-moe")
    model, batch = prepared("tiny-vl-moe"), collate(encoded, processor, packed=True)
    given = {key: value for key, value in batch.inputs.items() if key != "sample_lengths"}
    assert torch.equal(model(**given, use_cache=False).logits, model(**batch.inputs, use_cache=False).logits)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fault", ["one token leaks", "no bounds between two samples", "rope row of another sample"])
def test_what_mixes_samples_is_caught(mode, fault):
    """Negative control of the parity above."""
    encoded, processor = samples("tiny-vl-moe")
    expected = alone("tiny-vl-moe", encoded, processor, train=mode != "eval")
    batch = collate(encoded, processor, packed=True)
    lengths = list(batch.inputs["sample_lengths"])
    if fault == "one token leaks":  # the last token of the first sample counts as the second's first
        lengths[0], lengths[1] = lengths[0] - 1, lengths[1] + 1
        batch.inputs |= sample_bounds(lengths)
    elif fault == "no bounds between two samples":
        batch.inputs |= sample_bounds([lengths[0] + lengths[1], *lengths[2:]])
    else:  # height and width of the first sample's image change places, as of an image of another shape
        batch.inputs["position_ids"][2:, 0, : lengths[0]] = batch.inputs["position_ids"][2:, 0, : lengths[0]].flip(0)
        assert not torch.equal(
            batch.inputs["position_ids"], collate(encoded, processor, packed=True).inputs["position_ids"]
        )
    loss, gradient = differences(prepared("tiny-vl-moe", train=mode != "eval"), batch, expected, use_cache=False)
    assert loss > LOSS and gradient > GRADIENT


def test_loads_by_kind_and_modality_are_those_of_padded_rows():
    """Of the same samples, one of which only fills up: it neither routes nor counts."""
    encoded, processor = samples("tiny-vl-moe")
    model = build_preset("tiny-vl-moe").train()
    attend_by_sample(model)
    context, found = convert(model, MoEConfig()), []
    for packed in (True, False):
        batch = collate([*encoded, filler(processor)], processor, packed=packed)
        batch.kind_B = torch.tensor([0, 1, -1, 1, 0])
        context.real_BS, context.kind_BS = batch.real_of_token, batch.kind_of_token
        for layer in moe_layers(model):
            layer.load.kinds = layer.load.count_pairs = 2
        model(**batch.inputs, use_cache=False)
        found.append([layer.load.take() for layer in moe_layers(model)])
    for ours, theirs in zip(*found, strict=True):
        for name, own, other in zip(ours._fields, ours, theirs, strict=True):
            torch.testing.assert_close(own, other, msg=name)
        assert ours.tokens == sum(len(one.input_ids) for one in encoded) and ours.counts_E.sum() == 2 * ours.tokens
        assert ours.image_E.sum() > 0 and (ours.kind_GE.sum(1) > 0).all()


def test_positions_that_begin_anew_without_bounds_are_refused():
    encoded, processor = samples("tiny-moe")
    batch = collate(encoded, processor, packed=True)
    given = {key: batch.inputs[key] for key in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="cu_seq_lens_q is not given: attention would mix its samples"):
        prepared("tiny-moe")(**given, use_cache=False)
    with pytest.raises(ValueError, match="do not lay out 1 rows of"):
        prepared("tiny-moe")(**given, **sample_bounds([3, 4]), use_cache=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_right_padded_rows_need_no_mask(preset, monkeypatch):
    """Real tokens come out as with the mask of plain sdpa, which is not made."""
    encoded, processor = samples(preset)
    batch = collate(encoded, processor)
    masks = watch_masks(monkeypatch)
    plain = build_preset(preset).train()
    expected_logits = plain(**batch.inputs, use_cache=False).logits
    expected = losses(expected_logits, batch)
    expected.sum().backward()
    assert any(mask is not None for mask in masks)
    masks.clear()
    model = prepared(preset, moe=False)
    real = batch.inputs["attention_mask"].bool()
    assert (model(**batch.inputs, use_cache=False).logits - expected_logits)[real].abs().max() <= 1e-6
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    loss, gradient = differences(model, batch, (expected.detach(), gradients), use_cache=False)
    assert loss <= LOSS and gradient <= GRADIENT and all(mask is None for mask in masks)


def test_a_sliding_window_keeps_its_mask_and_is_not_packed():
    config = build_preset("tiny-moe").config
    config.sliding_window = 3
    given = {"inputs_embeds": torch.zeros(2, 8, 4), "past_key_values": None}
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    masks = {}
    for name in ("sdpa", BY_SAMPLE):
        config._attn_implementation = name
        masks[name] = create_sliding_window_causal_mask(config, attention_mask=mask, position_ids=None, **given)
    assert masks["sdpa"] is not None and torch.equal(masks["sdpa"], masks[BY_SAMPLE])
    query = torch.zeros(1, 4, 8, 16)
    attention = AttentionInterface()[BY_SAMPLE]
    with pytest.raises(ValueError, match="this layer has a mask"):
        attention(torch.nn.Module(), query, query, query, masks["sdpa"][:1], **sample_bounds([5, 3]))


def test_a_family_that_does_not_say_so_is_not_packed(monkeypatch):
    row = dataclasses.replace(FAMILIES["qwen3_moe"], packs=False)
    config, model_config = run_config(packing=True), preset_config("tiny-moe")
    check_packable(config, model_config)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", row)
    with pytest.raises(UserError, match="of a qwen3_moe model may mix.* exact for qwen3_vl_moe, qwen3_vl"):
        check_packable(config, model_config)
    check_packable(run_config(packing=False), model_config)


def run_config(**data):
    return RunConfig(
        model={"preset": "tiny-moe"}, data={"train": "any", **data}, moe={}, train={"steps": 1}, deepspeed="none"
    )


def watch_masks(monkeypatch):
    """The masks of all calls of torch's attention from now on."""
    masks, own = [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return own(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return masks


@pytest.mark.parametrize("preset", PRESETS)
def test_left_padded_rows_and_generation_are_those_of_plain_sdpa(preset):
    encoded, processor = samples(preset)
    batch = collate(encoded, processor, side="left")
    plain, model = build_preset(preset).eval(), prepared(preset, train=False, moe=False)
    assert torch.equal(plain(**batch.inputs).logits, model(**batch.inputs).logits)
    one, other = (each.generate(**batch.inputs, max_new_tokens=4, do_sample=False) for each in (plain, model))
    assert torch.equal(one, other)


def test_no_mask_of_a_packed_row_is_made(monkeypatch):
    """Its attention runs over samples, so the largest score matrix is that of the longest sample."""
    encoded, processor = samples("tiny-vl-moe")
    masks = watch_masks(monkeypatch)
    prepared("tiny-vl-moe")(**collate(encoded, processor, packed=True).inputs, use_cache=False)
    assert masks and all(mask is None for mask in masks)


def test_only_sdpa_is_replaced_and_the_vision_tower_keeps_it():
    for preset in PRESETS:
        model = prepared(preset)
        assert model.config.get_text_config()._attn_implementation == BY_SAMPLE
        if hasattr(model.config, "vision_config"):
            assert model.config.vision_config._attn_implementation == "sdpa"
        assert BY_SAMPLE not in model.config.to_json_string()
        eager = build_preset(preset, attention="eager")
        attend_by_sample(eager)
        assert eager.config.get_text_config()._attn_implementation == "eager"


def torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):  # fmt: skip
    """flash_attn_varlen_func by torch: (tokens, heads, width) each."""
    bounds = cu_seqlens_q.tolist()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and bounds == cu_seqlens_k.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k)
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    outputs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = [tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(*part, is_causal=causal, scale=softmax_scale, enable_gqa=gqa)
        outputs.append(out.squeeze(0).transpose(0, 1))
    torch_varlen.calls.append((bounds, causal))
    return torch.cat(outputs)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_reaches_the_flash_kernel(preset, monkeypatch):
    """transformers' own flash path with the kernel replaced by torch: the same samples, alone."""
    encoded, processor = samples(preset)
    expected = alone(preset, encoded, processor)

    def imports(*args, **kwargs):
        return None, torch_varlen, None, flash._pad_input, flash._unpad_input

    torch_varlen.calls = []
    monkeypatch.setattr(flash, "_lazy_imports", imports)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = build_preset(preset).train()
    model.config._attn_implementation = "flash_attention_2"
    batch = collate(encoded, processor, packed=True)
    loss, gradient = differences(model, batch, expected, use_cache=False)
    assert loss <= LOSS and gradient <= GRADIENT
    bounds = batch.inputs["cu_seq_lens_q"].tolist()
    causal = [found for found, causal in torch_varlen.calls if causal]
    assert causal == [bounds] * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if "vl" in preset])
def test_positions_are_those_of_the_models_own_method(preset):
    """Made without the model: several images, of several shapes, text alone, a single token."""
    encoded, processor = samples(preset)
    wide = Encoded(torch.tensor([5, *[processor.image_token_id] * 6, 9, 9, *[processor.image_token_id] * 4]),
                   torch.zeros(13), 1, image_grid_thw=torch.tensor([[1, 4, 6], [1, 8, 2]]))  # fmt: skip
    model = build_preset(preset)
    for one in [*encoded, wide, filler(processor)]:
        inputs = collate([one], processor).inputs
        rope, _ = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=one.image_grid_thw,
            attention_mask=inputs["attention_mask"],
        )
        found = processor.position_ids(one.input_ids, one.image_grid_thw)
        assert found[0].tolist() == list(range(len(one.input_ids))) and torch.equal(found[1:], rope[:, 0])


def test_kernels_that_this_machine_lacks_are_one_line_that_names_the_key():
    with pytest.raises(UserError, match=r"^model\.attention flash_attention_2.*use sdpa$"):
        load_model(ModelConfig(preset="tiny-vl-moe", attention="flash_attention_2"), torch.bfloat16)


def test_only_errors_about_attention_are_blamed_on_its_key(tmp_path, monkeypatch):
    model, _ = tiny_families.build("gpt_oss")
    model.save_pretrained(tmp_path)
    for unread in (True, False):
        with pytest.raises(UserError, match=r"^model\.attention sdpa: GptOssForCausalLM does not support.*\(eager "):
            load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)
    for error in (ImportError("no module kernels"), ValueError("layer_types names linear_attention")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(type(model), "from_pretrained", fail)
        with pytest.raises(type(error), match=str(error)):
            load_model(ModelConfig(path=str(tmp_path)), torch.float32)
