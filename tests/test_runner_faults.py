"""Faults injected for real into the runner: the exit code, the sentence, and that nothing is lost.

Every row of the table runs the script as a subprocess; where cells run, in a real kernel. After each: the exit code,
one sentence on standard error and no traceback, the notebook and the checkpoints byte for byte as before, no process
and no lock left. Two rows patch a function (PATCHED); all others inject the fault itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from runner_helpers import (
    PARAMETERS,
    Place,
    WebServer,
    draw_layout,
    finish,
    git,
    git_repository,
    outputs,
    tree,
    zip_folder,
)

pytestmark = pytest.mark.timeout(120)
POSIX = os.name == "posix"
GOOD = (PARAMETERS, "print('one')", "print('two')")
DATA = ("parameters", "DATA_DIR = 'BCCD_Dataset'\nDATASET_URL = ''\nCHECKPOINT_DIR = 'checkpoints'\nDATA_DIR")
WEIGHTS = ("parameters", "VGG16_WEIGHTS = ''\nVGG16_WEIGHTS")
LONG = """import time
open('running', 'w').close()
for i in range(600):
    print('line', i, flush=True)
    time.sleep(0.1)"""
PATCHED = ("no-space", "space-for-checkpoints")


@dataclass
class Fault:
    """One row: what is broken, and what has to be said."""

    name: str
    code: int
    sentence: str  # regular expression, searched in standard error (in standard output where the code is 0)
    cells: tuple = GOOD
    arguments: tuple[str, ...] = ()
    prepare: Callable[[Place], None] | None = None
    during: Callable[[Place, subprocess.Popen], None] | None = None
    after: Callable[[Place], None] | None = None
    kept: str = ""  # file with the outputs so far, and what stands in it


def put(place: Place, name: str, data: bytes | str) -> None:
    path = place.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def old_package(name: str, module: str) -> Callable[[Place], None]:
    """An older release of a package, found before the installed one."""

    def prepare(place: Place) -> None:
        folder = place.shadow()
        (folder / f"{name}-0.1.dist-info").mkdir()
        (folder / f"{name}-0.1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n"
        )
        if module not in ("nbformat", "nbconvert", "ipykernel"):
            put(place, f"shadow/{module}/__init__.py", "")

    return prepare


def bare_python(place: Place) -> None:
    """An environment without any package, as a fresh installation is."""
    venv.create(place.folder.parent / "bare", with_pip=False, symlinks=POSIX)
    place.python = str(place.folder.parent / "bare" / ("bin/python" if POSIX else "Scripts/python.exe"))
    place.env["PATH"] = str(place.folder)  # no uv either


def no_space(limit: int) -> Callable[[Place], None]:
    """PATCHED: the disk claims to be almost full."""

    def prepare(place: Place) -> None:
        place.shadow(
            sitecustomize="import shutil, collections\nU = collections.namedtuple('usage', 'total used free')\n"
            f"shutil.disk_usage = lambda path: U(10**9, 10**9, {limit})\n"
        )

    return prepare


def small_files(place: Place) -> None:
    """No process of the run can make a file larger than 60 kB grow: every such `write` fails."""
    import resource

    place.limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def bad_dataset(change: Callable[[Place], None]) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        draw_layout(place.folder / "BCCD_Dataset")
        change(place)

    return prepare


def data_file(name: str, data: bytes | str) -> Callable[[Place], None]:
    return bad_dataset(lambda place: put(place, f"BCCD_Dataset/BCCD/{name}", data))


def zip_with(name: str, link: bool = False) -> Callable[[Place], None]:
    """An archive with one bad member."""

    def prepare(place: Place) -> None:
        draw_layout(place.folder / "source")
        archive = zip_folder(place.folder / "source", place.folder / "data.zip")
        shutil.rmtree(place.folder / "source")
        with zipfile.ZipFile(archive, "a") as bundle:
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link else 0o100644) << 16
            bundle.writestr(info, "/etc/passwd")

    return prepare


def tar_with_link(place: Place) -> None:
    with tarfile.open(place.folder / "data.tar.gz", "w:gz") as bundle:
        info = tarfile.TarInfo("BCCD/link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        bundle.addfile(info)


def cut_zip(place: Place) -> None:
    draw_layout(place.folder / "source")
    archive = zip_folder(place.folder / "source", place.folder / "data.zip")
    shutil.rmtree(place.folder / "source")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])


def damaged_zip(place: Place) -> None:
    draw_layout(place.folder / "source")
    archive = zip_folder(place.folder / "source", place.folder / "data.zip")
    shutil.rmtree(place.folder / "source")
    archive.write_bytes(archive.read_bytes().replace(b" picture ", b" pixture ", 1))


def other_repository(place: Place) -> None:
    source = place.folder.parent / "other"
    source.mkdir()
    (source / "README.md").write_text("something else")
    place.arguments = ["--dataset-url", git_repository(source)]


def own_folder(place: Place) -> None:
    put(place, "BCCD_Dataset/my_notes.txt", "mine")


def own_folder_kept(place: Place) -> None:
    assert (place.folder / "BCCD_Dataset" / "my_notes.txt").read_text() == "mine"


def changed_clone(place: Place) -> None:
    """A clone of the dataset with a file of the user's in it, and one file missing."""
    source = draw_layout(place.folder.parent / "mirror")
    url = git_repository(source)
    git("clone", "--quiet", url, str(place.folder / "BCCD_Dataset"), cwd=place.folder)
    (place.folder / "BCCD_Dataset" / "BCCD" / "JPEGImages" / "a.jpg").unlink()
    own_folder(place)
    place.arguments = ["--dataset-url", url]


def no_outside(place: Place) -> None:
    assert not (place.folder.parent / "evil.txt").exists()
    assert not (place.folder / "BCCD_Dataset").exists()


def serve(status: int) -> Callable[[Place, subprocess.Popen], None]:
    """The address is known before the start, so the server is started in `prepare` and lives as long as the test."""

    def prepare(place: Place) -> None:
        place.server = WebServer(b"", status=status).__enter__()
        place.arguments = ["--dataset-url", place.server.address + "/data.zip"]

    return prepare


def pickled(names: list[str]) -> bytes:
    return pickle.dumps(dict.fromkeys(names, 0), protocol=2)


def send(signum_name: str, more: int = 0) -> Callable[[Place, subprocess.Popen], None]:
    def during(place: Place, process: subprocess.Popen) -> None:
        place.wait_for("running")
        time.sleep(0.4)
        for _ in range(more + 1):
            process.send_signal(getattr(signal, signum_name))
            time.sleep(0.5)

    return during


def interrupt_clone(place: Place, process: subprocess.Popen) -> None:
    end = time.monotonic() + 20
    while not list(place.folder.glob(".BCCD_Dataset.fetch-*")):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)


def first_runner(place: Place) -> None:
    """The row's own script is the second; the first holds the lock."""
    place.first = place.start()
    place.wait_for("running")


def end_first_runner(place: Place) -> None:
    place.first.send_signal(signal.SIGINT)
    assert finish(place.first).returncode == 130


def write_protected(place: Place) -> None:
    place.notebook.chmod(0o444)


def read_only_folder(place: Place) -> None:
    (place.folder / "results").mkdir()
    (place.folder / "results").chmod(0o555)


def checkpoints_are_a_file(place: Place) -> None:
    put(place, "weights", "a file")


def small_disk(place: Place) -> None:
    """The result goes to a file system of one megabyte."""
    disk = place.folder.parent / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("file systems cannot be mounted here")
    place.disk = disk
    place.arguments = ["--output", str(disk / "result.ipynb")]


def unmount(place: Place) -> None:
    assert list(place.disk.glob("*.ipynb")) == []
    subprocess.run(["umount", str(place.disk)], check=True)


def text_file(text: str) -> Callable[[Place], None]:
    return lambda place: place.notebook.write_text(text, encoding="utf-8")


def launcher(text: str) -> Callable[[Place], None]:
    return lambda place: place.shadow(ipykernel_launcher=text) and None


def kernelspec(place: Place) -> None:
    """The user's own kernel `python3` belongs to another environment."""
    spec = place.folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = ["/opt/other/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "other", "language": "python"}))
    place.env["JUPYTER_PATH"] = str(place.folder / "jupyter")


HIDE_INTERRUPT = "import signal, time, subprocess\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
SLEEPER = (
    "subprocess.Popen(['sleep', '300'])\nopen('running', 'w').close()\nprint('asleep', flush=True)\ntime.sleep(300)"
)
KILL = """import os, signal, time
print('last words', flush=True)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)"""

FAULTS = [
    # wrong use
    Fault("unknown-parameter", 2, r"-p COUMT: .* did you mean COUNT\?", arguments=("-p", "COUMT=4")),
    Fault("wrong-type", 2, r"-p COUNT: 'abc' is not an integer, like the notebook's 3", arguments=("-p", "COUNT=abc")),
    Fault("no-equals-sign", 2, r"write it as NAME=VALUE", arguments=("-p", "COUNT")),
    Fault("no-parameters-cell", 2, r"no cell tagged 'parameters'", cells=("print(1)",), arguments=("-p", "COUNT=4")),
    Fault("override-in-place", 2, r"never published in place", arguments=("-p", "COUNT=4", "--output", "study.ipynb")),
    Fault(
        "override-own-checkpoints", 2, r"the notebook's own folder", arguments=("-p", "CHECKPOINT_DIR=./checkpoints")
    ),
    Fault("output-no-notebook", 2, r"ends in \.ipynb", arguments=("--output", "page.html")),
    Fault("unknown-option", 2, r"unrecognized arguments: --fast", arguments=("--fast",)),
    Fault(
        "options-clash",
        2,
        r"--fresh and -p TRAINING do not go together",
        cells=(("parameters", "TRAINING = 'auto'\nTRAINING"),),
        arguments=("--fresh", "-p", "TRAINING=reuse"),
    ),
    # packages
    Fault(
        "nothing-installed",
        3,
        r"nbformat is missing; nbclient is missing; nbconvert is missing; ipykernel is missing",
        prepare=bare_python,
    ),
    Fault(
        "nothing-to-install-with",
        3,
        r"Installing failed .*install by hand with  python -m pip install \"nbformat",
        prepare=bare_python,
        arguments=("--install",),
    ),
    Fault(
        "package-too-old",
        3,
        r"torchmetrics 0\.1 is older than 1\.3: run  python -m pip install \"torchmetrics>=1\.3\"",
        cells=(PARAMETERS, "import torchmetrics"),
        prepare=old_package("torchmetrics", "torchmetrics"),
    ),
    Fault("nbconvert-too-old", 3, r"nbconvert 0\.1 is older than", prepare=old_package("nbconvert", "nbconvert")),
    # dataset
    Fault(
        "dataset-missing",
        4,
        r"--dataset: there is no folder .*nowhere",
        cells=(DATA,),
        arguments=("--dataset", "nowhere"),
    ),
    Fault(
        "dataset-own-folder",
        4,
        r"not a whole BCCD dataset \(no folder BCCD in it\)",
        cells=(DATA,),
        prepare=own_folder,
        after=own_folder_kept,
    ),
    Fault(
        "dataset-changed-clone", 4, r"a\.jpg: no such file", cells=(DATA,), prepare=changed_clone, after=own_folder_kept
    ),
    Fault("dataset-no-address", 4, r"no address to fetch it", cells=(DATA,)),
    Fault(
        "dataset-image-missing",
        4,
        r"BCCD/JPEGImages/a\.jpg: no such file",
        cells=(DATA,),
        prepare=bad_dataset(lambda place: (place.folder / "BCCD_Dataset/BCCD/JPEGImages/a.jpg").unlink()),
    ),
    Fault(
        "dataset-image-empty",
        4,
        r"c\.jpg is no whole JPEG image",
        cells=(DATA,),
        prepare=data_file("JPEGImages/c.jpg", b""),
    ),
    Fault(
        "dataset-annotation-cut",
        4,
        r"d\.xml is no whole XML file",
        cells=(DATA,),
        prepare=data_file("Annotations/d.xml", "<annotation><obj"),
    ),
    Fault(
        "dataset-split-empty",
        4,
        r"the split BCCD/ImageSets/Main/val\.txt is empty",
        cells=(DATA,),
        prepare=data_file("ImageSets/Main/val.txt", "\n"),
    ),
    Fault(
        "dataset-splits-overlap",
        4,
        r"a is in train and in test",
        cells=(DATA,),
        prepare=data_file("ImageSets/Main/test.txt", "a\n"),
    ),
    Fault(
        "clone-refused",
        4,
        r"Cannot clone BCCD after 3 tries \(.*\): name a copy by --dataset",
        cells=(DATA,),
        arguments=("--dataset-url", "file:///no/such/repository.git"),
    ),
    Fault("clone-of-something-else", 4, r"What was fetched is not BCCD", cells=(DATA,), prepare=other_repository),
    Fault(
        "git-missing",
        4,
        r"git is not installed",
        cells=(DATA,),
        arguments=("--dataset-url", "https://example.org/x.git"),
        prepare=lambda place: place.env.update(PATH=str(place.folder)),
    ),
    Fault(
        "archive-outside",
        4,
        r"'\.\./evil\.txt' points outside",
        cells=(DATA,),
        arguments=("--dataset-url", "data.zip"),
        prepare=zip_with("../evil.txt"),
        after=no_outside,
    ),
    Fault(
        "archive-absolute",
        4,
        r"'C:\\\\evil\.txt' points outside",
        cells=(DATA,),
        arguments=("--dataset-url", "data.zip"),
        prepare=zip_with("C:\\evil.txt"),
        after=no_outside,
    ),
    Fault(
        "archive-zip-link",
        4,
        r"'BCCD/link' is a link",
        cells=(DATA,),
        arguments=("--dataset-url", "data.zip"),
        prepare=zip_with("BCCD/link", link=True),
        after=no_outside,
    ),
    Fault(
        "archive-tar-link",
        4,
        r"'BCCD/link' is a link",
        cells=(DATA,),
        arguments=("--dataset-url", "data.tar.gz"),
        prepare=tar_with_link,
        after=no_outside,
    ),
    Fault(
        "archive-cut",
        4,
        r"neither a zip nor a tar|damaged",
        cells=(DATA,),
        arguments=("--dataset-url", "data.zip"),
        prepare=cut_zip,
        after=no_outside,
    ),
    Fault(
        "archive-damaged",
        4,
        r"damaged or encrypted",
        cells=(DATA,),
        arguments=("--dataset-url", "data.zip"),
        prepare=damaged_zip,
        after=no_outside,
    ),
    Fault("archive-missing", 4, r"There is no archive", cells=(DATA,), arguments=("--dataset-url", "data.zip")),
    Fault("archive-not-found", 4, r"Cannot download BCCD \(HTTP 404", cells=(DATA,), prepare=serve(404)),
    # weights
    Fault(
        "weights-missing",
        5,
        r"--weights: there is no file .*w\.pth",
        cells=(WEIGHTS,),
        arguments=("--weights", "w.pth"),
    ),
    Fault(
        "weights-no-weights",
        5,
        r"does not hold VGG-16 features \(not a file of torch\.save\)",
        cells=(WEIGHTS,),
        arguments=("--weights", "w.pth"),
        prepare=lambda place: put(place, "w.pth", "<html>"),
    ),
    Fault(
        "weights-foreign",
        5,
        r"it has no features\.0\.weight and lacks 12 more",
        cells=(WEIGHTS,),
        arguments=("--weights", "w.pth"),
        prepare=lambda place: put(place, "w.pth", pickled(["layer1.weight"])),
    ),
    Fault(
        "weights-cut",
        5,
        r"does not hold VGG-16 features",
        cells=(WEIGHTS,),
        arguments=("--weights", "w.pth"),
        prepare=lambda place: put(place, "w.pth", pickled(["features.0.weight"] * 40)[:9]),
    ),
    # cells
    Fault(
        "cell-error",
        6,
        r"Cell 2 of 3 \(2\. Data\) failed with KeyError: 'wbc'\. Outputs so far: study\.failed\.ipynb",
        cells=("print(1)", "## 2. Data", "print('so far')\n{}['wbc']", "print(3)"),
        kept="so far",
    ),
    Fault("cell-syntax-error", 6, r"Cell 1 of 1 failed with SyntaxError", cells=("for",)),
    Fault("cell-asks-for-input", 6, r"StdinNotImplementedError", cells=("input('name?')",)),
    Fault(
        "cell-exits",
        6,
        r"failed with SystemExit: 3",
        cells=("print('so far')", "import sys; sys.exit(3)"),
        kept="so far",
    ),
    Fault("cell-prints-without-end", 6, r"printed over 8\.00 MB", ("while True: print('x' * 1_000_000)",), kept="xxx"),
    # kernel
    Fault(
        "kernel-killed",
        7,
        r"died in cell 1 of 1, signal 9 after 1 restart",
        cells=(KILL,),
        arguments=("--retries", "1"),
        kept="last words",
    ),
    Fault(
        "kernel-exits",
        7,
        r"died in cell 2 of 2, exit code 3",
        cells=("print('so far')", "import os; os._exit(3)"),
        arguments=("--retries", "0"),
        kept="so far",
    ),
    Fault(
        "kernel-crashes",
        7,
        r"died in cell 1 of 1, signal 11",
        cells=("import ctypes; ctypes.string_at(0)",),
        arguments=("--retries", "0"),
    ),
    Fault(
        "kernel-does-not-start",
        7,
        r"could not be started",
        arguments=("--retries", "0"),
        prepare=launcher("raise ImportError('no zmq here')"),
    ),
    Fault(
        "kernel-of-another-python",
        7,
        r"runs in another Python",
        arguments=("--retries", "0"),
        prepare=launcher(
            "import sys\nsys.executable = '/opt/other/bin/python'\n"
            "from ipykernel import kernelapp\nkernelapp.launch_new_instance()"
        ),
    ),
    # time
    Fault(
        "timeout",
        8,
        r"Cell 2 of 2 ran longer than --timeout 1 s",
        cells=("print(1)", LONG),
        arguments=("--timeout", "1"),
        kept="line 5",
    ),
    Fault(
        "timeout-interrupt-ignored",
        8,
        r"ran longer than --timeout 1 s",
        cells=(HIDE_INTERRUPT + SLEEPER,),
        arguments=("--timeout", "1"),
        kept="asleep",
    ),
    Fault(
        "stall",
        8,
        r"printed nothing for --stall 1 s",
        cells=("import time\nprint('so far', flush=True)\ntime.sleep(300)",),
        arguments=("--stall", "1"),
        kept="so far",
    ),
    Fault(
        "stall-interrupt-swallowed",
        8,
        r"Cell 1 of 2 printed nothing",
        arguments=("--stall", "1"),
        cells=("import time\ntry:\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    print('so far')", "print(2)"),
        kept="so far",
    ),
    # validation
    Fault("silent-cells", 9, r"coverage 50\.0% \(code cell 2\)", cells=("print(1)", "x = 1"), kept="1"),
    Fault("too-large", 9, r"file saved and small: 6\.\d+ MB", cells=("print('x' * 6_000_000)",)),
    Fault(
        "script-on-the-page",
        9,
        r"a script in code cell 1",
        cells=("from IPython.display import HTML; HTML('<script>1</script>')",),
    ),
    # notebook
    Fault("notebook-missing", 10, r"There is no notebook", prepare=lambda place: place.notebook.unlink()),
    Fault(
        "notebook-is-a-folder",
        10,
        r"is a folder",
        prepare=lambda place: (place.notebook.unlink(), place.notebook.mkdir()) and None,
    ),
    Fault(
        "notebook-cut",
        10,
        r"not a valid notebook",
        prepare=lambda place: place.notebook.write_bytes(place.notebook.read_bytes()[:300]),
    ),
    Fault("notebook-merge-conflict", 10, r"conflict marks", prepare=text_file("{\n<<<<<<< HEAD\n")),
    Fault("notebook-not-text", 10, r"not UTF-8 text", prepare=lambda place: place.notebook.write_bytes(b"\x89PNG\xff")),
    Fault("notebook-other-json", 10, r"no nbformat version in it", prepare=text_file('{"cells": []}')),
    Fault("notebook-without-code", 10, r"nothing to run", cells=("## only text",)),
    # storage
    Fault("notebook-write-protected", 11, r"write-protected", prepare=write_protected),
    Fault(
        "folder-read-only",
        11,
        r"Cannot write the notebook in .*results",
        prepare=read_only_folder,
        arguments=("--output", "results/study.ipynb"),
    ),
    Fault(
        "checkpoints-are-a-file",
        11,
        r"Cannot write checkpoints in .*weights",
        prepare=checkpoints_are_a_file,
        arguments=("-p", "CHECKPOINT_DIR=weights"),
    ),
    Fault("no-space", 11, r"Not enough disk space for the notebook: 1\.00 MB free", prepare=no_space(1_000_000)),
    Fault(
        "space-for-checkpoints",
        11,
        r"Not enough disk space for checkpoints: 1000 MB free.*, 2000 MB needed",
        prepare=no_space(1_000_000_000),
    ),
    Fault("disk-of-one-megabyte", 11, r"Not enough disk space for the notebook", prepare=small_disk, after=unmount),
    # two at once, signals
    Fault(
        "second-runner",
        12,
        r"Another run works here: process \d+ on .*, since 2",
        cells=(LONG,),
        prepare=first_runner,
        after=end_first_runner,
    ),
    Fault(
        "ctrl-c",
        130,
        r"Ended by SIGINT; run it again to go on.*study\.partial\.ipynb",
        cells=("print(1)", LONG),
        during=send("SIGINT"),
        kept="line 2",
    ),
    Fault("terminated", 143, r"Ended by SIGTERM", cells=(LONG,), during=send("SIGTERM"), kept="line 2"),
    Fault("terminal-closed", 129, r"Ended by SIGHUP", cells=(LONG,), during=send("SIGHUP"), kept="line 2"),
    Fault(
        "ctrl-c-twice",
        130,
        r"Ended by SIGINT",
        cells=(HIDE_INTERRUPT + SLEEPER,),
        during=send("SIGINT", 1),
        kept="asleep",
    ),
    Fault(
        "ctrl-c-while-cloning",
        130,
        r"Ended by SIGINT",
        cells=(DATA,),
        during=interrupt_clone,
        arguments=("--dataset-url", "file:///no/such/repository.git"),
    ),
]
if not POSIX:
    needs_posix = {
        "terminated",
        "terminal-closed",
        "ctrl-c",
        "ctrl-c-twice",
        "kernel-killed",
        "kernel-crashes",
        "second-runner",
    }
    FAULTS = [fault for fault in FAULTS if fault.name not in needs_posix]


def test_the_table_is_long_enough():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 30
    assert len(PATCHED) <= 5 and set(PATCHED) <= set(names)
    assert {fault.code for fault in FAULTS} >= set(range(2, 13)) | {129, 130, 143}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, tmp_path):
    place = Place(tmp_path / "study folder")
    place.write(*fault.cells)
    if fault.prepare:
        fault.prepare(place)
    before = place.notebook.read_bytes() if place.notebook.is_file() else None
    checkpoints = tree(place.checkpoints)

    process = place.start(*fault.arguments)
    if fault.during:
        fault.during(place, process)
    result = finish(process)

    said = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == fault.code, said
    assert re.search(fault.sentence, result.stderr), said
    assert "Traceback" not in result.stderr and "never retrieved" not in result.stderr, said
    assert len([line for line in result.stderr.splitlines() if "error: " in line]) == 1, said
    if fault.after:
        fault.after(place)
    assert (place.notebook.read_bytes() if place.notebook.is_file() else None) == before
    assert tree(place.checkpoints) == checkpoints
    if fault.kept:
        kept = place.folder / f"study.{'partial' if fault.code > 128 else 'failed'}.ipynb"
        assert fault.kept in outputs(kept)
        assert kept.name in result.stderr
    assert place.kernels() == []
    assert place.left_over() == []
    with contextlib.suppress(AttributeError):
        place.server.__exit__()


# ---------------------------------------------------------------------------------------------------------------------
# Faults that the run survives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "study folder")


COUNTER = """
import json, os, signal, time
from pathlib import Path
state_file = Path('checkpoints') / 'last.json'
run = os.environ['SSD_RUN_ID']
state = {'run': run, 'epoch': 0, 'weight': 1.0}
if state_file.exists() and json.loads(state_file.read_text())['run'] == run:
    state = json.loads(state_file.read_text())
    print('resumed after epoch', state['epoch'])
for epoch in range(state['epoch'] + 1, 7):
    state.update(epoch=epoch, weight=state['weight'] * 1.1 + epoch)
    temporary = state_file.with_suffix('.tmp')
    temporary.write_text(json.dumps(state))
    os.replace(temporary, state_file)
    print('epoch', epoch, flush=True)
    if epoch in KILL_AFTER and not Path(f'killed{epoch}').exists():
        Path(f'killed{epoch}').touch()
        os.kill(os.getpid(), signal.SIGKILL)
print('weight', state['weight'].hex(), 'divisor', os.environ.get('SSD_BATCH_DIVISOR', '1'))
"""


@pytest.mark.skipif(not POSIX, reason="SIGKILL")
@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["auto", "fresh"])
def test_killed_kernel_resumes_its_own_run(place, fresh):
    """Two kills; the last epoch's state is that of an undisturbed run; only the second in a row halves the batch."""
    weight = 1.0
    for epoch in range(1, 7):
        weight = weight * 1.1 + epoch
    place.write("KILL_AFTER = (2, 4)\nprint(KILL_AFTER)", "## 2. Training", COUNTER)
    (place.checkpoints / "last.json").write_text(json.dumps({"run": "of another", "epoch": 5, "weight": 0.0}))
    result = place.run(*fresh)
    assert result.returncode == 0, result.stderr
    counted = Path("/proc/vmstat").is_file() and "oom_kill " in Path("/proc/vmstat").read_text()
    assert result.stdout.count("signal 9") == 2
    assert result.stdout.count("signal 9; it looks like memory") == (1 if counted else 2)
    text = outputs(place.notebook)
    assert "resumed after epoch 4" in text
    assert f"weight {weight.hex()} divisor {2 if counted else 4}" in text
    assert place.kernels() == [] and place.left_over() == []


def test_memory_error_divides_the_batch(place):
    divisor = "import os\nd = int(os.environ.get('SSD_BATCH_DIVISOR', '1'))\nprint('divisor', d)"
    place.write(divisor + "\nif d < 4: raise MemoryError('no room')")
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert "ran out of memory (MemoryError: no room)" in result.stdout
    assert "divisor 4" in outputs(place.notebook)


def test_foreign_kernelspec_is_found_out_and_replaced(place):
    kernelspec(place)
    place.write("import sys\nprint(sys.executable == " + repr(sys.executable) + ")")
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert "the kernel 'python3' belongs to /opt/other/bin/python: this Python is used instead" in result.stdout
    assert outputs(place.notebook) == "True\n"


def test_unknown_kernelspec_is_replaced(place):
    place.write("print(1)", metadata={"kernelspec": {"name": "lab", "display_name": "Lab", "language": "python"}})
    result = place.run()
    assert result.returncode == 0 and "no kernel 'lab' is installed" in result.stdout


def test_lock_of_a_dead_process_is_taken_over(place):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    note = {"pid": dead.pid, "host": socket.gethostname(), "since": "yesterday"}
    place.write(*GOOD)
    (place.folder / "study.ipynb.lock").write_text(json.dumps(note))
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert f"a lock of process {dead.pid}, which is gone, was taken over" in result.stdout
    assert place.left_over() == []


@pytest.mark.skipif(not POSIX, reason="SIGKILL")
def test_killed_runner_leaves_no_kernel_and_no_lock_that_holds(place):
    place.write("print(1)", LONG)
    before = place.notebook.read_bytes()
    process = place.start()
    place.wait_for("running")
    process.kill()
    finish(process)
    assert place.notebook.read_bytes() == before
    end = time.monotonic() + 15  # the kernel looks after its parent once a second
    while place.kernels() and time.monotonic() < end:
        time.sleep(0.2)
    assert place.kernels() == []
    place.write(*GOOD)
    assert place.run().returncode == 0
    assert place.left_over() == []


@pytest.mark.skipif(not POSIX, reason="limits of a process")
def test_a_disk_that_fills_up_in_the_run(place):
    """Copies that cannot be saved do not end the run; the result that cannot be written does, and says so."""
    small_files(place)
    place.write("print('x' * 100_000)", "print('still here')\nopen('second', 'w').close()")
    before = place.notebook.read_bytes()
    result = place.run()
    assert result.returncode == 11, result.stderr
    assert "warning: the working copy cannot be saved (File too large); going on" in result.stdout
    assert re.search(r"error: The result cannot be written \(File too large\)", result.stderr)
    assert (place.folder / "second").exists()
    assert place.notebook.read_bytes() == before and place.left_over() == []


def test_machine_path_is_published_with_a_warning_and_found_by_check(place):
    """Hours of work are not thrown away for a path in an output; the committed page is held to more by --check."""
    place.write("import os; print(os.getcwd())")
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert re.search(r"no paths of one machine +'.+' in code cell 1", result.stdout)
    result = place.run("--check")
    assert result.returncode == 9
    assert re.search(r"study\.ipynb does not pass: no paths of one machine: '.+' in code cell 1", result.stderr)


def test_notebook_edited_during_the_run_is_left_alone(place):
    place.write(
        "print(1)", "from pathlib import Path\np = Path('study.ipynb')\np.write_text(p.read_text() + '\\n')\nprint(2)"
    )
    before = place.notebook.read_bytes()
    result = place.run()
    assert result.returncode == 9 and "was edited during the run and is left alone" in result.stderr
    assert place.notebook.read_bytes() == before + b"\n"
    assert outputs(place.folder / "study.failed.ipynb") == "1\n2\n"


@pytest.mark.skipif(not POSIX, reason="pipes")
def test_a_reader_that_goes_away_does_not_end_the_run(place):
    place.write(*GOOD)
    process = place.start()
    process.stdout.close()
    process.stdout = None
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert outputs(place.notebook) == "one\ntwo\n"


def test_report_that_cannot_be_written_is_a_warning(place):
    place.write(*GOOD)
    put(place, "file", "")
    result = place.run("--report", "file/report.json")
    assert result.returncode == 0 and "warning: the report cannot be written" in result.stderr


def test_copy_is_saved_within_a_long_cell(place):
    """With the interval shortened to a second, the copy on the disk grows while the cell runs."""
    starter = "import runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {!r})\nimport execute_ssd_notebook as e\n"
    starter += "e.SAVE_SECONDS = 1\nsys.exit(e.main(sys.argv[1:]))\n"
    from runner_helpers import ROOT

    put(place, "start.py", starter.format(str(ROOT)))
    place.write("print(1)", LONG)
    process = subprocess.Popen(
        [sys.executable, "start.py", "x", str(place.notebook)], cwd=place.folder, env=place.env, stdout=subprocess.PIPE
    )
    try:
        place.wait_for("running")
        end = time.monotonic() + 15
        seen = ""
        while "line 12" not in seen and time.monotonic() < end:
            time.sleep(0.3)
            with contextlib.suppress(Exception):
                seen = outputs(place.folder / "study.partial.ipynb")
        assert "line 12" in seen
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM if POSIX else signal.SIGBREAK)
        process.communicate(timeout=30)


# -- fetching


def test_clone_and_second_run(place, tmp_path):
    url = git_repository(draw_layout(tmp_path / "mirror"))
    place.write(DATA, "import os\nprint(sorted(os.listdir('BCCD_Dataset/BCCD')))")
    result = place.run("--dataset-url", url)
    assert result.returncode == 0, result.stderr
    assert "4 images with annotations (train 2, val 1, test 1)" in result.stdout
    assert place.left_over() == []


def test_broken_clone_is_fetched_again(place, tmp_path):
    """A clone whose checkout was cut off holds nothing of the user's: it is removed."""
    url = git_repository(draw_layout(tmp_path / "mirror"))
    git("clone", "--quiet", url, str(place.folder / "BCCD_Dataset"), cwd=place.folder)
    (place.folder / "BCCD_Dataset" / "BCCD" / "JPEGImages" / "a.jpg").unlink()
    left = place.folder / ".BCCD_Dataset.fetch-999999999"  # of a run that was killed
    left.mkdir()
    place.write(DATA)
    result = place.run("--dataset-url", url)
    assert result.returncode == 0, result.stderr
    assert "an unfinished clone is removed and fetched again" in result.stdout
    assert (place.folder / "BCCD_Dataset" / "BCCD" / "JPEGImages" / "a.jpg").is_file()
    assert place.left_over() == []


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archive_with_a_folder_around(place, tmp_path, kind):
    source = draw_layout(tmp_path / "BCCD_Dataset-master")
    archive = tmp_path / f"data.{kind}"
    if kind == "zip":
        zip_folder(source, archive, "BCCD_Dataset-master/")
    else:
        with tarfile.open(archive, "w:gz") as bundle:
            bundle.add(source, "BCCD_Dataset-master")
    place.write(DATA)
    with WebServer(archive.read_bytes(), cut=1) as server:
        result = place.run("--dataset-url", f"{server.address}/data.{kind}")
    assert result.returncode == 0, result.stderr
    assert server.requests[0] == "" and server.requests[1].startswith("bytes=")  # the second try resumed
    assert tree(place.folder / "BCCD_Dataset") == tree(source)


def test_dataset_of_another_place_reaches_the_kernel(place, tmp_path):
    data = draw_layout(tmp_path / "Данные крови")
    place.write(DATA, "import os\nfrom pathlib import Path\nprint(Path(os.environ['BCCD_DATASET'], 'BCCD').is_dir())")
    for given in (data, data / "BCCD"):  # the inner folder will do
        result = place.run("--dataset", os.path.relpath(given, place.folder))
        assert result.returncode == 0, result.stderr
        assert outputs(place.notebook) == "True\n"


def weights_bytes() -> bytes:
    """A file as torchvision publishes it: its key names, next to nothing in them."""
    import execute_ssd_notebook

    names = list(execute_ssd_notebook.PROJECT.weights_keys)
    return pickled([*names, *(name.replace("weight", "bias") for name in names)]) + b"\0" * 300_000


def weights_address(server: WebServer, data: bytes, digest: str = "") -> str:
    import hashlib

    return f"{server.address}/vgg16_features-{digest or hashlib.sha256(data).hexdigest()[:8]}.pth"


@pytest.mark.parametrize(
    "fault", ["none", "cut", "no-ranges", "part", "foreign-part", "whole-part", "damaged-cache"], ids=lambda name: name
)
def test_weights_download(place, fault):
    """Whatever the network and earlier tries left: the whole file with the right checksum is in torch's cache."""
    data = weights_bytes()
    place.write(WEIGHTS)
    with WebServer(data, ranges=fault != "no-ranges", cut=2 if fault in ("cut", "no-ranges") else 0) as server:
        address = weights_address(server, data)
        place.env["VGG16_WEIGHTS_URL"] = address
        target = place.folder / "torch" / "hub" / "checkpoints" / address.rpartition("/")[2]
        target.parent.mkdir(parents=True)
        part = target.with_name(target.name + ".part")
        if fault == "part":
            part.write_bytes(data[:100_000])
        elif fault == "foreign-part":
            part.write_bytes(b"?" * 100_000)
        elif fault == "whole-part":
            part.write_bytes(data)
        elif fault == "damaged-cache":
            target.write_bytes(data[:1000])
        result = place.run()
    assert result.returncode == 0, result.stderr
    assert "fetched into torch's cache" in result.stdout, result.stdout
    assert target.read_bytes() == data and not part.exists()
    if fault in ("part", "foreign-part"):
        assert server.requests[0] == "bytes=100000-"
    if fault == "cut":
        assert "resuming at" in result.stdout


@pytest.mark.parametrize("fault", ["offline", "not-found", "wrong-checksum"])
def test_weights_that_cannot_be_had_are_a_warning(place, fault):
    place.write(WEIGHTS)
    with WebServer(b"something else", status=404 if fault == "not-found" else 0) as server:
        place.env["VGG16_WEIGHTS_URL"] = weights_address(server, b"", "88682ab5")
        if fault == "offline":
            place.env["VGG16_WEIGHTS_URL"] = "http://127.0.0.1:9/vgg16_features-88682ab5.pth"
        result = place.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: VGG-16 features cannot be fetched (") == 1
    assert result.stderr == ""


def test_weights_file_reaches_the_kernel(place):
    put(place, "w.pth", weights_bytes())
    place.write(WEIGHTS, "import os\nprint(os.environ['VGG16_WEIGHTS'])")
    result = place.run("--weights", str(place.folder / "w.pth"))
    assert result.returncode == 0, result.stderr
    assert outputs(place.notebook) == "w.pth\n"  # relative: no machine's path on the page


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_names_in_files_of_torch_save(tmp_path, legacy):
    """Both formats of torch.save are told from another network's, without unpickling anything."""
    import torch

    import execute_ssd_notebook as runner

    good = {key: torch.zeros(1) for key in runner.PROJECT.weights_keys}
    torch.save(good, tmp_path / "good.pth", _use_new_zipfile_serialization=not legacy)
    runner.check_weights(tmp_path / "good.pth", runner.PROJECT)
    torch.save({"layer1.weight": torch.zeros(1)}, tmp_path / "bad.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"no features\.0\.weight"):
        runner.check_weights(tmp_path / "bad.pth", runner.PROJECT)


# -- installing


def wheel(folder, name: str, version: str) -> None:
    """A wheel of an empty package."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as bundle:
        bundle.writestr(f"{name}/__init__.py", "")
        bundle.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        bundle.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        bundle.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip")
@pytest.mark.parametrize("available", [True, False], ids=["available", "no-index"])
def test_install(place, available):
    """--install puts the package in and goes on, or says that it could not."""
    old_package("torchmetrics", "torchmetrics")(place)
    wheels, target = place.folder.parent / "wheels", place.folder / "target"  # pip splits find-links at spaces
    wheels.mkdir()
    if available:
        wheel(wheels, "torchmetrics", "9.9")
    place.env.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels), PIP_TARGET=str(target), PIP_NO_DEPS="1")
    place.env["PYTHONPATH"] = os.pathsep.join([str(target), place.env["PYTHONPATH"]])
    place.write("import torchmetrics\nprint('imported')")
    before = place.notebook.read_bytes()
    result = place.run("--install")
    if available:
        assert result.returncode == 0, result.stderr
        assert "torchmetrics 0.1 is older than 1.3: installing" in result.stdout
        assert outputs(place.notebook) == "imported\n"
    else:
        assert result.returncode == 3 and "Installing failed" in result.stderr
        assert place.notebook.read_bytes() == before
