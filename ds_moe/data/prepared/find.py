"""The prepared records that a run's data match, or why there are none."""

import json

from ds_moe.config.run import RunConfig
from ds_moe.data.digits import SPLIT_KEYS, Split
from ds_moe.data.fingerprint import Fingerprint, difference, fingerprint
from ds_moe.data.prepared.folder import INDEX, Prepared, folder_of, open_prepared, prepared_in, read_index
from ds_moe.data.prepared.shards import Damaged
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records

MAKE = "ds-moe data prepare makes them"


def find_prepared(
    config: RunConfig, split: Split, records: Records, processor: Processor
) -> tuple[Prepared | None, str | None]:
    """(the prepared records of a run, None where there are none that match; a line about that for its summary)."""
    place, name = prepared_in(config), SPLIT_KEYS[split]
    try:
        there = [path for path in sorted(place.glob(f"{split}-*")) if (path / INDEX).is_file()]
    except OSError:
        there = []
    if not there:
        asked = config.data.prepared is not None
        return None, f"no prepared data of {name} in {place} ({MAKE})" if asked else None
    made_of = fingerprint(config, records, processor)
    folder = folder_of(config, split, made_of)
    try:
        if folder in there:
            found = open_prepared(folder, made_of)
            return found, f"prepared {name}: {found}"
    except Damaged as error:
        return None, f"prepared data are not used: {error} ({MAKE} anew)"
    others, damaged = list[Fingerprint](), list[str]()
    for other in there:
        try:
            others.append(read_index(other)["made_of"])
        except Damaged as error:
            damaged.append(str(error))
    if not others:
        return None, f"prepared data are not used: {damaged[0]} ({MAKE} anew)"
    closest = min(others, key=lambda other: sum(other.get(key) != value for key, value in made_of.items()))
    what = difference(closest, json.loads(json.dumps(made_of, default=str)))
    also = f"; {', '.join(damaged)}" if damaged else ""
    return None, f"prepared data in {place} are not used, they are of another {name}: {what}{also} ({MAKE})"


class Asides:
    """Says once that prepared records of a data file were encoded anew."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, False

    def say(self, why: str | None) -> None:
        if why is not None and not self._said:
            self._said = True
            print(f"{self._name}: prepared data are not used where they are not as they were: {why}", flush=True)
