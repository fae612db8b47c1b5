"""A converted model is the transformers model: names, loss, gradients, recorded logits, generation."""

import copy

import pytest
import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.errors import UserError
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.load import load_model
from ds_moe.models.presets import build_preset
from ds_moe.moe.all_to_all import ExpertParallel


def vl_batch(config, seed=0):
    """Two samples, one image, padding: what a converted model must get through unchanged."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (2, 12), generator=generator)
    ids[0, 2] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(4, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def batch_for(model):
    batch = vl_batch(model.config) if hasattr(model.config, "image_token_id") else None
    if batch is None:
        ids = torch.randint(20, 200, (2, 12))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return batch


@pytest.mark.parametrize("preset", ["tiny-vl-moe", "tiny-moe"])
def test_converted_equals_transformers(preset):
    model = build_preset(preset).train()
    plain = copy.deepcopy(model)
    convert(model, MoEConfig())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    batch = batch_for(model)
    ours, theirs = (m(**batch, output_router_logits=True) for m in (model, plain))
    assert abs(ours.loss.item() - theirs.loss.item()) <= 1e-6
    assert len(ours.router_logits) == len(theirs.router_logits) == len(moe_layers(model))
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 5e-6 * other.grad.abs().max(), name


def test_router_logits_recorded_before_the_conversion_are_recorded_after_it():
    """transformers hooks the routers once, in the first forward that records."""
    model = build_preset("tiny-moe").eval()
    batch = batch_for(model)
    before = model(**batch, output_router_logits=True)
    convert(model, MoEConfig())
    after = model(**batch, output_router_logits=True)
    assert len(after.router_logits) == len(before.router_logits) == len(moe_layers(model))
    torch.testing.assert_close(after.router_logits, before.router_logits)
    torch.testing.assert_close(after.aux_loss, before.aux_loss)


def test_parity_notices_one_changed_expert():
    """Negative control of every parity test here: the numbers above can fail."""
    model = build_preset("tiny-vl-moe")
    plain = copy.deepcopy(model)
    convert(model, MoEConfig())
    batch = batch_for(model)
    with torch.no_grad():
        used = moe_layers(model)[0].gate(torch.randn(64, 64)).expert_N.mode().values
        moe_layers(model)[0].experts.down_proj[used] += 0.05
    assert abs(model(**batch).loss.item() - plain(**batch).loss.item()) > 1e-6


def test_generation_is_unchanged_with_left_padding_and_cache():
    model = build_preset("tiny-vl-moe").eval()
    plain = copy.deepcopy(model)
    convert(model, MoEConfig())
    batch = vl_batch(model.config)
    batch.pop("labels")
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        batch[key] = batch[key].flip(1)  # the padding comes to the left
    ours, theirs = (m.generate(**batch, max_new_tokens=6, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_each_rank_keeps_its_own_experts():
    whole = build_preset("tiny-vl-moe")
    for rank in range(4):
        model = build_preset("tiny-vl-moe")
        convert(model, MoEConfig(ep_size=4), ExpertParallel(size=4, rank=rank))
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name)
            if ".experts." in name:
                expected = expected[2 * rank : 2 * rank + 2]
            assert torch.equal(parameter, expected), name


def test_top_k_from_the_run_is_used_and_kept_in_the_config():
    model = build_preset("tiny-vl-moe")
    convert(model, MoEConfig(router={"top_k": 3}))
    model(**batch_for(model))
    assert moe_layers(model)[0].load.take()[0].sum() == 3 * 20
    assert model.config.get_text_config().num_experts_per_tok == 3


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(UserError, match="qwen3_vl"):
        convert(build_preset("tiny-vl-dense"), MoEConfig())
    with pytest.raises(UserError, match="ep_size=3 does not divide the model's 8 experts"):
        convert(build_preset("tiny-vl-moe"), MoEConfig(ep_size=3), ExpertParallel(size=3))


def test_a_bf16_preset_keeps_fp32_rotary_frequencies_as_from_pretrained_does():
    model = load_model(ModelConfig(preset="tiny-vl-moe"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_experts_with_another_activation_are_refused():
    model = build_preset("tiny-moe")
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.act_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="their activation is GELU; known: plain SiLU-gated"):
        convert(model, MoEConfig())
