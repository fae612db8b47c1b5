"""Files of rounds below the output folder: rollouts in the form of tasks/rl, and beside each file what is known of it.

<output_dir>/rollouts/
    round_000012.jsonl      the rollouts, complete: `data.train` of another run may be this file
    round_000012_images/    their images
    round_000012.json       `RoundFacts`, written last: without it the round is sampled anew
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ds_moe.checkpoint.files import STATE, sha256_of, step_folders, write_json
from ds_moe.checkpoint.room import no_room
from ds_moe.errors import UserError
from ds_moe.tasks.rl.write import images_of

ROLLOUTS = "rollouts"  # in a run's output folder


@dataclass(frozen=True)
class RoundFacts:
    """One round of rollouts.

    Attributes:
        run: identity of the run that sampled it.
        begin: position of its first prompt; `end` is the one at which the next round begins.
        version: of the weights that the engine was given before it, and `step` the optimizer steps these had taken.
        figures: what is reported of it, by name.
    """

    number: int
    run: str
    begin: int
    end: int
    version: str
    step: int
    records: int
    sha256: str
    figures: dict[str, float] = field(default_factory=dict)


def round_file(output_dir: str, number: int) -> Path:
    return Path(output_dir, ROLLOUTS, f"round_{number:06d}.jsonl")


def finish_round(file: Path, facts: RoundFacts) -> None:
    """Call it when `file` is complete."""
    partial = file.with_name(f".{file.stem}.json")
    write_json(partial, asdict(facts))
    os.replace(partial, file.with_suffix(".json"))


def forget_rounds(output_dir: str, first: int) -> None:
    """Make the round `first` and all later ones unfinished: a killed process sampled them by weights that followed from
    another `first` than the one that is sampled now. Their rollouts stay until others take their place."""
    for number, file in _files_of_rounds(output_dir, ".json"):
        if number >= first:
            file.unlink()


def no_room_for_round(output_dir: str) -> str | None:
    """Why one more round, if it is as large as the largest one that is there, has no room; None: it has."""
    sizes = []
    for _, file in _files_of_rounds(output_dir, ".jsonl"):
        with suppress(OSError, UserError):
            sizes.append(sum(one.stat().st_size for one in (file, *images_of(file).glob("*"))))
    problem = no_room(Path(output_dir, ROLLOUTS), max(sizes, default=0), "a round of rollouts")
    return problem and f"train.output_dir {problem} (rl.engine.keep_rounds removes older ones)"


def _files_of_rounds(output_dir: str, suffix: str) -> Iterator[tuple[int, Path]]:
    for file in Path(output_dir, ROLLOUTS).glob(f"round_*{suffix}"):
        if number := re.fullmatch(r"round_(\d{6,})", file.stem):
            yield int(number[1]), file


def _rounds_of_checkpoints(output_dir: str) -> tuple[set[int], float]:
    """(those in the middle of which a checkpoint is, the one from which on the newest goes on; infinity: none)."""
    inside, newest = set[int](), float("inf")
    for number, folder in enumerate(step_folders(Path(output_dir, "checkpoints"))):
        with suppress(OSError, ValueError, KeyError, TypeError):  # one that cannot be read needs no round
            place = json.loads((folder / STATE).read_text())["data"]
            if place["step"]:
                inside.add(place["round"])
            if number == 0:
                newest = place["round"]
    return inside, newest


def remove_rounds(output_dir: str, last: int) -> None:
    """Remove the files of all rounds up to the number `last` that no checkpoint needs; what cannot be removed stays."""
    inside, newest = _rounds_of_checkpoints(output_dir)
    for number, file in _files_of_rounds(output_dir, ".jsonl"):
        if number > last or number in inside or number >= newest:
            continue
        with suppress(OSError, UserError):
            file.with_suffix(".json").unlink(missing_ok=True)  # first: without it the round is none
            shutil.rmtree(images_of(file), ignore_errors=True)
            file.unlink()


def finished_round(file: Path) -> RoundFacts | None:
    """What is known of a round whose file is complete and unchanged; None: there is none."""
    try:
        saved = json.loads(file.with_suffix(".json").read_text())
        facts = RoundFacts(**{one.name: saved[one.name] for one in fields(RoundFacts)})
        return facts if sha256_of(file) == facts.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
