"""Keys of other trainers are answered with ours, wherever they stand; all mistakes of a run file are said at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe.config.habits import HABITS, ROWS, habit
from ds_moe.config.run_file import ALL_KEYS, load_run, parse_run
from ds_moe.errors import MOST, UserError

BASE = "model: {preset: tiny-vl-moe}\ndata: {train: digits}\ntrain: {steps: 10}\ndeepspeed: zero3\n"
# What users of transformers, PEFT, LLaMA-Factory, ms-swift and Megatron write -> the key of ours that they mean.
RENAMED = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "monitor.log_every",
    "eval_steps": "train.eval_every",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "use_rslora": "lora.rslora",
    "max_length": "data.max_length",
    "dataset": "data.train",
    "val_dataset": "data.eval",
    "dataset_dir": "data.root",
    "model_name_or_path": "model.path",
    "model_id_or_path": "model.path",
    "attn_impl": "model.attention",
    "attn_implementation": "model.attention",
    "dataloader_num_workers": "data.num_workers",
    "dataloader-prefetch-factor": "data.prefetch_factor",
    "output_dir": "train.output_dir",
    "resume_from_checkpoint": "train.resume",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_offloading": "train.offload_activations",
    "expert_model_parallel_size": "moe.ep_size",
    "moe_router_topk": "moe.router.top_k",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "predict_with_generate": "train.eval_generate",
    "max_new_tokens": "train.max_new_tokens",
    "train_iters": "train.steps",
    "clip_grad": "train.max_grad_norm",
    "async_save": "checkpoint.background",
    "peft_config": "lora",
}
# The same where the meaning, the unit or the value differs: words that the hint must have.
CONVERTED = {
    "gradient_accumulation_steps": "write train.global_batch_size: micro_batch_size x ranks x accumulation",
    "bf16": "write train.precision: bf16",
    "fp16": "ds_moe trains in bf16 or fp32: write train.precision",
    "torch_dtype": "train.precision",
    "warmup_ratio": "write train.warmup_steps: ratio x steps of the run",
    "lr_scheduler_type": "write train.schedule: cosine, linear or constant",
    "adam_beta1": "write train.betas: [beta1, beta2]",
    "cutoff_len": "data.max_length, which refuses longer samples",
    "model_max_length": "data.max_length, which refuses longer samples",
    "router_aux_loss_coef": "write moe.balance: [{kind: aux, weight: coefficient / number of MoE layers}]",
    "moe_aux_loss_coeff": "normalize_by_k: true",
    "flash_attn": "write model.attention: flash_attention_2",
    "freeze_vit": "write model.freeze: [vision]",
    "freeze_vision_tower": "write model.freeze: [vision]",
    "report_to": "write monitor.tensorboard: true or false",
    "use_liger_kernel": "write moe.experts.backend: liger",
    "moe_grouped_gemm": "write moe.experts.backend: auto",
    "optim": "write train.optimizer: adamw or muon",
    "use_muon": "write train.optimizer: muon",
    "load_in_4bit": "ds_moe trains no quantized models",
    "finetuning_type": "a section lora trains LoRA",
    "use_dora": "ds_moe has LoRA and rsLoRA only",
    "eval_strategy": "write train.eval_every: steps",
    "overwrite_output_dir": "leave it out: no run is overwritten; choose another train.output_dir",
    "stage": "task is sft, rl, gate, dpo",
    "loss_type": "write task: dpo and dpo.loss",
    "ref_model": "the model that the run starts from",
    "trust_remote_code": "ds_moe runs no code of a model's folder",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(text)` writes run.yaml and goes to its folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = BASE) -> str:
        Path("run.yaml").write_text(text)
        return "run.yaml"

    return write


def hints(*overrides: str, path: str = "run.yaml") -> list[str]:
    """The hints of the complaints about unknown keys."""
    _, complaints = parse_run(path, list(overrides))
    return [line.partition("(")[2][:-1] for line in complaints if ": unknown key " in line]


def test_there_are_enough():
    assert len(RENAMED) + len(CONVERTED) >= 50


@pytest.mark.parametrize("name", RENAMED)
def test_a_key_of_another_trainer_is_answered_with_ours(run, name):
    run(f"{BASE}{name}: 1\n")
    assert RENAMED[name] in ALL_KEYS
    assert hints() == [f"did you mean {RENAMED[name]}?"]


@pytest.mark.parametrize("name", CONVERTED)
def test_where_the_meaning_differs_the_hint_says_how(run, name):
    run(f"{BASE}{name}: 1\n")
    [hint] = hints()
    assert CONVERTED[name] in hint and not hint.startswith("did you mean")


def test_the_hint_is_the_same_in_any_section_and_for_overrides(run):
    run(BASE.replace("{steps: 10}", "{steps: 10, eval_steps: 1}") + "lora: {r: 8}\nmoe:\n  bf16: true\n")
    written = ["did you mean train.eval_every?", "did you mean lora.rank?", habit("bf16")]
    assert hints() == written
    for typed in ("learning_rate", "train.learning_rate", "lora.learning_rate", "training.learning_rate"):
        assert hints(f"{typed}=1") == ["did you mean train.lr?", *written]


def test_every_row_is_reached_and_names_keys_that_exist(run):
    """A name that is a key of ours in one section would never be looked up; a key that a hint names can be written."""
    run("".join(f"{name}: 1\n" for name in HABITS))
    assert hints() == [habit(name) for name in HABITS]
    sections = "|".join({key.partition(".")[0] for key in ALL_KEYS})
    for hint in HABITS.values():
        assert not (unknown := set(re.findall(rf"\b(?:{sections})\.[\w.]*\w", hint)) - set(ALL_KEYS)), unknown
        assert hint in ALL_KEYS or " " in hint


def test_no_name_is_in_two_rows():
    names = " ".join(names for names, _ in ROWS).split()
    assert sorted(names) == sorted(HABITS)


def test_a_key_of_the_root_in_a_section_is_sent_there(run):
    run(BASE.replace("{steps: 10}", "{steps: 10, deepspeed: zero3}"))
    assert hints() == ["did you mean deepspeed at the top level?"]


LISTS = {
    "model.freeze=vision": "model.freeze is 'vision'; must be a valid list: write it as [vision]",
    "model.freeze=vision, router": "must be a valid list: write it as [vision, router]",
    "model.freeze=^a{1,2}$": "must be a valid list: write it as ['^a{1,2}$']",
    "model.freeze=true": "model.freeze is True; must be a valid list: write it as []",
    "lora={targets: 'q_proj,v_proj'}": "must be a valid list: write it as [q_proj, v_proj]",
    "lora.targets=7": "must be a valid list: write it as [q_proj, k_proj, v_proj, o_proj]",
    "lora.targets=null": "must be a valid list: write it as [q_proj, k_proj, v_proj, o_proj]",
    "train.betas=0.9": "train.betas is 0.9; must be a valid list: write it as [0.9, 0.95]",
    "train.betas='0.8, 0.99'": "must be a valid list: write it as [0.8, 0.99]",
    "moe.balance=aux": "moe.balance is 'aux'; must be a valid list: write it as [{kind: aux}]",
    "moe.balance={kind: aux, weight: 0.01}": "must be a valid list: write it as [{kind: aux, weight: 0.01}]",
    "moe.balance=0.01": "moe.balance is 0.01; must be a valid list: write it as [{kind: aux}]",
}


@pytest.mark.parametrize("override", LISTS)
def test_a_value_for_a_list_is_answered_with_a_list_that_passes(run, override):
    _, [line] = parse_run(run(), [override])
    assert line.startswith(f"override {override}: ") and line.endswith(LISTS[override])
    key, example = override.partition("=")[0], line.partition("write it as ")[2]
    if key != "lora":
        assert not parse_run(run(), [f"{key}={example}"])[1]


WRONG = [*RENAMED][:10] + [*CONVERTED][:5]


def test_python_users_get_every_complaint(run):
    with pytest.raises(UserError) as raised:
        load_run(run(BASE + "".join(f"{name}: 1\n" for name in WRONG)))
    lines = str(raised.value).splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"run.yaml:{number}: unknown key {name}" for number, name in enumerate(WRONG, start=5)
    ]
    with pytest.raises(UserError) as raised:
        load_run(run(BASE + "".join(f"x{number}: 1\n" for number in range(MOST + 7))))
    assert str(raised.value).splitlines()[MOST:] == ["and 7 more"]


COMMAND = """
import os, subprocess, sys
subprocess.Popen = None  # a rank that is started fails
from ds_moe.cli import main
code = main(sys.argv[1:])
assert not {"torch", "deepspeed", "transformers"} & set(sys.modules)
sys.exit(code)
"""


def test_the_command_prints_each_complaint_once_and_starts_no_rank(run):
    def lines(text: str) -> list[str]:
        told = subprocess.run([sys.executable, "-c", COMMAND, "train", run(text)], capture_output=True, text=True)
        assert told.returncode == 2 and told.stdout == ""
        return told.stderr.splitlines()

    wrong = lines(BASE + "".join(f"{name}: 1\n" for name in WRONG))
    assert len(wrong) == len(WRONG) == 15 and all(line.startswith("error: run.yaml:") for line in wrong)
    stage_4 = BASE.replace("zero3", "{zero_optimization: {stage: 4}}")
    assert lines(stage_4.replace("{steps: 10}", "{steps: 10, epochs: 1}")) == [
        "error: run.yaml:3: train.steps is 10 and train.epochs is 1; set only one of them",
        "error: run.yaml:4: deepspeed: zero_optimization.stage is 4; must be 1, 2 or 3",
    ]
