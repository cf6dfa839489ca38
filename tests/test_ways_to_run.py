"""The three ways in which people run it, with the files alone in an empty folder.

A: the notebook beside a clone of BCCD, *Restart & Run All*. B: the notebook and the script, nothing
else. C: the notebook alone, by `jupyter nbconvert --execute --inplace`. None of them finds VGG-16's
weights (the network ends at a closed port), a trained detector or complete labels, and each says so
before it trains and at the top of its page.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from runner_helpers import environment_without, git_repository, nbconvert_in_place
from synthetic_bccd import draw_dataset

SCRIPT = "execute_ssd_notebook.py"
NO_NETWORK = "http://127.0.0.1:9"  # a port that nobody listens at
LACKS = ["**No ImageNet weights:**", "**No trained detector:**", "**No complete labels:**"]
CLASSES = ["RBC", "Schizont", "Ring"]
SMALL = {
    "NUM_EPOCHS": "1",
    "PASSES_PER_EPOCH": "1",
    "BATCH_SIZE": "2",
    "FROZEN_BLOCKS": "5",
    "BOOTSTRAP_SAMPLES": "20",
}
RESTART_AND_RUN_ALL = """
import sys
import nbformat
from nbclient import NotebookClient
path = sys.argv[1]
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
nbformat.write(notebook, path)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def environment():
    """Variables of a machine that reaches no server, and on which nothing was set for us."""
    variables = environment_without("BCCD_", "VGG16_", "SSD_")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        variables[name] = NO_NETWORK
    return variables


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The address of a git repository of eight drawn smears.

    Validation has no platelet, so that each table of the page meets a class without objects.
    """
    folder = tmp_path_factory.mktemp("mirror") / "BCCD_Dataset"
    draw_dataset(folder, train=4, val=2, test=2, seed=5)
    for image_id in (folder / "BCCD/ImageSets/Main/val.txt").read_text().split():
        file = folder / "BCCD" / "Annotations" / f"{image_id}.xml"
        annotation = ElementTree.parse(file)
        for one in annotation.getroot().findall("object"):
            if one.findtext("name") == "Platelets":
                annotation.getroot().remove(one)
        annotation.write(file)
    return git_repository(folder)


def small_notebook(folder, to_the_end, **constants):
    """Copy the notebook as it is before its first run, with a training of a few seconds.

    constants: name -> source text. Without to_the_end the last section is the training.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if not to_the_end:
        headings = [cell.source.startswith("## 11. ") for cell in notebook.cells]
        del notebook.cells[headings.index(True) :]
    # a step like the one before it costs seconds and shows nothing here
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("run = Run(")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
        if "parameters" in cell.metadata.get("tags", ()):
            parameters = cell
        if cell.source.startswith("student = "):  # the first look at a few training steps
            assert cell.source.count("range(5)") == 1
            cell.source = cell.source.replace("range(5)", "range(1)")
    for name, value in {**SMALL, **constants}.items():
        pattern = rf"^{name} = [^#\n]*"
        parameters.source, count = re.subn(
            pattern, lambda found, text=f"{name} = {value}  ": text, parameters.source, flags=re.M
        )
        assert count == 1, name
    notebook.metadata.pop("execute_ssd_notebook", None)  # the stamp of the committed run
    nbformat.write(notebook, folder / NOTEBOOK.name)


def run(command, folder, environment):
    """The finished process of a command in a folder."""
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


def shown(cell):
    """All text that a code cell printed or displays."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts.extend(str(value) for key, value in output.get("data", {}).items() if "text" in key)
    return "\n".join(texts)


def check_page(folder, lacks=LACKS):
    """A page that a run left: whole, silent about this machine, and honest about what it lacked."""
    page = nbformat.read(folder / NOTEBOOK.name, as_version=4)
    cells = [cell for cell in page.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in cells) >= 0.9 * len(cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    texts = [shown(cell) for cell in cells]
    everything = "\n".join(texts)
    for path in (str(folder), os.path.expanduser("~") + "/", "/tmp/"):
        assert path not in everything
    assert "from from" not in everything and "1 epochs" not in everything
    training = next(number for number, text in enumerate(texts) if "epoch  1/1" in text)
    for sentence in lacks:
        assert sentence in texts[0], "not at the top of the page"
        assert any(sentence in text for text in texts[1:training]), "not before the training"


def check_what_git_takes(folder):
    """`git add .` in the folder of a run takes the page and its detector, no file over 100 MB."""
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=folder, check=True, capture_output=True, text=True
    )
    names = listed.stdout.split()
    assert (folder / "checkpoints" / "last.pth").stat().st_size > 100e6
    assert "checkpoints/best_model.pth" in names and NOTEBOOK.name in names
    assert all((folder / name).stat().st_size < 50e6 for name in names)


def test_a_the_notebook_beside_a_clone(mirror, environment, tmp_path):
    """As a student does it: clone BCCD beside the notebook, Restart & Run All."""
    folder = tmp_path / "a folder with spaces, и буквы"
    folder.mkdir()
    small_notebook(folder, to_the_end=False)
    subprocess.run(["git", "clone", "-q", mirror, "BCCD_Dataset"], cwd=folder, check=True)
    command = [sys.executable, "-c", RESTART_AND_RUN_ALL, NOTEBOOK.name]
    done = run(command, folder, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    check_page(folder)
    check_what_git_takes(folder)


def test_b_the_notebook_and_the_script(mirror, environment, tmp_path):
    """The whole page, from a clone of the data to metrics.json, by two files alone."""
    small_notebook(tmp_path, to_the_end=True)
    shutil.copy(ROOT / SCRIPT, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [SCRIPT, NOTEBOOK.name]
    helped = run([sys.executable, SCRIPT, "-h"], tmp_path, environment)
    assert helped.returncode == 0 and "--check" in helped.stdout
    done = run([sys.executable, SCRIPT], tmp_path, environment | {"BCCD_URL": mirror})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "BCCD_Dataset" / "BCCD" / "Annotations").is_dir()
    check_page(tmp_path)
    metrics = json.loads((tmp_path / "checkpoints" / "metrics.json").read_text("utf-8"))
    assert metrics["training"]["weights"] == "random numbers"
    assert metrics["test"]["images"] == 2
    assert metrics["validation"]["ap"]["Platelets"] is None
    checked = run([sys.executable, SCRIPT, "--check"], tmp_path, environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    best = tmp_path / "checkpoints" / "best_model.pth"
    exported = tmp_path / "checkpoints" / "ssd300.onnx"
    before = best.read_bytes(), exported.read_bytes()
    again = run([sys.executable, SCRIPT], tmp_path, environment)
    assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
    page = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    everything = "\n".join(shown(cell) for cell in page.cells if cell.cell_type == "code")
    assert "reusing checkpoints/best_model.pth" in everything
    assert (best.read_bytes(), exported.read_bytes()) == before
    check_what_git_takes(tmp_path)


def test_c_the_notebook_alone_by_nbconvert(environment, tmp_path):
    """Classes of one's own, and a start from the shipped detector: configuration alone."""
    data = tmp_path / "mirror"
    draw_dataset(data, train=4, val=2, test=2, seed=5, class_names=CLASSES)
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / "checkpoints" / "best_model.pth", tmp_path / "start.pth")
    own = {"CLASS_NAMES": repr(CLASSES), "FINETUNE_FROM": '"../start.pth"'}
    small_notebook(folder, to_the_end=False, **own)
    address = git_repository(data)
    command = nbconvert_in_place(NOTEBOOK.name)
    done = run(command, folder, environment | {"BCCD_URL": address})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "BCCD_Dataset" / "BCCD" / "Annotations").is_dir()
    content = torch.load(folder / "checkpoints" / "best_model.pth", weights_only=True)
    assert content["class_names"] == CLASSES
    assert content["trained"]["weights"] == "fine-tuned from start.pth"
    check_page(folder, lacks=LACKS[1:])  # it has the weights of another detector
    check = [sys.executable, str(ROOT / SCRIPT), "--check", str(folder / NOTEBOOK.name)]
    checked = run(check, folder, environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "digest" in checked.stdout


def test_where_bccd_cannot_be_had_each_way_says_what_to_do(environment, tmp_path):
    """By the script an exit code and a sentence, by Jupyter the last line of the cell."""
    small_notebook(tmp_path, to_the_end=False, DATASET_URL=repr(f"{NO_NETWORK}/BCCD.git"))
    shutil.copy(ROOT / SCRIPT, tmp_path)
    before = (tmp_path / NOTEBOOK.name).read_bytes()
    advice = "BCCD_Dataset, or set DATA_DIR to a copy"
    by_script = run([sys.executable, SCRIPT], tmp_path, environment)
    assert by_script.returncode == 4
    assert "clone it by hand into" in by_script.stderr and advice in by_script.stderr
    assert len(by_script.stderr.strip().splitlines()) == 1
    by_jupyter = run(nbconvert_in_place(NOTEBOOK.name), tmp_path, environment)
    assert by_jupyter.returncode != 0
    assert advice in by_jupyter.stderr.strip().splitlines()[-1]
    assert (tmp_path / NOTEBOOK.name).read_bytes() == before
