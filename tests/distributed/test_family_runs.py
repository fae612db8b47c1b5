"""Whole runs of families whose block stays: a folder is read, trained with its experts over two ranks under ZeRO-3,
saved, resumed and exported, and plain transformers loads the export."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ds_moe.checkpoint.files import Reader
from ds_moe.export.model import export_adapter, export_checkpoint
from ds_moe.models.families import FAMILIES, TRAINED_BLOCKS
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.weights.files import SafetensorsFiles
from tests.launcher import run_ranks
from tests.models.test_families import slow_but
from tests.models.tiny_families import build
from tests.models.tiny_processors import PROCESSORS, adjust

ANSWERS = {"one": "eno", "two": "owt"}
MOVES = "glm4_moe"  # with loss-free balancing, which moves the family's own bias
# They have no other attention on a CPU.
EAGER = {"flint", "gpt_oss", "granitemoe_swa", "hy_v4", "inkling2_text", "mimo_v2_flash"}
# Their hubs hold stacked experts, the others' one tensor an expert.
STACKED = {
    *{"aria_text", "gemma4", "gemma4_text", "gpt_oss"},
    *{"granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"},
    *{"hy_v4", "inkling2_text", "inkling_text", "minimax_m3_vl_text", "mistral4", "qwen3_5_moe", "step3p7", "zaya"},
}
AS_IMAGES = {"mistral4"}  # AutoModelForCausalLM does not know it; the auto class of models with images does
WITH_IMAGES = [name for name, family in FAMILIES.items() if family.vision and not family.measured]
EVERY = [*TRAINED_BLOCKS, *WITH_IMAGES]
UPDATED = "qwen3_5_moe"  # also with LoRA of its experts
QUICK = [MOVES, UPDATED]
_OTHERS = [family for family in EVERY if family not in QUICK]
LAUNCHES = [QUICK, *(_OTHERS[start : start + 12] for start in range(0, len(_OTHERS), 12))]
STOPPED, LAST = "step_00000002", "step_00000004"
GLM = "glm4v_moe"
SPECULATES = {  # what begins the names of weights of multi-token prediction in files
    "qwen3_5_moe": "",
    "deepseek_v3": "model.layers.61.",
    GLM: "model.language_model.layers.46.",
}
SPECULATION = {
    "mtp.fc.weight": torch.randn(64, 128).bfloat16(),
    "mtp.norm.weight": torch.randn(64),
    **{
        f"mtp.layers.0.mlp.experts.{e}.{one}_proj.weight": torch.randn(48, 64) for e in (0, 1) for one in ("up", "gate")
    },
}


def folder_of(family: str, path: Path) -> Path:
    preset = FAMILIES[family].preset
    processor = PROCESSORS[family]() if family in PROCESSORS else tiny_processor("text")
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = build_preset(preset) if preset else build(family, vocab_size=len(tokenizer), **ids)[0]
    if family in PROCESSORS and not preset:
        adjust(model, processor)
    model.save_pretrained(path)
    save_processor(processor, path)
    file = path / "model.safetensors"
    beside = {SPECULATES.get(family, "") + name: value for name, value in SPECULATION.items()}
    save_file({**load_file(file), **(beside if family in SPECULATES else {})}, file, metadata={"format": "pt"})
    return path


def _record(question: str, answer: str, image: str | None = None) -> str:
    parts = [{"type": "image", "image": image}] if image else []
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": messages}) + "\n"


def case(family: str, folder: Path, name: str, *more: str) -> list[object]:
    keys = [f"model.path={folder / family}", f"train.output_dir={folder / name / family}"]
    keys += ["model.attention=eager"] if family in EAGER else []
    keys += ["moe.balance=[{kind: loss_free, update_rate: 0.05}]"] if family == MOVES else []
    keys += [f"data.train={folder / 'mixed.jsonl'}", "data.shuffle=false"] if family in WITH_IMAGES else []
    if name == "resumed":
        keys += [f"train.resume={folder / 'whole' / family / 'checkpoints' / STOPPED}"]
    return [f"{family} {name}", [*keys, *more], "train"]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.read(key) for key in reader.tensors}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder in which a family was trained: without a stop, and again from where the first run was stopped.
    The families that are trained in one launch are trained when one of them is asked for."""
    folders: dict[str, Path] = {}

    def trained(family: str) -> Path:
        if family not in folders:
            together = next(few for few in LAUNCHES if family in few)
            folders.update(dict.fromkeys(together, _train(tmp_path_factory.mktemp("families"), together)))
        return folders[family]

    return trained


def _train(folder: Path, families: list[str]) -> Path:
    for family in families:
        folder_of(family, folder / family)
    (folder / "qa.jsonl").write_text("".join(_record(*pair) for pair in ANSWERS.items()) * 4)
    Image.linear_gradient("L").resize((16, 16)).save(folder / "a.png")
    # In some step one rank has no image, and in another only one has an image that Step-3.7 cuts into tiles.
    Image.linear_gradient("L").resize((40, 36)).save(folder / "b.png")
    small, large, text = _record("which", "a", "a.png"), _record("which", "a", "b.png"), _record("one", "eno")
    (folder / "mixed.jsonl").write_text((small + large + text * 2 + large * 2 + small * 2) * 2)
    run = {
        "model": {"path": "given for each"},
        "data": {"train": str(folder / "qa.jsonl"), "max_length": 160},
        "moe": {"ep_size": 2},
        "train": {"precision": "fp32", "steps": 4, "lr": 0.01, "gradient_checkpointing": True}
        | {"micro_batch_size": 2, "global_batch_size": 4},
        "checkpoint": {"every": 2, "keep": 2},
        "monitor": {"tensorboard": False},
        "deepspeed": str(Path("ds_configs/zero3.json").resolve()),
    }
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    cases = [case(family, folder, name) for family in families for name in ("whole", "resumed")]
    if UPDATED in families:
        cases.append(case(UPDATED, folder, "lora", "lora={rank: 8, experts: true}"))
    run_ranks("tests/distributed/resume_ranks.py", 2, [json.dumps(cases), str(folder / "run.yaml")])
    return folder


@pytest.mark.parametrize("family", slow_but(EVERY, QUICK))
def test_a_resumed_run_equals_one_that_never_stopped(runs, family):
    whole, resumed = (tensors(runs(family) / name / family / "checkpoints" / LAST) for name in ("whole", "resumed"))
    stopped = tensors(runs(family) / "whole" / family / "checkpoints" / STOPPED)
    assert whole.keys() == resumed.keys() == stopped.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    learned = [key for key in whole if key.startswith("weight/") and not torch.equal(whole[key], stopped[key])]
    assert "weight/lm_head.weight" in learned
    assert any(".experts." in key for key in learned)


@pytest.mark.parametrize("family", slow_but(EVERY, QUICK))
@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_an_export_is_the_trained_model_in_plain_transformers(runs, family, layout, tmp_path):
    written = export_checkpoint(runs(family) / "whole" / family, tmp_path / "export", layout)
    kind = AutoModelForImageTextToText if family in AS_IMAGES.union(WITH_IMAGES) else AutoModelForCausalLM
    plain = kind.from_pretrained(tmp_path / "export").state_dict()
    trained = tensors(runs(family) / "whole" / family / "checkpoints" / LAST)
    kept = {key.partition("/")[2]: value for key, value in trained.items() if key.startswith(("weight/", "buffer/"))}
    assert kept.keys() == plain.keys()
    assert all(torch.equal(plain[name], value) for name, value in kept.items())
    stored = SafetensorsFiles.of_folder(tmp_path / "export").shapes
    single = any(".experts.0." in name for name in stored if "mtp." not in name)
    assert single == (layout == "hub" and family not in STACKED) and written.layout == layout
    source = kind.from_pretrained(runs(family) / family).state_dict()
    biases = [name for name in plain if name.endswith("e_score_correction_bias")]
    assert biases or family not in ("glm4_moe", "glm4v_moe", "deepseek_v3")
    for name in biases:  # read from the file, and moved only where the run asks for it
        assert source[name].abs().max() > 0
        assert torch.equal(plain[name], source[name]) == (family != MOVES)


@pytest.mark.parametrize("family", slow_but(SPECULATES, QUICK))
def test_weights_of_multi_token_prediction_go_through_as_they_are(runs, family, tmp_path):
    export_checkpoint(runs(family) / "resumed" / family, tmp_path / "export")
    files = load_file(tmp_path / "export" / "model.safetensors")
    for name, value in SPECULATION.items():
        found = files[SPECULATES[family] + name]
        assert found.dtype == value.dtype and torch.equal(found, value)


def test_lora_of_experts_in_a_block_that_stays_is_merged_and_exported(runs, tmp_path):
    folder, inputs = runs(UPDATED), {"input_ids": torch.arange(3, 23).view(2, 10), "use_cache": False}
    trained = tensors(folder / "lora" / UPDATED / "checkpoints" / LAST)
    assert any(key.endswith("experts.lora.down_B") and value.any() for key, value in trained.items())
    export_checkpoint(folder / "lora" / UPDATED, tmp_path / "merged")
    export_adapter(folder / "lora" / UPDATED, tmp_path / "adapter")
    with torch.no_grad():
        base = AutoModelForImageTextToText.from_pretrained(folder / UPDATED).eval()
        before = base(**inputs).logits
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
    assert (merged - adapted).abs().max() <= 1e-5 < 1e-3 < (merged - before).abs().max()
    files = load_file(tmp_path / "merged" / "model.safetensors")  # what the base carries goes along
    assert all(torch.equal(files[SPECULATES[UPDATED] + name], value) for name, value in SPECULATION.items())
