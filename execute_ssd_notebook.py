#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.5",
#   "torchvision>=0.20",
#   "numpy>=1.26",
#   "pillow>=10.3",
#   "matplotlib>=3.7",
#   "opencv-python>=4.8",
#   "tqdm>=4.65",
#   "lxml>=5.0",
#   "ipykernel>=6.25",
#   "nbformat>=5.9",
#   "nbclient>=0.8",
#   "nbconvert>=7.8",
#   "torchmetrics>=1.3",
#   "faster-coco-eval>=1.6.3",
#   "onnx>=1.16",
#   "onnxruntime>=1.17",
#   "onnxscript>=0.1",
# ]
# ///
"""Run the notebook from beginning to end and publish the result, or say in one sentence why not.

Six steps: dependencies, dataset, weights, execute, validate, publish. The run works on a copy; the notebook itself
is replaced by one rename, and only after its result was validated. A failed run leaves it byte for byte as it was.

Exit codes
    0    done (or: --check found nothing wrong)
    1    an error in this script
    2    wrong use: an option, a parameter's name or a value's type
    3    a package is missing or too old
    4    the dataset is missing, broken or cannot be fetched
    5    the file given as weights is missing or is another network's
    6    a cell failed
    7    the kernel died or could not be started, also after the retries
    8    a cell ran into --timeout or --stall
    9    the result did not pass validation, or the notebook was edited during the run
    10   the notebook is missing, unreadable or empty
    11   not enough disk space, or a place that cannot be written
    12   another run works on the same notebook or checkpoints
    129, 130, 143   ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM

Tried on Linux. Windows and macOS have their own branches where the systems differ, but were not tried.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import copy
import difflib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pickletools
import platform
import queue
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["PROJECT", "Exit", "Failure", "Project", "check_notebook", "main"]

# ---------------------------------------------------------------------------------------------------------------------
# What is known of this project. Everything below this table works for any notebook of the same shape.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """Names, addresses and layouts of one project.

    The names of parameters are those of constants in the notebook's cell tagged ``parameters``; a step whose
    parameter the notebook does not have is left out. Environment variables are those that the notebook reads.
    """

    notebook: str = "ssd_bccd_detection.ipynb"
    runs: str = "runs"  # where runs with overrides go, relative to the notebook
    # packages: import name -> requirement; of these, the ones that the notebook imports are required
    packages: dict[str, str] = field(
        default_factory=lambda: {
            "torch": "torch>=2.5",
            "torchvision": "torchvision>=0.20",
            "numpy": "numpy>=1.26",
            "PIL": "pillow>=10.3",
            "matplotlib": "matplotlib>=3.7",
            "cv2": "opencv-python>=4.8",
            "tqdm": "tqdm>=4.65",
            "lxml": "lxml>=5.0",
            "torchmetrics": "torchmetrics>=1.3",
            "faster_coco_eval": "faster-coco-eval>=1.6.3",
            "onnx": "onnx>=1.16",
            "onnxruntime": "onnxruntime>=1.17",
            "onnxscript": "onnxscript>=0.1",
        }
    )
    # dataset
    dataset_parameter: str = "DATA_DIR"
    dataset_variable: str = "BCCD_DATASET"
    url_parameter: str = "DATASET_URL"
    url_variable: str = "BCCD_URL"
    dataset_name: str = "BCCD"
    dataset_root: str = "BCCD"  # the folder of the layout inside the dataset folder
    annotations: str = "Annotations/{}.xml"
    images: str = "JPEGImages/{}.jpg"
    splits: str = "ImageSets/Main/{}.txt"
    split_names: tuple[str, ...] = ("train", "val", "test")
    # weights
    weights_parameter: str = "VGG16_WEIGHTS"
    weights_variable: str = "VGG16_WEIGHTS"
    weights_url: str = "https://download.pytorch.org/models/vgg16_features-amdegroot-88682ab5.pth"
    weights_url_variable: str = "VGG16_WEIGHTS_URL"
    weights_megabytes: int = 554
    weights_name: str = "VGG-16 features"
    weights_keys: tuple[str, ...] = tuple(
        f"features.{n}.weight" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    )
    # training
    training_parameter: str = "TRAINING"
    training_variable: str = "SSD_TRAINING"
    finetune_parameter: str = "FINETUNE_FROM"
    run_variable: str = "SSD_RUN_ID"
    divisor_variable: str = "SSD_BATCH_DIVISOR"
    divisor_limit: int = 64
    memory_errors: tuple[str, ...] = ("MemoryError", "OutOfMemoryError")
    checkpoint_parameter: str = "CHECKPOINT_DIR"
    checkpoint_file: str = "best_model.pth"
    output_parameters: tuple[str, ...] = ("CHECKPOINT_DIR", "MY_RESULTS")  # folders that a run writes
    training_megabytes: int = 2000  # free space asked for where the run may train
    # own images
    images_parameter: str = "MY_IMAGES"
    results_parameter: str = "MY_RESULTS"
    images_tags: tuple[str, ...] = ("parameters", "define", "images")
    image_suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
    # demo: drawn data
    demo_module: str = "synthetic_bccd"
    demo_images: dict[str, int] = field(default_factory=lambda: {"train": 48, "val": 16, "test": 16})
    demo_parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "TRAINING": "fresh",
            "NUM_EPOCHS": 3,
            "FINETUNE_FROM": "checkpoints/best_model.pth",
            "DATA_NOTE": "Drawn smears: no result",
        }
    )


PROJECT = Project()

RUNNER_PACKAGES = {
    "nbformat": "nbformat>=5.9",
    "nbclient": "nbclient>=0.8",
    "nbconvert": "nbconvert>=7.8",
    "ipykernel": "ipykernel>=6.25",
}
COVERAGE = 90.0  # percent of the code cells that must have outputs
SIZE_LIMIT, SIZE_WARNING = 5_000_000, 2_000_000  # bytes of the notebook file
SAVE_SECONDS = 30.0  # a long cell is saved this often
FETCH_TRIES = 3
OUTPUT_LIMIT = 8_000_000  # characters of text in one cell: more than a whole page may have
ARCHIVE_LIMIT = 4_000_000_000  # bytes that an archive may unpack to
STAMP = "ssd_runner"  # key in the notebook's metadata
INJECTED = "injected-parameters"  # papermill's tag
METADATA = {  # as Jupyter writes it, without the version of one machine's Python
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}
INTERRUPT_SECONDS = 6.0  # a cell may take this long to end after an interrupt


class Exit(IntEnum):
    """Exit codes; the module's docstring says what each means."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    PACKAGES = 3
    DATASET = 4
    WEIGHTS = 5
    CELL = 6
    KERNEL = 7
    TIMEOUT = 8
    VALIDATION = 9
    NOTEBOOK = 10
    STORAGE = 11
    LOCKED = 12
    HANGUP = 129
    INTERRUPT = 130
    TERMINATE = 143


class Failure(Exception):
    """An end of the run: an exit code and one sentence that says what to do."""

    def __init__(self, code: Exit, sentence: str):
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# ---------------------------------------------------------------------------------------------------------------------
# Words and numbers
# ---------------------------------------------------------------------------------------------------------------------


def one_line(text: object, limit: int = 200) -> str:
    """The text on one line, at most `limit` characters."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def duration(seconds: float) -> str:
    """Seconds as ``8.1 s``, ``12 min 03 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(size: float) -> str:
    """Bytes in kB of 10**3 or MB of 10**6."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.2f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def plural(number: int, word: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{number} {word}" + ("" if number == 1 else "s")


class Console:
    """Says what happens: a bar with the last line of the running cell on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.stream = sys.stdout
        self.broken = False
        with contextlib.suppress(Exception):
            self.stream.reconfigure(errors="replace")
        with contextlib.suppress(Exception):
            sys.stderr.reconfigure(errors="replace")
        try:
            self.tty = self.stream.isatty() and not quiet and os.environ.get("TERM") != "dumb"
        except (AttributeError, ValueError, OSError):
            self.tty = False
        if self.tty and os.name == "nt":
            os.system("")  # switches the Windows console to ANSI sequences
        self.unicode = can_encode("✓✗█░", getattr(self.stream, "encoding", None))
        self.region: list[str] = []

    def _write(self, text: str) -> None:
        if self.broken:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the reader is gone (`| head`); the run is not
            self.broken = True
            with contextlib.suppress(Exception):
                sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def _clear(self) -> str:
        text = "\r\x1b[K" + "\x1b[A\x1b[K" * (len(self.region) - 1) if self.region else ""
        self.region = []
        return text

    def line(self, text: str = "") -> None:
        """One line that stays."""
        if not self.quiet:
            region = self.region
            self._write(self._clear() + text + "\n")
            if region:
                self.show(region)

    def show(self, lines: list[str]) -> None:
        """Lines at the bottom of a terminal, replaced by the next call."""
        if self.tty:
            width = max(20, shutil.get_terminal_size().columns - 1)
            lines = [" " * (len(text) - len(text.lstrip())) + one_line(text, width - 4) for text in lines]
            text = self._clear()
            self.region = lines
            self._write(text + "\n".join(lines))

    def clear(self) -> None:
        """Takes the bottom lines away."""
        if self.region:
            self._write(self._clear())

    def error(self, text: str) -> None:
        """One line on standard error, also under --quiet."""
        self.clear()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def bar(self, share: float, width: int = 24) -> str:
        """A bar of `width` characters."""
        full = round(max(0.0, min(1.0, share)) * width)
        return ("█" * full + "░" * (width - full)) if self.unicode else ("#" * full + "." * (width - full))


def can_encode(text: str, encoding: str | None) -> bool:
    """Whether a console of that encoding can show the text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Files, locks, processes
# ---------------------------------------------------------------------------------------------------------------------


def replace(source: Path, target: Path) -> None:
    """`os.replace`, repeated for a while where Windows holds the target open."""
    for attempt in range(5):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == 4:
                raise
            time.sleep(0.2 * 2**attempt)


def write_file(path: Path, data: bytes, durable: bool = False) -> None:
    """Writes a file as a whole or not at all.

    Args:
        path: the file, replaced if it exists.
        data: its new content.
        durable: wait until it is on the disk.

    Raises:
        OSError: it could not be written; the earlier file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if path.exists():
            with contextlib.suppress(OSError):
                shutil.copymode(path, temporary)
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable and os.name == "posix":
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder of our own, also read-only files as git leaves them."""

    def writable(function: Callable, name: str, _: object) -> None:
        os.chmod(name, stat.S_IRWXU)
        function(name)

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, **({"onexc": writable} if sys.version_info >= (3, 12) else {"onerror": writable}))
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_writable(folder: Path, what: str) -> None:
    """Makes sure that files can be made in a folder, which is made if missing.

    Raises:
        Failure: STORAGE, naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.stat().st_mode & 0o222:  # holds for root too, who could write all the same
            raise PermissionError("it is read-only")
        handle, name = tempfile.mkstemp(prefix=".write-test-", dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        reason = error.strerror or error
        raise Failure(
            Exit.STORAGE, f"Cannot write {what} in {folder} ({reason}): make it writable or choose another place."
        ) from None


def check_space(folder: Path, needed: int, what: str) -> None:
    """Makes sure that a disk has room.

    Raises:
        Failure: STORAGE, with the numbers.
    """
    folder = existing_parent(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Failure(
            Exit.STORAGE,
            f"Not enough disk space for {what}: {megabytes(free)} free in {folder}, {megabytes(needed)} needed; "
            "make room or choose another place.",
        )


def process_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    if os.name == "nt":
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return False
        code = ctypes.c_ulong()
        ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Lock:
    """One run at a time on a file or folder: ``NAME.lock`` beside it, held by the system's own file lock.

    The system frees it when the process ends, however it ends; the file's text only says who holds it.
    """

    def __init__(self, target: Path):
        self.path = target.with_name(target.name + ".lock")
        self.handle: int | None = None
        self.stale: dict[str, Any] | None = None

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            return owner if isinstance(owner, dict) else {}
        except (OSError, ValueError):
            return {}

    def _system_lock(self, handle: int) -> bool | None:
        """True: ours. False: somebody else's. None: this file system has no locks."""
        try:
            if os.name == "nt":
                import msvcrt

                os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which stays readable
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return None
        return True

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            Failure: LOCKED, saying who holds it; STORAGE, where the lock file cannot be written.
        """
        for _ in range(10):
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            except OSError as error:
                raise Failure(
                    Exit.STORAGE,
                    f"Cannot write the lock file {self.path} ({error.strerror}): make its folder writable.",
                ) from None
            owner = self._owner()
            got = self._system_lock(handle)
            foreign = owner.get("host") not in (None, socket.gethostname())
            alive = isinstance(owner.get("pid"), int) and (foreign or process_alive(owner["pid"]))
            if got is False or (got is None and alive):
                os.close(handle)
                who = f"process {owner.get('pid', '?')} on {owner.get('host', 'this machine')}"
                raise Failure(
                    Exit.LOCKED,
                    f"Another run works here: {who}, since {owner.get('since', 'an unknown time')}; wait for it or end "
                    f"it (lock file: {self.path.name}).",
                )
            with contextlib.suppress(OSError):
                if os.fstat(handle).st_ino != os.stat(self.path).st_ino:  # removed by its owner in between
                    os.close(handle)
                    continue
            self.handle = handle
            self.stale = owner or None
            note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):
                os.lseek(handle, 0, os.SEEK_SET)
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(note).encode())
            return
        raise Failure(Exit.LOCKED, f"The lock file {self.path} changes hands all the time; try again.")

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        if self.handle is None:
            return
        if os.name == "nt":
            os.close(self.handle)
            with contextlib.suppress(OSError):
                self.path.unlink()
        else:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.handle)
        self.handle = None


def run_process(command: list[str], limit: float, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Runs a program; it never outlives this call.

    Returns:
        Its exit code and the last part of what it printed. 127: there is no such program; 124: it took over `limit`.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=os.name == "posix",  # so that its own children end with it
        )
    except FileNotFoundError:
        return 127, f"{command[0]} is not installed"
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output.decode("utf-8", "replace")[-4000:].strip()
    except subprocess.TimeoutExpired:
        return 124, f"no end after {duration(limit)}"
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                if os.name == "posix":
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The notebook as a file
# ---------------------------------------------------------------------------------------------------------------------


def import_quickly() -> None:
    """Imports nbformat without a grammar that jsonschema compiles for two seconds and no notebook needs."""
    name = "rfc3987_syntax"
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails, which jsonschema expects
        try:
            import nbformat  # noqa: F401
        finally:
            del sys.modules[name]


def read_notebook(path: Path) -> tuple[Any, bytes]:
    """Reads a notebook.

    Returns:
        The notebook (nbformat, version 4) and the file's bytes.

    Raises:
        Failure: NOTEBOOK, where there is none or it is broken.
    """
    import nbformat

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Failure(
            Exit.NOTEBOOK, f"There is no notebook {path}: name one, or run in the project's folder."
        ) from None
    except IsADirectoryError:
        raise Failure(Exit.NOTEBOOK, f"{path} is a folder: name the notebook in it.") from None
    except OSError as error:
        raise Failure(Exit.NOTEBOOK, f"Cannot read {path}: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(Exit.NOTEBOOK, f"{path.name} is not UTF-8 text (byte {error.start}): restore it.") from None
    if re.search(r"^<<<<<<< ", text, re.M):
        raise Failure(Exit.NOTEBOOK, f"{path.name} holds conflict marks of a merge: resolve them first.")
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or "nbformat" not in document:
            raise ValueError("no nbformat version in it")
        notebook = nbformat.reads(text, as_version=4)
        if not isinstance(notebook.get("cells"), list):
            raise ValueError("no cells in it")
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds
        raise Failure(
            Exit.NOTEBOOK, f"{path.name} is not a valid notebook ({one_line(error, 120)}): restore it."
        ) from None
    return notebook, data


def tags(cell: Any) -> list[str]:
    """A cell's tags."""
    return list(cell.get("metadata", {}).get("tags", []))


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The code cells with their positions among all cells."""
    return [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def cell_titles(notebook: Any) -> list[str]:
    """For every cell the nearest heading ``## ...`` at or above it."""
    titles, title = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^##\s+(.+?)\s*#*\s*$", cell.source, re.M)
            title = re.sub(r"[*_`]", "", found[-1]) if found else title
        titles.append(title)
    return titles


def source_digest(notebook: Any) -> str:
    """SHA-256 over the sources of all code cells, in order."""
    sources = [cell.source.replace("\r\n", "\n") for _, cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=True).encode()).hexdigest()


def terminal_text(text: str) -> str:
    """What a terminal would show after carriage returns and backspaces."""
    if "\b" in text:
        old = None
        while old != text:
            old, text = text, re.sub("[^\n\b]\b", "", text)  # no raw text: \b is the backspace
    if "\r" not in text:
        return text
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            part_clean = re.sub(r"\x1b\[[0-9;]*K", "", part)
            shown = part_clean + shown[len(part_clean) :] if part == part_clean else part_clean
        lines.append(shown.rstrip() if "\r" in line else shown)
    return "\n".join(lines)


def clean_notebook(notebook: Any) -> Any:
    """A copy without what changes from run to run for nothing.

    Between two outputs of another kind the streams are joined by name, standard output first; carriage returns are
    resolved; widget state, execution times and transient keys dropped; kernelspec and language as this project keeps
    them.
    """
    result = copy.deepcopy(notebook)
    result.metadata.pop("widgets", None)
    result.metadata.pop("signature", None)
    result.metadata.update(copy.deepcopy(METADATA))
    for _, cell in code_cells(result):
        cell.metadata.pop("execution", None)
        outputs: list[Any] = []
        stretch: dict[str, Any] = {}  # streams since the last output of another kind
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name in stretch:
                    stretch[output.name]["text"] += output["text"]
                    continue
                stretch[output.name] = output
                last = outputs[-1] if outputs else None
                if output.name == "stdout" and last is not None and last.get("name") == "stderr":
                    outputs.insert(len(outputs) - 1, output)  # which of the two arrives first is chance
                    continue
            else:
                stretch = {}
                output.pop("transient", None)
            outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output["text"] = terminal_text(output["text"])
        cell["outputs"] = [o for o in outputs if o.output_type != "stream" or o["text"]]
    return result


def notebook_bytes(notebook: Any) -> bytes:
    """The file's bytes, the same on every system."""
    from nbformat.v4 import writes_json  # nbformat.writes would validate every copy

    text = writes_json(notebook)
    return (text if text.endswith("\n") else text + "\n").encode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """One line of the checklist."""

    name: str
    verdict: str  # "ok", "warning" or "failure"
    measured: str


MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(?:/home/[^\s/:]+|/root(?=/)|/Users/[^\s/:]+|/tmp/|/private/|/var/folders/|/mnt/[^\s/:]+/)"
    r"|\b[A-Za-z]:\\{1,2}Users\\|ipykernel_\d+"
)


def output_texts(output: Any) -> Iterator[str]:
    """All text in an output, without pictures."""
    if output.output_type == "stream":
        yield output.get("text", "")
    elif output.output_type == "error":
        yield f"{output.get('ename', '')}: {output.get('evalue', '')}"
        yield from output.get("traceback", [])
    else:
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/") or kind.endswith("json"):
                yield data if isinstance(data, str) else json.dumps(data)


def unrenderable(output: Any) -> str:
    """Why GitHub cannot show an output; empty if it can."""
    data = output.get("data", {})
    if not data or any(kind in data for kind in ("image/png", "image/jpeg", "image/gif")):
        return ""
    kinds = set(data)
    if any("widget-view" in kind for kind in kinds):
        return "a widget"
    if any("plotly" in kind or "vega" in kind or "bokeh" in kind for kind in kinds):
        return "an interactive chart"
    html = str(data.get("text/html", ""))
    if re.search(r"<script\b|<iframe\b", html, re.I) or "application/javascript" in kinds:
        return "a script"
    if "image/svg+xml" in kinds or re.search(r"<svg\b", html, re.I):
        return "an SVG picture without PNG"
    if "application/pdf" in kinds:
        return "a PDF"
    return ""


def check_notebook(
    notebook: Any, size: int, folders: tuple[str, ...] = (), draft: bool = False, paths: str = "failure"
) -> list[Check]:
    """The user's checklist and what a published page needs besides.

    Args:
        notebook: the notebook.
        size: bytes of its file.
        folders: folders of this machine that no output should name.
        draft: a page that stays on this machine: coverage and machine paths only warn.
        paths: verdict for an output that names a folder of this machine.

    Returns:
        One `Check` a line; the page passes if none has the verdict ``failure``.
    """
    cells = code_cells(notebook)
    numbers = {index: number for number, (index, _) in enumerate(cells, 1)}
    checks: list[Check] = []

    def names(found: list[int]) -> str:
        shown = ", ".join(str(numbers[index]) for index in found[:8])
        return f" (code cell {shown}{', ...' if len(found) > 8 else ''})"

    def add(name: str, good: bool, measured: str, otherwise: str = "failure") -> None:
        checks.append(Check(name, "ok" if good else otherwise, measured))

    busy = [(index, cell) for index, cell in cells if cell.source.strip() and "skip-execution" not in tags(cell)]
    idle = [index for index, cell in busy if cell.execution_count is None]
    add(
        "all code cells executed",
        bool(busy) and not idle,
        f"{len(busy) - len(idle)} of {len(busy)}{names(idle) if idle else ''}",
    )

    silent = [index for index, cell in cells if not cell.outputs]
    share = 100.0 * (len(cells) - len(silent)) / len(cells) if cells else 0.0
    measured = f"{len(cells) - len(silent)} of {len(cells)}, coverage {share:.1f}%{names(silent) if silent else ''}"
    add(
        f"outputs present in {COVERAGE:.0f}% of the code cells",
        share >= COVERAGE,
        measured,
        "warning" if draft else "failure",
    )

    failed = [
        index
        for index, cell in cells
        if any(o.output_type == "error" for o in cell.outputs) and "raises-exception" not in tags(cell)
    ]
    add("no errors", not failed, f"{plural(len(failed), 'error')}{names(failed) if failed else ''}")

    counts = [cell.execution_count for _, cell in busy]
    add(
        "executed in order",
        counts == list(range(1, len(busy) + 1)),
        f"1 to {len(busy)}"
        if counts == list(range(1, len(busy) + 1))
        else one_line("counts " + ", ".join(str(c) for c in counts), 80),
    )

    stamp = notebook.metadata.get(STAMP, {}).get("source_sha256")
    digest = source_digest(notebook)
    if not stamp:
        checks.append(Check("outputs belong to this code", "warning", "no digest: not stamped by this script"))
    else:
        add(
            "outputs belong to this code",
            stamp == digest,
            f"digest {digest[:12]}"
            if stamp == digest
            else f"digest {digest[:12]}, stamped {stamp[:12]}: the code was edited after the run, run it again",
        )

    verdict = "ok" if size <= SIZE_WARNING else "warning" if size <= SIZE_LIMIT else "failure"
    checks.append(
        Check(
            "file saved and small",
            verdict,
            f"{megabytes(size)} (over {SIZE_WARNING // 10**6} warns, over {SIZE_LIMIT // 10**6} fails)",
        )
    )

    problems = []
    widgets = notebook.metadata.get("widgets")
    if widgets is not None and not all("state" in value for value in widgets.values()):
        problems.append("widget metadata without state")
    for index, cell in cells:
        for output in cell.outputs:
            if reason := unrenderable(output):
                problems.append(f"{reason} in code cell {numbers[index]}")
    add("GitHub can show it", not problems, one_line("; ".join(problems), 120) or "nothing that it cannot")

    named, warned = [], []
    own = re.compile("|".join(rf"(?<![\w.:/]){re.escape(f)}(?![\w.-])" for f in folders)) if folders else None
    for index, cell in cells:
        for output in cell.outputs:
            for text in output_texts(output):
                found = MACHINE_PATH.search(text)
                found = found or (own.search(text) if own else None)
                hit = found.group(0) if found else ""
                if hit:
                    kind = warned if output.get("name") == "stderr" else named
                    kind.append(f"{hit!r} in code cell {numbers[index]}")
                    break
    if named:
        checks.append(Check("no paths of one machine", "warning" if draft else paths, one_line("; ".join(named), 160)))
    elif warned:
        checks.append(Check("no paths of one machine", "warning", one_line("; ".join(warned), 160) + " (in warnings)"))
    else:
        checks.append(Check("no paths of one machine", "ok", "none"))
    return checks


def print_checks(console: Console, checks: list[Check]) -> None:
    """The checklist with ticks."""
    signs = (
        {"ok": "✓", "warning": "!", "failure": "✗"}
        if console.unicode
        else {"ok": "[x]", "warning": "[!]", "failure": "[ ]"}
    )
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.line(f"  {signs[check.verdict]} {check.name:<{width}}  {check.measured}")


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------

UNKNOWN = object()


def literal(node: ast.expr) -> Any:
    """The value of a constant expression, UNKNOWN for any other."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)):
        left, right = literal(node.left), literal(node.right)
        if all(isinstance(v, (int, float)) for v in (left, right)):
            with contextlib.suppress(ZeroDivisionError, OverflowError):
                return {
                    ast.Add: lambda: left + right,
                    ast.Sub: lambda: left - right,
                    ast.Mult: lambda: left * right,
                    ast.Div: lambda: left / right,
                    ast.FloorDiv: lambda: left // right,
                }[type(node.op)]()
    return UNKNOWN


def notebook_parameters(notebook: Any) -> dict[str, Any]:
    """The constants of the cell tagged ``parameters``: name to value (UNKNOWN where it is no constant)."""
    found: dict[str, Any] = {}
    for _, cell in code_cells(notebook):
        if "parameters" not in tags(cell):
            continue
        with contextlib.suppress(SyntaxError):
            for statement in ast.parse(cell.source).body:
                if isinstance(statement, ast.Assign):
                    targets, value = statement.targets, statement.value
                elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                    targets, value = [statement.target], statement.value
                else:
                    continue
                for target in targets:
                    if isinstance(target, ast.Name):
                        found[target.id] = literal(value)
    return found


def type_name(value: Any) -> str:
    """The type of a value in words."""
    return {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a text",
        list: "a list",
        tuple: "a tuple",
    }.get(type(value), type(value).__name__)


def parse_value(name: str, text: str, default: Any) -> Any:
    """A value from the command line, of the type of the notebook's own.

    Args:
        name: the parameter's name, for the sentence.
        text: what was typed after ``NAME=``.
        default: the notebook's value.

    Raises:
        Failure: USAGE, where the type is another.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)

    def fits(value: Any, default: Any) -> tuple[bool, Any]:
        if default is UNKNOWN or default is None:
            return True, value
        if isinstance(default, bool):
            return isinstance(value, bool), value
        if isinstance(default, int):
            return isinstance(value, int) and not isinstance(value, bool), value
        if isinstance(default, float):
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            return good, float(value) if good else value
        if isinstance(default, str):
            return True, value if isinstance(value, str) and text.strip()[:1] in "'\"" else text
        if isinstance(default, (list, tuple)):
            if not isinstance(value, (list, tuple)):
                return False, value
            kinds = {type(item) for item in default}
            items = []
            for item in value:
                good, item = fits_item(item, default[0]) if len(kinds) == 1 else (True, item)
                if not good:
                    return False, value
                items.append(item)
            return True, type(default)(items)
        return isinstance(value, type(default)), value

    def fits_item(item: Any, default: Any) -> tuple[bool, Any]:
        return (isinstance(item, str), item) if isinstance(default, str) else fits(item, default)

    good, value = fits(value, default)
    if not good:
        raise Failure(Exit.USAGE, f"-p {name}: {text!r} is not {type_name(default)}, like the notebook's {default!r}.")
    return value


def parse_overrides(pairs: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, checked against the notebook's parameters.

    Raises:
        Failure: USAGE, for an unknown name or a wrong type.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        name = name.strip()
        if not sign or not name:
            raise Failure(Exit.USAGE, f"-p {pair!r}: write it as NAME=VALUE.")
        if name not in parameters:
            near = difflib.get_close_matches(name.upper(), parameters, n=1, cutoff=0.5)
            hint = f" did you mean {near[0]}?" if near else f" known are {', '.join(parameters) or 'none'}."
            raise Failure(Exit.USAGE, f"-p {name}: the notebook has no such parameter;{hint}")
        result[name] = parse_value(name, text, parameters[name])
    return result


def inject(notebook: Any, values: dict[str, Any]) -> None:
    """Puts a cell with the values after the parameters cell, in place of an earlier one."""
    import nbformat

    notebook.cells[:] = [cell for cell in notebook.cells if INJECTED not in tags(cell)]
    if not values:
        return
    source = "# Overrides of this run\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    source += "\nprint('Overrides of this run: " + ", ".join(values) + "')"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": [INJECTED]})
    cell["id"] = INJECTED
    position = max(index for index, cell_ in code_cells(notebook) if "parameters" in tags(cell_))
    notebook.cells.insert(position + 1, cell)


# ---------------------------------------------------------------------------------------------------------------------
# Step 1: dependencies
# ---------------------------------------------------------------------------------------------------------------------


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a release: ``2.1.0+cpu`` gives (2, 1, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text, maxsplit=1)[0]))


def requirement_problem(module: str, requirement: str) -> str:
    """What is wrong with an installed package; empty if nothing is."""
    name, _, minimum = requirement.partition(">=")
    try:
        if importlib.util.find_spec(module) is None:
            return f"{name} is missing"
    except (ImportError, ValueError):
        return f"{name} is missing"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""  # importable, but not installed as a package: nothing to compare
    if minimum and version_numbers(version) < version_numbers(minimum):
        return f"{name} {version} is older than {minimum}"
    return ""


def imported_modules(notebook: Any) -> tuple[set[str], set[str]]:
    """What code cells import: at their outer level (needed), and elsewhere, as in a function or `try` (optional)."""
    needed: set[str] = set()
    found: set[str] = set()
    for _, cell in code_cells(notebook):
        source = re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M)
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.parse(source)
            for node in ast.walk(tree):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                (needed if node in tree.body else found).update(name.split(".")[0] for name in names)
    return needed, found - needed


def missing_packages(requirements: dict[str, str]) -> dict[str, str]:
    """Of import name → requirement, those with a problem: requirement → problem."""
    importlib.invalidate_caches()
    problems = {need: requirement_problem(module, need) for module, need in requirements.items()}
    return {need: problem for need, problem in problems.items() if problem}


def pip_command(requirements: list[str]) -> list[str]:
    """The command that installs into this interpreter's environment."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable, *requirements]
    return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *requirements]


def ensure_packages(requirements: dict[str, str], install: bool, console: Console) -> None:
    """Makes sure that packages are there.

    Raises:
        Failure: PACKAGES, naming all of them and one command.
    """
    problems = missing_packages(requirements)
    if not problems:
        return
    needs = list(problems)
    what = "; ".join(problems.values())
    command = "python -m pip install " + " ".join(f'"{need}"' for need in needs)
    if not install:
        raise Failure(Exit.PACKAGES, f"{what}: run  {command}  or repeat with --install.")
    console.line(f"  {what}: installing")
    code, output = run_process(pip_command(needs), 3600)
    if code:
        reason = next((line for line in reversed(output.splitlines()) if "error" in line.lower()), output)
        raise Failure(Exit.PACKAGES, f"Installing failed ({one_line(reason, 160)}): install by hand with  {command}")
    problems = missing_packages(requirements)
    if problems:
        raise Failure(
            Exit.PACKAGES, f"Installed, but still {'; '.join(problems.values())}: run  {command}  in this environment."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def backoff(attempt: int) -> None:
    """Waits 1, 2, 4, ... seconds."""
    time.sleep(2.0**attempt)


def reason_of(error: BaseException) -> str:
    """A network error in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return one_line(error.reason, 100)
    return one_line(error or type(error).__name__, 100)


def download(url: str, target: Path, sha256: str, console: Console) -> None:
    """Downloads a file, resuming what an earlier try left in ``TARGET.part``.

    Args:
        url: http, https or file address.
        target: the file, made only when whole.
        sha256: first digits that the checksum must have; empty for none.
        console: shows the progress.

    Raises:
        OSError: not available, cut off at every try, or of another checksum.
    """
    part = target.with_name(target.name + ".part")
    shown = urllib.parse.urlsplit(url).hostname or "file"
    last: Exception | None = None
    for attempt in range(FETCH_TRIES):
        if attempt:
            console.line(f"  try {attempt + 1} of {FETCH_TRIES}: {reason_of(last or OSError())}")
            backoff(attempt - 1)
        try:
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"User-Agent": "execute_ssd_notebook"})
            if have:
                request.add_header("Range", f"bytes={have}-")
            try:
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing behind what we have: whole, or of another file
                    error.close()
                    total = int((error.headers.get("Content-Range") or "*/-1").rpartition("/")[2] or -1)
                    if total != have:
                        part.unlink(missing_ok=True)
                        raise OSError("the earlier part belongs to another file") from None
                    answer = None
                else:
                    if error.code in (401, 403, 404, 410):
                        raise FileNotFoundError(f"HTTP {error.code} {error.reason}") from None
                    raise
            if answer is not None:
                with answer:
                    resumed = getattr(answer, "status", 200) == 206
                    have = have if resumed else 0
                    length = answer.headers.get("Content-Length")
                    total = have + int(length) if length else 0
                    if resumed and have:
                        console.line(f"  resuming at {megabytes(have)}")
                    copy_stream(answer, part, have, total, shown, console)
            if sha256:
                digest = file_digest(part)
                if not digest.startswith(sha256.lower()):
                    part.unlink()
                    raise OSError(f"its checksum is {digest[:12]}, not {sha256}")
            replace(part, target)
            return
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES):
                raise
            last = error
    raise OSError(reason_of(last or OSError("unknown")))


def copy_stream(answer: Any, part: Path, have: int, total: int, shown: str, console: Console) -> None:
    """Appends an answer's bytes to a file, with progress; OSError if fewer come than were announced."""
    start = spoken = time.monotonic()
    first = have
    with open(part, "r+b" if have else "wb") as file:
        file.seek(have)
        file.truncate()
        while chunk := answer.read(1 << 18):
            file.write(chunk)
            have += len(chunk)
            now = time.monotonic()
            if now - spoken > (0.2 if console.tty else 10.0):
                spoken = now
                speed = (have - first) / max(now - start, 1e-6)
                left = f", left {duration((total - have) / speed)}" if total and speed else ""
                of = f" of {megabytes(total)}" if total else ""
                text = f"{megabytes(have)}{of} from {shown}, {speed / 1e6:.1f} MB/s{left}"
                if console.tty:
                    console.show([f"  {console.bar(have / total if total else 0)} {text}"])
                else:
                    console.line(f"  {text}")
    console.clear()
    if total and have < total:
        raise OSError(f"the connection ended at {megabytes(have)} of {megabytes(total)}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def safe_name(name: str) -> PurePosixPath:
    """A member's path inside an archive.

    Raises:
        ValueError: it points outside.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or any(":" in part or "\0" in part for part in path.parts):
        raise ValueError(f"{name!r} points outside of the archive")
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip or tar archive: plain files and folders inside `folder`, nothing else.

    Raises:
        ValueError: it is no archive, is damaged or encrypted, or a member is a link or points outside.
    """

    def copy_out(source: Any, path: PurePosixPath, left: int) -> int:
        target = folder.joinpath(*path.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            while chunk := source.read(1 << 20):
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"it unpacks to more than {megabytes(ARCHIVE_LIMIT)}")
                file.write(chunk)
        return left

    left = ARCHIVE_LIMIT
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                members = bundle.infolist()
                for member in members:
                    safe_name(member.filename)
                    if stat.S_ISLNK(member.external_attr >> 16):
                        raise ValueError(f"{member.filename!r} is a link")
                for member in members:
                    if not member.is_dir():
                        with bundle.open(member) as source:
                            left = copy_out(source, safe_name(member.filename), left)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as bundle:
                members = bundle.getmembers()
                for member in members:
                    safe_name(member.name)
                    if not (member.isfile() or member.isdir()):
                        raise ValueError(f"{member.name!r} is a link or a device")
                for member in members:
                    if member.isfile():
                        source = bundle.extractfile(member)
                        assert source is not None
                        left = copy_out(source, safe_name(member.name), left)
        else:
            raise ValueError("it is neither a zip nor a tar archive")
    except FileExistsError as error:
        raise ValueError(f"two members are called {Path(error.filename).name!r}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"it is damaged or encrypted ({one_line(error, 80)})") from None
    except OSError as error:
        if type(error).__name__ in ("BadGzipFile", "LZMAError"):
            raise ValueError("it is damaged") from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Step 2: dataset
# ---------------------------------------------------------------------------------------------------------------------


def dataset_summary(folder: Path, project: Project) -> str:
    """Checks a dataset folder's layout: splits, pairs of image and annotation, files that are whole.

    Returns:
        Its numbers in words.

    Raises:
        ValueError: what is wrong, naming the file.
    """
    root = folder / project.dataset_root
    if not root.is_dir():
        raise ValueError(f"no folder {project.dataset_root} in it")
    seen: dict[str, str] = {}
    counts = []
    problems = []
    for split in project.split_names:
        name = project.splits.format(split)
        try:
            ids = (root / name).read_text(encoding="utf-8-sig").split()
        except FileNotFoundError:
            raise ValueError(f"no file {project.dataset_root}/{name}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{project.dataset_root}/{name} is not a text file") from None
        if not ids:
            raise ValueError(f"the split {project.dataset_root}/{name} is empty")
        counts.append(f"{split} {len(ids)}")
        for item in ids:
            if item in seen:
                problems.append(f"{item} is in {seen[item]} and in {split}")
            seen[item] = split
            image, annotation = root / project.images.format(item), root / project.annotations.format(item)
            for path in (image, annotation):
                try:
                    with open(path, "rb") as file:
                        head = file.read(2)
                        file.seek(max(0, path.stat().st_size - 64))
                        tail = file.read().rstrip()
                except OSError as error:
                    problems.append(
                        f"{path.relative_to(folder).as_posix()}: {(error.strerror or 'unreadable').lower()}"
                    )
                    continue
                whole = head == b"\xff\xd8" if path is image else tail.endswith(b">")
                if not whole:
                    kind = "JPEG image" if path is image else "XML file"
                    problems.append(f"{path.relative_to(folder).as_posix()} is no whole {kind}")
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise ValueError("; ".join(problems[:2]) + more)
    return f"{len(seen)} images with annotations ({', '.join(counts)})"


def find_dataset(folder: Path, project: Project) -> Path | None:
    """The folder that holds the layout: `folder` or one up to two levels below it."""
    for depth in ("", "*", "*/*"):
        for path in [folder] if not depth else sorted(folder.glob(depth)):
            if (path / project.dataset_root / project.splits.format(project.split_names[0])).is_file():
                return path
    return None


def is_our_clone(folder: Path, urls: set[str]) -> bool:
    """Whether a folder is nothing but an unfinished or broken clone of the dataset, or empty."""
    try:
        entries = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    if not entries:
        return True
    config = folder / ".git" / "config"
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    remotes = {
        url.strip().removesuffix("/").removesuffix(".git") for url in re.findall(r"^\s*url\s*=\s*(.+)$", text, re.M)
    }
    if not remotes & {url.removesuffix("/").removesuffix(".git") for url in urls}:
        return False
    if entries == {".git"}:
        return True
    code, output = run_process(["git", "-C", str(folder), "status", "--porcelain", "--ignored"], 60)
    # only files that are missing against the commit: nothing that somebody made or changed
    return code == 0 and all(line.lstrip().startswith("D") for line in output.splitlines() if line.strip())


def is_archive(url: str) -> bool:
    """Whether an address names a zip or tar file."""
    return bool(re.search(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", urllib.parse.urlsplit(url).path, re.I))


def fetch_dataset(url: str, target: Path, project: Project, console: Console) -> str:
    """Clones or unpacks a dataset into a temporary folder, checks it and renames it.

    Returns:
        The numbers of `dataset_summary`.

    Raises:
        Failure: DATASET or STORAGE.
    """
    check_writable(target.parent, "the dataset")
    for left in target.parent.glob(f".{target.name}.fetch-*"):  # of a run that was killed
        number = left.name.rpartition("-")[2]
        if number.isdigit() and not process_alive(int(number)):
            remove(left)
    temporary = target.with_name(f".{target.name}.fetch-{os.getpid()}")
    name = project.dataset_name
    other = f"name a copy by --dataset or another address by --dataset-url (also {project.url_variable})"
    try:
        remove(temporary)
        temporary.mkdir()
        archive = is_archive(url)
        if not archive and shutil.which("git") is None:
            if "github.com/" not in url:
                raise Failure(
                    Exit.DATASET, f"git is not installed, so {name} cannot be cloned: install it, or {other}."
                )
            url, archive = url.removesuffix("/").removesuffix(".git") + "/archive/HEAD.zip", True
            console.line("  git is not installed: taking the archive")
        if archive:
            local = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path) if "://" in url else url)
            file = temporary / "archive"
            if "://" not in url or url.startswith("file://"):
                if not local.is_file():
                    raise Failure(Exit.DATASET, f"There is no archive {local}: {other}.")
                file = local
            else:
                try:
                    download(url, file, "", console)
                except OSError as error:
                    raise Failure(Exit.DATASET, f"Cannot download {name} ({reason_of(error)}): {other}.") from None
            folder = temporary / "content"
            folder.mkdir()
            try:
                unpack(file, folder)
            except ValueError as error:
                raise Failure(Exit.DATASET, f"The archive of {name} is refused: {error}; {other}.") from None
        else:
            folder = temporary / "content"
            clone(url, folder, name, other, console)
        found = find_dataset(folder, project)
        try:
            summary = dataset_summary(found or folder, project)
        except ValueError as error:
            raise Failure(Exit.DATASET, f"What was fetched is not {name} ({error}): {other}.") from None
        os.replace(found or folder, target)
        return summary
    except OSError as error:
        raise Failure(
            Exit.STORAGE, f"Cannot store {name} in {target.parent} ({error.strerror or error}): make room or {other}."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def clone(url: str, folder: Path, name: str, other: str, console: Console) -> None:
    """A shallow clone with retries.

    Raises:
        Failure: DATASET, with git's reason.
    """
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "LC_ALL": "C"}
    slow = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60"]
    reason = ""
    for attempt in range(FETCH_TRIES):
        if attempt:
            console.line(f"  try {attempt + 1} of {FETCH_TRIES}: {reason}")
            backoff(attempt - 1)
        remove(folder)
        code, output = run_process(
            ["git", *slow, "clone", "--quiet", "--depth", "1", "--", url, str(folder)], 1800, env
        )
        if code == 0:
            return
        lines = [line for line in output.splitlines() if re.match(r"fatal|error", line)] or output.splitlines()
        reason = one_line(lines[-1] if lines else f"git ended with {code}", 140)
    raise Failure(Exit.DATASET, f"Cannot clone {name} after {FETCH_TRIES} tries ({reason}): {other}.")


# ---------------------------------------------------------------------------------------------------------------------
# Step 3: weights
# ---------------------------------------------------------------------------------------------------------------------


def weight_names(path: Path) -> set[str]:
    """Names of the tensors in a file of `torch.save`, read without running anything in it.

    Raises:
        ValueError: it is no such file.
    """
    names: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as bundle:
                member = next((n for n in bundle.namelist() if n.endswith("data.pkl")), None)
                if member is None:
                    raise ValueError("a zip file without weights")
                with bundle.open(member) as file:
                    content = file.read(1 << 26)
                    names.update(arg for _, arg, _ in pickletools.genops(content) if isinstance(arg, str))
        else:
            with open(path, "rb") as file:
                if file.read(1) != b"\x80":
                    raise ValueError("not a file of torch.save")
                file.seek(0)
                for _ in range(4):  # magic number, protocol, system, content
                    names.update(arg for _, arg, _ in pickletools.genops(file) if isinstance(arg, str))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"damaged ({one_line(error, 60)})") from None
    except Exception as error:  # the reader of pickles raises many kinds
        if not names:
            raise ValueError(one_line(error, 80)) from None
    return names


def check_weights(path: Path, project: Project) -> None:
    """Makes sure that a file holds the weights.

    Raises:
        ValueError: why it does not.
    """
    names = weight_names(path)
    missing = [key for key in project.weights_keys if key not in names]
    if missing:
        raise ValueError(
            f"it has no {missing[0]}" + (f" and lacks {len(missing) - 1} more" if len(missing) > 1 else "")
        )


def hub_folder() -> Path:
    """`torch.hub.get_dir()` and its folder of files, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"


def accelerator() -> bool:
    """Whether a GPU that the notebook would train on is likely to be here."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", None) == "":
        return False
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None


def fetch_weights(project: Project, console: Console) -> str:
    """Torchvision's own file, downloaded into torch's cache where the notebook finds it.

    Returns:
        What was done, in words.

    Raises:
        OSError: it cannot be had.
    """
    url = os.environ.get(project.weights_url_variable) or project.weights_url
    name = PurePosixPath(urllib.parse.urlsplit(url).path).name
    match = re.search(r"-([0-9a-f]{8,64})\.", name)
    prefix = match.group(1) if match else ""
    target = hub_folder() / name
    if target.is_file():
        if not prefix or file_digest(target).startswith(prefix):
            return f"{name} is in torch's cache"
        console.line(f"  {name} in torch's cache is damaged: fetching it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < project.weights_megabytes * 1e6 and url == project.weights_url:
        raise OSError(f"{megabytes(free)} free in torch's cache, {project.weights_megabytes} MB needed")
    console.line(f"  fetching {name}")
    download(url, target, prefix, console)
    return f"{name} fetched into torch's cache, {megabytes(target.stat().st_size)}"


# ---------------------------------------------------------------------------------------------------------------------
# Step 4: execute
# ---------------------------------------------------------------------------------------------------------------------


class KernelDied(Exception):
    """The kernel ended by itself; `memory`: it looks like the system's memory guard."""

    def __init__(self, cell: int | None, code: int | None, memory: bool = False, reason: str = ""):
        super().__init__(reason)
        self.cell, self.code, self.memory, self.reason = cell, code, memory, reason


def foreign_kernel(notebook: Any) -> str:
    """Says which other interpreter the notebook's kernelspec would have started; empty if none."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    name = notebook.metadata.get("kernelspec", {}).get("name") or "python3"
    try:
        spec = KernelSpecManager().get_kernel_spec(name)
    except NoSuchKernel:
        return f"no kernel {name!r} is installed" if name != "python3" else ""
    except Exception:
        return f"the kernel {name!r} is broken"
    program = spec.argv[0] if spec.argv else "nothing"
    if os.path.basename(program) == program:  # jupyter itself puts its own interpreter in the place of `python`
        return "" if re.fullmatch(r"python[\d.]*(\.exe)?", program) else f"the kernel {name!r} belongs to {program}"
    same = os.path.normcase(os.path.abspath(program)) == os.path.normcase(os.path.abspath(sys.executable))
    return "" if same else f"the kernel {name!r} belongs to {program}"


def memory_guard_kills() -> int | None:
    """How many processes the system's memory guard has killed since it started; None where it keeps no such count."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


class Execution:
    """One run of the notebook in one kernel, with everything that is watched meanwhile."""

    def __init__(self, plan: Plan, notebook: Any, console: Console, timings: dict[str, float]):
        self.plan, self.notebook, self.console = plan, notebook, console
        self.titles = cell_titles(notebook)
        self.cells = [index for index, cell in code_cells(notebook) if cell.source.strip()]
        self.numbers = {index: number for number, index in enumerate(self.cells, 1)}
        self.timings = timings
        self.keys = {index: cell_key(notebook.cells[index]) for index in self.cells}
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, int] = {}
        self.started = time.monotonic()
        self.current: int | None = None
        self.cell_started = self.saved = self.activity = 0.0
        self.pending = ""  # unfinished line of the running cell
        self.last_line = ""
        self.spoken = 0.0
        self.fault: Failure | None = None
        self.fault_since = 0.0
        self.unsaved = ""
        self.km: Any = None
        self.process: Any = None
        self.group: int | None = None
        self.ticker: asyncio.Task | None = None
        self.interrupting: asyncio.Task | None = None
        self.characters = 0
        self.log = Path()
        self.guard_kills = memory_guard_kills()

    # -- what the executor calls

    def cell_begins(self, cell: Any, cell_index: int) -> None:
        """Hook: a code cell is about to be sent to the kernel."""
        if self.fault:  # the cell before survived the interrupt
            raise self.fault
        self.current = cell_index
        self.cell_started = self.activity = time.monotonic()
        self.pending = self.last_line = ""
        self.characters = 0
        if self.ticker is None or self.ticker.done():
            self.ticker = asyncio.ensure_future(self.watch())
        self.draw()

    def cell_ended(self, cell: Any, cell_index: int, execute_reply: Any) -> None:
        """Hook: a code cell has its reply and all its outputs."""
        now = time.monotonic()
        self.seconds[cell_index] = now - self.cell_started
        self.measure()
        self.save()
        if self.pending and not self.console.tty and now - self.cell_started > 3:
            self.console.line("    " + one_line(self.pending, 160))
        quick = "define" in tags(cell) and self.seconds[cell_index] < 1  # definitions: nothing to tell
        if not self.console.tty and not quick:
            number = self.numbers[cell_index]
            outputs = plural(count_outputs(cell), "output")
            self.console.line(
                f"  [{number}/{len(self.cells)}] {self.titles[cell_index] or 'cell'}: "
                f"{duration(self.seconds[cell_index])}, {outputs}"
            )

    def message(self, msg: dict[str, Any]) -> None:
        """Every message of the running cell, as it comes."""
        kind = msg["msg_type"]
        if kind in ("stream", "display_data", "update_display_data", "execute_result", "error", "clear_output"):
            self.activity = time.monotonic()
        if kind == "stream":
            text = msg["content"]["text"]
            self.characters += len(text)
            if self.characters > OUTPUT_LIMIT and self.fault is None:
                self.set_fault(
                    Failure(Exit.CELL, f"{self.where()} printed over {megabytes(OUTPUT_LIMIT)}: make it print less.")
                )
            if self.characters > OUTPUT_LIMIT:  # what is over is not kept
                msg["content"]["text"] = text[: max(0, len(text) - (self.characters - OUTPUT_LIMIT))]
                return
            *lines, self.pending = (self.pending + text[-100_000:]).split("\n")
            self.pending = self.pending[-10_000:]
            for line in lines:
                line = terminal_text(line).rstrip()
                if line:
                    self.last_line = line
                    if not self.console.tty and self.activity - self.cell_started > 3:
                        self.console.line("    " + one_line(line, 160))
            if shown := terminal_text(self.pending).strip():
                self.last_line = shown

    # -- what runs beside a cell

    async def watch(self) -> None:
        """Once a second: memory, the bar, the copy on disk, the time limits."""
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            if self.current is None:
                continue
            self.measure()
            self.draw()
            if now - self.saved > SAVE_SECONDS:
                self.save()
            plan = self.plan
            if self.fault is None:
                if plan.timeout and now - self.cell_started > plan.timeout:
                    self.set_fault(
                        Failure(
                            Exit.TIMEOUT,
                            f"{self.where()} ran longer than --timeout {plan.timeout:g} s: give it more time, "
                            "or look at what it printed.",
                        )
                    )
                elif plan.stall and now - self.activity > plan.stall:
                    self.set_fault(
                        Failure(
                            Exit.TIMEOUT,
                            f"{self.where()} printed nothing for --stall {plan.stall:g} s: give it more time, "
                            "or look at what it printed last.",
                        )
                    )
            elif now - self.fault_since > INTERRUPT_SECONDS:
                self.kill_group()

    def set_fault(self, fault: Failure) -> None:
        """Ends the running cell by an interrupt; the reason is kept."""
        self.fault, self.fault_since = fault, time.monotonic()
        self.interrupting = asyncio.ensure_future(self.interrupt())  # kept: a task nobody holds may be collected

    async def interrupt(self) -> None:
        """Ctrl-C inside the kernel."""
        with contextlib.suppress(Exception):
            await self.km.interrupt_kernel()

    def measure(self) -> None:
        """Memory of the kernel and its children, highest value per cell."""
        if self.process is None or self.current is None:
            return
        with contextlib.suppress(Exception):
            size = self.process.memory_info().rss
            if time.monotonic() - self.cell_started > 1:
                size += sum(child.memory_info().rss for child in self.process.children(recursive=True))
            self.peaks[self.current] = max(size, self.peaks.get(self.current, 0))

    def where(self, index: int | None = None) -> str:
        """``Cell 7 of 40 (3. Dataset)``."""
        index = self.current if index is None else index
        if index is None:
            return "The kernel"
        title = f" ({self.titles[index]})" if self.titles[index] else ""
        return f"Cell {self.numbers[index]} of {len(self.cells)}{title}"

    def remaining(self) -> str:
        """Time left, by the last run's seconds; a question mark where that is unknown."""
        if self.current is None:
            return "?"
        left = 0.0
        for index in self.cells[self.numbers[self.current] - 1 :]:
            expected = self.timings.get(self.keys[index])
            if expected is None:
                return "?"
            if index == self.current:
                expected = max(0.0, expected - (time.monotonic() - self.cell_started))
            left += expected
        return duration(left)

    def draw(self) -> None:
        """The bar on a terminal; elsewhere a sign of life every two minutes of silence."""
        now = time.monotonic()
        index = self.current
        if index is None:
            return
        number = self.numbers[index]
        elapsed = duration(now - self.started)
        if self.console.tty:
            if now - self.spoken > 0.2:
                self.spoken = now
                bar = self.console.bar((number - 1) / len(self.cells))
                head = f"{bar} {number}/{len(self.cells)} {self.titles[index]}"
                self.console.show([f"{head} | {elapsed}, left {self.remaining()}", "  " + (self.last_line or "...")])
        elif now - max(self.spoken, self.activity, self.cell_started) > 120:
            self.spoken = now
            self.console.line(
                f"  [{number}/{len(self.cells)}] {self.titles[index]}: running for {duration(now - self.cell_started)}"
            )

    def save(self) -> None:
        """The working copy on disk; a full disk is said once and survived."""
        self.saved = time.monotonic()
        try:
            write_file(self.plan.partial, notebook_bytes(clean_notebook(self.notebook)))
            self.unsaved = ""
        except OSError as error:
            if not self.unsaved:
                self.console.line(f"  warning: the working copy cannot be saved ({error.strerror or error}); going on")
            self.unsaved = str(error.strerror or error)

    # -- the kernel

    def run(self, env: dict[str, str]) -> None:
        """Executes all cells of the notebook, in place.

        Args:
            env: the kernel's environment.

        Raises:
            Failure: a cell failed, hung or printed without end.
            KernelDied: the kernel did.
            Interrupted: by a signal.
        """
        from jupyter_core.utils import run_sync
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        folder = tempfile.mkdtemp(prefix="notebook-run-")
        self.log = Path(folder) / "kernel.log"
        client = None
        try:
            self.km = make_kernel_manager(Path(folder))
            client = make_executor(self)
            env = {**env, "IPYTHONDIR": os.path.join(folder, "ipython")}
            try:
                run_sync(self.start)(env)
                client.preprocess(self.notebook, {"metadata": {"path": str(self.plan.folder)}}, km=self.km)
            except DeadKernelError:
                raise self.died() from None
            except queue.Empty:
                raise self.died("it does not answer") from None
            except (CellExecutionError, CellTimeoutError) as error:
                if self.fault:
                    raise self.fault from None
                raise self.cell_failure(error) from None
            except (RuntimeError, OSError) as error:
                if self.fault:
                    raise self.fault from None
                if self.current is None or not run_sync(self.alive)():
                    raise self.died(one_line(error, 120)) from None
                raise
            if self.fault:
                raise self.fault
            self.current = None
        except KeyboardInterrupt:
            with contextlib.suppress(BaseException):
                run_sync(self.end_cell)()
            raise
        finally:
            self.console.clear()
            with contextlib.suppress(BaseException):
                run_sync(self.shut_down)(client)
            self.kill_group()
            self.save()
            shutil.rmtree(folder, ignore_errors=True)

    async def alive(self) -> bool:
        """Whether the kernel's process runs."""
        return bool(await self.km.is_alive())

    async def start(self, env: dict[str, str]) -> None:
        """Starts the kernel's process."""
        with open(self.log, "wb") as log:  # the crash report of a dying kernel, and its start-up warnings
            await self.km.start_kernel(
                extra_arguments=["--HistoryManager.hist_file=:memory:"],
                cwd=str(self.plan.folder),
                env=env,
                stdout=log,
                stderr=log,
            )
        provisioner = self.km.provisioner
        pid = getattr(provisioner, "pid", None)
        self.group = getattr(provisioner, "pgid", None)
        with contextlib.suppress(Exception):
            import psutil

            self.process = psutil.Process(pid)

    async def kernel_is_ours(self, kc: Any) -> None:
        """Makes sure that the kernel is this very interpreter; warnings then name files, not folders.

        Raises:
            Failure: KERNEL, naming the other interpreter.
        """
        code = (
            "import warnings as _w, os as _o\n"
            "_w.formatwarning = lambda message, category, filename, lineno, line=None: "
            "f'{__import__(\"os\").path.basename(filename)}:{lineno}: {category.__name__}: {message}\\n'\n"
            "del _w, _o"
        )
        ask = "[__import__('sys').executable, __import__('sys').prefix]"
        msg_id = kc.execute(code, silent=True, store_history=False, user_expressions={"where": ask})
        while True:
            reply = await kc.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == msg_id:
                break
        answer = reply["content"].get("user_expressions", {}).get("where", {})
        text = answer.get("data", {}).get("text/plain", "[]")
        if ast.literal_eval(text) != [sys.executable, sys.prefix]:
            raise Failure(
                Exit.KERNEL,
                f"The kernel runs in another Python ({one_line(text, 120)}) than this one: check ipykernel.",
            )

    def died(self, reason: str = "") -> BaseException:
        """The fault that ended the kernel: ours, or its own."""
        if self.fault:
            return self.fault
        code = None
        with contextlib.suppress(Exception):
            code = self.km.provisioner.process.poll()
        killed = code is not None and os.name == "posix" and code == -getattr(signal, "SIGKILL", 9)
        if not reason:
            with contextlib.suppress(OSError):
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                fatal = [line for line in lines if re.search(r"error|fatal|abort|exception", line, re.I)]
                reason = one_line(fatal[-1], 120) if fatal else ""
        # where the system counts the kills of its memory guard, a SIGKILL without one came from somebody else
        kills = memory_guard_kills()
        memory = killed and (kills is None or kills != self.guard_kills)
        return KernelDied(self.current, code, memory, reason)

    def cell_failure(self, error: Any) -> BaseException:
        """The failure of a cell, or a memory fault that a smaller batch may cure."""
        name = getattr(error, "ename", "") or type(error).__name__
        value = one_line(getattr(error, "evalue", "") or error, 200)
        if name in self.plan.project.memory_errors:
            return KernelDied(self.current, None, True, f"{name}: {value}")
        return Failure(Exit.CELL, f"{self.where()} failed with {name}: {value}".rstrip(" :.") + ".")

    async def end_cell(self) -> None:
        """After a signal: interrupts the cell and waits for what it still prints."""
        await self.interrupt()
        end = time.monotonic() + INTERRUPT_SECONDS
        index = self.current
        while index is not None and index not in self.seconds and time.monotonic() < end and await self.km.is_alive():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)

    async def shut_down(self, client: Any) -> None:
        """Ends the kernel and whatever still listens to it."""
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # of tasks cut off
        if self.ticker is not None:
            self.ticker.cancel()
        if self.km is not None:
            try:
                if await self.km.is_alive():
                    await asyncio.wait_for(self.km.shutdown_kernel(now=self.fault is not None), 15)
            finally:
                with contextlib.suppress(Exception):
                    await self.km.cleanup_resources()
        kc = getattr(client, "kc", None)
        if kc is not None:
            with contextlib.suppress(Exception):
                kc.stop_channels()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kill_group(self) -> None:
        """No process of the kernel is left behind."""
        if os.name == "posix":
            group = self.group or getattr(getattr(self.km, "provisioner", None), "pgid", None)
            if group and group != os.getpgrp():
                with contextlib.suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
        elif self.process is not None:
            with contextlib.suppress(Exception):
                for child in [*self.process.children(recursive=True), self.process]:
                    child.kill()


def count_outputs(cell: Any) -> int:
    """Outputs of a cell, with streams that `clean_notebook` joins counted once."""
    count, names = 0, set()
    for output in cell.outputs:
        name = output.get("name") if output.output_type == "stream" else None
        if name is None:
            names = set()
        if name is None or name not in names:
            count += 1
            names.add(name)
    return count


def cell_key(cell: Any) -> str:
    """Names a cell by its source, for the seconds of the last run."""
    return hashlib.sha256(cell.source.encode()).hexdigest()[:16]


def make_kernel_manager(folder: Path) -> Any:
    """A kernel manager whose only kernel is this interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"})
    (spec / "kernel.json").write_text(text, encoding="utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(folder / "kernels")], ensure_native_kernel=False)
    return AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=specs, connection_file=str(folder / "connection.json")
    )


def make_executor(execution: Execution) -> Any:
    """nbconvert's executor, with live messages."""
    import logging

    from nbconvert.preprocessors import ExecutePreprocessor

    class Executor(ExecutePreprocessor):
        """Hands messages over as they come and joins the streams of one cell."""

        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            execution.message(msg)
            return super().process_message(msg, cell, cell_index)

        def output(self, outs: list[Any], msg: dict[str, Any], display_id: Any, cell_index: int) -> Any:
            if (
                msg["msg_type"] == "stream"
                and outs
                and outs[-1].output_type == "stream"
                and outs[-1].name == msg["content"]["name"]
                and not self.clear_before_next_output
                and not self.output_hook_stack[msg["parent_header"].get("msg_id")]
            ):
                if msg["content"]["text"]:
                    outs[-1]["text"] += msg["content"]["text"]
                return outs[-1]
            return super().output(outs, msg, display_id, cell_index)

    async def started(notebook: Any) -> None:
        await execution.kernel_is_ours(client.kc)

    client = Executor(
        timeout=None,
        iopub_timeout=120,
        raise_on_iopub_timeout=True,
        startup_timeout=120,
        record_timing=False,
        store_widget_state=False,
        on_notebook_start=started,
        on_cell_execute=execution.cell_begins,
        on_cell_executed=execution.cell_ended,
    )
    client.log = logging.getLogger("execute_ssd_notebook")
    client.log.addHandler(logging.NullHandler())
    client.log.propagate = False
    return client


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What one run does, all questions answered."""

    project: Project
    source: Path  # the notebook
    target: Path  # where the result goes
    folder: Path  # working folder of the kernel: the notebook's
    overrides: dict[str, Any]
    draft: bool  # the result stays under runs/
    timeout: float | None
    stall: float | None
    retries: int

    @property
    def partial(self) -> Path:
        """The working copy."""
        return self.target.with_name(f"{self.target.stem}.partial.ipynb")

    @property
    def failed(self) -> Path:
        """What a failed run leaves."""
        return self.target.with_name(f"{self.target.stem}.failed.ipynb")


class Runner:
    """One call of the script."""

    def __init__(self, options: argparse.Namespace, project: Project = PROJECT):
        self.options, self.project = options, project
        self.console = Console(options.quiet)
        self.env = dict(os.environ)
        self.report: dict[str, Any] = {"cells": [], "checks": [], "notes": []}
        self.locks: list[Lock] = []
        self.started = time.monotonic()
        self.plan: Plan | None = None
        self.execution: Execution | None = None
        self.folder = Path.cwd()  # of the notebook

    # -- helpers

    def note(self, text: str) -> None:
        """A line that is also in the report."""
        self.console.line(f"  {text}")
        self.report["notes"].append(text)

    def step(self, name: str) -> None:
        """The heading of a step."""
        self.console.line(f"{name}")

    def relative(self, path: Path) -> str:
        """A path as the notebook may write it: relative to its folder where it lies inside."""
        path = Path(os.path.abspath(path))
        try:
            return path.relative_to(self.folder).as_posix()
        except ValueError:
            return str(path)

    # -- the steps

    def main(self) -> Exit:
        """All steps of this call; failures come as `Failure`."""
        options = self.options
        path = self.find_notebook()
        self.folder = path.parent
        self.report["notebook"] = str(path)
        needed = {"nbformat": RUNNER_PACKAGES["nbformat"]} if options.check else dict(RUNNER_PACKAGES)
        if not options.check:
            self.step("1 dependencies")
        ensure_packages(needed, options.install, self.console)
        import_quickly()
        if options.check:
            return self.check(path)
        notebook, data = read_notebook(path)
        inject(notebook, {})
        if not any(cell.source.strip() for _, cell in code_cells(notebook)):
            raise Failure(Exit.NOTEBOOK, f"{path.name} has no code cell with code in it: nothing to run.")
        imported, optional = imported_modules(notebook)
        requirements = {module: need for module, need in self.project.packages.items() if module in imported}
        extras = {module: need for module, need in self.project.packages.items() if module in optional}
        sys.path.insert(0, str(path.parent))
        ensure_packages(requirements | (extras if options.install else {}), options.install, self.console)
        if lacking := missing_packages(extras):
            self.note(f"warning: {'; '.join(lacking.values())}; what needs them says so (--install installs them)")
        self.note(f"{plural(len(needed) + len(requirements), 'package')} found, Python {platform.python_version()}")
        parameters = notebook_parameters(notebook)
        self.plan = plan = self.make_plan(path, parameters)
        self.acquire_locks(parameters)
        self.sweep()
        self.check_storage(parameters)
        self.prepare_data(parameters)
        self.prepare_weights(parameters)
        base = self.prepare_notebook(notebook)
        self.execute(base)
        assert self.execution is not None
        self.publish(data)
        self.console.line(f"done in {duration(time.monotonic() - self.started)}: {shown_path(plan.target)}")
        return Exit.OK

    def find_notebook(self) -> Path:
        """The notebook named, or the project's beside this script or in the current folder."""
        if self.options.notebook:
            return Path(os.path.realpath(self.options.notebook))
        beside = Path(__file__).resolve().parent / self.project.notebook
        here = Path.cwd() / self.project.notebook
        return Path(os.path.realpath(here if here.is_file() else beside))

    def check(self, path: Path) -> Exit:
        """--check: validates a notebook and runs nothing."""
        notebook, data = read_notebook(path)
        self.console.line(f"{path.name}")
        draft = any(INJECTED in tags(cell) for cell in notebook.cells)
        return self.verdict(check_notebook(notebook, len(data), machine_folders(path.parent), draft), path)

    def verdict(self, checks: list[Check], path: Path) -> Exit:
        """Prints the checklist; Failure VALIDATION if a line failed."""
        print_checks(self.console, checks)
        self.report["checks"] = [vars(check) for check in checks]
        failed = [f"{check.name}: {check.measured}" for check in checks if check.verdict == "failure"]
        if failed:
            raise Failure(Exit.VALIDATION, f"{path.name} does not pass: {'; '.join(failed)}.")
        return Exit.OK

    def make_plan(self, path: Path, parameters: dict[str, Any]) -> Plan:
        """Answers all questions of options against each other."""
        options, project = self.options, self.project
        if (options.param or options.demo or options.images) and not parameters:
            raise Failure(Exit.USAGE, f"{path.name} has no cell tagged 'parameters': nothing can be overridden.")
        overrides = parse_overrides(options.param, parameters)
        clashes = [
            (options.demo and options.images, "--demo and --images"),
            (options.demo and (options.dataset or options.dataset_url), "--demo and --dataset"),
            (options.results and not options.images, "--results without --images"),
            (
                options.dataset and project.dataset_parameter in overrides,
                f"--dataset and -p {project.dataset_parameter}",
            ),
            (
                options.weights and project.weights_parameter in overrides,
                f"--weights and -p {project.weights_parameter}",
            ),
            (options.fresh and project.training_parameter in overrides, f"--fresh and -p {project.training_parameter}"),
        ]
        for clash, words in clashes:
            if clash:
                raise Failure(Exit.USAGE, f"{words} do not go together: choose one.")
        kind = "demo" if options.demo else "images" if options.images else "custom" if overrides else ""
        folder = path.parent
        target = Path(os.path.realpath(options.output)) if options.output else path
        if options.output and target.suffix != ".ipynb":
            raise Failure(Exit.USAGE, f"--output {options.output}: name a file that ends in .ipynb.")
        if kind:
            if not options.output:
                target = folder / project.runs / kind / path.name
            elif target == path:
                raise Failure(
                    Exit.USAGE,
                    "--output names the notebook itself, but a run with overrides is never published in place.",
                )
        place = target.parent if target.parent != folder else folder / project.runs / target.stem
        if kind in ("demo", "custom"):
            defaults = {
                name: place / Path(str(parameters[name])).name
                for name in project.output_parameters
                if parameters.get(name)
            }
            extra = {name: self.relative(value) for name, value in defaults.items()}
            if kind == "demo":
                missing = [name for name in project.demo_parameters if name not in parameters]
                if missing:
                    raise Failure(Exit.USAGE, f"--demo: {path.name} has no parameter {missing[0]}.")
                extra.update(project.demo_parameters)
                start = extra.get(project.finetune_parameter)
                if start and not (folder / start).is_file():
                    self.note(f"warning: there is no {start}, so the demo trains from the start and will find little")
                    extra[project.finetune_parameter] = ""
                extra[project.dataset_parameter] = self.relative(
                    place / Path(str(parameters[project.dataset_parameter])).name
                )
            for name in project.output_parameters:
                if (
                    name in overrides
                    and (folder / str(overrides[name])).resolve() == (folder / str(parameters[name])).resolve()
                ):
                    raise Failure(
                        Exit.USAGE,
                        f"-p {name}: that is the notebook's own folder, which a run with overrides never writes to.",
                    )
            overrides = {**extra, **overrides}
        if kind == "images":
            overrides = {**overrides, **self.image_overrides(parameters, place)}
        for parameter, variable in (
            (project.dataset_parameter, project.dataset_variable),
            (project.url_parameter, project.url_variable),
            (project.weights_parameter, project.weights_variable),
            (project.training_parameter, project.training_variable),
        ):
            if parameter in overrides:
                self.env.pop(variable, None)
        return Plan(
            project, path, target, folder, overrides, bool(kind), options.timeout, options.stall, options.retries
        )

    def image_overrides(self, parameters: dict[str, Any], place: Path) -> dict[str, Any]:
        """Parameters of a run over the user's own images."""
        project = self.project
        for name in (project.images_parameter, project.results_parameter):
            if name not in parameters:
                raise Failure(Exit.USAGE, f"--images: the notebook has no parameter {name}.")
        images = Path(os.path.realpath(self.options.images))
        if not images.is_dir():
            raise Failure(Exit.USAGE, f"--images: there is no folder {images}.")
        found = [file for file in images.iterdir() if file.suffix.lower() in project.image_suffixes]
        if not found:
            raise Failure(Exit.USAGE, f"--images: no picture ({', '.join(project.image_suffixes)}) in {images}.")
        results = Path(os.path.realpath(self.options.results)) if self.options.results else place / "results"
        return {project.images_parameter: self.relative(images), project.results_parameter: self.relative(results)}

    def acquire_locks(self, parameters: dict[str, Any]) -> None:
        """One run at a time on the result and on the checkpoints."""
        assert self.plan is not None
        check_writable(self.plan.target.parent, "the notebook")
        targets = [self.plan.target]
        folder = self.checkpoint_folder(parameters)
        if folder is not None and not self.options.images:
            check_writable(folder.parent, "checkpoints")
            targets.append(folder)
        for target in targets:
            lock = Lock(target)
            lock.acquire()
            self.locks.append(lock)
            if lock.stale:
                self.note(f"a lock of process {lock.stale.get('pid', '?')}, which is gone, was taken over")

    def sweep(self) -> None:
        """Removes half-written files of a run that was killed."""
        assert self.plan is not None
        for path in self.plan.target.parent.glob(f".{self.plan.target.stem}.*.partial.ipynb"):
            number = path.name.split(".")[-3]
            if number.isdigit() and not process_alive(int(number)):
                with contextlib.suppress(OSError):
                    path.unlink()

    def checkpoint_folder(self, parameters: dict[str, Any]) -> Path | None:
        """Where the run writes checkpoints; None if the notebook has none."""
        assert self.plan is not None
        name = self.project.checkpoint_parameter
        value = self.plan.overrides.get(name, parameters.get(name))
        return Path(os.path.realpath(self.plan.folder / value)) if isinstance(value, str) and value else None

    def check_storage(self, parameters: dict[str, Any]) -> None:
        """Disk space and permissions, before the hours of work."""
        plan = self.plan
        assert plan is not None
        if plan.target.exists() and not plan.target.stat().st_mode & 0o222:
            raise Failure(Exit.STORAGE, f"{plan.target.name} is write-protected: make it writable or name --output.")
        check_space(plan.target.parent, 50_000_000 + 3 * plan.source.stat().st_size, "the notebook")
        folder = self.checkpoint_folder(parameters)
        if folder is not None and not self.options.images:
            check_writable(folder, "checkpoints")
            needed = 200 if self.reuses(parameters) else self.project.training_megabytes
            check_space(folder, needed * 1_000_000, "checkpoints")

    def training(self, parameters: dict[str, Any]) -> Any:
        """What the run is asked to do about training."""
        assert self.plan is not None
        name = self.project.training_parameter
        if self.options.fresh:
            return "fresh"
        return self.plan.overrides.get(name) or self.env.get(self.project.training_variable) or parameters.get(name)

    def reuses(self, parameters: dict[str, Any]) -> bool:
        """Whether the run will most likely reuse a finished checkpoint."""
        folder = self.checkpoint_folder(parameters)
        if folder is None or not (folder / self.project.checkpoint_file).is_file():
            return False
        mode = self.training(parameters)
        return mode == "reuse" or (mode == "auto" and not accelerator())

    def prepare_data(self, parameters: dict[str, Any]) -> None:
        """Step 2."""
        options, project, plan = self.options, self.project, self.plan
        assert plan is not None
        self.step("2 dataset")
        if project.dataset_parameter not in parameters:
            if options.dataset or options.dataset_url:
                raise Failure(
                    Exit.USAGE, f"--dataset: {plan.source.name} has no parameter {project.dataset_parameter}."
                )
            self.note("the notebook asks for none")
            return
        if options.images:
            self.note("not needed for own images")
            return
        if options.demo:
            self.draw_data(plan.folder / plan.overrides[project.dataset_parameter])
            return
        given = options.dataset or (
            None if project.dataset_parameter in plan.overrides else self.env.get(project.dataset_variable)
        )
        where = "--dataset" if options.dataset else project.dataset_variable
        value = given or plan.overrides.get(project.dataset_parameter, parameters[project.dataset_parameter])
        folder = Path(os.path.abspath(os.path.expanduser(value) if given else plan.folder / str(value)))
        if folder.name == project.dataset_root and (folder / project.splits.format(project.split_names[0])).is_file():
            folder = folder.parent  # the inner folder was named
        url = options.dataset_url or plan.overrides.get(project.url_parameter) or self.env.get(project.url_variable)
        url = url or parameters.get(project.url_parameter)
        known = {u for u in (url, parameters.get(project.url_parameter)) if isinstance(u, str) and u}
        hint = "name a good copy by --dataset, or move it away and it is fetched"
        if given and not folder.is_dir():
            raise Failure(Exit.DATASET, f"{where}: there is no folder {folder}; name a copy of {project.dataset_name}.")
        if folder.exists():
            try:
                summary = dataset_summary(folder, project)
            except ValueError as error:
                if given or not is_our_clone(folder, known):
                    raise Failure(
                        Exit.DATASET, f"{folder} is not a whole {project.dataset_name} dataset ({error}): {hint}."
                    ) from None
                self.note("an unfinished clone is removed and fetched again")
                remove(folder)
            else:
                self.note(summary)
        if not folder.exists():
            if not isinstance(url, str) or not url:
                raise Failure(
                    Exit.DATASET, f"There is no dataset in {folder} and no address to fetch it: name --dataset."
                )
            self.note(f"fetching {project.dataset_name}")
            self.note(fetch_dataset(url, folder, project, self.console))
        if given:
            self.env[project.dataset_variable] = self.relative(folder)

    def draw_data(self, folder: Path) -> None:
        """--demo: draws the dataset."""
        project = self.project
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        try:
            module = importlib.import_module(project.demo_module)
        except ImportError as error:
            raise Failure(
                Exit.DATASET, f"--demo needs {project.demo_module}.py beside this script ({error})."
            ) from None
        temporary = folder.with_name(f".{folder.name}.draw-{os.getpid()}")
        try:
            remove(temporary)
            module.draw_dataset(temporary, **project.demo_images)
            remove(folder)
            os.replace(temporary, folder)
        except OSError as error:
            raise Failure(
                Exit.STORAGE, f"Cannot draw the demo's data in {folder} ({error.strerror or error})."
            ) from None
        finally:
            with contextlib.suppress(OSError):
                remove(temporary)
        self.note("drawn: " + dataset_summary(folder, project))
        self.note("drawn data: nothing that this run shows is a result")

    def prepare_weights(self, parameters: dict[str, Any]) -> None:
        """Step 3."""
        options, project, plan = self.options, self.project, self.plan
        assert plan is not None
        self.step("3 weights")
        name = project.weights_parameter
        if name not in parameters:
            if options.weights:
                raise Failure(Exit.USAGE, f"--weights: {plan.source.name} has no parameter {name}.")
            self.note("the notebook asks for none")
            return
        typed = options.weights or (None if name in plan.overrides else self.env.get(project.weights_variable))
        value = typed or plan.overrides.get(name, parameters[name])
        if value and isinstance(value, str):
            path = Path(os.path.abspath(os.path.expanduser(value) if typed else plan.folder / value))
            where = "--weights" if options.weights else name
            if not path.is_file():
                raise Failure(Exit.WEIGHTS, f"{where}: there is no file {path}; name one with {project.weights_name}.")
            try:
                check_weights(path, project)
            except ValueError as error:
                raise Failure(
                    Exit.WEIGHTS, f"{where}: {path} does not hold {project.weights_name} ({error}); name another file."
                ) from None
            if typed:
                self.env[project.weights_variable] = self.relative(path)
            self.note(f"{project.weights_name} from {path.name}, {megabytes(path.stat().st_size)}")
            return
        self.env.pop(project.weights_variable, None)
        if options.images or plan.overrides.get(project.finetune_parameter):
            self.note("not needed: a trained checkpoint is the start")
            return
        try:
            self.note(fetch_weights(project, self.console))
        except OSError as error:
            reuse = self.reuses(parameters)
            then = "a finished checkpoint is reused" if reuse else "the notebook trains without them and says so"
            self.note(
                f"warning: {project.weights_name} cannot be fetched ({reason_of(error)}); {then}; "
                "give them as a file by --weights"
            )

    def prepare_notebook(self, notebook: Any) -> Any:
        """The notebook that is executed: without old outputs, with the overrides."""
        plan = self.plan
        assert plan is not None
        base = copy.deepcopy(notebook)
        if self.options.images:
            wanted = set(self.project.images_tags)
            titles = cell_titles(base)
            kept = {title for cell, title in zip(base.cells, titles, strict=True) if "images" in tags(cell)}
            if not kept:
                raise Failure(Exit.USAGE, f"--images: {plan.source.name} has no cell tagged 'images'.")
            base.cells[:] = [
                cell
                for cell, title in zip(base.cells, titles, strict=True)
                if (cell.cell_type == "code" and wanted & set(tags(cell)))
                or (cell.cell_type == "markdown" and title in kept)
            ]
        inject(base, plan.overrides)
        for _, cell in code_cells(base):
            cell["outputs"], cell["execution_count"] = [], None
        base.metadata.pop("widgets", None)
        base.metadata.pop(STAMP, None)
        return base

    def execute(self, base: Any) -> None:
        """Step 4, with restarts after a dead kernel."""
        plan, project, console = self.plan, self.project, self.console
        assert plan is not None
        self.step("4 execute")
        if other := foreign_kernel(base):
            self.note(f"{other}: this Python is used instead")
        env = self.env
        for name in ("MPLBACKEND", "PYTHONSTARTUP"):  # they would change what the page shows
            env.pop(name, None)
        env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
        env.setdefault(project.run_variable, uuid.uuid4().hex)
        if self.options.fresh:
            env[project.training_variable] = "fresh"
        timings = self.load_timings()
        killed: int | None = 0
        for attempt in range(plan.retries + 1):
            notebook = copy.deepcopy(base)
            self.execution = execution = Execution(plan, notebook, console, timings)
            try:
                execution.run(env)
                break
            except KernelDied as death:
                what = self.describe(death, execution)
                if attempt == plan.retries:
                    tries = f" after {plural(plan.retries, 'restart')}" if plan.retries else ""
                    raise Failure(Exit.KERNEL, f"{what}{tries}; look at the last output.") from None
                # a smaller batch changes the result's last bits: for a lack of memory only, or a second kill in a row
                killed_again = killed and death.code == killed
                killed = death.code if death.code == -getattr(signal, "SIGKILL", 9) else 0
                if (death.memory or killed_again) and project.divisor_variable:
                    divisor = env.get(project.divisor_variable, "1")
                    divisor = int(divisor) if divisor.isdigit() and int(divisor) > 0 else 1
                    env[project.divisor_variable] = str(min(project.divisor_limit, divisor * 2))
                    what += f"; it looks like memory, so the batch is divided by {env[project.divisor_variable]}"
                self.note(f"{what}; restart {attempt + 1} of {plan.retries}, from the top")
                self.report["restarts"] = attempt + 1
            finally:
                self.report["cells"] = [
                    {
                        "number": number,
                        "section": execution.titles[index],
                        "seconds": round(execution.seconds[index], 3) if index in execution.seconds else None,
                        "outputs": count_outputs(execution.notebook.cells[index]),
                        "peak_memory_mb": round(execution.peaks[index] / 1e6) if index in execution.peaks else None,
                    }
                    for index, number in execution.numbers.items()
                ]
        self.save_timings(self.execution)

    def describe(self, death: KernelDied, execution: Execution) -> str:
        """A dead kernel in words."""
        if death.cell is None:
            return f"The kernel could not be started ({death.reason or f'exit code {death.code}'})"
        if death.memory and death.code is None:
            return f"{execution.where(death.cell)} ran out of memory ({death.reason})"
        code = death.code
        how = (
            f"signal {-code}"
            if code is not None and code < 0
            else f"exit code {code}"
            if code is not None
            else "no exit code"
        )
        detail = f" ({death.reason})" if death.reason else ""
        return f"The kernel died in cell {execution.where(death.cell).removeprefix('Cell ')}, {how}{detail}"

    def timings_file(self) -> Path:
        """Where the seconds of the last run are kept."""
        assert self.plan is not None
        return self.plan.folder / self.project.runs / "timings.json"

    def load_timings(self) -> dict[str, float]:
        """Seconds per cell of the last run; empty if unknown."""
        try:
            data = json.loads(self.timings_file().read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def save_timings(self, execution: Execution) -> None:
        """Keeps the seconds per cell; no harm if that fails."""
        seconds = {execution.keys[index]: round(value, 2) for index, value in execution.seconds.items()}
        with contextlib.suppress(OSError):
            self.timings_file().parent.mkdir(parents=True, exist_ok=True)
            write_file(self.timings_file(), json.dumps({**self.load_timings(), **seconds}).encode())

    def publish(self, data: bytes) -> None:
        """Steps 5 and 6."""
        plan, execution = self.plan, self.execution
        assert plan is not None and execution is not None
        self.step("5 validate")
        import nbformat

        result = clean_notebook(execution.notebook)
        result.metadata[STAMP] = {"source_sha256": source_digest(result)}
        content = notebook_bytes(result)
        try:
            write_file(plan.partial, content, durable=True)
        except OSError as error:
            raise Failure(
                Exit.STORAGE, f"The result cannot be written ({error.strerror or error}): make room and run again."
            ) from None
        try:
            nbformat.validate(result)
        except nbformat.ValidationError as error:
            raise Failure(Exit.VALIDATION, f"The result is no valid notebook: {one_line(error, 120)}.") from None
        # a path in an output is no reason to throw hours of work away; --check is stricter
        checks = check_notebook(result, len(content), machine_folders(plan.folder), plan.draft, paths="warning")
        self.verdict(checks, plan.target)
        self.step("6 publish")
        if plan.target == plan.source:
            try:
                unchanged = plan.source.read_bytes() == data
            except OSError:
                unchanged = False
            if not unchanged:
                raise Failure(
                    Exit.VALIDATION, f"{plan.source.name} was edited during the run and is left alone: run it again."
                )
        if self.options.html:
            self.write_html(result)
        try:
            if plan.target.exists():
                with contextlib.suppress(OSError):
                    shutil.copymode(plan.target, plan.partial)
            replace(plan.partial, plan.target)
        except OSError as error:
            raise Failure(
                Exit.STORAGE, f"{plan.target.name} cannot be replaced ({error.strerror or error}): close it elsewhere."
            ) from None
        with contextlib.suppress(OSError):
            plan.failed.unlink()
        self.note(f"{plan.target.name}, {megabytes(len(content))}")

    def write_html(self, notebook: Any) -> None:
        """--html: the page beside the notebook."""
        from nbconvert import HTMLExporter

        assert self.plan is not None
        path = self.plan.target.with_suffix(".html")
        text, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": self.plan.target.stem}})
        try:
            write_file(path, text.encode("utf-8"))
        except OSError as error:
            raise Failure(Exit.STORAGE, f"{path.name} cannot be written ({error.strerror or error}).") from None
        self.note(f"{path.name}, {megabytes(len(text))}")

    # -- the end

    def leave(self, code: int, sentence: str) -> None:
        """Keeps what a failed run has, writes the report, frees the locks."""
        plan = self.plan
        kept = ""
        if code and plan is not None and self.execution is not None and plan.partial.is_file():
            name = plan.partial
            if code < 128:
                with contextlib.suppress(OSError):
                    replace(plan.partial, plan.failed)
                    name = plan.failed
            kept = f" Outputs so far: {shown_path(name)}; {plan.target.name} is unchanged."
        for lock in self.locks:
            lock.release()
        if sentence:
            self.console.error(f"error: {sentence}{kept}")
        self.report.update(
            exit_code=int(code),
            sentence=sentence,
            seconds=round(time.monotonic() - self.started, 3),
            environment=environment(self.project),
        )
        if self.options.report:
            try:
                path = Path(os.path.abspath(self.options.report))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, (json.dumps(self.report, indent=2, ensure_ascii=False) + "\n").encode())
            except OSError as error:
                self.console.error(f"warning: the report cannot be written ({error.strerror or error})")


def shown_path(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def machine_folders(folder: Path) -> tuple[str, ...]:
    """Folders of this machine that no published output may name."""
    found = {str(folder), os.path.expanduser("~"), sys.prefix, tempfile.gettempdir()}
    return tuple(sorted(path for path in found if len(path) > 4 and path not in ("/usr/local", "/usr")))


def environment(project: Project) -> dict[str, Any]:
    """Versions and machine, for the report."""
    versions = {}
    for need in [*RUNNER_PACKAGES.values(), *project.packages.values()]:
        name = need.partition(">=")[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
    }


def seconds_option(text: str) -> float:
    """A number of seconds above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("a number of seconds above 0")
    return value


def count_option(text: str) -> int:
    """A whole number, zero or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("0 or more")
    return value


def make_parser(project: Project = PROJECT) -> argparse.ArgumentParser:
    """The command line."""
    codes = __doc__.partition("Exit codes\n")[2].partition("\n\n")[0] if __doc__ else ""
    parser = argparse.ArgumentParser(
        description="Run the notebook from beginning to end and publish the result.",
        epilog="exit codes:\n" + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("notebook", nargs="?", help=f"the notebook (default: {project.notebook})")
    add("--check", action="store_true", help="validate the notebook only, run nothing")
    add(
        "--demo",
        action="store_true",
        help=f"the whole notebook on drawn data, without downloads, under {project.runs}/demo",
    )
    add(
        "-p",
        dest="param",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="override a constant of the notebook",
    )
    add("--dataset", metavar="DIR", help=f"an existing copy of the dataset (also {project.dataset_variable})")
    add(
        "--dataset-url",
        metavar="URL",
        help=f"another git mirror, or a zip or tar archive (also {project.url_variable})",
    )
    add("--weights", metavar="FILE", help=f"{project.weights_name} from a file (also {project.weights_variable})")
    add("--images", metavar="DIR", help="detect in a folder of your own pictures only")
    add("--results", metavar="DIR", help="where the results of --images go")
    add("--output", metavar="NB", help="write the result there, leave the notebook alone")
    add("--html", action="store_true", help="also write it as a page")
    add("--fresh", action="store_true", help="train from the start, whatever checkpoints there are")
    add("--install", action="store_true", help="install what is missing")
    add("--retries", type=count_option, default=3, metavar="N", help="restarts after a dead kernel (default: 3)")
    add("--timeout", type=seconds_option, metavar="S", help="seconds that one cell may take (default: no limit)")
    add("--stall", type=seconds_option, metavar="S", help="seconds that a cell may stay silent (default: no limit)")
    add("--quiet", action="store_true", help="say nothing but errors")
    add("--report", metavar="FILE", help="write what happened as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the script.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit code.
    """
    options = make_parser().parse_args(arguments)
    runner = Runner(options)
    received: list[int] = []

    def on_signal(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) == 1:
            raise Interrupted(signum)
        if runner.execution is not None:  # asked again: at once
            runner.execution.kill_group()

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            with contextlib.suppress(ValueError, OSError):
                signal.signal(number, on_signal)
    code, sentence = Exit.INTERNAL, ""
    try:
        code = runner.main()
    except Failure as failure:
        code, sentence = failure.code, failure.sentence
    except KeyboardInterrupt:
        signum = received[0] if received else signal.SIGINT
        code = (
            Exit.TERMINATE
            if signum == signal.SIGTERM
            else Exit.HANGUP
            if signum == getattr(signal, "SIGHUP", None)
            else Exit.INTERRUPT
        )
        how = " without --fresh" if options.fresh else ""
        sentence = f"Ended by {signal.Signals(signum).name}; run it again{how} to go on, finished epochs are kept."
    except OSError as error:
        code, sentence = Exit.STORAGE, f"{error.strerror or error}: {error.filename or 'no file named'}."
    except Exception as error:
        traceback.print_exc()
        sentence = f"An error in this script: {type(error).__name__}: {one_line(error)}."
    if not received:
        received.append(0)  # from here on a signal only ends the kernel
    runner.leave(int(code), sentence)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
