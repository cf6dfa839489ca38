"""Files that are written whole or not at all, room on the disk, one run at a time."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .console import Exit, Failure, megabytes


def write_file(path: Path, data: bytes) -> None:
    """Writes a file as a whole and waits for the disk; OSError: the earlier file is as it was.

    The half-written file has a fixed name: what a killed run leaves, the next one replaces.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder of our own, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(folder: Path, needed: int, what: str) -> None:
    """Makes a folder if it is missing; Failure STORAGE where it cannot take so many bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.stat().st_mode & 0o222:  # holds for root too, who could write all the same
            raise PermissionError(0, "it is read-only")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"Cannot write {what} in {folder} ({error.strerror}): choose another place."
        raise Failure(Exit.STORAGE, why) from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        room = f"{megabytes(free)} free in {folder}, {megabytes(needed)} needed"
        raise Failure(Exit.STORAGE, f"Not enough disk space for {what}: {room}; make room.")


def lock(target: Path) -> Any:
    """One run at a time on a file or folder, until the end of a `with` or of the process.

    The lock file stays behind: removing it would let two runs hold two locks of one name.
    Raises Failure LOCKED where another run holds it.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        why = f"Another run works on {target.name} (it holds {path}): wait for it or end it."
        raise Failure(Exit.LOCKED, why) from None


def replace_together(pairs: list[tuple[Path, Path]]) -> None:
    """Renames each (new, old) pair into place; OSError: none could be, all old files are back."""
    kept = {old: old.with_name(f".{old.name}.old") for _, old in pairs}
    done: list[Path] = []
    try:
        for new, old in pairs:
            if old.is_file():
                shutil.copy2(old, kept[old])
                shutil.copymode(old, new)
            os.replace(new, old)
            done.append(old)
    except OSError:
        for old in done:
            os.replace(kept[old], old) if kept[old].is_file() else old.unlink()
        raise
    finally:
        for copy in kept.values():
            copy.unlink(missing_ok=True)
