"""The rollout generator: what it writes is what the engine did, whatever stood beside it in the batch."""

import copy
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_moe import cli
from ds_moe.config.run import RunConfig
from ds_moe.data.chat import parse_record
from ds_moe.data.encode import encode_images
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.replay import RoutingRecorder, RoutingShape, align, decode, joined
from ds_moe.tasks.rl import sample as tool
from ds_moe.tasks.rl.rollouts import Rollouts
from tests.data.templates import THINKING, with_template


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("vl")


@pytest.fixture(scope="module")
def model():
    return build_preset("tiny-vl-moe").eval()


@pytest.fixture(scope="module")
def samples():
    return tool.open_prompts("digits", 5, seed=3)


def rollouts(model, processor, samples, **options):
    options = {"per_prompt": 3, "max_new_tokens": 5, "batch_size": 15, **options}
    return tool.generate_rollouts(model, processor, samples, **options)


def read_back(records, folder, processor, shape):
    """The records as the trainer reads them, one micro-batch."""
    tool.write_rollouts(records, folder / "rollouts.jsonl")
    config = RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": str(folder / "rollouts.jsonl"), "shuffle": False, "length_grouping": False},
        train={"steps": 1, "micro_batch_size": len(records), "global_batch_size": len(records)},
        deepspeed="none",
    )
    config.train.output_dir = str(folder / "run")
    [[batch]] = islice(TrainStream(config, processor, rank=0, world_size=1, record_kind=Rollouts(shape)), 1)
    return batch.to(torch.device("cpu"))


def test_log_probs_and_routing_are_those_of_a_forward_over_the_record(model, processor, samples, tmp_path):
    records = rollouts(model, processor, samples)
    assert len({record["completion"] for record in records}) > 5  # sampled
    shape = RoutingShape.of(model.config)
    batch = read_back(records, tmp_path, processor, shape)
    inputs = {key: value for key, value in batch.inputs.items() if key != "routing"}
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        logits = model(**inputs).logits
    scored = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    mask = batch.completion_BS
    assert mask.sum() == sum(len(record["logprobs"]) for record in records)
    torch.testing.assert_close(batch.engine_BS[mask], scored[mask[:, 1:]], rtol=1e-4, atol=1e-4)
    whole = joined(recorder.take(), len(records))
    routed = batch.inputs["routing"][..., 0, 0] >= 0
    assert torch.equal(routed.sum(1), batch.inputs["attention_mask"].sum(1) - 1)  # all but the last token
    same = (whole.sort(-1).values == batch.inputs["routing"].sort(-1).values).all(-1)[routed]
    assert same.float().mean() > 0.99  # rounding may flip a tie


@pytest.fixture
def ending_model(processor):
    """A model whose answers end at different steps, so that rows of a batch are padded on the right."""

    def favour_the_end(head, args, logits):
        favoured = logits.clone()
        favoured[..., processor.tokenizer.eos_token_id] += 4.5
        return favoured

    model = build_preset("tiny-vl-moe").eval()
    model.lm_head.register_forward_hook(favour_the_end)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5, 0.0])
def test_a_record_alone_and_unpadded_has_its_log_probs_and_routing(ending_model, processor, samples, temperature):
    records = rollouts(ending_model, processor, samples, per_prompt=4, max_new_tokens=8, temperature=temperature)
    if temperature == 1:
        assert len({len(record["logprobs"]) for record in records}) > 3
    ended, agreed = 0, []
    for record in records:
        ids = torch.tensor([record["tokens"]])
        pixels, grid, _ = encode_images(record["images"], processor, sys.maxsize)
        of_images = (ids == processor.image_token_id).long()
        with torch.no_grad(), RoutingRecorder(ending_model) as recorder:
            logits = ending_model(ids, mm_token_type_ids=of_images, pixel_values=pixels, image_grid_thw=grid).logits
        scored = (logits[0, :-1] / (temperature or 1.0)).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        completed = torch.tensor(record["completion_mask"][1:]).bool()
        torch.testing.assert_close(torch.tensor(record["logprobs"]), scored[completed], rtol=0, atol=1e-4)
        routing = torch.tensor(decode(record["routing"], kind="record").ids)
        [whole] = recorder.take()
        agreed.append((routing.sort(-1).values == whole[:-1].sort(-1).values).all(-1).flatten())
        ended += record["tokens"][-1] == processor.tokenizer.eos_token_id
    assert ended > len(records) / 4
    assert torch.cat(agreed).float().mean() > 0.99  # rounding may flip a tie


def test_samples_are_those_of_the_softmax_whatever_the_folder_says(model, processor, samples):
    """A folder's generation config must not warp what is sampled: log-probs would not be of that distribution."""
    plain = rollouts(model, processor, samples)
    own = model.generation_config
    for name, value in (("repetition_penalty", 3.0), ("min_p", 0.5), ("top_k", 1)):
        model.generation_config = copy.deepcopy(own)
        setattr(model.generation_config, name, value)
        assert rollouts(model, processor, samples) == plain
        assert getattr(model.generation_config, name) == value  # as it was
    model.generation_config = own


def test_what_stands_beside_a_prompt_in_the_batch_changes_nothing(model, processor, samples):
    together = rollouts(model, processor, samples, per_prompt=1, temperature=0)
    alone = rollouts(model, processor, samples, per_prompt=1, temperature=0, batch_size=1)
    assert len({len(record["tokens"]) - len(record["logprobs"]) for record in together}) > 1  # padded on the left
    for one, other in zip(together, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert decode(one["routing"], kind="record").ids.shape == decode(other["routing"], kind="record").ids.shape
        torch.testing.assert_close(torch.tensor(one["logprobs"]), torch.tensor(other["logprobs"]), rtol=1e-4, atol=1e-4)


def test_records_are_whole(model, processor, samples):
    records = rollouts(model, processor, samples, max_new_tokens=12)
    eos, shape = processor.tokenizer.eos_token_id, RoutingShape.of(model.config)
    assert [len({record["group"] for record in records}), len(records)] == [5, 15]
    for record in records:
        completed = record["tokens"][-sum(record["completion_mask"]) :]
        assert len(completed) == len(record["logprobs"]) and eos not in completed[:-1]
        assert completed[-1] == eos or len(completed) == 12
        assert record["reward"] == float(record["completion"].strip() == record["answer"])
        assert align(decode(record["routing"], kind="record"), shape, len(record["tokens"])).shape[1:] == (2, 2)
        assert record["kind"] in ("digit", "parity", "at_least_five")


def test_the_end_token_belongs_to_the_completion():
    assert tool._completion_length(torch.tensor([4, 9, 9, 0]), ends=[9]) == 2
    assert tool._completion_length(torch.tensor([4, 5]), ends=[9]) == 2


def test_a_completion_with_image_tokens_is_left_out(model, processor, samples, monkeypatch):
    whole = rollouts(model, processor, samples, per_prompt=1)
    spoiled = {**whole[0], "tokens": [*whole[0]["tokens"][:-1], processor.image_token_id]}
    monkeypatch.setattr(tool, "complete", lambda *args: iter([spoiled, *whole[1:]]))
    assert len(rollouts(model, processor, samples, per_prompt=1)) == len(whole) - 1


def test_a_dense_model_has_no_routing(processor, samples):
    records = rollouts(build_preset("tiny-vl-dense").eval(), processor, samples)
    assert records and not any("routing" in record for record in records)


def test_an_overlong_sample_is_named(model, processor, samples):
    with pytest.raises(UserError, match=r"^digits:\d+: over-long"):
        rollouts(model, processor, samples, max_length=8)


def test_a_seed_decides_everything(model, processor, samples):
    before = torch.get_rng_state()
    first, again, other = (rollouts(model, processor, samples, seed=seed) for seed in (1, 1, 2))
    assert [r["tokens"] for r in first] == [r["tokens"] for r in again] != [r["tokens"] for r in other]
    assert torch.equal(before, torch.get_rng_state())  # the caller's own draws go on as they were
    assert samples == tool.open_prompts("digits", 5, seed=3) != tool.open_prompts("digits", 5, seed=4)


# --- the command


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """A folder with `model`, and `data` of two records whose images lie in a `pictures` beside it."""
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder / "model")
    save_processor(processor, folder / "model")
    (folder / "data").mkdir()
    (folder / "pictures").mkdir()
    for number, color in enumerate(("navy", "teal")):
        Image.new("RGB", (16, 16), color).save(folder / f"pictures/{number}.png")
    records = [
        {
            "messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "x"}],
            "images": [i],
        }
        for i in ("0.png", "1.png")
    ]
    (folder / "data/chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def command(folder, *words):
    options = ["--per-prompt", "2", "--max-new-tokens", "3", "--dtype", "fp32"]
    return cli.main(["rollouts", str(folder / "model"), *map(str, words), *options])


def test_the_command_writes_a_file_that_trains_and_replaces_it(folder, tmp_path, capsys):
    out = tmp_path / "new/rollouts.jsonl"
    for seed in ("0", "1"):  # rounds that write the same file
        words = ["--data", folder / "data/chats.jsonl", "--root", folder / "pictures", "--seed", seed]
        assert command(folder, out, *words) == 0
        assert f"{out}: 4 completions of 2 prompts, mean reward 0.000, " in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    colors = [Image.open(out.parent / record["images"][0]).getpixel((3, 3)) for record in records]
    assert colors == [(0, 0, 128)] * 2 + [(0, 128, 128)] * 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["rollouts.jsonl", "rollouts_images"]
    assert len(list((out.parent / "rollouts_images").iterdir())) == 2


def test_bad_records_are_left_out_if_asked(folder, tmp_path, capsys):
    data, out = folder / "data/some_bad.jsonl", tmp_path / "rollouts.jsonl"
    (folder / "pictures/cut.png").write_bytes((folder / "pictures/0.png").read_bytes()[:60])  # its header is whole
    lines = (folder / "data/chats.jsonl").read_text().splitlines()
    data.write_text("\n".join(["{", lines[0], lines[0].replace("0.png", "cut.png")]))
    words = [out, "--data", data, "--root", folder / "pictures"]
    assert command(folder, *words) == 2
    assert f"error: {data}:1: broken JSON" in capsys.readouterr().err and not out.exists()
    assert command(folder, *words, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "2 completions of 1 prompts" in said and f"2 bad records left out; the first: {data}:1: broken" in said
    data.write_text("\n".join([lines[0], lines[0].replace("0.png", "cut.png")]))
    assert command(folder, *words) == 2
    assert f"error: {data}:2: truncated image" in capsys.readouterr().err


def test_nothing_is_written_through_a_link_or_among_other_files(folder, tmp_path, capsys):
    data = ["--data", folder / "data/chats.jsonl", "--root", folder / "pictures"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "a_images").symlink_to(mine)
    (tmp_path / "b_images").mkdir()
    (tmp_path / "b_images/cat.png").touch()
    (tmp_path / "c_images").mkdir()
    (tmp_path / "c_images/0123456789abcdef.png").symlink_to(mine / "new.png")
    (tmp_path / "d_images").touch()
    for name in "abcd":
        assert command(folder, tmp_path / f"{name}.jsonl", *data) == 2
        said = capsys.readouterr().err
        assert (
            said.startswith(f"error: {tmp_path}/{name}_images is not a folder that rollouts have made")
            and said.count("\n") == 1
        )
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    for name in ("e.jsonl", "e.jsonl.partial"):
        (tmp_path / name).symlink_to(kept)
    assert command(folder, tmp_path / "e.jsonl", *data) == 0
    assert kept.read_text() == "mine" and not list(mine.iterdir()) and not (tmp_path / "e.jsonl").is_symlink()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["data/chats.jsonl", "--data", "data/chats.jsonl"], "data/chats.jsonl is the data itself"),
        (["pictures"], "pictures: rollouts are JSON lines; call the file pictures.jsonl"),
        (["out.parquet"], "call the file out.jsonl"),
        (["data/chats.jsonl/x.jsonl"], "cannot write data/chats.jsonl/x.jsonl: "),
        (["out.jsonl", "--root", "data"], "--root would not be used: the data is digits"),
        (["data/chats.jsonl", "--data", "nowhere.jsonl"], "data: nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(words, complaint, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tool, "load_policy", lambda *arguments: pytest.fail("a model was loaded"))
    assert command(folder, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and said.count("\n") == 1


def test_a_model_that_is_none_is_one_line(tmp_path, capsys):
    assert cli.main(["rollouts", str(tmp_path / "nothing"), str(tmp_path / "out.jsonl")]) == 2
    assert "neither a Hugging Face folder nor a run's output folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["rollouts", "model", "out.jsonl", "--temperature", "-1"])
    assert "argument --temperature: -1 is not a number from 0 on" in capsys.readouterr().err


def test_a_checkpoint_is_exported_first(model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    save_processor(processor, tmp_path / "model")
    monkeypatch.setattr(tool, "export_checkpoint", lambda source, out: shutil.copytree(tmp_path / "model", out))
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1/state.json").write_text("{}")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for source in ("step_1", "run"):
        loaded, _ = tool.load_policy(tmp_path / source, torch.float32, "eager")
        assert torch.equal(loaded.lm_head.weight.cpu(), model.lm_head.weight)
        assert "eager" in loaded.get_experts_implementation().values()


def test_prompts_are_what_the_template_renders_to_be_continued(model):
    """A model that thinks goes on inside the thought that its prompt opens; named tokens stay whole."""
    thinking = with_template(THINKING, "vl", special=("<|action_7|>",))
    messages = [{"role": "user", "content": "Do <|action_7|>?"}, {"role": "assistant", "content": "<think>a</think>b"}]
    sample = parse_record({"messages": messages}, "here:1", Path("/"))
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(len(thinking.tokenizer))
    [record] = rollouts(larger, thinking, [sample], per_prompt=1, content_tokens=("<|action_7|>",))
    prompt = record["tokens"][: record["completion_mask"].index(1)]
    rendered = thinking.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n<think>\n") and thinking.decode(prompt) == rendered
    assert prompt.count(thinking.tokenizer.convert_tokens_to_ids("<|action_7|>")) == 1
    assert record["answer"] == "b"
    with pytest.raises(UserError, match="is a control token of the chat template"):
        rollouts(larger, thinking, [sample], content_tokens=("<|im_end|>",))


def test_the_completion_of_a_conversation_begins_behind_an_opened_thought():
    thinking = with_template(THINKING)
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "So.\n</think>\n\nyes"}]
    completion = "So.\n</think>\n\nyes<|im_end|>"
    ids = thinking.tokenizer(completion, add_special_tokens=False)["input_ids"]
    record = {"messages": messages, "logprobs": [-1.0] * len(ids), "advantage": 1.0}
    kind = Rollouts(None)
    encoded = kind.encode(kind.parse(record, "here:1", Path("/")), thinking, 512, 10**6)
    assert encoded.input_ids[encoded.completion].tolist() == ids
