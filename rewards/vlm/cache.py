"""A folder of answers by key, shared by any number of threads and processes."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


class DiskCache:
    """JSON values by hexadecimal key, one file each. It only grows: delete the folder, or old files in it, at will.

    A file is written beside its place and moved there, so readers see all of it or nothing; of two writers the later
    one stays, which is the same answer. A file that cannot be read as JSON counts as missing and is written anew.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"

    def get(self, key: str) -> Any | None:
        """The value put under `key`, or None."""
        try:
            return json.loads(self._path(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, value: Any) -> None:
        """Store a value that JSON can hold; infinities are kept."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(value, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
