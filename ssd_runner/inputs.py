"""Steps 2 and 3: the dataset, fetched by the notebook's own cells, and the files of weights."""

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

from .console import Exit, Failure, megabytes, one_line
from .page import code_cells
from .plan import VARIABLES, Job, shown

EXITS = {
    "DatasetError": Exit.DATASET,
    "AnnotationError": Exit.DATASET,
    "WeightsError": Exit.WEIGHTS,
}


def given(job: Job, name: str, option: str) -> tuple[str, Path | None]:
    """Who names an input, and its path: an option, a variable, or the notebook's constant."""
    typed = getattr(job.options, option) or job.env.get(VARIABLES[name])
    if typed and name not in job.values:
        who = f"--{option}" if getattr(job.options, option) else VARIABLES[name]
        path = Path(os.path.abspath(os.path.expanduser(typed)))
        job.env[VARIABLES[name]] = job.relative(path)
        return who, path
    return name, job.folder / job.value(name) if job.value(name) else None


def dataset(job: Job) -> None:
    """Step 2: draws the demo's smears, or lets the notebook find, clone or unpack the dataset."""
    who, folder = given(job, "DATA_DIR", "dataset")
    cells = code_cells(job.notebook, "fetch")
    if job.kind == "images":
        job.console.note("not needed for own images")
    elif job.kind == "demo":
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from synthetic_bccd import draw_dataset

        draw_dataset(folder)  # leaves a folder alone that holds anything else
        job.console.note(
            f"smears drawn in {shown(folder)}: nothing that this run shows is a result"
        )
    elif who != "DATA_DIR" and not folder.is_dir():
        raise Failure(Exit.DATASET, f"{who}: there is no folder {folder}; name a copy of BCCD.")
    elif cells and folder:
        if job.options.dataset_url:
            job.env["BCCD_URL"] = job.options.dataset_url
        fetch(job, cells, folder)
    else:
        job.console.note("the notebook fetches none")


def fetch(job: Job, cells: list[Any], folder: Path) -> None:
    """Executes the cells tagged `fetch`, which need the standard library only; Failure DATASET."""
    space: dict[str, Any] = {"print": lambda *words: job.console.note(" ".join(map(str, words)))}
    url = job.env.get("BCCD_URL") or job.value("DATASET_URL")
    here = os.getcwd()
    try:
        os.chdir(job.folder)
        for cell in cells:
            exec(compile(cell.source, "<cell tagged fetch>", "exec"), space)
        root = space["dataset_root"](space["fetch_dataset"](folder, url, say=job.console.note))
        job.console.note(shown(Path(root)))
    except Exception as error:
        codes = [EXITS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in EXITS]
        if not codes:
            raise
        raise Failure(codes[0], one_line(error, 400)) from None
    finally:
        os.chdir(here)


def weights(job: Job) -> None:
    """Step 3: a file that is named is there; a damaged detector is said before anybody waits."""
    who, file = given(job, "VGG16_WEIGHTS", "weights")
    if file and not file.is_file():
        why = f"{who}: there is no file {file}; name one with VGG-16's features."
        raise Failure(Exit.WEIGHTS, why)
    said = f"{file.name}, {megabytes(file.stat().st_size)}" if file else "the notebook's own choice"
    job.console.note(f"VGG-16's features: {said}")
    best = job.checkpoints and job.checkpoints / "best_model.pth"
    if best and best.is_file():
        try:
            with zipfile.ZipFile(best) as bundle:  # what torch.save writes
                bad = bundle.testzip()
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            bad = one_line(error, 60)
        if bad:
            why = f"{shown(best)} is damaged ({bad}) and cannot be reused"
            job.console.note(f"warning: {why}: restore it, or this run trains from the start")
