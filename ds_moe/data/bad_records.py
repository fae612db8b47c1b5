"""Records that cannot be used: each ends the run, or becomes a line of a file in the output folder."""

import json
from pathlib import Path

from ds_moe.config.run import RunConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.records import stop_message
from ds_moe.errors import UserError

BAD_RECORDS = "bad_records.jsonl"


class BadRecordLog:
    """The bad records of a run so far, each listed once in the file BAD_RECORDS of its output folder.

    Under `data.on_bad_record: stop` nothing is listed and the first bad record is an error, which is raised, or with
    `raise_errors` False only kept as `error`.

    Args:
        lists: whether this rank writes what it finds: of ranks that load the same records one does.
    """

    def __init__(
        self, config: RunConfig, bad: list[BadRecord], rank: int, raise_errors: bool = True, lists: bool = True
    ):
        self._stop, self._raise_errors = config.data.on_bad_record == "stop", raise_errors
        self._file = Path(config.train.output_dir) / BAD_RECORDS
        self._lists = lists
        self._listed: set[str] = set()  # lines that any rank has written, as far as the file has been read
        self._read_to = 0
        self._known = set(bad)
        self.records = list(bad)
        self.error: str | None = None
        if rank == 0:  # every rank has found the same ones when it opened the files
            self._write(bad)

    def note(self, bad: list[BadRecord]) -> None:
        """Add what loading a step has found; a record is found again in every epoch. Under stop, raises `UserError`."""
        new = [record for record in dict.fromkeys(bad) if record not in self._known]
        if not new:
            return
        if self._stop:
            self.error = self.error or stop_message(new)
            if self._raise_errors:
                raise UserError(self.error)
            return
        self._known.update(new)
        self.records += new
        self._write(new)

    def _write(self, bad: list[BadRecord]) -> None:
        if not bad or not self._lists:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"where": record.where, "reason": record.reason}) for record in bad]
        with self._file.open("a+", encoding="utf-8") as stream:  # ranks append short lines, which do not mix
            stream.seek(self._read_to)
            self._listed.update(stream.read().splitlines())
            self._read_to = stream.tell()
            stream.writelines(f"{line}\n" for line in lines if line not in self._listed)
