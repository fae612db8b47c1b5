"""From a run file, YAML plus dotted overrides, to a `RunConfig`; every mistake is one line that says where and what.

Runs start from `load_run`, which raises all complaints as one error; `parse_run` gives them as a list.
"""

from collections.abc import Sequence
from os.path import isfile
from pathlib import Path

import yaml
from pydantic import ValidationError

from ds_moe.config.check import problems, unused_keys
from ds_moe.config.complaints import Schema, descend, read_mapping
from ds_moe.config.deepspeed_json import SHIPPED, json_text
from ds_moe.config.habits import habit
from ds_moe.config.rollout import FUNCTION, RewardConfig, RewardFunction
from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.config.yaml_lines import Plain, compose_lines, join
from ds_moe.errors import UserError, all_in_one, shown

SCHEMA = Schema(RunConfig, "run file", habit)
ALL_KEYS = SCHEMA.keys


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config of a run file with `key=value` overrides, in which `deepspeed` is no path but of an existing JSON.

    Raises `UserError` with a line for each complaint, also about keys that the run would not use.
    """
    config, complaints = parse_run(path, overrides)
    if config is None or complaints:
        raise all_in_one(complaints)
    return config


def parse_run(path: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig | None, list[str]]:
    """(config, complaints): the config is None where the file could not be made into one."""
    file = str(path)
    try:
        data, origins = read_mapping(Path(path), SCHEMA)
        for override in overrides or []:
            _override(data, origins, override)
    except UserError as error:
        return None, [str(error)]
    for key in SCHEMA.sections:  # `train:` with nothing below it is an empty section
        parent, _, name = key.rpartition(".")
        holder = descend(data, parent)
        if key in SCHEMA.forms:
            continue
        if isinstance(holder, dict) and name in holder and holder[name] is None and key in origins:
            holder[name] = None if origins[key].startswith("override ") else {}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        return None, SCHEMA.complaints(error, origins, file)
    config.remember_origins(file, origins)
    complaints = problems(config)
    try:
        config.deepspeed = _find_json(config, Path(path))
    except UserError as error:
        complaints.append(str(error))
    if engine_of(config) is not None:
        complaints += _find_rewards(config, Path(path))
    return config, complaints


def dump(config: RunConfig) -> dict[str, Plain]:
    """The tree as plain data: every key this run uses, defaults filled in, without keys that are not set."""
    unused = unused_keys(config)

    def prune(section: dict[str, Plain], key: str) -> dict[str, Plain]:
        kept: dict[str, Plain] = {}
        for name, value in section.items():
            dotted = join(key, name)
            if dotted not in unused and value is not None:
                kept[name] = prune(value, dotted) if isinstance(value, dict) else value
            if dotted in SCHEMA.forms and isinstance(value, list):
                kept[name] = [prune(item, dotted) if isinstance(item, dict) else item for item in value]
        return kept

    return prune(config.model_dump(mode="json"), "")


def dump_yaml(config: RunConfig) -> str:
    """`dump` as the text of a run file."""
    return yaml.safe_dump(dump(config), sort_keys=False)


def write_run(config: RunConfig, folder: Path) -> None:
    """Write run.yaml and, beside it, deepspeed.json, so that the run is read there from any working directory."""
    (folder / "deepspeed.json").write_text(json_text(config))
    (folder / "run.yaml").write_text(dump_yaml(config.model_copy(update={"deepspeed": "deepspeed.json"})))


def _override(data: dict[str, Plain], origins: dict[str, str], override: str) -> None:
    """Set one `dotted.key=value` in `data`; the override becomes the origin of this key and of all below it."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override {override}: write it as dotted.key=value, e.g. train.lr=1e-4")
    try:
        value, _ = compose_lines(text, "value")
    except UserError as error:
        raise UserError(f"override {override}: {error}") from error
    holder: Plain = data
    for depth, name in enumerate(names):
        last, so_far = depth == len(names) - 1, ".".join(names[:depth])
        place: str | int = name
        if isinstance(holder, list):
            if not name.isdecimal() or int(name) >= len(holder):
                raise UserError(f"override {override}: {so_far} is a list of {len(holder)}; {name} is no index in it")
            place = int(name)
        elif not isinstance(holder, dict):
            raise UserError(f"override {override}: {so_far} is {shown(holder)}, not a section")
        elif not last and holder.get(name) is None:
            holder[name] = {}
            origins[".".join(names[: depth + 1])] = f"override {override}"
        if last:
            holder[place] = value
        holder = holder[place]
    dotted = ".".join(names)
    for below in [origin for origin in origins if origin.startswith(dotted + ".")]:
        del origins[below]
    origins[dotted] = f"override {override}"


def _find_rewards(config: RunConfig, run_file: Path) -> list[str]:
    """Give the files of reward functions as `_find_file` finds them; complaints about those that are nowhere."""
    complaints = []
    key, reward = "rl.reward.functions", config.rl.reward
    holders: Sequence[RewardConfig | RewardFunction] = reward.functions
    if not holders:
        key, holders = "rl.reward.function", [reward]
    for holder in holders:
        match = FUNCTION.fullmatch(holder.function)
        if match is None or match["file"] is None:
            continue
        if (path := _find_file(match["file"], run_file)) is not None:
            holder.function = f"{path}:{match['of_file']}"
        else:
            text = f"{shown(match['file'])} is neither a file beside the run file nor below the working directory"
            complaints.append(f"{config.at(key)}: {key}: {text} {Path.cwd()}")
    return complaints


def _find_file(given: str, run_file: Path) -> str | None:
    """The path of a file that is named relative to the folder of the run file, or else to the working directory.

    It is without "..", and relative to the working directory if it lies below that. None: there is no such file.
    """
    for folder in (run_file.parent, Path()):
        found = folder / given
        if isfile(found):  # which Path.is_file raises about where the name is too long for one
            found = found.resolve()
            return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)
    return None


def _find_json(config: RunConfig, run_file: Path) -> str | dict[str, object]:
    """`deepspeed` of a run file: a path relative to that file's folder, or else to the working directory, is found.

    It is given without "..", relative to the working directory if it lies below that. Names of shipped JSONs, and a
    section, stay as they are.
    """
    given = config.deepspeed
    if not isinstance(given, str) or given in SHIPPED:
        return given
    if (path := _find_file(given, run_file)) is not None:
        return f"./{path}" if path in SHIPPED else path
    text = f"deepspeed is {shown(given)}, which is neither a file beside the run file nor below the working directory"
    text, name = f"{config.at('deepspeed')}: {text} {Path.cwd()}", Path(given).stem
    if name in SHIPPED:
        text += f"; did you mean {name}, which ds_moe ships?"
    elif name == given:
        text += f", nor one of the names {', '.join(SHIPPED)}"
    raise UserError(text)
