"""A base model, whose generation stops at another token than its chat template ends answers with, learns to answer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ds_moe.data.chat_template import end_token
from ds_moe.doctor.report import diagnose
from ds_moe.export.model import export_checkpoint
from ds_moe.models.generation import stop_tokens
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import load_processor, save_processor, tiny_processor
from tests.launcher import run_ranks

ANSWERS = {"one": "north", "two": "south", "three": "east and west", "four": "up"}
OTHER_END = 7  # a byte's token, which no answer holds
RUN = """
model: {{path: {model}}}
data: {{train: {data}, eval: {data}, max_length: 128}}
moe: {{}}
train:
  output_dir: {output}
  precision: fp32
  steps: 120
  micro_batch_size: 4
  global_batch_size: 4
  lr: 3e-3
  eval_batch_size: 4
monitor: {{tensorboard: false}}
deepspeed: {zero}
"""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = build_preset("tiny-moe")
    model.config.eos_token_id = OTHER_END
    model.generation_config = GenerationConfig(eos_token_id=OTHER_END, pad_token_id=model.config.pad_token_id)
    model.generation_config.repetition_penalty = 1e6  # a folder's sampling settings do not reach evaluations
    model.save_pretrained(folder)
    save_processor(tiny_processor("text"), folder)
    return folder


@pytest.fixture(scope="module")
def run_file(base_model) -> Path:
    data, file = base_model.parent / "qa.jsonl", base_model.parent / "run.yaml"
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in ANSWERS.items()
    ]
    data.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    zero = Path("ds_configs/zero1.json").resolve()
    output = base_model.parent / "out"
    file.write_text(RUN.format(model=base_model, data=data, output=output, zero=zero))
    return file


def test_the_doctor_tells_the_two_ends_apart(base_model, run_file):
    processor = load_processor(base_model)
    assert end_token(processor) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>") != OTHER_END
    lines = [finding.text for finding in diagnose(run_file) if "ends answers with <|im_end|>" in finding.text]
    assert len(lines) == 1 and "stops at" in lines[0]


def answers_of(model: PreTrainedModel, processor) -> list[str]:
    """What plain transformers generates, with the folder's own idea of where to stop."""
    found = []
    for question in ANSWERS:
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
        found.append(processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.mark.slow
def test_evaluation_checkpoint_and_export_stop_at_the_trained_end(base_model, run_file):
    run_ranks("ds_moe.train", 1, [str(run_file)])
    output = base_model.parent / "out"
    result = json.loads((output / "result.json").read_text())
    assert result["eval_loss"] < 0.1
    assert result["accuracy"]["mean"] == 1.0
    end = end_token(load_processor(base_model))
    saved = GenerationConfig.from_pretrained(output / "checkpoints/step_00000120/model")
    assert set(stop_tokens(saved)) == {end, OTHER_END}
    export_checkpoint(output, base_model.parent / "export")
    exported = AutoModelForCausalLM.from_pretrained(base_model.parent / "export")
    assert answers_of(exported, load_processor(base_model.parent / "export")) == list(ANSWERS.values())
