"""A small real training: the notebook through the runner on a few real smears, with overrides.

tests/test_ways_to_run.py runs the page to its end.
"""

import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from runner_helpers import environment_without
from test_ways_to_run import small_notebook


@pytest.fixture(scope="module")
def few_smears(bccd_root, tmp_path_factory):
    """A BCCD folder with the first 6, 3 and 2 images of the real splits."""
    root = tmp_path_factory.mktemp("few") / "BCCD_Dataset"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "BCCD" / folder).mkdir(parents=True)
    for split, number in (("train", 6), ("val", 3), ("test", 2)):
        file = f"BCCD/ImageSets/Main/{split}.txt"
        names = (bccd_root / file).read_text().split()[:number]
        (root / file).write_text("\n".join(names) + "\n")
        for name in names:
            for part in (f"Annotations/{name}.xml", f"JPEGImages/{name}.jpg"):
                shutil.copy(bccd_root / "BCCD" / part, root / "BCCD" / part)
    return root


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_run_on_a_few_smears(few_smears, vgg_weights, tmp_path):
    shutil.copy(ROOT / "execute_ssd_notebook.py", tmp_path)
    small_notebook(tmp_path, to_the_end=False)
    before = (tmp_path / NOTEBOOK.name).read_bytes()
    settings = [
        "NUM_EPOCHS=2",
        "PASSES_PER_EPOCH=1",
        "TRAINING=fresh",
        "SAVE_EVERY=1",
        "BATCH_SIZE=4",
    ]
    command = [sys.executable, "execute_ssd_notebook.py", "--dataset", str(few_smears)]
    command += ["--weights", str(vgg_weights)]
    for setting in settings:
        command += ["-p", setting]
    environment = environment_without("BCCD_", "VGG16_", "SSD_")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    # a run with overrides never touches the page
    assert (tmp_path / NOTEBOOK.name).read_bytes() == before
    assert not (tmp_path / "checkpoints").exists()
    (detector,) = (tmp_path / "runs").rglob("best_model.pth")
    trained = torch.load(detector, weights_only=True)["trained"]
    assert trained["epochs"] == 2 and trained["weights"] == "ImageNet features"
    files = {path.name for path in detector.parent.iterdir()}
    assert {"best_model.pth", "last.pth", "ssd300_epoch_1.pth", "ssd300_epoch_2.pth"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    (page,) = (tmp_path / "runs").rglob("*.ipynb")
    epochs = []
    tags = []
    for cell in nbformat.read(page, as_version=4).cells:
        tags.extend(cell.metadata.get("tags", ()))
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", cell.source
            for line in output.get("text", "").splitlines():
                if line.startswith("epoch ") and "/2 " in line:
                    epochs.append(line)
    assert len(epochs) == 2
    assert "injected-parameters" in tags
