"""Columns of a source that have other names than the keys of a record, and the label of its records."""

from collections.abc import Mapping


def renamed(record: object, columns: Mapping[str, str], label: str | None = None) -> object:
    """The record with each column under the key that is read, and with `label` as `kind` if it brings no other.

    Args:
        columns: key of a record -> column of the source. Where a record lacks the column, it keeps the key that it has.
    """
    if not isinstance(record, dict):
        return record
    if columns:
        taken = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        record = {key: value for key, value in record.items() if key not in columns.values()} | taken
    if label is not None and record.get("kind") is None:
        record = {**record, "kind": label}
    return record
