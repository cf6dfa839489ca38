"""What one run does: options, environment and notebook, answered before anything is touched."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import files, page, parameters
from .console import Console, Exit, Failure, Signals

VARIABLES = {  # in the environment, for constants of the notebook
    "DATA_DIR": "BCCD_DATASET",
    "DATASET_URL": "BCCD_URL",
    "VGG16_WEIGHTS": "VGG16_WEIGHTS",
    "TRAINING": "SSD_TRAINING",
}
DEMO = {"TRAINING": "fresh", "NUM_EPOCHS": 3, "DATA_NOTE": "Drawn smears: no result"}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


class Job:
    """One run, all questions answered; Failure USAGE where options contradict each other."""

    def __init__(self, options: Namespace, console: Console, signals: Signals):
        self.options, self.console, self.signals = options, console, signals
        self.env = dict(os.environ)  # of the kernel
        self.source = page.find(options.notebook)
        self.folder = self.source.parent  # in which the kernel works
        self.notebook, self.data = page.read(self.source)  # what will be executed; the file
        parameters.inject(self.notebook, {})
        if not any(cell.source.strip() for cell in page.code_cells(self.notebook)):
            raise Failure(Exit.NOTEBOOK, f"{self.source.name} has no code: nothing to run.")
        self.known = parameters.constants(self.notebook)  # the notebook's own constants
        self.values = parameters.overrides(options.param, self.known)  # what overrides them
        kinds = {"demo": options.demo, "images": options.images, "custom": self.values}
        self.kind = next((kind for kind, chosen in kinds.items() if chosen), "")
        self.check_clashes()
        self.choose_places()
        self.add_values()
        for name in VARIABLES.keys() & self.values.keys():
            self.env.pop(VARIABLES[name], None)
        if self.kind == "images":
            keep_image_cells(self.notebook)
        parameters.inject(self.notebook, self.values)

    def check_clashes(self) -> None:
        """Failure USAGE for options that contradict each other or the notebook."""
        options, given = self.options, self.values
        clashes = {
            "--demo and --images": options.demo and options.images,
            "--demo and --dataset": options.demo and (options.dataset or options.dataset_url),
            "--demo and -p DATA_DIR": options.demo and "DATA_DIR" in given,
            "--dataset and -p DATA_DIR": options.dataset and "DATA_DIR" in given,
            "--weights and -p VGG16_WEIGHTS": options.weights and "VGG16_WEIGHTS" in given,
            "--fresh and -p TRAINING": options.fresh and "TRAINING" in given,
            "--results without --images": options.results and not options.images,
        }
        for words, clash in clashes.items():
            if clash:
                raise Failure(Exit.USAGE, f"{words} do not go together: choose one.")
        if self.kind and not self.known:
            raise Failure(Exit.USAGE, f"{self.source.name} has no cell tagged 'parameters'.")
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
            if self.target.suffix != ".ipynb":
                raise Failure(Exit.USAGE, f"--output {output}: name a file that ends in .ipynb.")
            if self.kind and self.target == self.source:
                why = "a run with overrides is never published in place: name another file."
                raise Failure(Exit.USAGE, f"--output {output}: {why}")
        inside = runs in self.target.parent.parents
        self.place = self.target.parent if inside else runs / self.target.stem
        stem = self.target.stem
        self.partial = self.target.with_name(f"{stem}.partial.ipynb")  # the working copy
        self.failed = self.target.with_name(f"{stem}.failed.ipynb")  # what a failed run leaves
        self.work = self.target.with_name(f".{stem}.run")  # the kernel's own files

    def add_values(self) -> None:
        """What the kind of this run overrides besides what was given; below runs/ it writes."""
        own: dict[str, Any] = {}
        if self.kind in ("demo", "custom"):
            names = [name for name in ("CHECKPOINT_DIR", "MY_RESULTS") if self.known.get(name)]
            own = {name: self.relative(self.place / Path(self.known[name]).name) for name in names}
        if self.kind == "demo":
            best = "checkpoints/best_model.pth"
            if not (self.folder / best).is_file():
                self.console.note(f"warning: without {best} the demo will find little")
                best = ""
            own |= DEMO | {"FINETUNE_FROM": best}
            own["DATA_DIR"] = self.relative(self.place / "BCCD_Dataset")
        if self.kind == "images":
            images = Path(os.path.realpath(self.options.images))
            if not images.is_dir():
                raise Failure(Exit.USAGE, f"--images: there is no folder {images}.")
            if not any(file.suffix.lower() in PICTURES for file in images.iterdir()):
                why = f"no picture ({', '.join(PICTURES)}) in {images}."
                raise Failure(Exit.USAGE, f"--images: {why}")
            results = Path(os.path.realpath(self.options.results or self.place / "results"))
            own = {"MY_IMAGES": self.relative(images), "MY_RESULTS": self.relative(results)}
        self.values = own | self.values
        name = self.value("CHECKPOINT_DIR")
        self.checkpoints = Path(os.path.realpath(self.folder / name)) if name else None
        writes = self.checkpoints and self.kind != "images"
        self.staging = self.checkpoints / ".staging" if writes else None  # changes with the page

    def value(self, name: str) -> Any:
        """A constant as this run has it."""
        return self.values.get(name, self.known.get(name))

    def relative(self, path: Path) -> str:
        """A path as the notebook may print it: relative to its folder where it lies inside."""
        inside = self.folder in path.parents
        return path.relative_to(self.folder).as_posix() if inside else str(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds result and checkpoints against other runs; a failed run's outputs are kept."""
        with contextlib.ExitStack() as stack:
            room = 50_000_000 + 3 * len(self.data)
            files.check_place(self.target.parent, room, "the notebook")
            if self.target.exists() and not self.target.stat().st_mode & 0o222:
                why = f"{self.target.name} is write-protected: make it writable or name --output."
                raise Failure(Exit.STORAGE, why)
            stack.enter_context(files.lock(self.target))
            if self.staging:
                trains = self.options.fresh or self.value("TRAINING") == "fresh"
                room = 2_000_000_000 if trains else 200_000_000
                files.check_place(self.checkpoints, room, "checkpoints")
                stack.enter_context(files.lock(self.checkpoints))
            self.partial.unlink(missing_ok=True)  # of a run that was killed
            try:
                yield
            except Failure as failure:
                if self.partial.is_file():
                    name = self.partial if failure.code > 128 else self.failed
                    os.replace(self.partial, name)
                    failure.sentence += f" Outputs so far: {shown(name)}; "
                    failure.sentence += f"{self.target.name} is unchanged."
                raise
            finally:
                for folder in filter(None, (self.work, self.staging)):
                    files.remove(folder)


def shown(path: Path) -> str:
    """A path as short as it can be said here."""
    return os.path.relpath(path) if Path.cwd() in path.parents else str(path)


def keep_image_cells(notebook: Any) -> None:
    """Leaves what counting needs: definitions, and the section of the cell tagged `images`."""
    pairs = list(zip(notebook.cells, page.titles(notebook), strict=True))
    sections = {title for cell, title in pairs if "images" in page.tags(cell)}
    wanted = {"parameters", "define", "images"}
    notebook.cells[:] = [
        cell
        for cell, title in pairs
        if wanted & page.tags(cell) or (cell.cell_type == "markdown" and title in sections)
    ]
