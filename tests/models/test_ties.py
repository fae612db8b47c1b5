"""A streamed load ties what `from_pretrained` ties: it compares the values that files hold twice."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe.config.sections import ModelConfig
from ds_moe.models import ties
from ds_moe.models.families import family_of
from ds_moe.models.load import build_outline, load_model
from ds_moe.models.presets import preset_config
from ds_moe.models.ties import ties_of, untie
from ds_moe.weights.files import SafetensorsFiles
from tests.models.streamed import EMBEDDING, HEAD, tied_folder

# What files hold -> whether the model is tied in fp32 and in bf16.
STORED = {"equal": (True, True), "other": (False, False), "last row": (False, False), "close": (False, True)}


def of(folder):
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("preset", EMBEDDING)
@pytest.mark.parametrize("stored", STORED)
def test_streamed_and_complete_loads_tie_alike(tmp_path, monkeypatch, preset, stored):
    folder = tied_folder(tmp_path, preset, stored)
    monkeypatch.setattr(ties, "BLOCK", 1000)  # several blocks, the last one not full
    for dtype, tied in zip((torch.float32, torch.bfloat16), STORED[stored], strict=True):
        streamed, complete = (
            load_model(ModelConfig(path=str(folder)), dtype, unread=unread) for unread in (True, False)
        )
        plain = family_of(complete).model_class.from_pretrained(folder, dtype=dtype)
        for model in (streamed, complete, plain):
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            assert model.all_tied_weights_keys == (ties_of(plain.config) if tied else {})
        names = [[name for name, _ in model.named_parameters()] for model in (streamed, complete, plain)]
        assert names[0] == names[1] == names[2] and (HEAD in names[0]) != tied
        assert streamed.config.to_dict() == complete.config.to_dict()
        assert streamed.config.tie_word_embeddings == tied  # what is saved with the weights does not contradict them


def test_the_form_of_qwen3_0_6b_has_one_matrix(tmp_path):
    model = load_model(
        ModelConfig(path=str(tied_folder(tmp_path, "tiny-vl-dense", "equal"))), torch.float32, unread=True
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 231_152


def test_an_untied_model_is_saved_as_one(tmp_path):
    folder = tied_folder(tmp_path / "model", "tiny-moe", "other")
    load_model(of(folder), torch.float32).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    head = SafetensorsFiles.of_folder(tmp_path / "saved").read(HEAD)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight, head)


def test_an_outline_is_untied_only_where_both_weights_are_stored():
    config = preset_config("tiny-vl-dense")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = build_outline(config)
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names
    untie(model, names)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    untie(model, names | {"lm_head.weight"})
    assert {name for name, _ in model.named_parameters()} == names | {"lm_head.weight"}
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape
