"""The notebook alone in an empty folder, by plain nbconvert: it fetches its data, trains, and passes --check.

The classes are others than BCCD's, and the start is the shipped detector: configuration alone.
"""

import json
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from runner_helpers import environment_without, git_repository, nbconvert_in_place
from test_kill_resume import NOTEBOOK, up_to_training

from synthetic_bccd import draw_dataset

CLASSES = ("RBC", "Schizont", "Ring")


@pytest.mark.timeout(600)
def test_alone_in_an_empty_folder(tmp_path):
    mirror, folder = tmp_path / "mirror", tmp_path / "a folder with spaces, и буквы"
    draw_dataset(mirror, train=4, val=2, test=2, seed=5, class_names=CLASSES)
    address = git_repository(mirror)
    folder.mkdir()
    shutil.copy(ROOT / "checkpoints" / "best_model.pth", tmp_path / "start.pth")
    up_to_training(
        folder, CLASS_NAMES=repr(list(CLASSES)), FINETUNE_FROM='"../start.pth"', NUM_EPOCHS="1"
    )
    environment = environment_without("BCCD_", "VGG16_", "SSD_") | {"BCCD_URL": address}
    command = nbconvert_in_place(NOTEBOOK.name)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    assert (folder / "BCCD_Dataset" / "BCCD" / "Annotations").is_dir()
    content = torch.load(folder / "checkpoints" / "best_model.pth", weights_only=True)
    assert (
        content["class_names"] == list(CLASSES)
        and content["trained"]["weights"] == "fine-tuned from start.pth"
    )
    cells = [
        c
        for c in nbformat.read(folder / NOTEBOOK.name, as_version=4).cells
        if c.cell_type == "code"
    ]
    assert all(cell.outputs for cell in cells)
    assert str(tmp_path) not in json.dumps([cell.outputs for cell in cells])
    script = ROOT / "execute_ssd_notebook.py"
    check = [sys.executable, str(script), "--check", str(folder / NOTEBOOK.name)]
    checked = subprocess.run(check, cwd=folder, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "digest" in checked.stdout
