"""ds_moe/tasks/gate/files.py: a gate goes through checkpoint, export and freeze as it was, or is refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ds_moe.checkpoint.base import base_identity
from ds_moe.checkpoint.files import FORMAT, MANIFEST, file_table, write_json
from ds_moe.config.run_file import dump_yaml, load_run
from ds_moe.errors import UserError
from ds_moe.tasks.gate.adapters import adapter_files
from ds_moe.tasks.gate.files import export_gate, freeze_gate, load_gate, read_gate, start_gate
from ds_moe.weights.files import write_tensors
from tests.tasks.gate.gated import batch, fixed, gated
from tests.tasks.gate.lora_folders import ADAPTERS, base, difference, write

ZERO = Path(__file__).parents[3] / "ds_configs/zero1.json"
WEIGHTS = {"mail": 0.75, "notes": -0.5, "photos": 0.125}
SETTINGS = [{"stage": "end_to_end"}, {"stage": "joint", "per": "layer", "text": "layer", "text_layer": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


def run_config(out: Path, folder: Path, **gate):
    """Of a run on `lora_folders.base()`."""
    values = {
        "task": "gate",
        "model": {"preset": "tiny-vl-dense"},
        "data": {"train": "train.jsonl"},
        "train": {"output_dir": str(out), "seed": 3, "steps": 10, "micro_batch_size": 1, "global_batch_size": 1},
        "gate": {"adapters_in": str(folder), **gate},
        "deepspeed": str(ZERO),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "given.yaml").write_text(yaml.safe_dump(values))
    return load_run(out / "given.yaml")


def save(model, config, step: int = 4) -> Path:
    """A checkpoint as `ds_moe.checkpoint.save.save` writes one, of what is trained, without the moments of Adam."""
    folder = Path(config.train.output_dir) / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    tensors = {f"weight/{name}": one.detach() for name, one in parameters.items() if one.requires_grad}
    tensors |= {f"buffer/{name}": one for name, one in model.state_dict().items() if name not in parameters}
    write_tensors(folder / "rank-00000.safetensors", {key: value.contiguous() for key, value in tensors.items()})
    write_tensors(folder / "rng-00000.safetensors", {"cpu": torch.get_rng_state()})
    base = base_identity(config, adapter_files(config.gate))
    about = {"adam_step": 0, "world_size": 1, "ep_size": 1, "precision": "fp32", "data": {}, "result": {}}
    write_json(folder / "state.json", {"step": step, "base": base, **about})
    shutil.copy(ZERO, folder / "deepspeed.json")
    (folder / "run.yaml").write_text(dump_yaml(config.model_copy(update={"deepspeed": "deepspeed.json"})))
    pieces = {key: [["rank-00000.safetensors", 0, len(value)]] for key, value in tensors.items()}
    files = file_table(folder, [file for file in folder.iterdir() if file.is_file()])
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files, "tensors": pieces})
    return folder


def trained(out: Path, folder: Path, **gate):
    """(model, its run): with changed adapters where the stage trains them."""
    model = gated(folder, strength=2.0 if gate.get("stage") == "joint" else 1.0, **gate)
    config = run_config(out, folder, **gate)
    save(model, config)
    return model, config


def answers(model):
    """(logits, weights of the adapters)"""
    with torch.no_grad():
        return model(**batch(), use_cache=False).logits, model.decision.weights


def untrained(folder, **gate):
    """Another gate over the adapters as they are on disk."""
    model = gated(folder, strength=1.0, **gate)
    for parameter in model.adapter_gate.parameters():
        parameter.data += 0.3
    return model


@pytest.mark.parametrize("gate", SETTINGS, ids=lambda gate: gate["stage"])
def test_from_checkpoint_and_export_comes_the_same_model(folder, tmp_path, gate):
    model, config = trained(tmp_path / "run", folder, **gate)
    expected = answers(model)
    export_gate(tmp_path / "run", tmp_path / "out")
    checkpoint = tmp_path / "run/checkpoints/step_00000004"
    for source, adapters in ((tmp_path / "run", folder), (checkpoint, folder), (tmp_path / "out", None)):
        loaded = untrained(adapters or tmp_path / "out/adapters", **gate)
        assert difference(answers(loaded)[1], expected[1]) > 1e-2
        saved = read_gate(source)
        assert saved.adapters == list(ADAPTERS) and saved.path == (checkpoint if adapters else source)
        load_gate(loaded, saved)
        assert all(map(torch.equal, answers(loaded), expected))
        ours, theirs = loaded.adapter_gate.state_dict(), model.adapter_gate.state_dict()
        assert all(ours[name].equal(value) for name, value in theirs.items())
    about = json.loads((tmp_path / "out/gate.json").read_text())
    assert about["reads"].items() >= {"text": config.gate.text, "text_layer": config.gate.text_layer}.items()
    assert (about["base"], about["stage"]) == ("tiny-vl-dense", gate["stage"])
    assert about["reads"]["per"] == config.gate.per and about["adapters"] == list(ADAPTERS)


def exported(tmp_path, name):
    return load_file(tmp_path / "out/adapters" / name / "adapter_model.safetensors")


def test_adapters_that_were_not_trained_keep_their_bits(folder, tmp_path):
    trained(tmp_path / "run", folder, stage="end_to_end")
    export_gate(tmp_path / "run", tmp_path / "out")
    for name in ADAPTERS:
        there, here = load_file(folder / name / "adapter_model.safetensors"), exported(tmp_path, name)
        assert there.keys() == here.keys()
        for key, value in there.items():
            assert here[key].dtype == value.dtype and here[key].equal(value)
        config = "adapter_config.json"
        assert (tmp_path / "out/adapters" / name / config).read_bytes() == (folder / name / config).read_bytes()


def test_adapters_that_were_trained_are_exported_as_they_ended(folder, tmp_path):
    model, _ = trained(tmp_path / "run", folder, stage="joint")
    export_gate(tmp_path / "run", tmp_path / "out")
    for index, name in enumerate(ADAPTERS):
        here = exported(tmp_path, name)
        for module, layer in model.adapter_bank.layers.items():
            mine_R = layer.owner_R == index
            if mine_R.any():
                A, B = (here.pop(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
                assert torch.equal(A.float(), layer.lora_A[mine_R]) and torch.equal(B, layer.lora_B[:, mine_R])
        assert not here
        alone = peft.PeftModel.from_pretrained(base(), tmp_path / "out/adapters" / name).eval()
        with torch.no_grad():
            theirs = alone(**batch(), use_cache=False).logits
        one_hot = torch.eye(len(ADAPTERS))[index]
        assert difference(answers(fixed(model, one_hot))[0], theirs) <= 1e-6


@pytest.mark.parametrize("gate", SETTINGS, ids=lambda gate: gate["stage"])
def test_a_frozen_gate_is_the_model_under_constant_weights(folder, tmp_path, gate):
    model, _ = trained(tmp_path / "run", folder, **gate)
    freeze_gate(tmp_path / "run", tmp_path / "out", WEIGHTS)
    plain = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    with torch.no_grad():
        theirs = plain(**batch(), use_cache=False).logits
    weights_K = torch.tensor([WEIGHTS.get(name, 0.0) for name in ADAPTERS])
    assert difference(answers(fixed(model, weights_K))[0], theirs) <= 1e-6
    assert difference(answers(fixed(model, weights_K.flip(0)))[0], theirs) > 1e-4


def test_the_newest_checkpoint_is_taken_and_a_stage_starts_from_it(folder, tmp_path):
    model, config = trained(tmp_path / "run", folder, stage="supervised")
    model.adapter_gate.out.bias.data += torch.arange(len(ADAPTERS))
    save(model, config, step=10)
    expected = answers(model)[1]
    for kl_weight in (0.0, 0.5):
        later = run_config(tmp_path / "later", folder, stage="joint", start=str(tmp_path / "run"), kl_weight=kl_weight)
        started = untrained(folder, stage="joint")
        start_gate(started, later.gate)
        assert answers(started)[1].equal(expected)
        assert (started.reference_logits is not None) == (kl_weight > 0)
    assert started.reference_logits.equal(started.decision.logits)
    start_gate(started, run_config(tmp_path / "later", folder, stage="joint").gate)  # no start: as it is


def test_a_stage_that_would_lose_trained_adapters_is_refused(folder, tmp_path):
    trained(tmp_path / "run", folder, stage="joint")
    for stage in ("supervised", "end_to_end"):
        config = run_config(tmp_path / "later", folder, stage=stage, start=str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"trained its adapters, which stage {stage} would not save"):
            start_gate(untrained(folder, stage=stage), config.gate)


def test_what_holds_no_gate_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        read_gate(tmp_path / "nothing")
    model, config = trained(tmp_path / "run", folder)
    del model.adapter_gate
    other = run_config(tmp_path / "other", folder)
    save(model, other)
    with pytest.raises(UserError, match="step_00000004 holds no gate: it is of a run of another task"):
        read_gate(tmp_path / "other")
    file = tmp_path / "run/checkpoints/step_00000004/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        read_gate(tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file.name} has .* bytes instead of"):
        read_gate(file.parent)
    with pytest.raises(UserError, match="no whole checkpoint and no run with one"):
        read_gate(tmp_path / "run")


def test_an_exported_gate_that_cannot_be_read_is_refused(folder, tmp_path):
    trained(tmp_path / "run", folder)
    export_gate(tmp_path / "run", tmp_path / "out")
    about, router = (tmp_path / "out" / name for name in ("gate.json", "router.safetensors"))
    whole, bits = about.read_text(), router.read_bytes()
    for text, why in (
        (whole.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1"),
        (whole[:-5], "no exported gate that can be read"),
        ("[]", "no exported gate that can be read"),
        (whole.replace('"adapters"', '"adapter"', 1), "no exported gate that can be read"),
    ):
        about.write_text(text)
        with pytest.raises(UserError, match=why):
            read_gate(tmp_path / "out")
    about.write_text(whole)
    router.write_bytes(bits[:-3])
    with pytest.raises(UserError, match="no exported gate that can be read"):
        read_gate(tmp_path / "out")
    router.unlink()
    with pytest.raises(UserError, match="no exported gate that can be read"):
        read_gate(tmp_path / "out")


def test_a_gate_that_does_not_fit_is_refused(folder, tmp_path):
    trained(tmp_path / "run", folder)
    saved = read_gate(tmp_path / "run")
    with pytest.raises(UserError, match="a gate of other sizes"):
        load_gate(gated(folder, width=64), saved)
    shutil.copytree(folder, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer/maps")
    with pytest.raises(UserError, match="gates mail, maps, notes, photos; the run's adapters are mail, notes, photos"):
        load_gate(gated(tmp_path / "fewer"), saved)
    shutil.copytree(folder / "maps", tmp_path / "fewer/zoo")  # as many, under another name
    with pytest.raises(UserError, match="the run's adapters are mail, notes, photos, zoo"):
        load_gate(gated(tmp_path / "fewer"), saved)


def test_exports_that_cannot_be_are_refused(folder, tmp_path):
    trained(tmp_path / "run", folder)
    run, out = tmp_path / "run", tmp_path / "out"
    export_gate(run, out)
    (tmp_path / "file").write_text("here already")
    for taken in (out, tmp_path / "file"):
        with pytest.raises(UserError, match=f"{taken.name} is not empty"):
            export_gate(run, taken)
        with pytest.raises(UserError, match=f"{taken.name} is not empty"):
            freeze_gate(run, taken, WEIGHTS)
    with pytest.raises(UserError, match="is an exported gate already"):
        export_gate(out, tmp_path / "again")
    with pytest.raises(UserError, match="does not know its run"):
        freeze_gate(out, tmp_path / "again", WEIGHTS)
    for weights, why in (({"mail": 1.0, "male": 1.0}, "'male' is none of them"), ({"mail": 0.0}, "none has a weight")):
        with pytest.raises(UserError, match=f"mail, maps, notes, photos; {why}"):
            freeze_gate(run, tmp_path / "again", weights)
    assert not (tmp_path / "again").exists()


def test_adapters_that_changed_since_are_refused(folder, tmp_path):
    """Multiplied after the training: the export would not be what was evaluated."""
    shutil.copytree(folder, tmp_path / "adapters")
    trained(tmp_path / "run", tmp_path / "adapters", stage="supervised")
    file = tmp_path / "adapters" / list(ADAPTERS)[1] / "adapter_model.safetensors"
    save_file({name: 5 * value for name, value in load_file(file).items()}, file)
    for use in (export_gate, lambda *paths: freeze_gate(*paths, {list(ADAPTERS)[0]: 1.0})):
        with pytest.raises(UserError, match=f"adapter {list(ADAPTERS)[1]!r} has changed since the gate was trained"):
            use(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("key, value", [("text", "last"), ("vision", "mean"), ("modalities", "text"), ("per", "token")])
def test_a_gate_made_for_other_features_is_refused(folder, tmp_path, key, value):
    trained(tmp_path / "run", folder, stage="supervised")
    with pytest.raises(UserError, match=rf"gate\.{key} is '{value}', but the gate in .* was trained with"):
        load_gate(untrained(folder, **{key: value}), read_gate(tmp_path / "run"))
