"""What the tests share: the notebook's definitions as a module, drawn data, and the real data from data/."""

import copy
import linecache
import os
import sys
import types
import zipfile
from pathlib import Path

import filelock
import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # several workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(os.environ.get("SSD_TEST_NOTEBOOK", ROOT / "ssd_bccd_detection.ipynb"))
sys.path.insert(0, str(ROOT))  # `pytest` alone finds the scripts too


def load_definitions(
    notebook=NOTEBOOK, name="ssd_bccd_definitions", cells=("parameters", "define")
):
    """Execute a notebook's `parameters` and `define` cells, in order, in a new module, and return it.

    The module stands in sys.modules under `name`. Its cells stand in linecache, each with blank lines
    for those before it, so that tracebacks show a cell's lines, a function's source is looked up in
    its own cell, as in Jupyter, and inspect.getsource works on classes too.
    """
    import nbformat

    module = types.ModuleType(name)
    module.__file__ = f"<{Path(notebook).name}: definitions>"
    sys.modules[name] = module
    whole = ""
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
        if cell.cell_type != "code" or not set(cell.metadata.get("tags", ())) & set(cells):
            continue
        whole += f"# --- cell {number} ({cell.get('id', '')})\n"
        file = f"<{Path(notebook).name}: cell {number} of {name}>"
        source = "\n" * whole.count("\n") + cell.source + "\n"
        remember_lines(file, source)
        whole += cell.source + "\n\n"
        remember_lines(module.__file__, whole)
        exec(compile(source, file, "exec"), module.__dict__)
    return module


def remember_lines(file, source):
    """Give a file that does not exist its lines, for tracebacks and inspect."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)


def made_once(tmp_path_factory, name, make):
    """The path of what make(path) writes; the first of pytest-xdist's workers makes it for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / name
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


def pytest_collection_modifyitems(items):
    """Begin with the tests that take long, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def part_of(split, indices):
    """A split of some of the images of another."""
    part = copy.copy(split)
    for name in ("ids", "files", "sizes", "boxes", "labels"):
        setattr(part, name, [getattr(split, name)[i] for i in indices])
    return part


@pytest.fixture(scope="session")
def nb():
    """The notebook as a library: a module with what its `parameters` and `define` cells define."""
    import torch

    torch.set_num_threads(THREADS)
    return load_definitions()


@pytest.fixture(scope="session")
def bccd_root(tmp_path_factory):
    """The real dataset, unpacked from data/: the folder that holds BCCD/. Not to be written to."""
    folder = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(ROOT / "data" / "BCCD_Dataset.zip") as bundle:
        bundle.extractall(folder)
    return folder / "BCCD_Dataset"


@pytest.fixture(scope="session")
def vgg_weights():
    """The file with VGG-16's ImageNet features."""
    return ROOT / "data" / "vgg16_features.pth"


@pytest.fixture(scope="session")
def drawn_bccd(tmp_path_factory):
    """A small drawn dataset: 8 training, 4 validation, 4 test smears. Not to be written to."""
    from synthetic_bccd import draw_dataset

    return draw_dataset(
        tmp_path_factory.mktemp("drawn") / "BCCD_Dataset", train=8, val=4, test=4, seed=11
    )
