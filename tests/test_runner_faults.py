"""Faults injected for real into the runner: the exit code, the sentence, and that nothing is lost.

After each row of the table: the exit code, one sentence on standard error and no traceback, the
notebook and the checkpoints byte for byte as before, no process and no half-written file left. Rows
that send signals, limit the process or hide packages run the script as a process, all others call
it here. Where cells run, they run in a real kernel. Only "no-space" and "space-for-checkpoints"
patch a function.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from runner_helpers import DATA, FETCH, PARAMETERS, Place, finish, outputs, tree

import execute_ssd_notebook as runner

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX"),
]
GOOD = (PARAMETERS, "print('one')", "print('two')")
WEIGHTS = ("parameters", "VGG16_WEIGHTS = ''\nVGG16_WEIGHTS")
LONG = """import time
open('running', 'w').close()
for i in range(600):
    print('line', i, flush=True)
    time.sleep(0.1)"""
DEAF = """import signal, time, subprocess
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(['sleep', '300'])
open('running', 'w').close()
print('asleep', flush=True)
time.sleep(300)"""
KILL = """import os, signal, time
print('last words', flush=True)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)"""


@dataclass
class Fault:
    """One row: what is broken, and what has to be said."""

    name: str
    code: int
    sentence: str  # regular expression, searched in standard error
    arguments: tuple[str, ...] = ()
    cells: tuple = GOOD
    prepare: Callable[[Place], object] | None = None
    during: Callable[[Place, subprocess.Popen], None] | None = None
    after: Callable[[Place], object] | None = None
    kept: str = ""  # what stands in the file with the outputs so far
    process: bool = False  # needs a process of its own


def put(name, data):
    """Writes a file."""

    def prepare(place):
        place.put(name, data)

    return prepare


def old_package(name):
    """An older release of a package, found before the installed one."""

    def prepare(place):
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n"
        place.put(f"shadow/{name}-0.1.dist-info/METADATA", metadata)
        place.shadow()

    return prepare


def bare_python(place):
    """An environment without any package, as a fresh installation is, and no uv either."""
    venv.create(place.folder.parent / "bare", with_pip=False, symlinks=True)
    place.python = [str(place.folder.parent / "bare" / "bin" / "python")]
    place.env["PATH"] = str(place.folder)


def no_space(free):
    """Patched: the disk claims to have so many bytes left."""

    def disk_usage(path):
        return SimpleNamespace(free=free)

    def prepare(place):
        place.patch.setattr(shutil, "disk_usage", disk_usage)

    return prepare


def small_disk(place):
    """The result goes to a file system of one megabyte."""
    place.disk = place.folder.parent / "disk"
    place.disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")


def unmount(place):
    assert list(place.disk.glob("*.ipynb")) == []
    subprocess.run(["umount", str(place.disk)], check=True)


def notes_are_kept(place):
    assert (place.folder / "BCCD_Dataset" / "my_notes.txt").read_text() == "mine"


def low_output_limit(place):
    place.patch.setattr(runner, "OUTPUT_LIMIT", 10**6)


def broken_kernel(place):
    place.shadow(ipykernel_launcher="raise ImportError('no zmq here')")


def slow_kernel(place):
    launcher = "open('running', 'w').close()\nimport time\ntime.sleep(300)"
    place.shadow(ipykernel_launcher=launcher)


def remove_notebook(place):
    place.notebook.unlink()


def folder_in_its_place(place):
    place.notebook.unlink()
    place.notebook.mkdir()


def cut_notebook(place):
    place.notebook.write_bytes(place.notebook.read_bytes()[:300])


def protect_notebook(place):
    place.notebook.chmod(0o444)


def protected_results(place):
    (place.folder / "results").mkdir(0o555)


def first_runner(place):
    """The row's own script is the second; the first holds the lock."""
    place.first = place.start()
    place.wait_for("running")


def end_first_runner(place):
    place.first.send_signal(signal.SIGINT)
    assert finish(place.first).returncode == 130


def send(name, times=1, file="running"):
    """Sends a signal some times, once a file is there."""

    def during(place, process):
        place.wait_for(file)
        time.sleep(0.4)
        for _ in range(times):
            process.send_signal(getattr(signal, name))
            time.sleep(0.3)

    return during


def slow_clone(seconds):
    """A fetch cell whose clone takes its time, in a process of its own."""
    body = f"subprocess.run(['sh', '-c', 'touch running; exec sleep {seconds}'])"
    source = f"import subprocess\ndef fetch_dataset(folder, url, say=None):\n    {body}"
    source += "\ndataset_root = str"
    return ("fetch", source)


FAULTS = [
    # wrong use
    Fault("unknown-parameter", 2, r"-p COUMT: .*did you mean COUNT\?", ("-p", "COUMT=4")),
    Fault(
        "wrong-type", 2, r"-p COUNT: 'abc' is no int, like the notebook's 3", ("-p", "COUNT=abc")
    ),
    Fault("no-equals-sign", 2, r"write it as NAME=VALUE", ("-p", "COUNT")),
    Fault(
        "override-in-place",
        2,
        r"overrides are never published in place",
        ("-p", "COUNT=4", "--output", "study.ipynb"),
    ),
    Fault(
        "override-own-checkpoints",
        2,
        r"the notebook's own folder",
        ("-p", "CHECKPOINT_DIR=./checkpoints"),
    ),
    Fault("output-no-notebook", 2, r"ends in \.ipynb", ("--output", "page.html")),
    Fault("unknown-option", 2, r"unrecognized arguments: --fast", ("--fast",)),
    Fault(
        "options-clash",
        2,
        r"--fresh and -p TRAINING do not go together",
        ("--fresh", "-p", "TRAINING=reuse"),
        (("parameters", "TRAINING = 'auto'\nTRAINING"),),
    ),
    # packages
    Fault(
        "nothing-installed",
        3,
        r"torch is missing; .*nbconvert is missing; filelock is missing; packaging is missing: run",
        prepare=bare_python,
        process=True,
    ),
    Fault(
        "nothing-to-install-with",
        3,
        r"Installing failed, .* run  \S*python\S* -m pip install \"torch>=",
        ("--install",),
        prepare=bare_python,
        process=True,
    ),
    Fault(
        "package-too-old",
        3,
        r"lxml 0\.1 is older than 5\.0: run  \S*python\S* -m pip install \"lxml>=5\.0\"",
        prepare=old_package("lxml"),
        process=True,
    ),
    # dataset and weights
    Fault(
        "dataset-missing",
        4,
        r"There is no folder .*nowhere: name .* --dataset",
        ("--dataset", "nowhere"),
    ),
    Fault("dataset-not-fetched", 4, r"Could not clone somewhere \(no answer\)", (), (DATA, FETCH)),
    Fault(
        "dataset-own-folder",
        4,
        r"BCCD_Dataset is not a BCCD dataset\.",
        (),
        (DATA, FETCH),
        put("BCCD_Dataset/my_notes.txt", "mine"),
        after=notes_are_kept,
    ),
    Fault(
        "weights-missing",
        5,
        r"There is no file .*w\.pth: name .* --weights",
        ("--weights", "w.pth"),
    ),
    # cells
    Fault(
        "cell-error",
        6,
        r"Cell 2 of 3 \(2\. Data\) failed with KeyError: 'wbc'\. Outputs so far: study\.failed",
        (),
        ("print(1)", "## 2. Data", "print('so far')\n{}['wbc']", "print(3)"),
        kept="so far",
    ),
    Fault("cell-syntax-error", 6, r"Cell 1 of 1 failed with SyntaxError", (), ("for",)),
    Fault("cell-asks-for-input", 6, r"StdinNotImplementedError", (), ("input('name?')",)),
    Fault("cell-exits", 6, r"failed with SystemExit: 3", (), ("import sys; sys.exit(3)",)),
    Fault(
        "cell-prints-without-end",
        6,
        r"printed over 1000000 characters",
        (),
        ("import time\nwhile True: print('x' * 100_000, time.sleep(0.01))",),
        low_output_limit,
        kept="xxx",
    ),
    # kernel
    Fault(
        "kernel-killed",
        7,
        r"died in cell 1 of 1, signal 9, restarts: 1",
        ("--retries", "1"),
        (KILL,),
        kept="last words",
    ),
    Fault(
        "kernel-exits",
        7,
        r"died in cell 2 of 2, exit code 3",
        ("--retries", "0"),
        ("print('so far')", "import os; os._exit(3)"),
        kept="so far",
    ),
    Fault(
        "kernel-does-not-start",
        7,
        r"could not be started: exit code 1 \(ImportError: no zmq here\)",
        ("--retries", "0"),
        prepare=broken_kernel,
    ),
    # time
    Fault(
        "timeout",
        8,
        r"Cell 2 of 2 ran longer than --timeout 1 s",
        ("--timeout", "1"),
        ("print(1)", LONG),
        kept="line 5",
    ),
    Fault(
        "timeout-interrupt-ignored",
        8,
        r"ran longer than --timeout 1 s",
        ("--timeout", "1"),
        (DEAF,),
        kept="asleep",
    ),
    Fault(
        "timeout-interrupt-swallowed",
        8,
        r"Cell 1 of 2 ran longer than --timeout 1 s",
        ("--timeout", "1"),
        (
            "import time\ntry: time.sleep(300)\nexcept KeyboardInterrupt: print('so far')",
            "print(2)",
        ),
        kept="so far",
    ),
    # validation
    Fault(
        "silent-cells", 9, r"coverage 50\.0% \(code cell 2\)", (), ("print(1)", "x = 1"), kept="1"
    ),
    # notebook
    Fault("notebook-missing", 10, r"There is no", prepare=remove_notebook),
    Fault(
        "notebook-is-a-folder",
        10,
        r"Is a directory",
        prepare=folder_in_its_place,
    ),
    Fault(
        "notebook-cut",
        10,
        r"not a valid notebook",
        prepare=cut_notebook,
    ),
    Fault(
        "notebook-merge-conflict",
        10,
        r"not a valid notebook .*<<<<<<<",
        prepare=put("study.ipynb", "{\n<<<<<<< HEAD\n"),
    ),
    Fault("notebook-not-text", 10, r"utf-8.* codec", prepare=put("study.ipynb", b"\x89PNG\xff")),
    Fault(
        "notebook-other-json",
        10,
        r"not a valid notebook",
        prepare=put("study.ipynb", '{"cells": []}'),
    ),
    # storage
    Fault(
        "notebook-write-protected",
        11,
        r"\(study\.ipynb is write-protected\): make it writable .* or write elsewhere by --output",
        prepare=protect_notebook,
    ),
    Fault(
        "folder-read-only",
        11,
        r"Cannot write study\.ipynb in .*results \(results is write-protected\): make it writable",
        ("--output", "results/study.ipynb"),
        prepare=protected_results,
    ),
    Fault(
        "checkpoints-are-a-file",
        11,
        r"Cannot write weights in .*weights \(File exists\)",
        ("-p", "CHECKPOINT_DIR=weights"),
        prepare=put("weights", "a file"),
    ),
    Fault("no-space", 11, r"Cannot .*\(1 MB are free, .*\): make room", prepare=no_space(10**6)),
    Fault(
        "space-for-checkpoints",
        11,
        r"Cannot write checkpoints .*\(1000 MB are free, 2000 MB needed\)",
        ("--fresh",),
        prepare=no_space(10**9),
    ),
    Fault(
        "disk-of-one-megabyte",
        11,
        r"Cannot write result\.ipynb .*\(1 MB are free, 5\d MB needed\)",
        ("--output", "../disk/result.ipynb"),
        prepare=small_disk,
        after=unmount,
    ),
    Fault(
        "page-cannot-be-replaced",
        11,
        r"result\.ipynb cannot be replaced \(Is a directory\)",
        ("--output", "result.ipynb"),
        (PARAMETERS, "import os; print(os.mkdir('result.ipynb'))"),
    ),
    # two at once, signals
    Fault(
        "second-runner",
        12,
        r"Another run works on study\.ipynb",
        (),
        (LONG,),
        first_runner,
        after=end_first_runner,
    ),
    Fault(
        "ctrl-c",
        130,
        r"Ended by SIGINT; run it again to go on.*study\.partial\.ipynb",
        (),
        ("print(1)", LONG),
        during=send("SIGINT"),
        kept="line 2",
    ),
    Fault(
        "terminated",
        143,
        r"by SIGTERM; run it again, but not fresh, to go on",
        ("--fresh",),
        (PARAMETERS, LONG),
        during=send("SIGTERM"),
        kept="line 2",
    ),
    Fault("terminal-closed", 129, r"by SIGHUP", (), (LONG,), during=send("SIGHUP"), kept="line 2"),
    Fault("ctrl-c-twice", 130, r"by SIGINT", (), (DEAF,), during=send("SIGINT", 2), kept="asleep"),
    Fault(
        "ctrl-c-while-the-kernel-starts",
        130,
        r"Ended by SIGINT",
        prepare=slow_kernel,
        during=send("SIGINT"),
    ),
    Fault(
        "ctrl-c-while-cloning",
        130,
        r"Ended by SIGINT",
        (),
        (DATA, slow_clone(300)),
        during=send("SIGINT"),
    ),
]


def test_the_table_is_long_enough():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 30
    assert {fault.code for fault in FAULTS} >= set(range(2, 13)) | {129, 130, 143}


def content(path):
    """A file's bytes; None where there is none."""
    if path.is_file():
        return path.read_bytes()
    return None


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path / "study folder")
    made.patch = monkeypatch
    return made


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault(fault, place, capsys):
    place.write(*fault.cells)
    if fault.prepare:
        fault.prepare(place)
    page = content(place.notebook)
    checkpoints = tree(place.checkpoints)

    if fault.process or fault.during:
        process = place.start(*fault.arguments)
        if fault.during:
            fault.during(place, process)
        done = finish(process)
        code = done.returncode
        out = done.stdout
        err = done.stderr
    else:
        code, out, err = place.call(capsys, *fault.arguments)

    said = f"{out}\n{err}"
    assert code == fault.code, said
    assert re.search(fault.sentence, err), said
    assert "Traceback" not in err, said
    assert "never retrieved" not in err, said
    assert err.count("error: ") == 1, said
    if fault.after:
        fault.after(place)
    assert content(place.notebook) == page
    assert tree(place.checkpoints) == checkpoints
    if fault.kept:
        kept = place.folder / "study.failed.ipynb"
        if fault.code > 128:
            kept = place.folder / "study.partial.ipynb"
        assert fault.kept in outputs(kept)
        assert kept.name in err
    assert place.kernels() == []
    assert place.left_over() == []


# -- faults that the run survives

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
    if epoch in (2, 4) and not Path(f'killed{epoch}').exists():
        Path(f'killed{epoch}').touch()
        os.kill(os.getpid(), signal.SIGKILL)
print('weight', state['weight'].hex(), 'divisor', os.environ.get('SSD_BATCH_DIVISOR', '1'))
"""


def test_killed_kernel_resumes_its_own_run(place, capsys):
    """Two kills: the last state is an undisturbed run's; the second in a row halves the batch."""
    weight = 1.0
    for epoch in range(1, 7):
        weight = weight * 1.1 + epoch
    place.write("print(1)", "## 2. Training", COUNTER)
    place.put("checkpoints/last.json", json.dumps({"run": "another", "epoch": 5, "weight": 0.0}))
    code, out, err = place.call(capsys, "--fresh")
    assert code == 0, err
    assert out.count("signal 9") == 2
    assert out.count("signal 9; it looks like memory") == 1
    text = outputs(place.notebook)
    assert "resumed after epoch 4" in text
    assert f"weight {weight.hex()} divisor 2" in text
    assert place.kernels() == []
    assert place.left_over() == []


def test_memory_error_divides_the_batch(place, capsys):
    divisor = "import os\nd = int(os.environ.get('SSD_BATCH_DIVISOR', '1'))\nprint('divisor', d)"
    place.write(divisor + "\nif d < 2: raise MemoryError('no room')")
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert "ran out of memory (MemoryError: no room); it looks like memory" in out
    assert "divisor 2" in outputs(place.notebook)


def test_another_pythons_kernelspec_is_not_used(place, capsys):
    argv = ["/opt/other/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = json.dumps({"argv": argv, "display_name": "other", "language": "python"})
    place.put("jupyter/kernels/python3/kernel.json", spec)
    place.env["JUPYTER_PATH"] = str(place.folder / "jupyter")
    lab = {"name": "lab", "display_name": "Lab", "language": "python"}
    place.write(
        f"import sys\nprint(sys.executable == {sys.executable!r})", metadata={"kernelspec": lab}
    )
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert outputs(place.notebook) == "True\n"


def test_killed_runner_leaves_no_kernel_and_no_lock_that_holds(place, capsys):
    place.write("print(1)", LONG)
    before = place.notebook.read_bytes()
    process = place.start()
    place.wait_for("running")
    process.kill()
    finish(process)
    assert place.notebook.read_bytes() == before
    end = time.monotonic() + 15  # the kernel looks after its parent once a second
    while place.kernels() and time.monotonic() < end:
        time.sleep(0.1)
    assert place.kernels() == []
    place.write(*GOOD)
    assert place.call(capsys)[0] == 0
    assert place.left_over() == []


def test_machine_path_is_published_with_a_warning_and_found_by_check(place, capsys):
    """Hours of work are not thrown away for a path in an output; --check is stricter."""
    place.write("import os; print(os.getcwd())")
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert re.search(r"! no paths of one machine +'.+' in code cell 1", out)
    code, out, err = place.call(capsys, "--check")
    assert code == 9
    said = r"study\.ipynb does not pass: no paths of one machine: '.+' in code cell 1"
    assert re.search(said, err)


def test_notebook_edited_during_the_run_is_left_alone(place, capsys):
    edit = "from pathlib import Path\np = Path('study.ipynb')\np.write_text(p.read_text() + '\\n')"
    place.write("print(1)", edit)
    before = place.notebook.read_bytes()
    code, out, err = place.call(capsys)
    assert code == 9
    assert "was edited during the run and is left alone" in err
    assert place.notebook.read_bytes() == before + b"\n"
    assert outputs(place.folder / "study.failed.ipynb") == "1\n"


def test_notebook_moved_during_the_run_costs_no_outputs(place, capsys):
    place.write("print(1)", "import os\nprint(os.rename('study.ipynb', 'moved.ipynb'))")
    code, out, err = place.call(capsys)
    assert code == 9
    assert "was edited during the run and is left alone" in err
    assert "Outputs so far: study.failed.ipynb." in err
    assert outputs(place.folder / "study.failed.ipynb") == "1\nNone\n"


def test_a_reader_that_goes_away_does_not_end_the_run(place):
    place.write(*GOOD)
    process = place.start()
    process.stdout.close()
    process.stdout = None
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert outputs(place.notebook) == "one\ntwo\n"


def test_copy_is_saved_within_a_long_cell(place, monkeypatch, capsys):
    """With the interval shortened, the copy on the disk grows while the cell runs."""
    monkeypatch.setattr(runner, "SAVE_SECONDS", 0.5)
    place.write(
        "import time\nfor i in range(20):\n    print('line', i, flush=True)\n    time.sleep(0.1)\n"
        "import shutil; shutil.copy('study.partial.ipynb', 'copy.ipynb')"
    )
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert "line 5" in outputs(place.folder / "copy.ipynb")


# -- installing


def wheel(folder, name, version):
    """A wheel of an empty package."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as bundle:
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        bundle.writestr(f"{name}/__init__.py", "")
        for file, text in (("METADATA", metadata), ("WHEEL", tag), ("RECORD", "")):
            bundle.writestr(f"{info}/{file}", text)


@pytest.mark.parametrize("available", [True, False], ids=["available", "no-index"])
def test_install(place, available):
    """--install puts the package in, shows pip at work and goes on; or says that it could not."""
    old_package("lxml")(place)
    wheels = place.folder.parent / "wheels"
    target = place.folder / "target"
    if available:
        wheel(wheels, "lxml", "9.9")
    place.env["PIP_NO_INDEX"] = "1"
    place.env["PIP_NO_DEPS"] = "1"
    place.env["PIP_FIND_LINKS"] = str(wheels)
    place.env["PIP_TARGET"] = str(target)
    place.env["PYTHONPATH"] = os.pathsep.join([str(target), place.env["PYTHONPATH"]])
    place.write("import lxml\nprint('imported')")
    before = place.notebook.read_bytes()
    result = place.run("--install")
    if available:
        assert result.returncode == 0, result.stderr
        assert "lxml 0.1 is older than 5.0: installing" in result.stdout
        assert "Successfully installed" in result.stdout
        assert outputs(place.notebook) == "imported\n"
    else:
        assert result.returncode == 3
        assert "Installing failed, see above" in result.stderr
        assert place.notebook.read_bytes() == before
