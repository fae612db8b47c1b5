"""The documentation cannot go stale: its examples run, its run files load, its links, commands and keys exist.

Conventions of the pages: a fenced block opened as ```python runnable is executed here (blocks of a page share their
names, and run where `ds_configs` lies beside them); a ```yaml block with model, data and deepspeed is a whole run file;
every command of a ```bash block is parsed. Everything else is shown only.
"""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_moe.cli import _parser
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import ALL_KEYS, load_run
from ds_moe.config.sections import FORMS
from ds_moe.monitor.meters import routing_scalars, window_scalars
from ds_moe.monitor.reports import RoutingReport, StepReport

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOMS = ("ds_moe/", "ds_configs/", "launch/", "tools/", "tests/", "docs/")
RUN_FILE_KEYS = {"model", "data", "deepspeed"}


def blocks(page: Path, info: str) -> list[str]:
    return [body for opened, body in FENCE.findall(page.read_text()) if opened.strip() == info]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def on_each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory with the repository's ds_configs in it."""
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@on_each([page for page in PAGES if blocks(page, "python runnable")])
def test_runnable_blocks_run(page, workplace):
    names: dict[str, Any] = {"__name__": page.stem}
    for number, body in enumerate(blocks(page, "python runnable"), start=1):
        code = compile(body, f"{page.name}, block {number}", "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, names)


@on_each([page for page in PAGES if blocks(page, "yaml")])
def test_whole_run_files_load(page, workplace):
    for number, body in enumerate(blocks(page, "yaml")):
        tree = yaml.safe_load(body)  # a part must be valid YAML too
        if isinstance(tree, dict) and tree.keys() >= RUN_FILE_KEYS:
            file = workplace / f"block_{number}.yaml"
            file.write_text(body)
            load_run(file)


@on_each(PAGES)
def test_relative_links_and_named_files_exist(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    named = [name for name in re.findall(r"`([\w./-]+)`", text) if name.startswith(ROOMS)]
    missing += [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in re.findall(r"-m ([\w.]+)", text) if ours(name) and not source(name).is_file()]
    assert not missing, f"{page.name} names what does not exist: {missing}"


# --- what a wheel lacks

FOLDERS = "ds_configs|findings|launch|requirements|tests|tools"
UNSHIPPED = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/|-m tools\.|\bmake [\w-]*(?:bench|demo|test)\b")


def sent_astray(text: str) -> str | None:
    """The first name of a page that an installed wheel lacks, unless the page has said by then that it is of a
    checkout."""
    first = UNSHIPPED.search(text)
    if first is None:
        return None
    paragraph_ends = text.find("\n\n", first.end())
    said = re.search(r"\bin a\s+checkout\b", text[: paragraph_ends if paragraph_ends > 0 else None], re.IGNORECASE)
    return None if said else text[first.start() :].split("\n")[0]


@on_each([page for page in PAGES if page.parent.name == "docs"])
def test_no_page_sends_the_user_of_a_wheel_to_what_it_lacks(page):
    assert sent_astray(page.read_text()) is None


def test_a_page_that_does_is_noticed():
    assert sent_astray("Run\n\n    ds-moe train ds_configs/runs/demo.yaml\n\nin a checkout") is not None
    assert sent_astray("`make gate-demo` trains one.") and sent_astray("python -m tools.bench.chaos")
    assert sent_astray("Seen in\n`tests/hostile`. In a\ncheckout, that is.") is None
    assert sent_astray("In a checkout: `tools/bench`.\n\nThen `make demo`.") is sent_astray("ds_moe/memory") is None


# --- commands


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command of the page's bash blocks, without comments and the environment in front."""
    for body in blocks(page, "bash"):
        for command in re.split(r"\n|&&", body.replace("\\\n", " ")):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def subcommands() -> dict[str, argparse.ArgumentParser]:
    [action] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


def is_key(dotted: str) -> bool:
    return re.sub(r"\.\d+", "", dotted) in ALL_KEYS


def ours(module: str) -> bool:
    return module.partition(".")[0] in ("ds_moe", "tools")


def source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def split_at_module(words: list[str]) -> tuple[str | None, list[str]]:
    """The module of ours that a command runs (`python -m`, `deepspeed --module`), if any, and the words behind it."""
    for position, (word, module) in enumerate(zip(words, words[1:], strict=False)):
        if word in ("-m", "--module") and ours(module):
            return module, words[position + 2 :]
    return None, []


def complaints(words: list[str]) -> Iterator[str]:
    """What is wrong with one command of a page: its name, an option, the script, module or make target, an override's
    key."""
    if words[0] == "ds-moe":
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                _, rest = _parser().parse_known_args(words[1:])
        except SystemExit:
            rest = ["--unparsable"]
        yield from (word for word in rest if word.startswith("-"))
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (word for word in words[1:] if "=" not in word and word not in targets)
    scripts = [word for word in words if word.startswith(("launch/", "tools/"))]
    yield from (script for script in scripts if not (ROOT / script).is_file())
    module, behind = split_at_module(words)
    if module and not source(module).is_file():
        yield module
    elif module:
        options = [word.partition("=")[0] for word in behind if word.startswith("-")]
        yield from (option for option in options if f'"{option}"' not in source(module).read_text())
    if (
        words[0] == "ds-moe"
        or module in ("ds_moe.train", "ds_moe.evaluate")
        or any(script.startswith("launch/") for script in scripts)
    ):
        overrides = [word.partition("=")[0] for word in words if re.match(r"[a-z_.0-9]+=", word)]
        yield from (key for key in overrides if re.sub(r"\.\d+", "", key) not in ALL_KEYS)


@on_each(PAGES)
def test_commands_exist_with_their_options_and_overrides(page):
    wrong = [f"{' '.join(words)}: {what}" for words in commands(page) for what in complaints(words)]
    named = re.findall(r"\bds-moe ([a-z]\w*)", prose(page))
    wrong += [f"ds-moe {name}" for name in named if name not in subcommands()]
    assert not wrong, wrong


def test_a_wrong_command_is_noticed():
    wrong = ["ds-moe trian r.yaml", "ds-moe export a b --force", "launch/lokal.sh r.yaml 2", "make tset"]
    wrong += ["ds-moe train r.yaml train.learning=1", "deepspeed --module ds_moe.train r.yaml moe.balance.0.wight=1"]
    wrong += ["python -m tools.bench.lair.bench --suite cpu", "python -m tools.bench.layer.bench --sweet cpu"]
    wrong += ["python -m ds_moe.trainer r.yaml", "ds-moe plan --gups 8"]
    assert all(list(complaints(shlex.split(line))) for line in wrong)
    right = ["ds-moe train r.yaml --nproc 2 moe.balance.0.weight=1", "python -m tools.bench.layer.bench --suite cpu"]
    right += ["torchrun --nproc_per_node 2 --module ds_moe.train r.yaml train.steps=2"]
    assert not any(list(complaints(shlex.split(line))) for line in right)


# --- the table of keys


def sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in sections(argument)]


def values(field: FieldInfo) -> str:
    """What a key may hold, as the table writes it."""
    annotation = field.annotation
    if takes_forms(annotation):
        return "text, a section, or a list of both"
    options = [option for option in get_args(annotation) if option is not type(None)]
    optional = len(options) == 1 and get_origin(annotation) not in (Literal, list)
    kind = options[0] if optional else annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {len(get_args(kind))} floats"
    if get_origin(kind) is list:
        return "list of sections" if sections(kind) else "list of text"
    if get_origin(kind) is UnionType:
        return "text or a section"
    name = {str: "text", bool: "`true`, `false`"}.get(kind) or kind.__name__
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    bounds = [(signs[type(bound)], bound) for bound in field.metadata if type(bound) in signs]
    return ", ".join([name, *(f"{sign} {getattr(bound, name)}" for (sign, name), bound in bounds)])


def takes_forms(annotation: Any) -> bool:
    """Whether a key takes a text, a section, or a list of them."""
    inner = [option for option in get_args(annotation) if option is not type(None)]
    return FORMS[0] in str(inner)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple | list) else str(value)


def key_rows(model: type[BaseModel] = RunConfig, parent: str = "") -> dict[str, tuple[str, str]]:
    """Dotted key -> (values, default) of every key of a run file; `[]` stands for each item of a list."""
    rows: dict[str, tuple[str, str]] = {}
    for name, field in model.model_fields.items():
        key, inside = f"{parent}{name}", list(dict.fromkeys(sections(field.annotation)))
        if inside and get_origin(field.annotation) is not list and not takes_forms(field.annotation):
            for item in inside:  # where kinds share a key, the first one's default is what the table says
                rows |= {name: row for name, row in key_rows(item, f"{key}.").items() if name not in rows}
            if len(inside) > 1:
                kinds = [option for item in inside for option in get_args(item.model_fields["kind"].annotation)]
                rows[f"{key}.kind"] = (", ".join(f"`{kind}`" for kind in kinds), "topk")
            continue
        rows[key] = (values(field), default(field))
        of_kind = [item for item in inside if "kind" in item.model_fields]
        kinds = [option for item in of_kind for option in get_args(item.model_fields["kind"].annotation)]
        for item in inside:
            rows |= key_rows(item, f"{key}[].")
        if kinds:
            rows[f"{key}[].kind"] = (", ".join(f"`{kind}`" for kind in kinds), "required")
    return rows


def table(page: Path, columns: int) -> list[list[str]]:
    """Cells of the rows that begin with a `key`, the key's backticks removed."""
    lines = [line for line in prose(page).splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [[row[0].strip("`"), *row[1:]] for row in rows if len(row) == columns]


def test_the_table_of_keys_is_the_config():
    rows = table(ROOT / "docs/run_files.md", columns=4)
    written = {key: (allowed, preset.strip("`")) for key, allowed, preset, _ in rows}
    expected = key_rows()
    lacking = [f"| `{key}` | {row[0]} | `{row[1]}` | ... |" for key, row in expected.items() if written.get(key) != row]
    assert not lacking, "\n".join(["docs/run_files.md must say:", *lacking])
    assert list(written) == list(expected) and len(rows) == len(expected)
    assert all(meaning for *_, meaning in rows)


def test_the_table_of_tags_is_what_the_monitor_writes():
    step = StepReport(step=1, loss=1.0, lr=0.1, grad_norm=1.0, tokens=8, samples=2, step_s=1.0, data_wait_s=0.0)
    step.sent_bytes, step.fill = 1.0, 0.9
    counts_LE = np.array([[4, 4]])
    routing = RoutingReport(counts_LE, np.array([[1, 2]]), 0.5, aux_loss=2.0, last_step_LE=counts_LE, bias_norm=1.0)
    routing.kind_counts_LE = {"KIND": counts_LE}
    tags = set(window_scalars([step], 1.0)) | set(routing_scalars(routing))
    tags = {re.sub(r"_layer_\d+$", "_layer_N", tag) for tag in tags}
    rows = [key for key, *_ in table(ROOT / "docs/monitoring.md", columns=2)]
    written = {tag for tag in rows if tag.startswith(("train/", "perf/", "moe/"))}
    assert written == tags


# --- what is in git

MACHINE_FOLDER = re.compile(r"(?<![\w.)}$~-])/(?:home|root|work|Users|tmp|mnt|opt|scratch|data)/[\w.-]+")
NO_MACHINE_FOLDER = ("/data/plugin", "/data/my_data")  # TensorBoard's routes; the data page's example
RUN_FILE = re.compile(r"(?<![\w/])(?:ds_configs|tests/runs)/[\w./-]+\.(?:yaml|json)")


@pytest.fixture(scope="module")
def in_git() -> list[str]:
    """Paths of `git ls-files`."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != ROOT:
            pytest.skip("not a git checkout of its own")
        return [name for name in git("ls-files", "-z").split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")


def texts(names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        # Pictures; what is deleted but not committed; a linked folder.
        with contextlib.suppress(UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            yield name, (ROOT / name).read_text(encoding="utf-8")


def machine_folders(text: str) -> list[str]:
    return [path for path in MACHINE_FOLDER.findall(text) if not path.startswith(NO_MACHINE_FOLDER)]


def test_no_file_names_a_folder_of_somebody_s_machine(in_git):
    here = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}(?![\w-])")
    found = {name: machine_folders(text) + here.findall(text) for name, text in texts(in_git)}
    assert not {name: paths for name, paths in found.items() if paths}


def test_a_folder_of_a_machine_is_noticed():
    folders = ["/".join(["", top, "me", "run.yaml"]) for top in ("home", "root", "work")]
    assert all(machine_folders(text) for folder in folders for text in (folder, f"cd {folder}", f'open("{folder}")'))
    assert not machine_folders("src/home/me https://host/root/x ${HOME}/work/y ../tmp/z /data/plugin/scalars")


def test_run_files_that_are_named_are_in_git(in_git):
    places = ("README.md", "Makefile", "CONTRIBUTING.md", "docs/", "tests/", "tools/", "launch/", ".ci/")
    named = {
        (name, file)
        for name, text in texts([name for name in in_git if name.startswith(places)])
        for file in RUN_FILE.findall(text)
    }
    assert len(named) > 10
    assert not [f"{name} names {file}" for name, file in sorted(named) if file not in in_git]
