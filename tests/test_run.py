"""A small real run, end to end: the whole notebook through the runner on a few real smears, in a folder of its own."""

import json
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT
from runner_helpers import environment_without


@pytest.fixture(scope="module")
def few_smears(bccd_root, tmp_path_factory):
    """A BCCD folder with the first 8, 6 and 6 images of the real splits."""
    root = tmp_path_factory.mktemp("few") / "BCCD_Dataset"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "BCCD" / folder).mkdir(parents=True)
    for split, number in (("train", 8), ("val", 6), ("test", 6)):
        file = f"BCCD/ImageSets/Main/{split}.txt"
        names = (bccd_root / file).read_text().split()[:number]
        (root / file).write_text("\n".join(names) + "\n")
        for name in names:
            for part in (f"Annotations/{name}.xml", f"JPEGImages/{name}.jpg"):
                shutil.copy(bccd_root / "BCCD" / part, root / "BCCD" / part)
    return root


@pytest.mark.timeout(1800)
def test_a_fresh_run_on_a_few_smears(few_smears, vgg_weights, tmp_path):
    for name in (NOTEBOOK.name, "execute_ssd_notebook.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = (tmp_path / NOTEBOOK.name).read_bytes()
    settings = [
        "NUM_EPOCHS=2",
        "PASSES_PER_EPOCH=1",
        "TRAINING=fresh",
        "BOOTSTRAP_SAMPLES=20",
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
    (metrics_file,) = (tmp_path / "runs").rglob("metrics.json")
    metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
    assert metrics["training"]["epochs"] == 2 and metrics["test"]["images"] == 6
    files = {path.name for path in metrics_file.parent.iterdir()}
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
