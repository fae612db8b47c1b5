"""`ds-moe init`: what it writes is a run that fits, passes the doctor and trains; what it cannot write is one line."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ds_moe import cli
from ds_moe.config.run_file import load_run, parse_run
from ds_moe.data.digits import write_digits
from ds_moe.doctor import plans
from ds_moe.doctor.case import GIB, Device
from ds_moe.doctor.fit import Job, batch, fit
from ds_moe.doctor.run_text import round_down, written
from ds_moe.errors import UserError
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from tests.launcher import HANGS_S

BIG = "qwen3-vl-30b-a3b"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, images and conversations about them."""
    place = tmp_path_factory.mktemp("init")
    for name, kind in (("model", "vl"), ("text", "text")):
        build_preset(f"tiny-{kind}-moe" if kind == "vl" else "tiny-moe").save_pretrained(place / name)
        save_processor(tiny_processor(kind), place / name)
    write_digits(place / "data")
    return place


@pytest.fixture
def here(place, monkeypatch, tmp_path):
    """The working directory: a new one that sees what is in `place`."""
    for name in ("model", "text", "data"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return tmp_path


def init(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["init", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_run_for_gpus_has_sensible_keys_and_passes_the_doctor(here, capsys):
    words = ["model", "data/train.jsonl", "--eval", "data/held_out.jsonl", "--gpus", 4, "--memory", "24GB"]
    code, said, complaints = init(capsys, *words)
    assert code == 0 and not complaints
    config, problems = parse_run("run.yaml")
    assert not problems
    train = config.train
    assert (config.moe.ep_size, config.lora, config.model.freeze) == (4, None, ["vision"])
    assert config.deepspeed == "zero2"  # ZeRO-1 would sum the gradients of 2 micro-batches in bf16
    assert (train.epochs, train.micro_batch_size, train.global_batch_size) == (3, 8, 64)
    assert (train.gradient_checkpointing, train.precision, train.output_dir) == (False, None, "runs/run")
    steps = 3 * math.ceil(4311 / 64)  # 204
    assert (train.warmup_steps, train.eval_every, config.checkpoint.every) == (steps // 20, 20, 20)
    assert train.eval_samples == 256 and 1 < train.max_new_tokens <= 16
    longest = int(re.search(r"the longest record that was looked at has (\d+)", Path("run.yaml").read_text())[1])
    assert longest < config.data.max_length <= 2 * longest + 64 and config.data.num_workers == 4
    assert "4,311 records with images" in said and "EP 4, ZeRO-2" in said and "24.0 GiB are there" in said
    commands = [line.split() for line in said.partition("next:\n")[2].splitlines()]
    assert [words[1] for words in commands] == ["doctor", "train", "plot", "eval", "export"]
    assert cli.main(commands[0][1:]) == 0
    report = capsys.readouterr().out
    assert "0 errors, 0 warnings" in report, report
    predicted = re.search(r"about ([\d.]+ GiB a rank)", said)[0]
    assert predicted in report  # what init says of the memory is what the doctor says


@pytest.mark.parametrize("more", [[], ["--force"]])
@pytest.mark.parametrize("target", ["precious", "missing"])
def test_nothing_is_written_through_a_link(here, capsys, more, target):
    Path("precious").write_text("precious")
    Path("run.yaml").symlink_to(target)
    code, _, complaints = init(capsys, "--demo", *more)
    assert code == 2 and complaints.startswith("error: run.yaml is a link") and complaints.count("\n") == 1
    assert Path("precious").read_text() == "precious" and not Path("missing").exists()


@pytest.mark.parametrize("gpus", [1, 3, 8, 12, 16])
def test_the_next_commands_start_as_many_ranks_as_the_run_is_for(here, capsys, gpus):
    """On several hosts their slots say so: 12 GPUs are not two hosts of 8."""
    code, said, complaints = init(capsys, "model", "data/train.jsonl", "--gpus", gpus, "--memory", "24GB")
    assert code == 0 and not complaints
    [train] = [line.split()[1:] for line in said.splitlines() if line.startswith("  ds-moe train")]
    options = dict(zip(train[2::2], train[3::2], strict=True))
    expected = {"--hostfile": "HOSTS"} if gpus > 8 else {"--nproc": str(gpus)} if gpus > 1 else {}
    assert options == expected


def test_without_gpus_the_run_is_for_one_cpu_rank_and_lora_if_asked(here, capsys):
    code, said, _ = init(capsys, "text", write_texts(here, 10), "--lora", "--out", "new/small run.yaml")
    assert code == 0
    config = load_run("new/small run.yaml")
    assert (config.moe.ep_size, config.lora.rank, config.lora.experts, config.moe.balance) == (1, 16, True, [])
    assert (config.train.lr, config.model.freeze, config.data.num_workers) == (1e-4, [], 0)
    assert (config.train.global_batch_size, config.checkpoint.every) == (8, 2)  # 3 epochs of 2 steps
    assert (
        "ds-moe eval" not in said
        and "ds-moe train 'new/small run.yaml'\n" in said
        and "ds-moe plot 'runs/small run'\n" in said
    )
    assert cli.main(["doctor", "new/small run.yaml"]) == 0
    assert "0 errors" in capsys.readouterr().out


def write_texts(folder, count, **changes):
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is said. " * 30}]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"messages": turns, **changes}) + "\n" for _ in range(count)))
    return file


def test_long_answers_are_not_compared_word_by_word(here, capsys):
    texts = write_texts(here, 300)
    assert init(capsys, "text", texts, "--eval", texts)[0] == 0
    assert load_run("run.yaml").train.eval_generate is False
    assert init(capsys, "text", write_texts(here, 3), "--force")[0] == 0
    assert load_run("run.yaml").train.global_batch_size == 2  # no more than there are records


def test_the_demo_is_written_anywhere(here, capsys):
    code, said, _ = init(capsys, "--demo", "--out", "mine/demo.yaml")
    assert code == 0 and "ds-moe train mine/demo.yaml --nproc 2" in said
    assert load_run("mine/demo.yaml").model.preset == "tiny-vl-moe"
    assert "ds_configs" not in Path("mine/demo.yaml").read_text()
    assert cli.main(["doctor", "mine/demo.yaml", "--world", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["./nowhere", "digits"], "./nowhere: no such folder (give the folder of a saved model, or a hub id)"),
        (["model", "nowhere.jsonl"], 'data: nowhere.jsonl does not exist (give a JSONL or Parquet file, or "digits")'),
        (["model", "bad.jsonl"], "bad.jsonl:2: broken JSON"),
        (["model", "data/train.jsonl", "--eval", "bad.jsonl"], "bad.jsonl:2: broken JSON"),
        (["text", "data/train.jsonl"], "data/train.jsonl:1: the record has an image, but the model reads text only"),
        (["model"], "give a MODEL and its DATA, or --demo"),
        (["--demo", "--out", "."], ". is there already; give --out a file"),
        (["model", "digits", "--demo"], "--demo brings a whole run file; leave MODEL, DATA out"),
        (["--demo", "--gpus", "8", "--lora"], "--demo brings a whole run file; leave --gpus, --lora out"),
        (["model", "digits", "--memory", "80GB"], "--memory is that of a GPU, and this machine has none"),
        (["model", "digits", "--gpus", "2", "--memory", "1"], "nothing fits: each of 2 ranks needs"),
        (["model", "digits", "--out", "data/train.jsonl/run.yaml"], "cannot write data/train.jsonl/run.yaml: "),
    ],
)
def test_what_a_run_would_refuse_is_one_line_and_no_file(words, complaint, here, capsys):
    good = write_texts(here, 1).read_text()
    (here / "bad.jsonl").write_text(good + good[:40])
    code, said, complaints = init(capsys, *words)
    assert code == 2 and not said
    last = complaints.splitlines()[-1]
    assert last.startswith("error: ") and complaint in last and not (here / "run.yaml").exists()


def test_bad_records_are_left_out_where_the_run_is_to_skip_them(here, capsys):
    good = write_texts(here, 2).read_text()
    (here / "bad.jsonl").write_text(good + good[:40] + "\n")
    code, said, complaints = init(capsys, "text", "bad.jsonl", "--skip-bad")
    assert code == 0 and not complaints
    assert re.search(r"2 records, .*; 1 bad ones skipped, the first bad.jsonl:3: broken JSON", said)
    assert load_run("run.yaml").data.on_bad_record == "skip"
    assert cli.main(["doctor", "run.yaml"]) == 0
    (here / "bad.jsonl").write_text(good[:40])
    code, said, complaints = init(capsys, "text", "bad.jsonl", "--skip-bad", "--force")
    assert code == 2 and "no record to use" in complaints


def test_a_file_that_is_there_is_kept_unless_forced(here, capsys):
    Path("run.yaml").write_text("mine")
    code, _, complaint = init(capsys, "--demo")
    fix = "--force replaces it, --out writes another file"
    assert (code, complaint) == (2, f"error: run.yaml is there already; {fix}\n")
    assert Path("run.yaml").read_text() == "mine"
    assert init(capsys, "--demo", "--force")[0] == 0
    assert "tiny-vl-moe" in Path("run.yaml").read_text()


# --- the plan


def chosen(gpus, gib, lora=False, samples=64, max_length=4096):
    settings = {"data.max_length": max_length, "train.precision": "bf16", "model.freeze": ["vision"]}
    job = Job(BIG, plans.read_model(BIG), gpus, Device(False, gib * GIB, "here"))
    return fit(job, settings, samples, lora)


@pytest.mark.slow
def test_a_plan_gives_up_only_what_it_must():
    roomy = chosen(64, 80)
    assert (roomy.plan.stage, roomy.plan.offload, roomy.plan.lora, roomy.plan.ep_size) == (1, False, 0, 8)
    assert roomy.why == ["it fits without LoRA, offload and gradient checkpointing"]
    node = chosen(8, 80)
    assert (node.plan.ep_size, node.plan.stage, node.plan.offload, node.plan.lora) == (8, 3, False, 0)
    assert (node.micro_batch, node.global_batch, node.checkpointing) == (2, 64, True)
    small = chosen(8, 74)
    assert (small.plan.stage, small.plan.offload, small.global_batch) == (
        2,
        False,
        8,
    )  # more is summed in fp32: no room
    assert [line.partition(", because")[0] for line in small.why] == ["small steps", "gradient checkpointing"]
    assert (chosen(16, 80).global_batch, chosen(16, 80, max_length=1024).micro_batch) == (64, 4)
    pair = chosen(2, 80)
    assert pair.plan.offload and not pair.plan.lora and pair.why[0].startswith("optimizer in host memory, because")
    asked = chosen(8, 80, lora=True)
    assert asked.plan.lora == 16 and asked.why == ["it fits without offload and gradient checkpointing"]
    with pytest.raises(UserError, match=r"^nothing fits: 1 rank needs \d+\.\d GiB even at its least, with LoRA"):
        chosen(1, 40)


def test_batches_are_multiples_of_what_all_ranks_take():
    for ranks in range(1, 70):
        for micro_batch in (1, 2, 4, 8):
            sizes = batch(micro_batch, ranks, 64)
            assert sizes["train.global_batch_size"] % (micro_batch * ranks) == 0
            assert 64 - micro_batch * ranks < sizes["train.global_batch_size"] <= max(64, micro_batch * ranks)


def test_expert_parallel_sizes_are_common_divisors():
    model = plans.read_model(BIG)  # 128 experts
    assert [plans.ep_sizes(model, gpus) for gpus in (1, 3, 6, 8)] == [[1], [1], [1, 2], [1, 2, 4, 8]]


def test_values_are_written_as_yaml_reads_them_back():
    for value in (1e-5, 0.001, 3, True, "a: b", "- x", "null", "it's", ["vision"], [{"kind": "aux", "weight": 1e-3}]):
        text = written(value)
        assert "\n" not in text
        read = yaml.safe_load(f"key: {text}")["key"]
        assert (float(read) if isinstance(value, float) else read) == value
    assert [round_down(number) for number in (1, 4, 9, 10, 49, 999)] == [1, 2, 5, 10, 20, 500]


@pytest.mark.slow
def test_what_init_writes_trains_on_an_odd_number_of_ranks(here, capsys):
    assert init(capsys, "model", "data/train.jsonl", "--eval", "data/held_out.jsonl", "--gpus", 3)[0] == 0
    config = load_run("run.yaml")
    assert config.train.global_batch_size % (3 * config.train.micro_batch_size) == 0
    overrides = ["train.steps=2", "train.epochs=null", "train.warmup_steps=0", "data.num_workers=0"]
    overrides += ["train.eval_every=null", "train.eval_samples=null", "train.max_new_tokens=4"]
    command = [Path(sys.executable).with_name("ds-moe"), "train", "run.yaml", "--nproc", "3", *overrides]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert json.loads((here / "runs/run/result.json").read_text())["step"] == 2
