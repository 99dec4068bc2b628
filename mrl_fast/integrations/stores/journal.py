"""Records on disk beside an index: lines of JSON, written before the index and dropped after it.

The index decides which rows there are. Lines of other rows, and lines that a killed process left
half-written, are skipped; no row's number is ever used again. So at every moment the file has the
records of the index that is on disk, whether that is the old one or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mrl_fast.search.disk import filesystem


class Journal:
    """A file of records. Whoever appends or rewrites has locked its folder; reading needs no lock.

    Args:
        file: Its path.
        kind: What the records are, in the first line.
    """

    def __init__(self, file: Path, kind: str):
        self.file, self.lines = file, 0
        self._header = line_of({"format": f"mrl_fast {kind}", "version": 1})
        self._left: tuple[int, int] | None = None  # inode and size as we left it

    @property
    def unchanged(self) -> bool:
        """Whether the file is as this object left it."""
        return self._left is not None and self._left == self._state()

    def read(self, rows: set[int]) -> dict[int, Any]:
        """The records of these rows.

        Raises:
            ValueError: Not such a file; a row that has no record.
        """
        found, self.lines, line = {}, 0, b"\n"
        with open(self.file, "rb") as lines:
            self._check(lines.readline())
            for line in lines:
                self.lines += 1
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                match entry:
                    case [int(row), record] if row in rows:
                        found[row] = record
            # As far as it was read: another process may append meanwhile.
            state = os.fstat(lines.fileno()).st_ino, lines.tell()
        if missing := rows - found.keys():
            raise ValueError(f"{self.file}: expected a record of row {min(missing)}, got none")
        self._left = state if line.endswith(b"\n") else None
        return found

    def append(self, lines: Iterable[bytes]) -> None:
        """Adds lines; on return they are on disk."""
        if self._state() is None:
            return self.rewrite(lines)
        with filesystem.synced(self.file, "r+b") as file:
            self._check(file.readline())
            file.seek(0, os.SEEK_END)
            if not self.unchanged:
                file.write(b"\n")  # ends what a killed process may have begun
            self._write(file, lines)
        self._left = self._state()

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replaces the whole file."""
        new = self.file.with_name(self.file.name + ".new")
        self.lines = 0
        with filesystem.synced(new, "wb") as file:
            file.write(self._header)
            self._write(file, lines)
        os.replace(new, self.file)
        filesystem.sync_folder(self.file.parent)
        self._left = self._state()

    def _write(self, file: Any, lines: Iterable[bytes]) -> None:
        for line in lines:
            file.write(line)
            self.lines += 1

    def _check(self, header: bytes) -> None:
        if header != self._header:
            expected, got = self._header[:-1].decode(), repr(header[:80])
            raise ValueError(f"{self.file}: expected {expected} in the first line, got {got}")

    def _state(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.file)
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size


def line_of(record: Any) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"
