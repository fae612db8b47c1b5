"""A gated model on real images: the mixture, what the gate reads, decoding, checkpointing, the reference."""

import peft
import pytest
import torch

from ds_moe.config.tasks import GateConfig
from ds_moe.data.encode import NO_LOSS, collate, collate_prompts
from ds_moe.tasks.gate import model as gate
from ds_moe.tasks.gate.model import hold_reference
from ds_moe.tasks.gate.network import GateDecision, divergence, gate_loss
from tests.models.tiny_families import build
from tests.tasks.gate.gated import PROCESSOR, SAMPLES, WITHOUT_IMAGES, batch, encoded, fixed, gated
from tests.tasks.gate.lora_folders import ADAPTERS, base, difference, write

K, STEPS = len(ADAPTERS), 6
CONTROL = sorted(PROCESSOR.tokenizer.added_tokens_decoder)  # ids that an untrained model must not answer with
READS = [{"text": "embeddings"}, {"text": "last"}, {"text": "layer", "text_layer": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("index", range(K))
def test_one_hot_is_that_adapter_with_images(folder, index):
    model, inputs = fixed(gated(folder, strength=1), torch.eye(K)[index]), batch()
    plain = peft.PeftModel.from_pretrained(base(), folder / model.adapter_bank.names[index]).eval()
    ours = logits(model, inputs)
    assert difference(ours, logits(base(), inputs)) > 1e-3
    assert difference(ours, logits(plain, inputs)) <= 1e-6


@torch.no_grad()
def test_glm_s_edges_of_images_are_known_too(tmp_path):
    """Its config calls them otherwise than Qwen's."""
    for seed, name in enumerate(("mail", "maps")):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(build("glm4v_moe")[0], lora).save_pretrained(tmp_path / name)
    model, inputs = build("glm4v_moe")
    gate.install_gate(model, GateConfig(adapters_in=str(tmp_path))).eval()
    model(**inputs, use_cache=False)
    features, config = model.features, model.config
    assert features.present_B.tolist() == [True, False]
    ids_S = inputs["input_ids"][0]
    of_image = (
        (ids_S == config.image_start_token_id) | (ids_S == config.image_end_token_id) | (ids_S == config.image_token_id)
    )
    before_S = ~of_image & ((inputs["labels"][0] != NO_LOSS).cumsum(0) == 0)
    expected_D = model.get_input_embeddings()(ids_S[before_S]).float().sum(0) / before_S.sum().clamp(min=1)
    torch.testing.assert_close(features.text_BD[0], expected_D)


def test_an_even_mixture_is_the_naive_blend(folder):
    naive = base()
    with torch.no_grad():
        for name in ADAPTERS:
            for path, module in peft.PeftModel.from_pretrained(base(), folder / name).base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    naive.get_submodule(path).weight += module.get_delta_weight("default") / K
    model, inputs = fixed(gated(folder, strength=1), torch.full((K,), 1 / K)), batch()
    assert difference(logits(model, inputs), logits(naive, inputs)) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("keys", READS, ids=lambda keys: keys["text"])
def test_the_request_is_read_where_it_is_said_to_be(folder, keys):
    model, plain, hidden = gated(folder, **keys), base(), {}
    model(**batch(), use_cache=False)
    layers = {"embeddings": plain.get_input_embeddings(), "layer": plain.model.language_model.layers[0]}
    layers["last"] = plain.model.language_model.norm
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: hidden.update({name: out}))
    for one, text_D, vision_D in zip(encoded(), model.features.text_BD, model.features.vision_BD, strict=True):
        inputs = collate([one], PROCESSOR).inputs
        plain(**inputs)
        about_screen = [PROCESSOR.image_token_id, PROCESSOR.vision_start_token_id, PROCESSOR.vision_end_token_id]
        rows_SD = hidden[keys["text"]][0][~torch.isin(one.input_ids, torch.tensor(about_screen))]
        rows_SD = rows_SD[: len(rows_SD) - (one.labels != NO_LOSS).sum() - 1]  # nor the line break after the answer
        expected = rows_SD[-1] if keys["text"] == "last" else rows_SD.mean(0)
        torch.testing.assert_close(text_D, expected, atol=1e-5, rtol=1e-4)
        if one.pixel_values is None:
            assert not vision_D.any()
        else:
            tokens_ID = torch.cat(plain.get_image_features(one.pixel_values, one.image_grid_thw).pooler_output)
            expected = torch.cat([tokens_ID.mean(0), tokens_ID.std(0, correction=0)])
            torch.testing.assert_close(vision_D, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("keys", [*READS, {"per": "layer"}, {"per": "token"}])
def test_each_request_of_a_batch_gets_what_it_gets_alone(folder, keys):
    model = gated(folder, **keys)
    together = logits(model, batch())
    for row_SV, one in zip(together, SAMPLES, strict=True):
        [alone_SV] = logits(model, batch([one]))
        torch.testing.assert_close(row_SV[: len(alone_SV)], alone_SV, atol=2e-5, rtol=1e-4)


def spread(decision):
    """Largest distance of the weights of two requests."""
    return torch.pdist(decision.weights.flatten(1)).max()


def generate(model, samples):
    prompt = collate_prompts(encoded(samples), PROCESSOR).inputs
    options = {"max_new_tokens": STEPS, "suppress_tokens": CONTROL, "do_sample": False, "use_cache": True}
    made = model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True)
    return prompt, made.sequences, torch.stack(made.logits, 1)


def without_cache(model, prompt, sequences):
    """Logits of the generated tokens in one forward; the labels hide them from the gate, as they hide an answer."""
    more = torch.ones(len(sequences), STEPS, dtype=torch.int64)
    given = {
        "input_ids": sequences,
        "attention_mask": torch.cat([prompt["attention_mask"], more], 1),
        "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], 0 * more], 1),
        "labels": torch.cat([torch.full_like(prompt["input_ids"], NO_LOSS), sequences[:, -STEPS:]], 1),
    }
    return logits(model, {**prompt, **given})[:, -STEPS - 1 : -1]


@pytest.mark.parametrize("samples", [SAMPLES, WITHOUT_IMAGES, SAMPLES[2:3]], ids=["mixed", "no images", "two images"])
@pytest.mark.parametrize(
    "keys",
    [*READS, {"per": "layer"}, {"per": "token"}, {"select": "hard"}, {"select": "top_k", "top_k": 2}],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_generation_keeps_the_gate_of_its_prompt(folder, keys, samples):
    model, decisions = gated(folder, **keys), []
    handle = model.adapter_gate.register_forward_hook(lambda *call: decisions.append(call[-1]))
    prompt, sequences, step_by_step = generate(model, samples)
    handle.remove()
    assert len(decisions) == (STEPS if keys.get("per") == "token" else 1)
    assert samples is not SAMPLES or spread(decisions[0]) > 0.1
    at_once = without_cache(model, prompt, sequences)
    torch.testing.assert_close(step_by_step, at_once, atol=2e-5, rtol=1e-4)
    at_once[..., CONTROL] = float("-inf")
    assert at_once.argmax(-1).equal(sequences[:, -STEPS:])
    if keys.get("per") == "token":  # each step's gate is that of the token it reads
        weights = torch.cat([decision.weights for decision in decisions], 1)
        torch.testing.assert_close(weights, model.decision.weights[:, :-1], atol=1e-5, rtol=1e-5)
        assert (weights[:, -2] - weights[:, -3]).abs().max() > 0.02


@pytest.mark.parametrize("broken", ["dropped", "of the last token", "of the last token without its screen"])
def test_a_gate_dropped_at_decode_is_noticed(folder, broken):
    model = gated(folder, per="token" if "screen" in broken else "example")

    def tamper(decoder, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:  # the prompt
            return
        features = model.features
        if "screen" in broken:
            features.vision_BD, features.present_B = 0 * features.vision_BD, features.present_B & False
            model.adapter_bank.gates.weights = model.adapter_gate(features).weights
        elif broken == "dropped":
            model.adapter_bank.gates.weights = None
        else:
            features.text_BD = kwargs["inputs_embeds"][:, 0]
            model.adapter_bank.gates.weights = model.adapter_gate(features).weights

    handle = model.model.language_model.register_forward_pre_hook(tamper, with_kwargs=True)
    prompt, sequences, step_by_step = generate(model, SAMPLES)
    handle.remove()
    away = (step_by_step - without_cache(model, prompt, sequences)).abs().amax((0, 2))
    assert away[0] < 2e-5 and away[1:].min() > 1e-3


def decisions_for_two_answers(model):
    """(features, decision) of a batch, and of the same one with other answers."""
    inputs = batch()
    answer_BS = inputs["labels"] != NO_LOSS
    other = (inputs["input_ids"] + 17) % 200 + 5
    changed = {key: torch.where(answer_BS, other, inputs[key]) for key in ("input_ids", "labels")}
    seen = []
    for given in (inputs, inputs | changed):
        plain = logits(model, given)
        seen.append((model.features, model.decision, plain))
    assert difference(seen[0][2], seen[1][2]) > 1e-2
    return [one[:2] for one in seen]


@pytest.mark.parametrize("keys", READS, ids=lambda keys: keys["text"])
def test_the_answer_does_not_reach_the_gate(folder, keys):
    (features, decision), (other_features, other_decision) = decisions_for_two_answers(gated(folder, **keys))
    assert features.text_BD.equal(other_features.text_BD) and features.vision_BD.equal(other_features.vision_BD)
    assert decision.logits.equal(other_decision.logits) and decision.weights.equal(other_decision.weights)


@pytest.mark.parametrize("keys", READS, ids=lambda keys: keys["text"])
def test_a_leaked_answer_token_is_noticed(folder, keys, monkeypatch):
    honest = gate.prompt_mask
    monkeypatch.setattr(gate, "prompt_mask", lambda ids, mask, labels, *more: honest(ids, mask, None, *more))
    (features, decision), (other_features, other_decision) = decisions_for_two_answers(gated(folder, **keys))
    assert (features.text_BD != other_features.text_BD).any(1).all()
    assert ((decision.weights - other_decision.weights).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("keys", [*READS, {"per": "layer"}], ids=lambda keys: "-".join(map(str, keys.values())))
def test_training_and_serving_decide_alike(folder, keys):
    model = gated(folder, **keys)
    logits(model, batch())
    trained = model.decision
    assert spread(trained) > 0.1
    generate(model, SAMPLES)
    torch.testing.assert_close(model.decision.logits, trained.logits, atol=1e-5, rtol=1e-5)
    prompt = collate_prompts(encoded(), PROCESSOR).inputs
    with torch.no_grad():
        served = model(**prompt, gate_only=True)
    torch.testing.assert_close(served.logits, trained.logits, atol=1e-5, rtol=1e-5)


def test_the_first_token_says_nothing_and_that_is_said(folder):
    with pytest.warns(UserWarning, match="content-free under causal attention") as caught:
        model = gated(folder, text="first", modalities="text")
    assert len([one for one in caught if "content-free" in str(one.message)]) == 1
    logits(model, batch())
    text_BD = model.features.text_BD
    assert difference(text_BD, text_BD[:1]) < 1e-5 < 1e-2 < text_BD.abs().max() and spread(model.decision) < 1e-4


def gradients(model):
    model.zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("keys", [{}, {"text": "last", "per": "layer"}, {"per": "token"}])
@pytest.mark.parametrize("stage", ["end_to_end", "joint"])
def test_gradient_checkpointing_changes_no_gradient(folder, stage, keys):
    model = gated(folder, stage=stage, **keys).train()
    expected = gradients(model)
    banked = [name for name in expected if "lora_" in name]
    assert len(banked) == (2 * len(model.adapter_bank.layers) if stage == "joint" else 0)
    assert {name for name in expected if name not in banked} == {
        f"adapter_gate.{name}" for name, _ in model.adapter_gate.named_parameters()
    }
    assert all(expected[f"adapter_gate.{name}.weight"].abs().max() > 0 for name in ("text_in", "vision_in", "out"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)
    model.adapter_bank.gates.weights = None
    lost = model(**batch(), use_cache=False).loss
    model.adapter_bank.gates.weights = None  # the negative control: gates that do not last until the backward pass
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        lost.backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_gradient_checkpointing_is_refused(folder):
    model = gated(folder)
    for options in ({"use_reentrant": True}, {}):  # the second leaves it to torch, which takes the reentrant kind
        with pytest.raises(ValueError, match="non-reentrant"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with pytest.raises(ValueError, match="non-reentrant"):
            model.activation_checkpointing_enable(options)
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing


def test_a_bf16_base_has_a_fp32_gate(folder):
    expected = gated(folder)
    logits(expected, batch())
    model = base()
    for parameter in model.parameters():  # as `load_model` does
        parameter.data = parameter.data.bfloat16()
    model = gated(folder, model, stage="joint")
    for router in (model.adapter_gate, model.adapter_gate.bfloat16()):  # as built; as an engine casts it
        assert model.adapter_gate is router
        out = model(**batch(), use_cache=False)
        loss = gate_loss(model.decision, torch.tensor([0, 1, 2, 3, NO_LOSS]))
        assert out.logits.dtype == torch.bfloat16 and loss.dtype == model.features.text_BD.dtype == torch.float32
        assert model.decision.logits.dtype == model.decision.weights.dtype == torch.float32
        assert difference(model.decision.weights, expected.decision.weights) < 0.1
        (loss + out.loss).backward()
        assert all(one.grad.isfinite().all() for one in model.adapter_gate.parameters())


@pytest.mark.parametrize("keys", READS, ids=lambda keys: keys["text"])
def test_one_vision_pass_and_no_language_model_for_a_decision_alone(folder, keys):
    model, calls = gated(folder, **keys), []
    model.model.visual.register_forward_hook(lambda *call: calls.append("vision"))
    model.model.language_model.register_forward_hook(lambda *call: calls.append("language"))
    reads = [] if keys["text"] == "embeddings" else ["language"]
    for given, vision in ((batch(), ["vision"]), (batch(WITHOUT_IMAGES), [])):
        calls.clear()
        whole = logits(model, given)
        assert calls == [*vision, *reads, "language"] and whole.isfinite().all()
        calls.clear()
        with torch.no_grad():
            alone = model(**given, gate_only=True)
        assert calls == vision + reads and isinstance(alone, GateDecision)
    calls.clear()
    generate(model, SAMPLES)
    assert calls == ["vision", *reads, *["language"] * STEPS]


def test_the_reference_stays_where_it_was(folder):
    model = gated(folder, stage="end_to_end", per="layer")
    hold_reference(model)
    assert not any(one.requires_grad for one in model.gate_reference.parameters())
    loss = model(**batch(), use_cache=False).loss
    began = model.reference_logits
    assert began.equal(model.decision.logits) and divergence(model.decision.logits, began).abs().max() < 1e-6
    loss.backward()
    torch.optim.SGD(model.adapter_gate.parameters(), lr=10.0).step()
    model(**batch(), use_cache=False)
    assert model.reference_logits.equal(began) and not model.reference_logits.requires_grad
    assert divergence(model.decision.logits, model.reference_logits).min() > 1e-6
