"""PEFT adapters, exported gates and routing manifests from somebody else."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe.checkpoint.files import write_json
from ds_moe.tasks.gate.adapters import CONFIG, PICKLE, WEIGHTS, find_adapters, read_adapter
from ds_moe.tasks.gate.files import GATE, READS, ROUTER_FILE, read_gate
from ds_moe.tasks.gate.placement import updates
from ds_moe.weights.files import write_tensors
from tests.tasks.gate.lora_folders import DECODER, base, write

from .limits import Payload, refusal
from .safetensors_lies import LIES

KEY = f"base_model.model.{DECODER}.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def model():
    return base()


@pytest.fixture
def adapter(adapters, tmp_path):
    """A copy of a good adapter; a canary would not be a module beside it."""
    return Path(shutil.copytree(adapters / "mail", tmp_path / "mail"))


def use(adapter, model):
    return updates(read_adapter("mail", adapter), model)


def test_a_good_adapter_passes(adapter, model):
    assert len(use(adapter, model)) == 4


def test_a_pickle_is_never_opened(adapter, adapters, canary, model):
    """Beside good weights it is passed over; in their place it is refused. Loaded without care it would run."""
    torch.save({"payload": Payload(canary)}, adapter / PICKLE)
    use(adapter, model)
    (adapter / WEIGHTS).unlink()
    says = f"{PICKLE} is a pickle, which can run code; save it as safetensors"
    refusal(lambda: use(adapter, model), adapter, says)
    refusal(lambda: find_adapters({"mail": str(adapter), "maps": str(adapters / "maps")}, None), adapter, says)
    shutil.copy(adapter / PICKLE, adapter / WEIGHTS)
    refusal(lambda: use(adapter, model), adapter / WEIGHTS, "cannot be read")


@pytest.mark.parametrize("name", LIES)
def test_weights_that_lie_are_refused(adapter, model, name):
    (adapter / WEIGHTS).write_bytes(LIES[name])
    refusal(lambda: use(adapter, model), adapter / WEIGHTS, "cannot be read", "save the adapter again")


def with_tensor(value):
    return lambda path: save_file(load_file(path / WEIGHTS) | {KEY: value}, path / WEIGHTS)


FILES = {
    "weights cut off": (lambda path: os.truncate(path / WEIGHTS, 4000), f"{WEIGHTS}: cannot be read"),
    "weights that are a folder": (lambda path: _instead(path / WEIGHTS, os.mkdir), f"no {WEIGHTS}"),
    "weights that are a pipe": (lambda path: _instead(path / WEIGHTS, os.mkfifo), f"no {WEIGHTS}"),
    "a config that is a pipe": (lambda path: _instead(path / CONFIG, os.mkfifo), f"holds no {CONFIG}"),
    "no config": (lambda path: (path / CONFIG).unlink(), f"holds no {CONFIG}"),
    "a config cut off": (lambda path: os.truncate(path / CONFIG, 20), f"{CONFIG}: cannot be read"),
    "a config of lists": (lambda path: (path / CONFIG).write_text("[" * 10**5), f"{CONFIG}: cannot be read"),
    "a config that is no UTF-8": (lambda path: (path / CONFIG).write_bytes(b"\xff"), f"{CONFIG}: cannot be read"),
    "no weight": (lambda path: save_file({}, path / WEIGHTS), "holds no weights"),
    "one dimension": (with_tensor(torch.ones(4)), "does not fit"),
    "another rank": (with_tensor(torch.ones(7, 64)), "does not fit"),
    "another base": (with_tensor(torch.ones(4, 99)), "maps 64 to 64 in this model and 99 to 64 in the adapter"),
    "integers": (with_tensor(torch.ones(4, 64, dtype=torch.int64)), "holds more than finite floats"),
    "NaN": (with_tensor(torch.full((4, 64), torch.nan)), "holds more than finite floats"),
    "infinity": (with_tensor(torch.full((4, 64), torch.inf)), "holds more than finite floats"),
}


def _instead(path: Path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", FILES)
def test_broken_adapters_are_refused(adapter, model, name):
    change, says = FILES[name]
    change(adapter)
    refusal(lambda: use(adapter, model), adapter, says)


CANNOT, REFUSED = "PEFT cannot place it in this model", "refuses it"
CONFIGS = {
    "a rank of a billion": ({"r": 10**9}, "has rank 4, its adapter_config.json says 1000000000"),
    "a rank of a billion for one layer": ({"rank_pattern": {"q_proj": 10**9}}, "has rank 4, its adapter_config.json"),
    "rank 0": ({"r": 0}, CANNOT),
    "rank -1": ({"r": -1}, CANNOT),
    "a rank as text": ({"r": "8"}, CANNOT),
    "half a rank": ({"r": 1.5}, CANNOT),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is no finite number"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, CANNOT),
    "alpha as text": ({"lora_alpha": "x"}, CANNOT),
    "a broken regex": ({"target_modules": "("}, CANNOT),
    "a broken regex for a rank": ({"rank_pattern": {"(": 4}}, CANNOT),
    "targets as a number": ({"target_modules": 5}, CANNOT),
    "patterns as a list": ({"alpha_pattern": [1]}, CANNOT),
    "an unknown task": ({"task_type": "EVIL"}, REFUSED),
    "an initialisation of another type": ({"corda_config": 5}, REFUSED),
    "another method": ({"peft_type": "XLORA"}, "peft_type is 'XLORA'"),
    "a method of 1 MB": ({"peft_type": "x" * 10**6}, "peft_type is 'xxx"),
    "an unknown key of 1 MB": ({"later": "x" * 10**6}, "later='xxx"),
    "a module to import": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config={'a': 1} is more"),
    "a custom module": (
        {"corda_config": None, "modules_to_save": ["evil"]},
        "modules_to_save names 'evil', of which adapter_model.safetensors holds nothing",
    ),
    "custom code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map={'AutoModel': 'evil.Model'} is more"),
    "weights elsewhere": ({"layer_replication": [[0, 10**9]]}, "layer_replication=[[0, 1000000000]] is more"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_ask_for_more_are_refused(adapter, model, name):
    values, says = CONFIGS[name]
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | values))
    refusal(lambda: use(adapter, model), adapter, says)


def test_modules_that_a_config_names_are_not_imported(adapter, model, canary, monkeypatch):
    """PEFT's automatic classes would import them; a gate needs neither."""
    (adapter / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    monkeypatch.syspath_prepend(str(adapter))
    mapping = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "megatron_core": "evil"}
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | mapping))
    assert len(use(adapter, model)) == 4


# --- an exported gate: gate.json, router.safetensors


@pytest.fixture
def gate(tmp_path):
    about = {"format": 1, "adapters": ["mail", "maps"], "reads": dict.fromkeys(READS)}
    folder = tmp_path / "gate"
    folder.mkdir()
    write_json(folder / GATE, about)
    write_tensors(folder / ROUTER_FILE, {"out.weight": torch.ones(2, 4)})
    return folder


def about(**values):
    return lambda folder: write_json(folder / GATE, json.loads((folder / GATE).read_text()) | values)


NO_GATE = "is no exported gate that can be read"
GATES = {
    "another format": (about(format=2), "has format 2, this version reads 1"),
    "a format of 1 MB": (about(format="x" * 10**6), "has format 'xxx"),
    "adapters as a number": (about(adapters=5), NO_GATE),
    "reads as a text": (about(reads="text"), NO_GATE),
    "a list": (lambda folder: write_json(folder / GATE, []), NO_GATE),
    "lists in lists": (lambda folder: (folder / GATE).write_text("[" * 10**5), NO_GATE),
    "cut off": (lambda folder: os.truncate(folder / GATE, 30), NO_GATE),
    "no UTF-8": (lambda folder: (folder / GATE).write_bytes(b"\xff\xfe"), NO_GATE),
    "no router": (lambda folder: (folder / ROUTER_FILE).unlink(), NO_GATE),
    "a router cut off": (lambda folder: os.truncate(folder / ROUTER_FILE, 90), NO_GATE),
    "a pickled router": (lambda folder: (folder / ROUTER_FILE).write_bytes(pickle.dumps([1])), NO_GATE),
    "nothing of a gate": (lambda folder: (folder / GATE).unlink(), "is no whole checkpoint"),
}


@pytest.mark.parametrize("name", GATES)
def test_broken_gates_are_refused(gate, name):
    assert read_gate(gate).adapters == ["mail", "maps"]  # positive control
    change, says = GATES[name]
    change(gate)
    refusal(lambda: read_gate(gate), gate, says)
