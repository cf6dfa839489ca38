"""Files that are written whole or not at all, room on the disk, one run at a time."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .console import Exit, Failure


def write_file(path: Path, data: bytes) -> None:
    """Writes a file as a whole; OSError: the earlier file is as it was.

    The half-written file has a fixed name: what a killed run leaves, the next one replaces.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def claim(target: Path, folder: Path, room: int) -> Any:
    """Makes the folder that a run writes to, and lets no other run have the target meanwhile.

    Returns a context. The lock file stays behind: removing it would let two runs hold two locks
    of one name. Failure STORAGE, where not so many bytes can be written, or LOCKED.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.exists, (folder, target)):
            if not path.stat().st_mode & 0o222:  # root, too, is told
                raise PermissionError(0, f"{path.name} is write-protected")
        tempfile.TemporaryFile(dir=folder).close()
        if (free := shutil.disk_usage(folder).free) < room:
            raise OSError(0, f"{free / 1e6:.0f} MB are free, {room / 1e6:.0f} MB needed")
        return FileLock(target.with_name(f".{target.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        why = f"Another run works on {target.name} (it holds {error.lock_file}): wait or end it."
        raise Failure(Exit.LOCKED, why) from None
    except OSError as error:
        why = f"Cannot write {target.name} in {folder} ({error.strerror}): make room for it."
        raise Failure(Exit.STORAGE, why) from None
