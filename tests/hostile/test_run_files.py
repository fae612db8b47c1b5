"""Run files, overrides and DeepSpeed JSONs: nothing in them is executed, followed for ever, or passed over."""

import json
import os
from pathlib import Path

import pytest
import yaml

from ds_moe.cli import main
from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run_file import load_run
from ds_moe.config.yaml_lines import MAX_BYTES, MAX_VALUES

from .limits import refusal

BASE = """\
model: {preset: tiny-vl-moe}
data: {train: digits}
moe: {ep_size: 2}
train:
  steps: 10
deepspeed: zero.json
"""
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(text) writes run.yaml beside a good zero.json and goes to their folder."""
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text('{"zero_optimization": {"stage": 3}}')

    def write(text: str | bytes) -> str:
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "run.yaml"

    return write


def instead(steps: str) -> str:
    """A good run file, but for `train.steps`, which stands in line 5."""
    return BASE.replace("steps: 10", f"steps: {steps}")


# name -> (run file, its error); CANARY stands for the path that must not come to be
YAML = {
    "a call": (
        instead("!!python/object/apply:os.mkdir [CANARY]"),
        ":5: the tag 'tag:yaml.org,2002:python/object/apply",
    ),
    "an object": (BASE + "x: !!python/object:os._wrap_close {}\n", ":7: the tag 'tag:yaml.org,2002:python/object:os"),
    "an object for a section": (BASE.replace("train:\n", "train: !!python/object:a.B\n"), ":4: the tag 'tag:yaml.org"),
    "a new object": (instead("!!python/object/new:os.mkdir {args: [CANARY]}"), ":5: the tag 'tag:yaml.org,2002:python"),
    "a module": (instead("!!python/module:antigravity"), ":5: the tag 'tag:yaml.org,2002:python/module"),
    "a name": (instead("!!python/name:os.mkdir"), ":5: the tag 'tag:yaml.org,2002:python/name"),
    "a call as a key": (BASE + "? !!python/object/apply:os.mkdir [CANARY]\n: 1\n", ":7: a key is ["),
    "a tag of its own": (instead("!include /etc/passwd"), ":5: the tag '!include' is not read"),
    "a set": (BASE.replace("{train: digits}", "!!set {train}"), ":2: the tag 'tag:yaml.org,2002:set'"),
    "billion laughs": (BASE + LAUGHS, f"more than {MAX_VALUES} values, aliases (*name) followed"),
    "billion laughs as mappings": (BASE + LAUGHS.replace("[", "{k: [").replace("]", "]}"), f"than {MAX_VALUES} values"),
    "a list within itself": (BASE + "a: &a [*a]\n", "nested too deeply, or an alias (*name) within itself"),
    "a section within itself": (BASE + "a: &a {b: *a}\n", "nested too deeply, or an alias (*name) within itself"),
    "an unknown alias": (BASE + "a: *nothing\n", ":7: not valid YAML (found undefined alias 'nothing'"),
    "a merge": (BASE + "rl: &a {kl_kind: k1}\ngate: {<<: *a}\n", ":8: unknown key gate.<<"),
    "nested 1,200 deep": (BASE + "a: " + "[" * 1200, "nested too deeply"),
    "too large": (BASE + "#" * MAX_BYTES, f"the run file has {MAX_BYTES + len(BASE)} bytes, at most {MAX_BYTES}"),
    "two documents": (BASE + "---\n" + BASE, ":7: not valid YAML (but found another document)"),
    "a key twice": (BASE + "deepspeed: other.json\n", ":7: duplicate key deepspeed (first at run.yaml:6)"),
    "a section twice": (BASE + "train: {steps: 20}\n", ":7: duplicate key train (first at run.yaml:4)"),
    "a tab": (BASE + "\tmonitor: {}\n", ":7: not valid YAML (found character '\\t'"),
    "a NUL": (BASE + "\0", "not valid YAML (unacceptable character #x0000"),
    "no UTF-8": (BASE.encode() + b"\xff", "the run file is not UTF-8 text"),
    "UTF-16": (BASE.encode("utf-16"), "the run file is not UTF-8 text"),
    "empty": ("", "a run file is a mapping with the sections"),
    "a list": ("- 1\n", "a run file is a mapping with the sections"),
    "a text": ("run\n", "a run file is a mapping with the sections"),
    "a number": ("7\n", "a run file is a mapping with the sections"),
    "an unknown key": (BASE + "sudo: true\n", ":7: unknown key sudo (keys here:"),
    "a dunder": (BASE + "__class__: x\n", ":7: unknown key __class__"),
    "a look-alike letter": (
        BASE.replace("train:\n", "tr\u0430in:\n"),
        ":4: unknown key tr\u0430in (did you mean train",
    ),
    "an invisible letter": (
        BASE.replace("train:\n", "tra\u200bin:\n"),
        ":4: a key is 'tra\\u200bin'; must be short text",
    ),
    "text that runs backwards": (BASE + '"\u202esteps": 1\n', ":7: a key is '\\u202esteps'; must be short text"),
    "a line break in a key": (BASE + '"a\\nerror: all is well": 1\n', ":7: a key is 'a\\nerror: all is well'; must be"),
    "a key of 60 KB": (BASE + f"? {'k' * 60_000}\n: 1\n", ":7: a key is 'kkk"),
    "a value of 60 KB": (instead("v" * 60_000), ":5: train.steps is 'vvv"),
    "a mapping as a key": (BASE + "? {a: 1}\n: 1\n", ":7: a key is [("),
    "a section as a number": (instead("{a: 1}"), ":5: train.steps is {'a': 1}; must be a valid integer"),
    "a number as a section": (BASE.replace("{ep_size: 2}", "2"), ":3: moe is 2; must be a section with keys"),
    "NaN": (instead(".nan"), ":5: train.steps is nan; must be a valid integer"),
    "NaN for a float": (BASE + "rl: {clip_low: .nan}\n", ":7: rl.clip_low is nan; must be a finite number"),
    "infinity": (
        BASE.replace("  steps: 10", "  steps: 10\n  lr: .inf"),
        ":6: train.lr is inf; must be a finite number",
    ),
    "1e999": (BASE.replace("  steps: 10", "  steps: 10\n  lr: 1e999"), ":6: train.lr is inf; must be a finite number"),
    "a number of 5,000 digits": (instead("9" * 5000), "not valid YAML (Exceeds the limit"),
    "octal": (instead("010"), ":5: train.steps is 10.0; must be a valid integer"),
    "base 60": (instead("1:30"), ":5: train.steps is '1:30'; must be a valid integer"),
    "a date": (instead("2026-13-45"), "not valid YAML (month must be in 1..12)"),
    "yes": (instead("yes"), ":5: train.steps is True; must be a valid integer"),
    "minus one": (instead("-1"), ":5: train.steps is -1; must be greater than 0"),
    "a broken regex": (BASE.replace("moe}", 'moe, freeze: ["("]}'), "model.freeze: '(' is no regular expression"),
    "a list nested in text": (BASE.replace("moe}", f"moe, freeze: '{'[' * 900}'}}"), ":1: model.freeze is '[[["),
    "10,000 items in text": (BASE.replace("moe}", f"moe, freeze: '{'a, ' * 10_000}'}}"), ":1: model.freeze is 'a, a"),
    "a JSON of a long name": (BASE.replace("zero.json", "z" * 60_000), ":6: deepspeed is 'zzz"),
    "a JSON that is no file": (BASE.replace("zero.json", "/dev/zero"), "deepspeed is '/dev/zero', which is neither"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_run_file_is_refused(run, canary, name):
    text, says = YAML[name]
    path = run(text.replace("CANARY", str(canary)) if isinstance(text, str) else text)
    refusal(lambda: load_run(path), path, says)


def test_the_calls_run_where_yaml_is_loaded_unsafely(tmp_path):
    """Positive control of the tags above."""
    text = YAML["a call"][0].replace("CANARY", str(tmp_path / "fired"))
    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert (tmp_path / "fired").is_dir()


def test_good_run_files_pass(run):
    """Positive control: comments, a byte order mark, line ends of Windows, an alias, numbers with underscores."""
    config = load_run(run(b"\xef\xbb\xbf# a run\r\n" + instead("1_000").replace("\n", "\r\n").encode()))
    assert config.train.steps == 1000
    config = load_run(run(BASE.replace("digits}", "&data digits, eval: *data}")))
    assert config.data.train == config.data.eval == "digits"


PATHS = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "missing": lambda path: None,
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("file", ["run.yaml", "zero.json"])
def test_what_is_no_file_is_refused(run, file, name):
    run(BASE)
    Path(file).unlink()
    PATHS[name](Path(file).absolute())
    refusal(lambda: load_run("run.yaml"), "run.yaml", "cannot read the run file" if file == "run.yaml" else file)


OVERRIDES = {
    "train.lr=!!python/object/apply:os.mkdir [CANARY]": "value:1: the tag 'tag:yaml.org,2002:python/object",
    "train.lr=&a [*a]": "nested too deeply, or an alias (*name) within itself",
    "train.lr=[1": "not valid YAML",
    "train.lr=.nan": "train.lr is nan; must be a finite number",
    "train.lr": "write it as dotted.key=value",
    "=1": "write it as dotted.key=value",
    "train..lr=1": "write it as dotted.key=value",
    "train.lr.x=1": "train.lr is {'x': 1}; must be a valid number",
    "train.steps.x=1": "train.steps is 10, not a section",
    "model.freeze=[vision]; rm -rf /": "not valid YAML",
    "__class__.__init__=1": "unknown key __class__.__init__",
    "moe.balance.0.weight=1": "moe.balance",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_hostile_override_is_refused(run, canary, override):
    given = override.replace("CANARY", str(canary))
    refusal(lambda: load_run(run(BASE), [given]), f"override {given}: ", OVERRIDES[override])


def test_an_index_that_is_no_number_is_no_index(run):
    overrides = ["moe.balance=[{kind: aux}]", "moe.balance.\u00b2.weight=1"]
    refusal(lambda: load_run(run(BASE), overrides), "moe.balance is a list of 1; \u00b2 is no index in it")


def zero(**values) -> str:
    """Text of a JSON with these values below zero_optimization."""
    return json.dumps({"zero_optimization": {"stage": 3, **values}}, indent=1)


def beside(**values) -> str:
    """Text of a JSON with these values beside a good zero_optimization."""
    return json.dumps({"zero_optimization": {"stage": 3}, **values}, indent=1)


JSON = {
    "broken": ('{"zero_optimization": ', "zero.json:1: not valid JSON (Expecting value at column"),
    "comments": ("{\n // ZeRO\n}", "zero.json:2: not valid JSON (Expecting property name"),
    "a trailing comma": ('{"zero_optimization": {"stage": 3},}', "zero.json:1: not valid JSON"),
    "single quotes": ("{'zero_optimization': {}}", "zero.json:1: not valid JSON"),
    "two objects": ("{}\n{}", "zero.json:2: not valid JSON (Extra data"),
    "empty": ("", "zero.json:1: not valid JSON"),
    "a list": ("[]", "a DeepSpeed JSON is an object, this is a list"),
    "a byte order mark": ("\ufeff{}", "zero.json:1: not valid JSON (Unexpected UTF-8 BOM"),
    "NUL bytes": ("\0" * 8, "zero.json:1: not valid JSON"),
    "nested 20,000 deep": ('{"a":' * 10_000, "zero.json: not valid JSON (maximum recursion depth"),
    "a number of 5,000 digits": ('{"steps_per_print": ' + "9" * 5000 + "}", "not valid JSON (Exceeds the limit"),
    "too large": (" " * (MAX_BYTES + 1), f"the DeepSpeed JSON has {MAX_BYTES + 1} bytes"),
    "a key twice": ('{"fp16": {},\n"fp16": {}}', "zero.json:2: duplicate key fp16"),
    "an unknown key": (beside(include="../../etc/passwd"), "zero.json:5: unknown key include"),
    "a reference": (beside(**{"$ref": "file:///etc/passwd"}), "zero.json:5: unknown key $ref"),
    "a line break in a key": (beside(**{"a\nb": 1}), "zero.json:5: a key is 'a\\nb'; must be short text"),
    "stage 4": (zero(stage=4), "zero.json:3: zero_optimization.stage is 4; must be 1, 2 or 3"),
    "stage true": (zero(stage=True), "zero_optimization.stage is True; must be 1, 2 or 3"),
    "stage as text": (zero(stage="3"), "zero_optimization.stage is '3'; must be 1, 2 or 3"),
    "no stage": ("{}", "zero_optimization.stage is None; must be 1, 2 or 3"),
    "fp16": (beside(fp16={"enabled": True}), "fp16.enabled is True; ds_moe trains in bf16 or fp32"),
    "fp16 as a switch": (beside(fp16=True), "fp16 is True; must be an object"),
    "a section as text": ('{"zero_optimization": "3"}', "zero_optimization is '3'; must be an object"),
    "an offload as a number": (zero(offload_optimizer=5), "offload_optimizer is 5; must be an object"),
    "an offload to nowhere": (
        zero(offload_optimizer={"device": "/etc"}),
        "offload_optimizer.device is '/etc'; must be none",
    ),
    "an offload to NVMe": (zero(offload_param={"device": "nvme", "nvme_path": "/"}), '.device "nvme" is not supported'),
    "an offload misspelt": (
        zero(offload_optimizer={"devise": "cpu"}),
        "offload_optimizer.devise (did you mean device?)",
    ),
    "a bucket as text": (zero(reduce_bucket_size="big"), "reduce_bucket_size is 'big'; must be a number above 0"),
    "a bucket below 0": (zero(reduce_bucket_size=-5), "reduce_bucket_size is -5; must be a number above 0"),
    "a switch as text": (zero(overlap_comm="maybe"), "overlap_comm is 'maybe'; must be true or false"),
    "a logger as a number": (beside(comms_logger=7), "comms_logger is 7; must be an object"),
    "another optimizer": (beside(optimizer={"type": "os.system"}), "optimizer.type is 'os.system'; must be 'AdamW' or"),
    "an optimizer as a list": (beside(optimizer=[]), "optimizer is []; must be an object"),
    "eps NaN": (beside(optimizer={"params": {"eps": float("nan")}}), "optimizer.params.eps is nan; must be"),
    "clipping infinite": (beside(gradient_clipping=float("inf")), "gradient_clipping is inf; must be finite"),
    "a batch that contradicts": (beside(train_batch_size=7), "train_batch_size is 7, but run.yaml"),
    "a batch as text": (beside(train_batch_size="8"), 'train_batch_size is "8", but run.yaml'),
    "an accumulation that contradicts": (
        beside(gradient_accumulation_steps=3),
        "gradient_accumulation_steps is 3, but",
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_a_hostile_json_is_refused(run, name):
    text, says = JSON[name]
    config = load_run(run(BASE))
    Path("zero.json").write_text(text, encoding="utf-8")
    refusal(lambda: resolve_deepspeed(config, 2, on_cpu=True), "zero.json", says, lines=2)


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_the_command_says_it_in_one_line(run, canary, capsys, command):
    """As a user meets it: exit code 2 (the doctor: 1) and one line that is no traceback."""
    code = main([command, run(YAML["a call"][0].replace("CANARY", str(canary)))])
    out, err = capsys.readouterr()
    [line] = [line for line in (out + err).splitlines() if "the tag" in line]
    assert code != 0 and "run.yaml:5: the tag" in line and "Traceback" not in out + err
