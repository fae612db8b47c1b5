"""The rules that keep the package a house of rooms, read from its sources alone: nothing of ds_moe is imported.

A rule is a function from sources (path from the repository's root -> text) to its violations, one line each. Every rule
has a planted violation (`PLANTED`) that it must find. `python -m tests.test_architecture` lists what is long.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ds_moe"
Sources = dict[str, str]

# A room (a folder or a file of the package's root) imports from itself and from rooms to the left of it.
ROOMS = """errors distributed faults config moe weights data models monitor replay engine memory assembly checkpoint
    export rollout tasks training doctor train evaluate launcher cli __main__""".split()
ROOT_FILES = 7  # at most, in the root of the package
ANYS = 120  # at most, in the package
LONG_FILE, LONG_FUNCTION = 250, 50  # lines; guides, not walls

# Prefixes of the paths in which alone a word may stand, so that what it is about is changed in one place.
FAMILIES = "ds_moe/models/families.py"
ZERO_READERS = "ds_moe/config/deepspeed"
GATHERER = "ds_moe/distributed.py"
WEIGHT_READERS = "ds_moe/weights/"
# What differs between tasks is a row of the registry. But rules of a run file lie below it, and commands refuse runs of
# another task: these ask `task_is` and `other_task` of config/run.py.
TASK_READERS = ("ds_moe/tasks/registry.py", "ds_moe/config/run.py")
TASK_QUESTIONS = ("task_is", "other_task")
TASK_ASKERS = (
    "ds_moe/config/",
    "ds_moe/launcher/cli.py",
    "ds_moe/tasks/gate/commands.py",
    "ds_moe/tasks/gate/files.py",
)

# A `model_type` of transformers: one word, or words and digits in snake case, such as qwen3_vl_moe.
MODEL_TYPE = re.compile(
    r"mixtral|olmoe|dbrx|jamba|jetmoe|phimoe|gpt_oss|granitemoe|flex_olmo|seed_oss"
    r"|(?:apertus|bailing|cohere|deepseek|dots|ernie|exaone|falcon|gemma|glm|granite|hunyuan|internvl|kimi|lfm|llama|llava"
    r"|longcat|minimax|mistral|nemotron|olmo|phi|qwen|smollm)(?:\d|_|moe)[a-z0-9_]*"
)
OUTSIDE = re.compile(
    r"(?<![\w./-])(?:docs|tools|tests|launch|requirements|findings)/|\bds_configs\b|\bmake [\w-]*(?:bench|demo|test)\b"
    r"|\b(?:README|CONTRIBUTING|CHANGELOG|Makefile)\b|\b[\w-]+\.md\b"
)
# (file, text that may stand in one of its strings): names of files that the product itself opens, writes or ships.
OPENED = {
    ("ds_moe/__init__.py", "ds_configs"),  # the map: a wheel has that folder, see package_data in setup.py
    ("ds_moe/config/deepspeed_json.py", "ds_configs"),  # the same folder, whose DeepSpeed JSONs a run file may name
    ("ds_moe/doctor/new_run.py", "ds_configs"),  # the same folder, whose demo.yaml is written for a user
    ("ds_moe/assembly/assemble.py", "README"),  # the model card it writes beside the weights
    ("ds_moe/export/model.py", "README"),  # the same
}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def walked(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


def trees(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    for path, source in sorted(sources.items()):
        yield path, parsed(source)


# --- imports


def module_name(path: str) -> str:
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def imported(path: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Dotted names of what a file imports, at its top, in functions and under TYPE_CHECKING."""
    package = list(PurePosixPath(path).parent.parts)
    for node in walked(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def graph(sources: Sources) -> dict[str, set[str]]:
    """Module -> modules of the package, of tools and of tests that it imports."""
    modules = {module_name(path) for path in sources}
    ours = (PACKAGE, "tools", "tests")
    return {
        module_name(path): {name for name in imported(path, tree, modules) if name.split(".")[0] in ours}
        for path, tree in trees(sources)
    }


def upward_imports(sources: Sources) -> list[str]:
    def room(module: str) -> str:
        return (module.split(".") + [""])[1]

    found = [f"{module} is in no known room" for module in graph(sources) if room(module) not in ["", *ROOMS]]
    for module, targets in graph(sources).items():
        for target in sorted(targets):
            if not target.startswith(PACKAGE):
                found.append(f"{module} imports {target}, which an installed package lacks")
            elif room(target) and ["", *ROOMS].index(room(target)) > ["", *ROOMS].index(room(module)):
                found.append(f"{module} imports {target}, which lies above it")
    return found


def circles(sources: Sources) -> list[str]:
    """One line for each group of modules that reach each other."""
    edges = graph(sources)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for target in edges.get(ahead.pop(), set()) - seen:
                seen.add(target)
                ahead.append(target)
        return seen

    everything = {module: reached(module) for module in edges}
    groups = {
        tuple(sorted(other for other in targets if module in everything.get(other, ())))
        for module, targets in everything.items()
        if module in targets
    }
    return [f"{' and '.join(group)} import each other" for group in sorted(groups)]


# --- names


def repeated_classes(sources: Sources) -> list[str]:
    places = defaultdict(list)
    for path, tree in trees(sources):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]


def last_name(node: ast.expr) -> str:
    """`config` of `config`, `run.config` and `self.parts.config`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def run_config_names(tree: ast.Module) -> set[str]:
    """Names of variables that hold a run's config: by custom, by annotation, or as what `load_run` returns."""
    names = {"config", "run_config", "cfg", "c"}
    for node in walked(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            if "RunConfig" in ast.unparse(node.annotation):
                names.add(node.arg if isinstance(node, ast.arg) else last_name(node.target))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if last_name(node.value.func) in ("load_run", "RunConfig"):
                names |= {last_name(target) for target in node.targets}
    return names


def task_reads(sources: Sources) -> list[str]:
    """Reads of `task` of a run's config outside the registry of tasks."""
    found = []
    for path, tree in trees(sources):
        if path.startswith(TASK_READERS):
            continue
        names = run_config_names(tree)
        for node in walked(tree):
            if isinstance(node, ast.Attribute) and node.attr == "task" and isinstance(node.ctx, ast.Load):
                holder = node.value
            elif isinstance(node, ast.Call) and last_name(node.func) == "getattr" and len(node.args) > 1:
                holder = node.args[0] if getattr(node.args[1], "value", None) == "task" else None
            elif isinstance(node, ast.MatchClass) and last_name(node.cls) == "RunConfig" and "task" in node.kwd_attrs:
                found.append(f"{path}:{node.lineno} matches task")
                continue
            else:
                continue
            called = isinstance(holder, ast.Call) and last_name(holder.func) in ("load_run", "RunConfig")
            if called or (holder is not None and last_name(holder) in names):
                found.append(f"{path}:{node.lineno} reads {ast.unparse(node)}")
    return found


def task_questions(sources: Sources) -> list[str]:
    return [line for name in TASK_QUESTIONS for line in names_outside(sources, TASK_ASKERS, name)]


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string, docstrings and the fixed parts of f-strings included."""
    for node in walked(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def strings_outside(sources: Sources, home: str, wrong: Callable[[str], object]) -> list[str]:
    return [
        f"{path}:{line} has {text if len(text) < 60 else text[:57] + '...'!r}"
        for path, tree in trees(sources)
        if not path.startswith(home)
        for line, text in strings(tree)
        if wrong(text)
    ]


def names_outside(sources: Sources, home: str | tuple[str, ...], name: str) -> list[str]:
    """Places outside `home` that import or use `name`."""
    found = []
    for path, tree in trees(sources):
        for node in walked(tree) if not path.startswith(home) else ():
            used = isinstance(node, ast.Name | ast.Attribute) and last_name(node) == name
            if used or (isinstance(node, ast.alias) and node.name.split(".")[-1] == name):
                found.append(f"{path}:{node.lineno} uses {name}")
    return found


def model_types(sources: Sources) -> list[str]:
    return strings_outside(sources, FAMILIES, MODEL_TYPE.fullmatch)


def zero_sections(sources: Sources) -> list[str]:
    return strings_outside(sources, ZERO_READERS, lambda text: "zero_optimization" in text)


def gathered_objects(sources: Sources) -> list[str]:
    return names_outside(sources, GATHERER, "all_gather_object")


def opened_weights(sources: Sources) -> list[str]:
    return names_outside(sources, WEIGHT_READERS, "safe_open")


# --- what a reader meets


def incomplete_maps(sources: Sources) -> list[str]:
    """Folders whose `__init__` does not open with a docstring that names each of its files and folders."""
    inside: dict[str, set[str]] = defaultdict(set)
    for path in sources:
        parts = PurePosixPath(path).parts
        for depth in range(1, len(parts)):
            name = parts[depth] + ("/" if depth + 1 < len(parts) else "")
            inside["/".join(parts[:depth])].add(name)
    found = []
    for folder, names in sorted(inside.items()):
        initial = f"{folder}/__init__.py"
        text = (ast.get_docstring(parsed(sources[initial])) if initial in sources else None) or ""
        lacking = [name for name in sorted(names - {"__init__.py"}) if not re.search(rf"(?<![\w/]){name}", text)]
        if lacking or not text:
            found.append(f"{initial} does not name {', '.join(lacking) or 'its purpose'}")
    return found


def outside_paths(sources: Sources) -> list[str]:
    """Strings that name a path which an installed package lacks."""
    return [
        f"{path}:{line} names {name}"
        for path, tree in trees(sources)
        for line, text in strings(tree)
        for name in OUTSIDE.findall(text)
        if (path, name) not in OPENED
    ]


def root_files(sources: Sources) -> list[str]:
    files = [path for path in sources if path.count("/") == 1]
    return [f"{len(files)} files, more than {ROOT_FILES}: {', '.join(files)}"] if len(files) > ROOT_FILES else []


def anys(sources: Sources) -> list[str]:
    """The files with the most `Any`, if the package has too many."""
    counts = {
        path: sum(isinstance(node, ast.Name | ast.Attribute) and last_name(node) == "Any" for node in walked(tree))
        for path, tree in trees(sources)
    }
    total = sum(counts.values())
    most = sorted(counts.items(), key=lambda item: -item[1])[:12]
    shown = ", ".join(f"{path.removeprefix(PACKAGE + '/')} {count}" for path, count in most)
    return [f"{total} of Any, more than {ANYS}: {shown}"] if total > ANYS else []


RULES: dict[str, Callable[[Sources], list[str]]] = {
    "imports go down": upward_imports,
    "imports form no circle": circles,
    "a public class name exists once": repeated_classes,
    "tasks are told apart in the registry": task_reads,
    "only rules and commands ask which task it is": task_questions,
    "model types are known in families.py": model_types,
    "the ZeRO section is read in config/deepspeed": zero_sections,
    "objects are gathered in distributed.py": gathered_objects,
    "safetensors are opened in weights/": opened_weights,
    "every folder opens with its map": incomplete_maps,
    "no text names a path outside the package": outside_paths,
    "the root has few files": root_files,
    "Any is rare": anys,
}


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources()


def read_sources() -> Sources:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, sources):
    found = RULES[rule](sources)
    assert not found, "\n".join([f"{rule}; violated:", *found])


# A house that keeps every rule, and for each rule changed or added files that break it.
HOUSE = {
    "ds_moe/__init__.py": '"""config/ moe/ tasks/ training/ weights/ train.py"""',
    "ds_moe/train.py": "from ds_moe.training.step import step\n",
    "ds_moe/config/__init__.py": '"""run.py deepspeed.py rules/"""',
    "ds_moe/config/run.py": "class RunConfig:\n    task: str\ndef task_is(config, name): return config.task == name\n",
    "ds_moe/config/deepspeed.py": 'stage = {}["zero_optimization"]\n',
    "ds_moe/config/rules/__init__.py": '"""rule.py"""',
    "ds_moe/config/rules/rule.py": "def rule(config): return run.task_is(config, 'rl')\n",
    "ds_moe/moe/__init__.py": '"""layer.py"""\nfrom ds_moe.moe.layer import Layer\n',
    "ds_moe/moe/layer.py": "import torch\nclass Layer: ...\nclass _Helper: ...\n",
    "ds_moe/weights/__init__.py": '"""files.py"""',
    "ds_moe/weights/files.py": "from safetensors import safe_open\nclass _Helper: ...\n",
    "ds_moe/tasks/__init__.py": '"""registry.py  what a task is"""',
    "ds_moe/tasks/registry.py": "from ..config.run import RunConfig\ndef kind(config): return config.task\n",
    "ds_moe/training/__init__.py": '"""step.py"""',
    "ds_moe/training/step.py": "def step(run, report): return run.task.loss() + report.task\n",
}
HOME = "from __future__ import annotations\nfrom typing import TYPE_CHECKING, Any\n"
PLANTED: dict[str, list[tuple[str, str]]] = {
    "imports go down": [
        ("ds_moe/moe/layer.py", "import ds_moe.training.step\n"),
        ("ds_moe/moe/layer.py", "def late():\n    from ds_moe.tasks import registry\n"),
        ("ds_moe/moe/layer.py", f"{HOME}if TYPE_CHECKING:\n    from ..tasks.registry import kind\n"),
        ("ds_moe/moe/layer.py", "from tools.bench import launched\n"),
        ("ds_moe/__init__.py", '"""config/ moe/ tasks/ training/ weights/ train.py"""\nfrom ds_moe.moe import Layer\n'),
        ("ds_moe/utils.py", ""),
    ],
    "imports form no circle": [
        ("ds_moe/moe/layer.py", "from ds_moe.moe import Layer\n"),
        ("ds_moe/config/run.py", f"{HOME}if TYPE_CHECKING:\n    from ds_moe.tasks.registry import kind\n"),
        ("ds_moe/moe/layer.py", "def late():\n    import ds_moe.moe.layer\n"),
    ],
    "a public class name exists once": [("ds_moe/weights/files.py", "class Layer: ...\n")],
    "tasks are told apart in the registry": [
        ("ds_moe/training/step.py", text)
        for text in (
            "def step(run): return run.config.task == 'rl'\n",
            "short = lambda c: c.task\n",
            "def step(case): return case.parts.config.task\n",
            "def step(settings: RunConfig | None): return settings.task\n",
            "def step(path):\n    what = load_run(path)\n    return f'{what.task}'\n",
            "def step(path): return load_run(path).task\n",
            "def step(config): return getattr(config, 'task', None)\n",
            "def step(it):\n    match it:\n        case RunConfig(task='rl'): return 1\n",
        )
    ],
    "only rules and commands ask which task it is": [
        ("ds_moe/training/step.py", "from ds_moe.config.run import other_task\n"),
        ("ds_moe/moe/layer.py", "from ds_moe.config import run\ndef f(config): return run.task_is(config, 'rl')\n"),
    ],
    "model types are known in families.py": [
        ("ds_moe/moe/layer.py", f"def of(config): return config.model_type == '{name}'\n")
        for name in ("qwen3_vl_moe", "deepseek_v3", "mixtral", "gpt_oss", "glm4_moe", "olmoe", "ernie4_5_moe")
    ],
    "the ZeRO section is read in config/deepspeed": [
        ("ds_moe/moe/layer.py", 'stage = settings["zero_optimization"]["stage"]\n'),
        ("ds_moe/moe/layer.py", "text = f\"{resolved['zero_optimization']}\"\n"),
    ],
    "objects are gathered in distributed.py": [
        ("ds_moe/moe/layer.py", "dist.all_gather_object(found, 1)\n"),
        ("ds_moe/moe/layer.py", "from torch.distributed import all_gather_object as gather\n"),
    ],
    "safetensors are opened in weights/": [
        ("ds_moe/moe/layer.py", "from safetensors import safe_open as opened\n"),
        ("ds_moe/moe/layer.py", "safetensors.safe_open('x')\n"),
    ],
    "every folder opens with its map": [
        ("ds_moe/moe/tape.py", ""),
        ("ds_moe/moe/backends/liger.py", ""),
        ("ds_moe/moe/__init__.py", '"""my_layer.py"""'),
        ("ds_moe/moe/__init__.py", "# layer.py\n"),
        ("ds_moe/export/__init__.py", '"""Nothing yet."""'),
    ],
    "no text names a path outside the package": [
        ("ds_moe/moe/layer.py", text)
        for text in (
            '"""docs/routers.md has the formulas."""',
            'def f():\n    """Made by `tools/make_rollouts.py`."""\n',
            "raise ValueError(f'{key}: choose ds_configs/zero3.json')\n",
            "FOLDER = ROOT / 'ds_configs'\n",
            "HELP = 'see README'\n",
            "HELP = 'start it by launch/local.sh'\n",
            "HELP = 'as `make gate-demo` does'\n",
        )
    ],
    "the root has few files": [(f"ds_moe/file{n}.py", "") for n in (0,)],
    "Any is rare": [("ds_moe/moe/layer.py", HOME + "def f(a: Any, b: dict[str, Any]) -> typing.Any: ...\n" * 41)],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_violation_is_found(rule):
    more = {f"ds_moe/{name}.py": "" for name in ("errors", "distributed", "launcher", "cli", "faults")}
    house = HOUSE | more if rule == "the root has few files" else HOUSE
    assert not RULES[rule](house)
    assert PLANTED[rule]
    for path, source in PLANTED[rule]:
        assert RULES[rule](house | {path: source}), f"{path} with {source!r} was not noticed"


def long_parts(sources: Sources) -> Iterator[str]:
    """What is longer than a reader likes."""
    for path, tree in trees(sources):
        lines = len(sources[path].splitlines())
        if lines > LONG_FILE:
            yield f"{path}: {lines} lines"
        for node in walked(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONG_FUNCTION:
                    yield f"{path}:{node.lineno} {node.name}: {length} lines"


def test_what_is_long_is_listed():
    long = {"ds_moe/a.py": "def f():\n" + "    pass\n" * 300, "ds_moe/b.py": "def f():\n" + "    pass\n" * 49}
    assert list(long_parts(long)) == ["ds_moe/a.py: 301 lines", "ds_moe/a.py:1 f: 301 lines"]


if __name__ == "__main__":
    print(*long_parts(read_sources()), sep="\n")
