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
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}


def nbconvert_in_place(path):
    """The command by which Jupyter itself executes a notebook in place."""
    options = ["--to", "notebook", "--execute", "--inplace"]
    return [sys.executable, "-m", "nbconvert", *options, str(path)]


def write_notebook(path, *cells, metadata=None):
    """Write a notebook of code cells; "## ..." makes a text cell, (tag, source) a tag."""
    made = []
    for number, cell in enumerate(cells):
        if isinstance(cell, tuple):
            made.append(v4.new_code_cell(cell[1], metadata={"tags": [cell[0]]}))
        else:
            new = v4.new_markdown_cell if cell.startswith("## ") else v4.new_code_cell
            made.append(new(cell))
        made[-1]["id"] = f"cell-{number}"
    nbformat.write(v4.new_notebook(cells=made, metadata=metadata or {}), path)
    return path


def outputs(path):
    """All text that a notebook's cells printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))


def tree(folder):
    """{path: bytes} of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def git_repository(folder):
    """Commit everything in a folder; returns its address."""
    who = {f"GIT_{r}_{w}": "x@y.z" for r in ("AUTHOR", "COMMITTER") for w in ("NAME", "EMAIL")}
    for command in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "data"]):
        subprocess.run(["git", *command], cwd=folder, env={**os.environ, **who}, check=True)
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
        self.python, self.limit = sys.executable, None  # limit: called in the child at its start
        kept = environment_without(*FOREIGN_VARIABLES)
        self.env = {**kept, "OMP_NUM_THREADS": "1", "GIT_CONFIG_NOSYSTEM": "1"}

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

        command = [self.python, str(SCRIPT), str(self.notebook), *arguments]
        kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
        kwargs |= {"preexec_fn": prepare, "encoding": "utf-8", "errors": "replace"}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, **kwargs)

    def run(self, *arguments):
        """Run the script on the notebook to its end, as a process."""
        return finish(self.start(*arguments))

    def call(self, capsys, *arguments):
        """The same in this process, which saves its start: (exit code, standard output, error)."""
        before, here = dict(os.environ), os.getcwd()
        heard = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
            for number, handler in heard.items():
                signal.signal(number, handler)
        return (code, *capsys.readouterr())

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
        for entry in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
            with contextlib.suppress(OSError):
                if (
                    os.readlink(f"/proc/{entry}/cwd") == str(self.folder)
                    and int(entry) != os.getpid()
                ):
                    found.append(int(entry))
        return found

    def left_over(self):
        """Files that no run may leave."""
        names = [p.name for p in (*self.folder.iterdir(), *self.checkpoints.iterdir())]
        return [n for n in names if n.startswith(".") and not n.endswith(".lock")]


def finish(process, timeout=90):
    """Wait for a started script; a hanging one is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the script hangs\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
