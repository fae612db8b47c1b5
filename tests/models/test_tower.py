"""The light vision tower against transformers' own: the same numbers, no graph when frozen, no waits for the device."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ds_moe.config.sections import ModelConfig, VideoConfig
from ds_moe.data.batch import SIZES
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate
from ds_moe.data.encode import encode as encode_sample
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.freeze import freeze
from ds_moe.models.load import load_model, processor_of
from ds_moe.models.presets import build_preset
from ds_moe.models.tower import PATCHES, lighten_tower, tower_inputs

VL = ["tiny-vl-moe", "tiny-vl-dense"]
GRID = torch.tensor([[1, 4, 10], [1, 8, 2], [1, 2, 2]])  # not square, of different sizes
MERGERS = r"^model\.visual\.(?!merger|deepstack)"  # all of the tower but what ends it


def towers(preset, frozen=()):
    """Transformers' tower and a light one with the same weights, as parts of their models, in training."""
    plain = build_preset(preset, seed=1).train()
    if frozen:
        freeze(plain, list(frozen))
    light = copy.deepcopy(plain)
    lighten_tower(light)
    return plain, light


def pixels():
    return torch.randn(int(GRID.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(0))


def encode(model, **more):
    found = model.model.visual(pixels(), grid_thw=GRID, return_dict=True, **more)
    return [found.pooler_output, *found.deepstack_features]


def near(ours, theirs):
    return (ours - theirs).abs().max() / theirs.abs().max() < 1e-6


@pytest.mark.parametrize("conv", [nn.Conv3d(3, 7, (2, 4, 5), (2, 4, 5)), nn.Conv2d(3, 7, (4, 5), bias=False)])
@pytest.mark.parametrize("patches", [0, 1, 11])
def test_a_patch_embedding_equals_the_convolution_forward_and_backward(conv, patches):
    """In fp64, where the order of the sums does not show."""
    conv = copy.deepcopy(conv).double()
    product = copy.deepcopy(conv)
    product.__class__ = PATCHES[type(conv)]
    x = torch.randn(patches, 3, *conv.kernel_size, dtype=torch.float64)
    found = []
    for one in (conv, product):
        given = x.clone().requires_grad_()
        output = one(given)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        found.append([output, given.grad, *(parameter.grad for parameter in one.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and ours.shape == theirs.shape


def test_an_input_larger_than_a_patch_is_convolved():
    conv = nn.Conv2d(3, 7, 4, 4)
    product = copy.deepcopy(conv)
    product.__class__ = PATCHES[nn.Conv2d]
    image = torch.randn(2, 3, 8, 12)
    assert torch.equal(product(image), conv(image))


@pytest.mark.parametrize("options", [{"padding": 1}, {"dilation": 2}, {"groups": 3}, {"padding": "same"}])
def test_a_convolution_that_is_no_product_is_left_as_it_is(options):
    model = build_preset("tiny-vl-dense")
    model.model.visual.other = nn.Conv2d(3, 6, 3, **options)
    lighten_tower(model)
    assert type(model.model.visual.other) is nn.Conv2d
    assert type(model.model.visual.patch_embed.proj) is PATCHES[nn.Conv3d]


def test_a_model_without_a_tower_is_left_as_it_is():
    model = build_preset("tiny-moe")
    before = [type(module) for module in model.modules()]
    lighten_tower(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("preset", VL)
@pytest.mark.parametrize("frozen", [(), (MERGERS,)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_light_tower_equals_the_plain_one(preset, frozen, checkpointed):
    plain, light = towers(preset, frozen)
    assert {name: one.shape for name, one in plain.state_dict().items()} == {
        name: one.shape for name, one in light.state_dict().items()
    }
    gradients = []
    for model in (plain, light):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        outputs = encode(model)
        sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in outputs).backward()
        of = {name: one.grad for name, one in model.model.visual.named_parameters() if one.requires_grad}
        gradients.append((outputs, of))
    (theirs, their_grads), (ours, our_grads) = gradients
    assert all(near(a, b) for a, b in zip(ours, theirs, strict=True))
    assert our_grads.keys() == their_grads.keys() and our_grads
    for name, gradient in their_grads.items():
        assert (our_grads[name] - gradient).abs().max() <= 5e-6 * gradient.abs().max(), name


def kept(encode):
    """(bytes that a forward keeps for backward, its outputs); each storage counts once, parameters do not."""
    found = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = encode()
    return sum(found.values()), outputs


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_frozen_tower_keeps_nothing(checkpointed):
    """Even where a hook lets its patches require gradients, as PEFT and transformers do to input embeddings."""
    plain, light = towers("tiny-vl-moe", ["vision", "embeddings"])
    sizes = []
    for model in (plain, light):
        model.model.visual.patch_embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        size, outputs = kept(lambda model=model: encode(model))
        sizes.append((size > 0, any(one.requires_grad for one in outputs)))
    assert sizes == [(True, True), (False, False)]  # the plain tower is the negative control


def test_of_a_partly_trained_tower_only_what_follows_keeps_something():
    """The mergers keep their inputs, the blocks before them nothing."""
    _, whole = towers("tiny-vl-moe")
    _, partly = towers("tiny-vl-moe", [MERGERS])
    (all_of_it, _), (some, outputs) = (kept(lambda model=model: encode(model)) for model in (whole, partly))
    assert 0 < some < all_of_it / 2 and all(one.requires_grad for one in outputs)


class Device(torch.Tensor):
    """A tensor of a pretended device: notes every call that would wait for a real one."""

    waits: list[str] = []
    READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "numpy"}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(one, Device) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        unknown_size = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in cls.READS or by_mask or unknown_size:
            cls.waits.append(name)
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


def waits_of(model, **sizes):
    Device.waits.clear()
    model.model.visual(pixels().as_subclass(Device), return_dict=True, **sizes)
    return len(Device.waits)


@pytest.mark.parametrize("preset", VL)
def test_a_light_tower_waits_for_no_device(preset):
    plain, light = towers(preset)
    assert waits_of(light, grid_thw=GRID) == 0
    on_device = waits_of(light, grid_thw=GRID.as_subclass(Device))
    blocks = len(plain.model.visual.blocks)
    assert on_device == 1 and waits_of(plain, grid_thw=GRID.as_subclass(Device)) >= 5 + blocks  # negative control


def test_what_was_made_ahead_is_taken_and_not_made_again(monkeypatch):
    _, light = towers("tiny-vl-moe")
    expected = encode(light)
    made = tower_inputs(light.model.visual, GRID)
    assert made["max_seqlen"] == 40 and made["cu_seqlens"].tolist() == [0, 40, 56, 60]
    monkeypatch.setattr("ds_moe.models.tower.tower_inputs", None)
    made.pop("grid_thw")
    assert all(map(torch.equal, encode(light, **made), expected))
    made["position_ids"] = made["position_ids"].flip(0)  # negative control: they are what is read
    assert not torch.equal(encode(light, **made)[0], expected[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("preset", VL)
def test_a_loaded_model_with_what_the_loader_makes_equals_the_plain_one(preset, packed):
    """Loss, gradients and the waits that are left: one, for transformers' own count of image tokens."""
    config = ModelConfig(preset=preset)
    processor = processor_of(config, VideoConfig())
    plain, ours = build_preset(preset).train(), load_model(config, torch.float32)
    encoded = [encode_sample(one, processor, 256, 2**20) for one in digits_samples("train")[:3]]
    batch = collate(encoded, processor, packed=packed)
    made = {name for name in batch.inputs if name.startswith("image_")} - {"image_grid_thw"}
    assert "image_interp_weights" in made and "position_ids" in batch.inputs
    made |= set() if packed else {"position_ids"}
    bare = {name: value for name, value in batch.inputs.items() if name not in made}
    found = []
    for model, inputs in ((plain, bare), (ours.train(), batch.inputs)):
        attend_by_sample(model)
        loss = model(**inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
        found.append((loss, {name: one.grad for name, one in model.named_parameters()}))
    (theirs, their_grads), (own, our_grads) = found
    assert abs(theirs - own) < 1e-6
    for name, gradient in their_grads.items():
        assert (our_grads[name] - gradient).abs().max() <= 5e-6 * gradient.abs().max(), name
    waits = []
    for model, inputs, host in ((plain, bare, ()), (ours, batch.inputs, SIZES)):
        given = {
            name: one.as_subclass(Device) if isinstance(one, torch.Tensor) and name not in host else one
            for name, one in inputs.items()
        }
        Device.waits.clear()
        model(**given, use_cache=False)
        waits.append(list(Device.waits))
    assert waits[1] == ["item", "__bool__"] and len(waits[0]) > 12  # transformers alone is the negative control


def test_every_loaded_model_has_a_light_tower():
    model = load_model(ModelConfig(preset="tiny-vl-moe"), torch.float32)
    assert type(model.model.visual.patch_embed.proj) is PATCHES[nn.Conv3d]
