"""The notebook's own training under the runner, with overrides: where a run writes and what it leaves;
and with its kernel killed in the middle, bit for bit the same weights.
"""

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

SETTINGS = ["NUM_EPOCHS=2", "BATCH_SIZE=2", "PRECISION=float32", "FROZEN_BLOCKS=5"]
SETTINGS += ["SAVE_EVERY=1", "PASSES_PER_EPOCH=1"]


def up_to_training(folder):
    """A copy of the notebook that ends after the training, without the cells that only draw or
    try something.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = []
    for cell in notebook.cells:
        if cell.source.startswith("## 11. "):
            break
        starts = ("student = ", "criterion = ", "by_map = ", "run = Run(")
        only_shows = "show_figure(" in cell.source or cell.source.startswith(starts)
        if cell.metadata.get("tags") or not only_shows:
            kept.append(cell)
    notebook.cells = kept
    notebook.metadata.pop("execute_ssd_notebook", None)  # what a run of the script stamps
    nbformat.write(notebook, folder / NOTEBOOK.name)


def check_a_run_with_overrides(folder):
    """Page, detectors and the log of two epochs lie below runs/custom."""
    custom = folder / "runs" / "custom"
    files = {path.name for path in (custom / "checkpoints").iterdir()}
    assert {"best_model.pth", "last.pth", "ssd300_epoch_1.pth", "ssd300_epoch_2.pth"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    trained = torch.load(custom / "checkpoints" / "best_model.pth", weights_only=True)["trained"]
    assert trained["epochs"] == 2 and trained["weights"] == "ImageNet features"
    epochs = []
    tags = []
    for cell in nbformat.read(custom / NOTEBOOK.name, as_version=4).cells:
        tags.extend(cell.metadata.get("tags", ()))
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", cell.source
            for line in output.get("text", "").splitlines():
                if line.startswith("epoch ") and "/2 " in line:
                    epochs.append(line)
    assert len(epochs) == 2
    assert "injected-parameters" in tags


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the kernel in /proc")
def test_a_killed_kernel_ends_with_the_same_weights(tmp_path, vgg_weights):
    draw_dataset(tmp_path / "data", train=4, val=2, test=2, seed=3)
    ends = {}
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "execute_ssd_notebook.py", folder)
        up_to_training(folder)
        before = (folder / NOTEBOOK.name).read_bytes()
        command = [sys.executable, "execute_ssd_notebook.py", "--dataset", str(tmp_path / "data")]
        environment = environment_without("BCCD_", "VGG16_", "SSD_")
        command += ["--weights", str(vgg_weights)]
        for setting in SETTINGS:
            command += ["-p", setting]
        checkpoints = folder / "runs" / "custom" / "checkpoints"
        pipe = subprocess.PIPE
        runner = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, text=True)
        if name == "killed":
            first_epoch = checkpoints / "ssd300_epoch_1.pth"
            while not first_epoch.exists() and runner.poll() is None:
                time.sleep(0.05)
            os.kill(kernel_of(folder), signal.SIGKILL)
        said, _ = runner.communicate()
        assert runner.returncode == 0, said
        assert ("restart 1 of" in said) == (name == "killed")
        if name == "undisturbed":
            check_a_run_with_overrides(folder)
        assert (folder / NOTEBOOK.name).read_bytes() == before
        assert not (folder / "checkpoints").exists()
        ends[name] = torch.load(checkpoints / "last.pth", weights_only=True)
    assert ends["killed"]["epoch"] == ends["undisturbed"]["epoch"] == 2
    for key in ("model", "averaged", "best", "optimizer"):
        killed = torch.utils._pytree.tree_leaves(ends["killed"][key])
        undisturbed = torch.utils._pytree.tree_leaves(ends["undisturbed"][key])
        for one, other in zip(killed, undisturbed, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), key
            else:
                assert one == other, key
    histories = zip(ends["killed"]["history"], ends["undisturbed"]["history"], strict=True)
    for one, other in histories:
        for key in one:
            if key.startswith(("train_", "val_")):
                assert one[key] == other[key], key
