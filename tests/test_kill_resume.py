"""The notebook's own training under the runner, its kernel killed in the middle: bit for bit the same weights."""

import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from runner_helpers import environment_without

from synthetic_bccd import draw_dataset

STAMP = "ssd_runner"  # where a run of the script stamps the sources
SETTINGS = {
    "NUM_EPOCHS": "3",
    "BATCH_SIZE": "2",
    "PRECISION": '"float32"',
    "FROZEN_BLOCKS": "5",
    "SAVE_EVERY": "1",
}
SETTINGS["PASSES_PER_EPOCH"] = "1"


def up_to_training(folder, pictures=True, **more):
    """A copy of the notebook that ends after the training, with a small configuration; `more` are other constants.

    Without `pictures` no cell that only draws is left.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    end = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## 11. "))
    del notebook.cells[end:]
    if not pictures:
        notebook.cells = [
            c for c in notebook.cells if c.metadata.get("tags") or "show_figure(" not in c.source
        ]
    notebook.metadata.pop(STAMP)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    lines = cell.source.splitlines()
    for name, value in {**SETTINGS, **more}.items():
        (row,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[row] = f"{name} = {value}"
    cell.source = "\n".join(lines)
    nbformat.write(notebook, folder / NOTEBOOK.name)


def kernel_of(folder):
    """The process id of the kernel that works in a folder, or None."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = open(f"/proc/{entry}/cmdline").read()
                if "ipykernel_launcher" in command and os.path.samefile(
                    os.readlink(f"/proc/{entry}/cwd"), folder
                ):
                    return int(entry)
            except OSError:
                pass
    return None


@pytest.mark.timeout(600)
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the kernel in /proc")
def test_a_killed_kernel_ends_with_the_same_weights(tmp_path, vgg_weights):
    draw_dataset(tmp_path / "data", train=4, val=2, test=2, seed=3)
    ends = {}
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "execute_ssd_notebook.py", folder)
        shutil.copytree(ROOT / "ssd_runner", folder / "ssd_runner")
        up_to_training(folder, pictures=False)
        command = [sys.executable, "execute_ssd_notebook.py", "--dataset", str(tmp_path / "data")]
        environment = environment_without("BCCD_", "VGG16_", "SSD_")
        runner = subprocess.Popen(
            [*command, "--weights", str(vgg_weights)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        if name == "killed":
            while (
                not (folder / "checkpoints" / "ssd300_epoch_1.pth").exists()
                and runner.poll() is None
            ):
                time.sleep(0.05)
            os.kill(kernel_of(folder), signal.SIGKILL)
        said, _ = runner.communicate()
        assert runner.returncode == 0, said
        assert ("restart 1 of" in said) == (name == "killed")
        ends[name] = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    assert ends["killed"]["epoch"] == ends["undisturbed"]["epoch"] == 3
    for key in ("model", "averaged", "best", "optimizer"):
        one, two = (torch.utils._pytree.tree_leaves(ends[name][key]) for name in ends)
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key
    for one, two in zip(*(end["history"] for end in ends.values()), strict=True):
        assert all(one[key] == two[key] for key in one if key.startswith(("train_", "val_")))
