"""What the tests of the runner share: small notebooks, the script as a subprocess, layouts, a local web server."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "execute_ssd_notebook.py"
PARAMETERS = ("parameters", "COUNT = 3\nRATE = 0.1\nTITLE = 'blood'\nCHECKPOINT_DIR = 'checkpoints'\nCOUNT")
FOREIGN_VARIABLES = ("BCCD_", "VGG16_", "SSD_", "PIP_", "TORCH_", "XDG_CACHE", "JUPYTER", "MPL", "PYTHONPATH")


def write_notebook(path: Path, *cells: str | tuple[str, str], metadata: dict | None = None) -> Path:
    """A notebook of code cells; ``"## ..."`` makes a text cell, ``(tag, source)`` a tagged code cell."""
    made = []
    for number, cell in enumerate(cells):
        if isinstance(cell, tuple):
            made.append(v4.new_code_cell(cell[1], metadata={"tags": [cell[0]]}))
        else:
            made.append(v4.new_markdown_cell(cell) if cell.startswith("## ") else v4.new_code_cell(cell))
        made[-1]["id"] = f"cell-{number}"
    nbformat.write(v4.new_notebook(cells=made, metadata=metadata or {}), path)
    return path


def outputs(path: Path) -> str:
    """All text that a notebook's cells printed."""
    notebook = nbformat.read(path, as_version=4)
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def draw_layout(folder: Path, **splits: list[str]) -> Path:
    """A dataset folder in BCCD's layout with files that are whole at their ends; the runner looks no deeper."""
    root = folder / "BCCD"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for split, ids in (splits or {"train": ["a", "b"], "val": ["c"], "test": ["d"]}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for item in ids:
            (root / "JPEGImages" / f"{item}.jpg").write_bytes(b"\xff\xd8 picture \xff\xd9")
            (root / "Annotations" / f"{item}.xml").write_text("<annotation></annotation>\n")
    return folder


def zip_folder(folder: Path, archive: Path, prefix: str = "") -> Path:
    """A zip archive of a folder's files."""
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, data in tree(folder).items():
            bundle.writestr(prefix + name, data)
    return archive


def git(*arguments: str, cwd: Path) -> None:
    """A git command that needs no configuration."""
    who = {f"GIT_{role}_{what}": "x@y.z" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=cwd, env={**os.environ, **who}, check=True, capture_output=True)


def git_repository(folder: Path) -> str:
    """Commits everything in a folder; returns its address."""
    git("init", "--quiet", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "-m", "data", cwd=folder)
    return folder.as_uri()


class Place:
    """A folder with a notebook and checkpoints, and the script that runs there."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.notebook = folder / "study.ipynb"
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        (self.checkpoints / "best_model.pth").write_bytes(b"the trained weights")
        (self.checkpoints / "metrics.json").write_text('{"map": 0.9}')
        self.arguments: list[str] = []
        self.python = sys.executable
        self.limit = None  # preexec_fn
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)}
        self.env.update(TORCH_HOME=str(folder / "torch"), OMP_NUM_THREADS="1", GIT_CONFIG_NOSYSTEM="1")

    def write(self, *cells: str | tuple[str, str], **kwargs) -> Path:
        """Writes the notebook."""
        return write_notebook(self.notebook, *cells, **kwargs)

    def start(self, *arguments: str, **kwargs) -> subprocess.Popen:
        """Starts the script on the notebook."""
        command = [self.python, str(SCRIPT), str(self.notebook), *self.arguments, *arguments]
        kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
        kwargs |= {"preexec_fn": self.prepare} if os.name == "posix" else {}
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, encoding="utf-8", errors="replace", **kwargs
        )

    def prepare(self) -> None:
        """In the child: hear the terminal close, also where the tests run under nohup; then the limits."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if self.limit:
            self.limit()

    def run(self, *arguments: str, timeout: float = 90) -> subprocess.CompletedProcess:
        """Runs the script on the notebook to its end."""
        return finish(self.start(*arguments), timeout)

    def shadow(self, **files: str) -> Path:
        """Puts modules before all others on the path of the script and the kernel."""
        folder = self.folder / "shadow"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            path = folder / name.replace("__slash__", "/")
            path = path if path.name == "METADATA" else path.with_name(path.name + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.env["PYTHONPATH"] = str(folder)
        return folder

    def wait_for(self, *names: str, timeout: float = 30) -> None:
        """Waits until one of some files is there."""
        end = time.monotonic() + timeout
        while not any((self.folder / name).exists() for name in names):
            assert time.monotonic() < end, f"no {names} after {timeout} s"
            time.sleep(0.05)

    def kernels(self) -> list[int]:
        """Processes that still work in this folder."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(process.cwd()) == self.folder and process.pid != os.getpid():
                    found.append(process.pid)
        return found

    def left_over(self) -> list[str]:
        """Files that no run may leave."""
        return [
            path.name
            for path in self.folder.iterdir()
            if path.name.startswith(".study") and not path.name.endswith(".lock")
        ]


def finish(process: subprocess.Popen, timeout: float = 90) -> subprocess.CompletedProcess:
    """Waits for a started script; a hanging one is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the script hangs\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class WebServer:
    """A local web server with one file, and faults on request.

    Args:
        data: the file's bytes, under every name.
        ranges: whether it honours Range requests.
        cut: the first so many answers end after half of their bytes.
        status: answer all requests with this error.
    """

    def __init__(self, data: bytes, ranges: bool = True, cut: int = 0, status: int = 0):
        self.requests: list[str] = []  # the Range header of each, or ""
        outer = self
        left = [cut]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range") or ""
                outer.requests.append(wanted)
                if status:
                    self.send_error(status)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                body = data[start:]
                self.send_response(206 if wanted and ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if left[0]:
                    left[0] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *arguments) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
