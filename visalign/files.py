"""Files that are whole, or as they were before: written beside their place, then moved into it."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of OSError: no room, no quota left, larger than a file may be


def write_whole(path: Path, content: str | bytes) -> None:
    """Put `content`, text as UTF-8, at `path`, which a kill at any moment leaves as it was or as it is to be."""

    def write(partial: Path) -> None:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)

    write_beside(path, write)


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, of what `write` puts at the path it is given. What it wrote is gone where it fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error, of a library too, says that there was no room."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"os error {code}" in str(error).lower() for code in FULL) or "no space left" in str(error).lower()
