"""What transformers does that a reader of its manual would not expect. A failing test here means that a guard may go.

`docs/libraries.md` lists them all. `make test-transformers` runs this file with the newest version too.
"""

import json
from importlib.metadata import version

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLVideoProcessor,
    get_scheduler,
)
from transformers.exporters.utils import precompute_export_inputs
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchvision_available

from ds_moe.models.processor import tiny_processor

IDS = torch.arange(6).unsqueeze(0)
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
TEXT = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def text_model():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT)).eval()


def vl_model(processor, hidden_size=16):
    torch.manual_seed(0)
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in names}
    text = {**TEXT, "hidden_size": hidden_size, "rope_parameters": ROPE}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**VISION, "out_hidden_size": hidden_size}, **ids)
    return Qwen3VLMoeForConditionalGeneration(config).eval()


def with_an_image(processor):
    text = "<|vision_start|><|image_pad|><|vision_end|>hi"
    return processor(text=[text], images=[Image.new("RGB", (16, 16))], return_tensors="pt")


def changed(folder, change):
    """The folder of a text model whose weights `change` has rewritten."""
    text_model().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- loading


def test_a_missing_and_an_unexpected_weight_are_no_error_and_another_shape_names_no_weight(tmp_path):
    """Guard: `_from_pretrained` of models/load.py reads the report, and refuses whatever is in it."""

    def change(weights):
        weights["extra"] = torch.ones(2)
        del weights[NORM]

    def shorten(weights):
        change(weights)
        weights[QUERY] = weights[QUERY][:8].clone()

    Qwen3MoeForCausalLM.from_pretrained(changed(tmp_path / "names", change))
    folder = changed(tmp_path / "shapes", shorten)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as raised:
        Qwen3MoeForCausalLM.from_pretrained(folder)
    assert QUERY not in str(raised.value)
    more = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    for device in (None, "meta"):  # relied on: on meta nothing is read, and the report is the same
        _, report = Qwen3MoeForCausalLM.from_pretrained(folder, device_map=device, **more)
        assert report["missing_keys"] == {NORM} and report["unexpected_keys"] == {"extra"}
        assert [name for name, *_ in report["mismatched_keys"]] == [QUERY]


def test_experts_of_unequal_shapes_are_an_error_that_names_no_weight(tmp_path):
    """Guard: `uneven_experts` of weights/layouts.py."""
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    folder = changed(tmp_path, lambda weights: weights.update({name: weights[name][:4].clone()}))
    with pytest.raises(RuntimeError, match="automatic conversion") as raised:
        Qwen3MoeForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert name not in str(raised.value)


@pytest.mark.parametrize(("hidden_size", "right"), [(16, True), (24, False)], ids=["told by shape", "square"])
def test_transposed_experts_are_told_by_their_shape(processor, tmp_path, hidden_size, right):
    """Guards: `hub_layout_problem` of weights/layouts.py, `check_files` of the doctor. Nothing is said of a square."""
    model = vl_model(processor, hidden_size)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    hub = {name: one.mT.contiguous() if ".experts." in name else one for name, one in weights.items()}
    save_file(hub, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)) == right


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "apart"])
def test_weights_that_a_config_ties_are_tied_where_files_hold_equal_values_and_never_on_meta(tmp_path, equal):
    """Guard: `tie_as_stored` of models/ties.py."""
    model = text_model()
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + (0.0 if equal else 1.0)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for device, tied in ((None, equal), ("meta", False)):
        loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path, device_map=device)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_one_file_goes_before_an_index(tmp_path):
    """Guard: `_weight_paths` of weights/files.py chooses alike, `check_files` of the doctor warns."""
    text_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "missing"}}')
    Qwen3MoeForCausalLM.from_pretrained(tmp_path)


def test_a_config_can_name_another_file_of_weights(tmp_path):
    """Guard: `read_model_config` of models/folder.py refuses it."""
    text_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors"}))
    Qwen3MoeForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_beside_a_model_is_loaded_with_it(tmp_path):
    """Guard: `read_model_config` of models/folder.py refuses it."""
    peft.get_peft_model(text_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    text_model().save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_casting_a_model_rounds_rotary_frequencies_and_loading_it_does_not(tmp_path):
    """Guard: `load_model` of models/load.py casts the parameters of a preset alone."""
    text_model().save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {one.dtype for one in loaded.buffers()} == {torch.float32}
    assert {one.dtype for one in text_model().to(torch.bfloat16).buffers()} == {torch.bfloat16}


def test_values_of_a_config_are_used_before_their_types_are_looked_at(tmp_path):
    """Guard: `read_model_config` of models/folder.py takes any exception for a config that cannot be read."""
    for values in ({"model_type": "qwen3_moe", "layer_types": 3}, {"model_type": ["qwen3_moe"]}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(TypeError):
            AutoConfig.from_pretrained(tmp_path)


def test_weights_are_initialised_only_where_a_module_is_not_marked_as_done():
    """Relied on: `_compute_buffers` of weights/unread.py takes the mark off modules with buffers."""
    model = text_model()
    before, rotary = model.lm_head.weight.clone(), model.model.rotary_emb
    kept, rotary.inv_freq = rotary.inv_freq.clone(), torch.zeros_like(rotary.inv_freq)
    model.initialize_weights()
    assert not rotary.inv_freq.any()
    rotary._is_hf_initialized = False
    model.initialize_weights()
    assert torch.equal(rotary.inv_freq, kept) and torch.equal(model.lm_head.weight, before)


# --- configs


def test_the_width_and_the_number_of_experts_have_many_names(processor):
    """Guards: `install_gate` of tasks/gate/model.py, `expert_count` of config/rules/model.py."""
    config = vl_model(processor).config
    assert not hasattr(config, "hidden_size") and config.get_text_config().hidden_size == 16
    assert MixtralConfig(num_local_experts=4).num_experts == 4


def test_the_end_of_a_generation_is_none_a_number_or_a_list():
    """Guard: `stop_tokens` of models/generation.py."""
    assert [GenerationConfig(eos_token_id=end).eos_token_id for end in (None, 1, [1, 2])] == [None, 1, [1, 2]]


# --- forward


def test_an_argument_that_a_model_does_not_know_is_passed_over(processor):
    """Guard: `_take_routing` of models/convert.py takes `routing` out before a forward, which says nothing of it."""
    assert text_model()(IDS, nonsense=1).logits.shape == vl_model(processor)(IDS, nonsense=1).logits.shape


def test_router_logits_are_recorded_of_the_family_s_own_class_by_hooks_installed_once():
    """Relied on: `_router` of models/convert.py makes routers subclasses, and converts before the first forward."""

    class Other(nn.Module):
        def __init__(self, gate):
            nn.Module.__init__(self)
            self.weight, self.original = gate.weight, [gate]  # in a list, so that it is no module of this one

        def forward(self, x):
            logits, *rest = self.original[0].forward(x)
            return logits + 100, *rest

    model = text_model()
    first, second = (layer.mlp for layer in model.model.layers)
    kept = first.gate
    first.gate, second.gate = Other(kept), type("Ours", (Other, type(kept)), {})(second.gate)
    for gate in (first.gate, kept):  # the first forward installs the hooks, and the second one no more
        first.gate = gate
        [recorded] = model(IDS, output_router_logits=True).router_logits
        assert recorded.min() > 50


def test_a_constant_schedule_has_no_warm_up():
    """Guard: `scheduler_factory` of engine/build.py."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert get_scheduler("constant", optimizer, num_warmup_steps=5).get_last_lr() == [1.0]


def test_one_item_in_a_batch_makes_the_loss_a_sum(processor):
    """Relied on: `evaluate` of tasks/answers.py and the loss of tasks/task.py. Qwen3-VL is no exception."""
    for model in (text_model(), vl_model(processor)):
        mean, total = (model(IDS, labels=IDS, **more).loss for more in ({}, {"num_items_in_batch": 1}))
        torch.testing.assert_close(total, 5 * mean)


def test_an_image_needs_token_types_and_the_decoder_is_told_where_it_is(processor):
    """Guards: `collate` of data/encode.py; relied on: `_begin_forward` of models/convert.py, `keep_vision_in_step`."""
    model, inputs, given = vl_model(processor), with_an_image(processor), {}
    model.model.language_model.register_forward_pre_hook(lambda _, args, more: given.update(more), with_kwargs=True)
    model(**inputs)
    assert given["visual_pos_masks"].sum() == 4 and given["inputs_embeds"].shape[:2] == inputs["input_ids"].shape
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**inputs)


def test_a_vision_tower_takes_what_is_made_of_its_grid(processor):
    """Relied on: `tower_inputs` of models/tower.py and of models/processor.py."""
    model, inputs, seen = vl_model(processor), with_an_image(processor), []
    made = {"grid_thw": inputs["image_grid_thw"]}
    precompute_export_inputs(model.model.visual, made)
    names = ["cu_seqlens", "grid_thw", "interp_indices", "interp_weights", "max_seqlen", "position_ids"]
    assert sorted(made) == names
    model.model.visual.register_forward_pre_hook(lambda _, args, more: seen.append(set(more)), with_kwargs=True)
    given = {f"image_{name}": value for name, value in made.items() if name != "grid_thw"}
    with torch.no_grad():
        assert torch.equal(model(**inputs, **given).logits, model(**inputs).logits)
        assert seen[0] >= set(names) and not seen[1] & {"position_ids", "interp_indices", "cu_seqlens"}
        given["image_position_ids"] = given["image_position_ids"].flip(0)
        assert not torch.equal(model(**inputs, **given).logits, model(**inputs).logits)


def test_deepstack_features_are_added_by_a_method_of_the_decoder(processor):
    """Guard: `_add_at` of models/tower.py."""
    model, inputs, called = vl_model(processor), with_an_image(processor), []
    model.model.language_model._deepstack_process = lambda hidden, mask, features: called.append(mask) or hidden
    model(**inputs)
    assert len(called) == 1 and called[0].dtype == torch.bool and called[0].shape == inputs["input_ids"].shape


def test_experts_say_how_their_weights_lie_and_a_function_can_take_their_place():
    """Relied on: `experts_forward` of models/hf_experts.py."""
    experts = text_model().model.layers[0].mlp.experts
    assert experts.has_gate and experts.is_concatenated
    names = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    assert not any(getattr(experts, name) for name in names)
    assert [name for name, _ in text_model().model.layers[0].mlp.named_parameters()][-1] == "gate.weight"


# --- packed rows


def rows_of_two_samples():
    """One row of two samples of 3 tokens, and the same with another first sample."""
    other = IDS.clone()
    other[0, :3] += 100
    return IDS, other, torch.tensor([[0, 1, 2, 0, 1, 2]])


def test_samples_of_a_packed_row_mix_in_silence_where_a_cache_is_made():
    """Guard: models/attention.py takes bounds, not positions. A model makes a cache unless it is told not to."""
    model = text_model().eval()
    one, other, positions = rows_of_two_samples()
    second = {
        told: [model(ids, position_ids=positions, **more).logits[:, 3:] for ids in (one, other)]
        for told, more in (("nothing", {}), ("no cache", {"use_cache": False}))
    }
    torch.testing.assert_close(*second["no cache"])
    assert (second["nothing"][0] - second["nothing"][1]).abs().max() > 1e-4


def test_bounds_of_samples_are_passed_over_by_sdpa():
    """Guard: models/attention.py; flash attention alone reads them. With them alone samples mix."""
    model = text_model().eval()
    one, other, _ = rows_of_two_samples()
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 3, "max_length_k": 3}
    found = [model(ids, use_cache=False, **given).logits[:, 3:] for ids in (one, other)]
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_unknown_arguments_of_a_model_reach_the_attention_of_its_decoder_as_they_are(processor, monkeypatch):
    """Relied on: `_attention` of models/attention.py gets `sample_lengths`."""
    given, own = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, *args, **kwargs):
        given.append((type(module).__name__, kwargs.get("sample_lengths")))
        return own(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched)
    vl_model(processor)(**with_an_image(processor), sample_lengths=(2, 7))
    decoder = [lengths for name, lengths in given if name == "Qwen3VLMoeTextAttention"]
    assert decoder == [(2, 7)] * TEXT["num_hidden_layers"]


def test_an_attention_without_a_mask_function_of_its_name_gets_no_mask_of_padding():
    """Guard: models/attention.py registers both."""
    config = text_model().config
    config._attn_implementation = "attention without a mask"
    mask = torch.tensor([[0, 1, 1]])
    assert create_causal_mask(config, torch.zeros(1, 3, 4), mask, None) is None


# --- generate


def test_generate_takes_what_a_call_leaves_open_from_the_model_s_own_config():
    """Guard: `own_generation_config` of models/generation.py."""
    model, answers = text_model(), []
    for penalty in (1.0, 50.0):
        model.generation_config = GenerationConfig(repetition_penalty=penalty)
        call = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
        answers.append(model.generate(IDS, generation_config=call).tolist())
    assert answers[0] != answers[1]


def test_generate_encodes_images_before_the_first_forward_and_hands_on_no_grid(processor):
    """Guards: `generate_answers` of tasks/answers.py encodes a blank image; `_contextual` of tasks/gate/model.py."""
    model, order, given = vl_model(processor), [], []
    model.model.visual.register_forward_hook(lambda *_: order.append("vision"))
    model.model.language_model.register_forward_hook(lambda *_: order.append("decoder"))
    model.model.register_forward_pre_hook(lambda _, args, more: given.append(more), with_kwargs=True)
    model.generate(**with_an_image(processor), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert order == ["vision", "decoder", "decoder"]
    assert given[0].get("image_grid_thw") is None and given[0].get("pixel_values") is None
    assert given[0]["mm_encoder_outputs"] and given[0]["position_ids"] is not None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_decoder_gets_its_cache_by_a_name_that_depends_on_the_version(name):
    """Guard: `cache_of` of models/generation.py."""
    newer = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24)
    if newer != (name == "cache"):
        pytest.skip(f"transformers {version('transformers')} has the other name")
    model, given = text_model(), []
    model.model.register_forward_pre_hook(lambda _, args, more: given.append(more), with_kwargs=True)
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert all(one.get(name) is not None for one in given)


# --- processors


def test_text_that_imitates_a_special_token_becomes_one_unless_it_is_split(processor):
    """Guard: `_encode` of data/chat_template.py."""
    ids = [processor.tokenizer("<|im_end|>", **more)["input_ids"] for more in ({}, {"split_special_tokens": True})]
    assert ids[0] == [processor.tokenizer.eos_token_id] and len(ids[1]) > 1


def test_a_folder_of_a_text_model_gives_its_tokenizer_without_a_word_even_if_it_describes_images(processor, tmp_path):
    """Guard: `load_processor` of models/processor.py, which does not ask `AutoProcessor`."""
    processor.tokenizer.save_pretrained(tmp_path)
    Qwen3MoeConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision_there_is_no_video_processor():
    """Guard: `Qwen3VLProcessor` and `_vl_processor` of models/processor.py, which do without."""
    with pytest.raises(ImportError, match="Torchvision"):
        Qwen3VLVideoProcessor()


def test_an_image_two_hundred_times_as_long_as_wide_is_an_error(processor):
    """Guard: `encode_images` of data/encode.py makes it a bad record."""
    with pytest.raises(ValueError, match="aspect ratio"):
        processor.image_processor([Image.new("RGB", (402, 2))], return_tensors="pt")


def test_a_video_of_one_frame_is_refused_and_more_are_not():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    with pytest.raises(ValueError, match="t:1 must be larger than temporal_factor:2"):
        smart_resize(1, 64, 64)
    assert smart_resize(3, 64, 64, min_pixels=1) == (56, 56)


def test_times_of_an_odd_number_of_frames_lengthen_the_list():
    from transformers import Qwen3VLProcessor

    numbers = [0, 4, 8]
    assert Qwen3VLProcessor._calculate_timestamps(None, numbers, 2.0, 2) == [1.0, 4.0]
    assert numbers == [0, 4, 8, 8]
