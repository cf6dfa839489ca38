"""What one run does: options, environment and notebook, answered before anything is touched."""

import ast
import contextlib
import difflib
import os
import shutil
import tempfile
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout

from . import page
from .console import Console, Exit, Failure, Signals

INPUTS = {  # constants of the notebook: the variable and the option that override them
    "DATA_DIR": ("BCCD_DATASET", "dataset"),
    "DATASET_URL": ("BCCD_URL", "dataset_url"),
    "VGG16_WEIGHTS": ("VGG16_WEIGHTS", "weights"),
    "TRAINING": ("SSD_TRAINING", "fresh"),
}
DEMO = {"TRAINING": "fresh", "NUM_EPOCHS": 3, "DATA_NOTE": "Drawn smears: no result"}


class Job:
    """One run, all questions answered; Failure USAGE where options contradict each other."""

    def __init__(self, options, console: Console, signals: Signals):
        self.options, self.console, self.signals = options, console, signals
        self.env = dict(os.environ)  # of the kernel
        self.source, self.notebook, self.data = page.read(options.notebook)
        self.folder = self.source.parent  # in which the kernel works
        inject(self.notebook, {})
        self.known = constants(self.notebook)  # the notebook's own constants
        self.values = overrides(options.param, self.known)  # what overrides them
        kinds = {"demo": options.demo, "images": options.images, "custom": self.values}
        self.kind = next((kind for kind, chosen in kinds.items() if chosen), "")
        self.check_clashes()
        self.choose_places()
        self.values = self.own_values() | self.values
        name = self.value("CHECKPOINT_DIR")
        self.checkpoints = Path(os.path.realpath(self.folder / name)) if name else None
        writes = self.checkpoints and self.kind != "images"
        self.staging = self.checkpoints / ".staging" if writes else None  # changes with the page
        for name, (variable, option) in INPUTS.items():
            if name in self.values:
                self.env.pop(variable, None)
            elif typed := getattr(options, option):
                self.env[variable] = "fresh" if typed is True else typed
        inject(self.notebook, self.values)

    def check_clashes(self) -> None:
        """Failure USAGE for options that contradict each other or the notebook."""
        options, given = self.options, self.values
        clashes = {
            "--demo and --images": options.demo and options.images,
            "--demo and --dataset": options.demo and (options.dataset or options.dataset_url),
            "--demo and -p DATA_DIR": options.demo and "DATA_DIR" in given,
            "--results without --images": options.results and not options.images,
        }
        for name, (_, option) in INPUTS.items():
            clashes[f"--{option} and -p {name}"] = name in given and getattr(options, option)
        for words in filter(clashes.get, clashes):
            raise Failure(Exit.USAGE, f"{words} do not go together: choose one.")
        for name in {"CHECKPOINT_DIR", "MY_RESULTS"} & given.keys():
            own, other = (self.folder / values[name] for values in (self.known, given))
            if os.path.realpath(own) == os.path.realpath(other):
                why = "is the notebook's own folder, which a run with overrides never writes to."
                raise Failure(Exit.USAGE, f"-p {name}: that {why}")

    def choose_places(self) -> None:
        """Where the result goes, and below runs/ what else a run with overrides writes."""
        runs, output = self.folder / "runs", self.options.output
        self.target = runs / self.kind / self.source.name if self.kind else self.source
        if output:
            self.target = Path(os.path.realpath(output))
            if self.target.suffix != ".ipynb" or (self.kind and self.target == self.source):
                why = "name a file that ends in .ipynb; overrides are never published in place."
                raise Failure(Exit.USAGE, f"--output {output}: {why}")
        stem, inside = self.target.stem, runs in self.target.parent.parents
        self.place = self.target.parent if inside else runs / stem
        self.partial = self.target.with_name(f"{stem}.partial.ipynb")  # the working copy
        self.failed = self.target.with_name(f"{stem}.failed.ipynb")  # what a failed run leaves
        self.work = self.target.with_name(f".{stem}.run")  # the kernel's own files

    def own_values(self):
        """What the kind of this run overrides besides what was given."""
        if self.kind == "images":
            cells = list(zip(self.notebook.cells, page.titles(self.notebook), strict=True))
            sections = {title for cell, title in cells if "images" in page.tags(cell)}
            needed = {"parameters", "define", "images"}
            for cell, title in cells:
                text = cell.cell_type == "markdown" and title in sections
                if not text and not needed & page.tags(cell):
                    self.notebook.cells.remove(cell)
            images = Path(os.path.realpath(self.options.images))
            if not images.is_dir():
                raise Failure(Exit.USAGE, f"--images: there is no folder {images}.")
            results = Path(os.path.realpath(self.options.results or self.place / "results"))
            return {"MY_IMAGES": self.relative(images), "MY_RESULTS": self.relative(results)}
        names = ("CHECKPOINT_DIR", "MY_RESULTS", "DATA_DIR")[: 3 if self.kind == "demo" else 2]
        own = {name: Path(self.known[name]).name for name in names if self.known.get(name)}
        own = {name: self.relative(self.place / folder) for name, folder in own.items()}
        if self.kind == "demo":
            best = "checkpoints/best_model.pth"
            own |= DEMO | {"FINETUNE_FROM": best if (self.folder / best).is_file() else ""}
        return own if self.kind else {}

    def value(self, name: str):
        """A constant as this run has it."""
        return self.values.get(name, self.known.get(name))

    def path(self, name: str) -> Path | None:
        """An input: in the environment relative to here, as a constant to the notebook's folder."""
        if typed := self.env.get(INPUTS[name][0]):
            path = Path(os.path.abspath(os.path.expanduser(typed)))
            self.env[INPUTS[name][0]] = self.relative(path)
            return path
        return self.folder / self.value(name) if self.value(name) else None

    def relative(self, path: Path) -> str:
        """A path as the notebook may print it: relative to its folder where it lies inside."""
        inside = self.folder in path.parents
        return path.relative_to(self.folder).as_posix() if inside else str(path)

    @contextlib.contextmanager
    def held(self):
        """Holds result and checkpoints against other runs; a failed run's outputs are kept."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim(self.target, self.target.parent, 5e7 + 3 * len(self.data)))
            if self.staging:
                trains = "fresh" in (self.env.get("SSD_TRAINING"), self.value("TRAINING"))
                room = 2_000_000_000 if trains else 200_000_000
                stack.enter_context(claim(self.checkpoints, self.checkpoints, room))
            self.partial.unlink(missing_ok=True)  # of a run that was killed
            try:
                yield
            except Failure as failure:
                if self.partial.is_file():
                    name = self.partial if failure.code > 128 else self.failed
                    os.replace(self.partial, name)
                    kept = f"Outputs so far: {name.name}; {self.target.name} is unchanged."
                    failure.sentence += f" {kept}"
                raise
            finally:
                for folder in filter(None, (self.work, self.staging)):
                    shutil.rmtree(folder, ignore_errors=True)


def claim(target: Path, folder: Path, room: float):
    """A context in which no other run writes the target, in a folder with room for so many bytes.

    Failure STORAGE, LOCKED. The lock file stays: removed, two runs could hold locks of one name.
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


def constants(notebook):
    """Name to value of the parameters cell's assignments, not run; None takes any value."""
    found = {}
    sources = [cell.source for cell in page.code_cells(notebook, "parameters")]
    with contextlib.suppress(SyntaxError):  # the kernel will say so
        for node in ast.parse("\n".join(sources)).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = None
                with contextlib.suppress(ValueError):
                    found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def overrides(pairs: list[str], known):
    """``NAME=VALUE`` pairs by name, in the types of `constants`; Failure USAGE."""
    result = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise Failure(Exit.USAGE, f"-p {pair!r}: write it as NAME=VALUE.")
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise Failure(Exit.USAGE, f"-p {name}: the notebook has no such parameter; {hint}")
        default, kind, value = known[name], type(known[name]), text
        if kind is not str or text[:1] in ("'", '"'):  # a text needs no quotes
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = ast.literal_eval(text.title() if kind is bool else text.strip())
        if (kind is float and type(value) is int) or {kind, type(value)} == {list, tuple}:
            value = kind(value)
        if (default is not None and type(value) is not kind) or str(value) in ("inf", "-inf"):
            why = f"{text!r} is no {kind.__name__}, like the notebook's {default!r}."
            raise Failure(Exit.USAGE, f"-p {name}: {why}")
        result[name] = value
    return result


def inject(notebook, values) -> None:
    """Puts a cell with the values after the parameters cell, in place of an earlier one."""
    notebook.cells[:] = [cell for cell in notebook.cells if page.INJECTED not in page.tags(cell)]
    if values:
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        lines.append(f"print('Overrides of this run: {', '.join(values)}')")
        made = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": [page.INJECTED]})
        made["id"] = page.INJECTED
        after = [n for n, cell in enumerate(notebook.cells, 1) if "parameters" in page.tags(cell)]
        notebook.cells.insert(after[-1], made)
