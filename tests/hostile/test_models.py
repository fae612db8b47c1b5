"""Model folders from somebody else: no code of theirs runs, no pickle is opened, nothing outside is read."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ds_moe.config.sections import ModelConfig
from ds_moe.doctor.report import diagnose
from ds_moe.errors import UserError
from ds_moe.models.load import load_model, model_config
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import load_processor, save_processor
from ds_moe.weights.files import INDEX, WEIGHTS, SafetensorsFiles

from .conftest import line
from .limits import Payload, refusal
from .safetensors_lies import LIES

ZERO = Path(__file__).parents[2] / "ds_configs/zero3.json"
RUN = f"""
model: {{{{path: {{model}}}}}}
data: {{{{train: {{folder}}/train.jsonl}}}}
train: {{{{steps: 2, global_batch_size: 1, output_dir: {{folder}}/run}}}}
deepspeed: {ZERO}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_preset("tiny-vl-dense").save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.fixture
def model(saved, tmp_path, monkeypatch):
    """A copy of a good model; a question whether to run its code would be answered with yes."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    return Path(shutil.copytree(saved, tmp_path / "model"))


def with_code(folder: Path, canary: Path, file: str, **values: object) -> None:
    """`file` with an `auto_map` to classes in evil.py, which makes the canary when it is imported."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    mapping = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(known | {"auto_map": mapping} | values))


def test_a_good_model_passes(model):
    assert SafetensorsFiles.of_folder(model).parameters == sum(
        one.numel() for one in load_model(of(model), torch.float32).parameters()
    )
    assert load_processor(model).image_processor is not None


def of(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


CODED = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@pytest.mark.parametrize("file", CODED)
def test_code_beside_a_known_family_is_passed_over(model, canary, file):
    with_code(model, canary, file)
    assert load_processor(model).image_processor is not None
    assert load_model(of(model), torch.float32) is not None


UNKNOWN = {"model_type": "evil", "tokenizer_class": "Evil", "processor_class": "Evil", "image_processor_type": "Evil"}


@pytest.mark.parametrize("file", CODED)
def test_code_of_an_unknown_class_is_never_run(model, canary, file):
    with_code(model, canary, file, **UNKNOWN)
    with contextlib.suppress(UserError):  # some are refused, some are not needed
        load_processor(model)


def test_a_run_refuses_code_of_an_unknown_family(model, tmp_path):
    with_code(model, tmp_path / "fired", "config.json", **UNKNOWN)
    refusal(lambda: model_config(of(model)), model, "trust_remote_code")
    assert not (tmp_path / "fired").exists()


def test_the_doctor_refuses_code_of_an_unknown_family(model, canary, tmp_path):
    with_code(model, canary, "config.json", **UNKNOWN)
    assert "cannot be read as a transformers checkpoint" in one_error(model, tmp_path)


def one_error(model: Path, tmp_path: Path) -> str:
    """What the doctor finds wrong with a run on this model."""
    (tmp_path / "train.jsonl").write_bytes(line())
    (tmp_path / "run.yaml").write_text(RUN.format(model=model, folder=tmp_path))
    [error] = [one.text for one in diagnose(str(tmp_path / "run.yaml"), [], 1, 1, None) if one.level == "error"]
    assert "\n" not in error
    return error


# --- folders that plain transformers loads and a run does not train

QUANTIZED = {
    "bitsandbytes": ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "'bitsandbytes'"),
    "bitsandbytes of old": ({"load_in_8bit": True}, "bitsandbytes (load_in_8bit)"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "'awq'"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "'compressed-tensors'"),
    "of a kind to come": ({"quant_method": "one bit"}, "'one bit'"),
    "without a kind": ({"bits": 4}, "a method that its quantization_config does not name"),
}


@pytest.mark.parametrize("settings, kind", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized_weights_are_refused_with_their_kind_and_twin(model, tmp_path, settings, kind, part):
    folder = model.rename(model.parent / "Tiny-Instruct-FP8-dynamic")
    file = folder / "config.json"
    values = json.loads(file.read_text())
    (values[part] if part else values)["quantization_config"] = settings
    file.write_text(json.dumps(values))
    wanted = f"quantized by {kind}, which cannot be trained"
    refusal(lambda: model_config(of(folder)), folder, wanted)
    found = one_error(folder, tmp_path)
    assert wanted in found and found.endswith(f"usually {model.parent}/Tiny-Instruct")


def test_an_adapter_beside_the_model_is_refused(model, tmp_path):
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    refusal(lambda: model_config(of(model)), model, "holds a PEFT adapter beside the model")
    assert "move adapter_config.json away" in one_error(model, tmp_path)


def test_weights_in_a_file_that_only_transformers_would_look_for(model, tmp_path):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"transformers_weights": "other.safetensors"}))
    refusal(lambda: model_config(of(model)), model, "transformers_weights: 'other.safetensors'")
    assert "call the file model.safetensors" in one_error(model, tmp_path)


def test_one_file_goes_before_an_index_as_in_transformers(model, tmp_path):
    (model / INDEX).write_text(index("model-00001-of-00001.safetensors"))  # left over: its shard is gone
    assert len(SafetensorsFiles.of_folder(model).shapes) == len(SafetensorsFiles.find(str(model)).shapes)
    plain = load_model(of(model), torch.float32)
    assert sum(one.numel() for one in plain.parameters()) == SafetensorsFiles.of_folder(model).parameters
    (tmp_path / "train.jsonl").write_bytes(line())
    (tmp_path / "run.yaml").write_text(RUN.format(model=model, folder=tmp_path))
    found = [one.text for one in diagnose(str(tmp_path / "run.yaml"), [], 1, 1, None) if one.level == "warning"]
    assert sum("the first is read, as transformers does" in text for text in found) == 1


# --- weights


def test_a_pickle_of_weights_is_never_executed(model, canary):
    (model / WEIGHTS).unlink()
    torch.save({"model.visual.patch_embed.proj.weight": Payload(canary)}, model / "pytorch_model.bin")
    for unread in (False, True):
        refusal(lambda unread=unread: load_model(of(model), torch.float32, unread=unread), model, "safetensors")
    refusal(lambda: SafetensorsFiles.of_folder(model), model, f"lacks {WEIGHTS}")


@pytest.mark.parametrize("name", LIES)
def test_weights_that_lie_are_refused(model, name):
    (model / WEIGHTS).write_bytes(LIES[name])
    refusal(lambda: SafetensorsFiles.of_folder(model), model / WEIGHTS, "is broken")
    refusal(lambda: load_model(of(model), torch.float32), model, f"{WEIGHTS} cannot be read")


def index(*files: object) -> str:
    return json.dumps({"weight_map": {f"weight {number}": file for number, file in enumerate(files)}})


NO_INDEX, ELSEWHERE = "is no index of safetensors", "shards lie beside their index"
INDICES = {
    "a file above": (index("../../secret.safetensors"), f"names '../../secret.safetensors': {ELSEWHERE}"),
    "a file below": (index("deep/model.safetensors"), ELSEWHERE),
    "an absolute path": (index("/etc/passwd"), f"names '/etc/passwd': {ELSEWHERE}"),
    "a path of 1 MB": (index("../" * 300_000), "names '../../../"),
    "a missing shard": (index("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
    "a number": (index(1), NO_INDEX),
    "numbers and names": (index("a", 1), NO_INDEX),
    "lists": (index(["a"]), NO_INDEX),
    "a list": ("[]", NO_INDEX),
    "no map": ("{}", NO_INDEX),
    "a map that is a list": ('{"weight_map": []}', NO_INDEX),
    "cut off": (index("a")[:-3], NO_INDEX),
    "lists in lists": ("[" * 10**5, NO_INDEX),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_lead_elsewhere_are_refused(model, tmp_path, name):
    text, says = INDICES[name]
    shutil.move(model / WEIGHTS, tmp_path / "secret.safetensors")
    (model / INDEX).write_text(text)
    refusal(lambda: SafetensorsFiles.of_folder(model), model, says)
    if name != "a missing shard":  # which transformers would look for on the hub
        refusal(lambda: SafetensorsFiles.find(str(model)), model, says)


# --- configs and processors


BROKEN = {
    "a config cut off": ("config.json", '{"model_type": '),
    "a config of lists": ("config.json", "[" * 10**5),
    "another family": ("config.json", '{"model_type": "llama"}'),
    "no family": ("config.json", "{}"),
    "a width as text": ("config.json", '{"model_type": "qwen3_vl", "text_config": {"hidden_size": "wide"}}'),
    "a section as a number": ("config.json", '{"model_type": "qwen3_vl", "text_config": 5}'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_doctor_refuses_a_broken_config(model, tmp_path, name):
    file, text = BROKEN[name]
    (model / file).write_text(text)
    assert str(model) in one_error(model, tmp_path)


PROCESSORS = {
    "a tokenizer cut off": ("tokenizer.json", b'{"version": '),
    "a pickled tokenizer": ("tokenizer.json", pickle.dumps([1])),
    "lists in lists": ("tokenizer_config.json", b"[" * 10**5),
    "a list": ("tokenizer_config.json", b"[1]"),
    "images of no kind": ("processor_config.json", b'{"image_processor": 5}'),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_broken_processors_are_refused(model, name):
    file, content = PROCESSORS[name]
    (model / file).write_bytes(content)
    refusal(lambda: load_processor(model), model)


TEMPLATES = {
    "a syntax error": "{% for",
    "no such variable": "{{ nothing.at.all }}",
    "division by zero": "{{ 1 / 0 }}",
    "an endless range": "{% for i in range(10**12) %}x{% endfor %}",
    "a way to the system": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a call of the system": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "an import": "{% import 'os' as os %}",
    "a file": "{% include '/etc/passwd' %}",
    "nothing": "x",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("workers", [0, 1])
def test_hostile_chat_templates_are_refused(stream, folder, canary, processor, monkeypatch, name, workers):
    monkeypatch.setattr(processor, "chat_template", TEMPLATES[name].replace("CANARY", str(canary)))
    (folder / "train.jsonl").write_bytes(line())
    refusal(lambda: next(iter(stream(folder / "train.jsonl", num_workers=workers))), "chat template")
