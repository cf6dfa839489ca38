"""What the tests of the runner share: small notebooks, and the script in a folder of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbformat import v4

import execute_ssd_notebook

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "execute_ssd_notebook.py"
PARAMETERS = (
    "parameters",
    "COUNT = 3\nRATE = 0.1\nTITLE = 'blood'\nCHECKPOINT_DIR = 'checkpoints'\nCOUNT",
)
DATA = ("parameters", "DATA_DIR = 'BCCD_Dataset'\nDATASET_URL = 'somewhere'\nDATA_DIR")
FETCH = (  # stands in for the notebook's own cells: a folder that is there, or nothing
    "fetch",
    """class DatasetError(ValueError): pass
def fetch_dataset(folder, url, shipped="data/BCCD_Dataset.zip", say=None):
    say(f"looking into {url}")
    if not folder.is_dir(): raise DatasetError(f"Could not clone {url} (no answer): set DATA_DIR.")
    return folder
def dataset_root(folder):
    if not (folder / "BCCD").is_dir(): raise DatasetError(f"{folder.name} is not a BCCD dataset.")
    return folder / "BCCD"
print('defined')""",
)
FOREIGN_VARIABLES = ("BCCD_", "VGG16_", "SSD_", "PIP_", "JUPYTER", "MPL", "PYTHONPATH")


def environment_without(*prefixes):
    """This process's environment without the variables that begin so."""
    kept = {}
    for name, value in os.environ.items():
        if not name.startswith(prefixes):
            kept[name] = value
    return kept


def nbconvert_in_place(path):
    """The command by which Jupyter itself executes a notebook in place."""
    options = ["--to", "notebook", "--execute", "--inplace"]
    return [sys.executable, "-m", "nbconvert", *options, str(path)]


def write_notebook(path, *cells, metadata=None, minor=5):
    """Write a notebook of code cells; "## ..." makes a text cell, (tag, source) a tag.

    minor: of the format 4.minor; cells have ids from 4.5 on.
    """
    made = []
    for number, content in enumerate(cells):
        if isinstance(content, tuple):
            tag, source = content
            cell = v4.new_code_cell(source, metadata={"tags": [tag]})
        elif content.startswith("## "):
            cell = v4.new_markdown_cell(content)
        else:
            cell = v4.new_code_cell(content)
        cell["id"] = f"cell-{number}"
        if minor < 5:
            del cell["id"]
        made.append(cell)
    notebook = v4.new_notebook(cells=made, metadata=metadata or {}, nbformat_minor=minor)
    nbformat.write(notebook, path)
    return path


def outputs(path):
    """All text that a notebook's cells printed."""
    text = ""
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            text += output.get("text", "")
    return text


def tree(folder):
    """{path: bytes} of every file below a folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder)] = path.read_bytes()
    return files


def git_repository(folder):
    """Commit everything in a folder; returns its address."""
    env = dict(os.environ)
    for role in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{role}_NAME"] = "somebody"
        env[f"GIT_{role}_EMAIL"] = "x@y.z"
    for command in ("init -q", "add --all", "commit -q -m data"):
        subprocess.run(["git", *command.split()], cwd=folder, env=env, check=True)
    return folder.as_uri()


class Place:
    """A folder with a notebook and checkpoints, and the script that runs there."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        self.notebook = folder / "study.ipynb"
        self.checkpoints = folder / "checkpoints"
        self.put("checkpoints/best_model.pth", b"the trained weights")
        self.put("checkpoints/metrics.json", '{"map": 0.9}')
        self.python = [sys.executable]
        self.script = SCRIPT
        self.limit = None  # called in the child at its start
        self.env = environment_without(*FOREIGN_VARIABLES)
        self.env["OMP_NUM_THREADS"] = "1"
        self.env["GIT_CONFIG_NOSYSTEM"] = "1"

    def put(self, name, data):
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    def write(self, *cells, **kwargs):
        """Write the notebook."""
        return write_notebook(self.notebook, *cells, **kwargs)

    def start(self, *arguments, **kwargs):
        """Start the script on the notebook, as a process."""

        def prepare():  # hear the terminal, also where the tests run under nohup or behind "&"
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.limit:
                self.limit()

        command = [*self.python, str(self.script), str(self.notebook), *arguments]
        kwargs.setdefault("stdout", subprocess.PIPE)
        kwargs.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            preexec_fn=prepare,
            encoding="utf-8",
            errors="replace",
            **kwargs,
        )

    def run(self, *arguments):
        """Run the script on the notebook to its end, as a process."""
        return finish(self.start(*arguments))

    def call(self, capsys, *arguments):
        """The same in this process, which saves its start: (exit code, standard output, error)."""
        before = dict(os.environ)
        here = os.getcwd()
        capsys.readouterr()
        try:
            os.environ.clear()
            os.environ.update(self.env)
            os.chdir(self.folder)
            code = execute_ssd_notebook.main([str(self.notebook), *arguments])
        except SystemExit as end:  # argparse
            code = end.code
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def shadow(self, **files):
        """Put modules before all others on the path of the script and the kernel."""
        for name, text in files.items():
            self.put(f"shadow/{name}.py", text)
        self.env["PYTHONPATH"] = str(self.folder / "shadow")

    def wait_for(self, name, timeout=30):
        """Wait until a file is there."""
        end = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < end, f"no {name} after {timeout} s"
            time.sleep(0.02)

    def kernels(self):
        """Processes that still work in this folder."""
        found = []
        if not os.path.isdir("/proc"):
            return found
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(f"/proc/{entry}/cwd") == str(self.folder):
                    found.append(int(entry))
        return found

    def left_over(self):
        """Files that no run may leave."""
        found = []
        for folder in (self.folder, self.checkpoints):
            for path in folder.iterdir():
                if path.name.startswith(".") and path.suffix != ".lock":
                    found.append(path.name)
        return found


def finish(process, timeout=90):
    """Wait for a started script; a hanging one is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the script hangs\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
