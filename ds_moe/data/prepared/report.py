"""What prepared records are like, counted for people."""

import json
import statistics
from pathlib import Path

from ds_moe.data.fingerprint import Facts
from ds_moe.data.prepared.chunks import Chunk
from ds_moe.data.prepared.folder import Prepared
from ds_moe.data.record_kind import Records
from ds_moe.errors import UserError, one_line

REPORT = "report.json"
LIST_BAD = 100  # bad records that a report names


def write_report(folder: Path, found: Chunk, records: Records) -> None:
    (folder / REPORT).write_text(json.dumps(_report(found, records), indent=1), encoding="utf-8")


def read_report(prepared: Prepared) -> Facts:
    """What `prepare` has found. Raises `UserError` where the file is gone."""
    try:
        return json.loads((prepared.folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared.folder / REPORT} cannot be read ({one_line(error)}); remove its folder") from error


def _report(found: Chunk, records: Records) -> dict[str, object]:
    """Counts, tokens, images, bad records and special tokens, for people."""
    tokens = [size for size, _ in found.sizes if size]
    bad = [{"where": one.where, "reason": one.reason} for one in records.bad]
    bad += [{"where": records.where(index), "reason": why} for index, why in found.bad.items()]
    pixels = [width * height for width, height in found.images]
    return {
        "records": len(tokens),
        "bad": len(bad),
        "bad_records": bad[:LIST_BAD],
        "tokens": {**_spread(tokens), "sum": sum(tokens), "labelled": found.labelled},
        "images": {**_spread(pixels), "count": len(pixels), "records": found.with_images, **_extremes(found.images)},
        "videos": len(found.unstored),
        "patches": sum(patches for _, patches in found.sizes),
        "special_tokens": dict(found.special.most_common()),
    }


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"min": min(values), "median": statistics.median(values), "p90": tenths[8], "max": max(values)}


def _extremes(images: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Width and height of the smallest and the largest image."""
    if not images:
        return {}
    by_area = sorted(images, key=lambda size: size[0] * size[1])
    return {"smallest": list(by_area[0]), "largest": list(by_area[-1])}
