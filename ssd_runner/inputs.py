"""Steps 2 and 3: the dataset, fetched by the notebook's own cells, and the files of weights."""

import os
import sys
import zipfile
from pathlib import Path

from .console import Exit, Failure, one_line
from .page import code_cells
from .plan import Job

EXITS = {"DatasetError": 4, "AnnotationError": 4, "WeightsError": 5}  # of the notebook's exceptions


def dataset(job: Job) -> None:
    """Step 2: draws the demo's smears, or lets the notebook find, clone or unpack the dataset."""
    folder = job.path("DATA_DIR")
    if job.kind == "images":
        job.console.note("not needed for own images")
    elif job.kind == "demo":
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from synthetic_bccd import draw_dataset

        draw_dataset(folder)  # leaves a folder alone that holds anything else
        job.console.note(f"drawn in {folder}: nothing that this run shows is a result")
    elif "BCCD_DATASET" in job.env and not folder.is_dir():
        why = f"There is no folder {folder}: name a copy of BCCD by --dataset or BCCD_DATASET."
        raise Failure(Exit.DATASET, why)
    elif cells := code_cells(job.notebook, "fetch"):
        fetch(job, cells, folder)


def fetch(job: Job, cells, folder: Path) -> None:
    """Executes the cells tagged `fetch`, which need the standard library only; Failure DATASET."""
    space = {"print": lambda *words: job.console.note(" ".join(map(str, words)))}
    url = job.env.get("BCCD_URL") or job.value("DATASET_URL")
    here = os.getcwd()
    try:
        os.chdir(job.folder)
        for cell in cells:
            exec(compile(cell.source, "<cell tagged fetch>", "exec"), space)
        root = space["dataset_root"](space["fetch_dataset"](folder, url, say=job.console.note))
        job.console.note(f"{root}")
    except Exception as error:
        codes = [EXITS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in EXITS]
        if not codes:
            raise
        raise Failure(codes[0], one_line(error, 400)) from None
    finally:
        os.chdir(here)


def weights(job: Job) -> None:
    """Step 3: a file that is named is there; a damaged detector is said before anybody waits."""
    file = job.path("VGG16_WEIGHTS")
    if file and not file.is_file():
        why = f"There is no file {file}: name VGG-16's features by --weights or VGG16_WEIGHTS."
        raise Failure(Exit.WEIGHTS, why)
    job.console.note(f"VGG-16's features: {file or 'the notebook chooses'}")
    best = (job.checkpoints or job.folder) / "best_model.pth"
    try:  # torch.save writes a zip archive
        bad = zipfile.ZipFile(best).testzip() if best.is_file() else None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        bad = error
    if bad:
        why = f"{best} is damaged ({bad}) and cannot be reused"
        job.console.note(f"warning: {why}: restore it, or this run trains from the start")
