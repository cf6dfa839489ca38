"""What a run of the script publishes, where, and what it says: real kernels, small notebooks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from runner_helpers import PARAMETERS, ROOT, Place, draw_layout, outputs, tree

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "кровь study")


def test_published_page(place):
    """Clean, stamped, accepted by --check; a second run changes no byte; checkpoints are not touched."""
    place.write(
        "## 1. Setup",
        "import sys, warnings\nwarnings.warn('old')\nprint('to', end='')\nprint(' join')\nprint('e', file=sys.stderr)",
        "import time\nfor i in range(20):\n    print(f'\\r{i * 5}%', end='', flush=True)\n    time.sleep(0.01)",
        "## 2. Picture",
        "import matplotlib_inline, os\nprint(os.environ['MPLBACKEND'], os.path.basename(os.getcwd()))",
        "from IPython.display import display, update_display\nh = display('first', display_id='x')\nprint('between')",
        "update_display('second', display_id='x')\n7",
    )
    place.env["MPLBACKEND"] = "Agg"  # a page would have no figures
    checkpoints = tree(place.checkpoints)
    result = place.run("--report", "report.json", "--html")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first = place.notebook.read_bytes()
    notebook = nbformat.reads(first.decode(), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
    assert [cell.id for cell in notebook.cells] == [f"cell-{n}" for n in range(7)]
    assert all("execution" not in cell.metadata for cell in code)
    assert [(o.name, o.text) for o in code[0].outputs][0] == ("stdout", "to join\n")
    assert re.fullmatch(r"\d+\.py:2: UserWarning: old\ne\n", code[0].outputs[1].text)  # no folder
    assert code[1].outputs[0].text == "95%"
    assert code[2].outputs[0].text == "module://matplotlib_inline.backend_inline кровь study\n"
    assert code[3].outputs[0].data["text/plain"] == "'second'"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "ssd_runner"}
    assert (place.folder / "study.html").stat().st_size > 1000
    assert tree(place.checkpoints) == checkpoints and place.left_over() == []
    assert not (place.folder / "study.partial.ipynb").exists()

    report = json.loads((place.folder / "report.json").read_text(encoding="utf-8"))
    assert report["exit_code"] == 0 and report["sentence"] == ""
    assert [cell["section"] for cell in report["cells"]] == ["1. Setup"] * 2 + ["2. Picture"] * 3
    assert all(cell["seconds"] > 0 and cell["peak_memory_mb"] > 10 for cell in report["cells"])
    assert {check["verdict"] for check in report["checks"]} <= {"ok", "warning"} and len(report["checks"]) == 8
    assert report["environment"]["python"].startswith("3.")

    again = place.run("--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert place.notebook.read_bytes() == first
    assert place.run("--check").returncode == 0


def test_overrides_go_under_runs(place):
    """An injected cell in the run's own notebook; folders that it writes are its own; the committed page stays."""
    results = ("parameters", PARAMETERS[1].replace("COUNT\n", "") + "\nMY_RESULTS = 'my_results'\nDATA_DIR = 'data'")
    place.write(
        "print(1)",
        results,
        "print(COUNT, RATE, CHECKPOINT_DIR, MY_RESULTS, DATA_DIR)\nimport os\nprint(os.path.isdir(CHECKPOINT_DIR))",
    )
    draw_layout(place.folder / "data")
    before = place.notebook.read_bytes()
    result = place.run("-p", "COUNT=4", "-p", "RATE=1")
    assert result.returncode == 0, result.stderr
    page = place.folder / "runs" / "custom" / "study.ipynb"
    assert "4 1.0 runs/custom/checkpoints runs/custom/my_results data\nTrue\n" in outputs(page)
    assert [
        cell.metadata.get("tags") for cell in nbformat.read(page, as_version=4).cells if "tags" in cell.metadata
    ] == [
        ["parameters"],
        ["injected-parameters"],
    ]
    assert place.notebook.read_bytes() == before
    assert place.run("-p", "COUNT=5", "--output", "runs/five/page.ipynb").returncode == 0
    assert "5 0.1 runs/five/checkpoints" in outputs(place.folder / "runs" / "five" / "page.ipynb")


def test_output_elsewhere_without_overrides(place, tmp_path):
    place.write(PARAMETERS, "print(CHECKPOINT_DIR)")
    before = place.notebook.read_bytes()
    result = place.run("--output", str(tmp_path / "new folder" / "page.ipynb"))
    assert result.returncode == 0, result.stderr
    assert outputs(tmp_path / "new folder" / "page.ipynb").endswith("checkpoints\n")
    assert place.notebook.read_bytes() == before


def test_fresh_reaches_the_kernel(place):
    place.write(
        ("parameters", "TRAINING = 'auto'\nTRAINING"),
        "import os\nprint(os.environ['SSD_TRAINING'], len(os.environ['SSD_RUN_ID']))",
    )
    assert place.run("--fresh").returncode == 0
    assert outputs(place.notebook) == "fresh 32\n"


IMAGES = (
    (
        "parameters",
        "MY_IMAGES = ''\nMY_RESULTS = 'my_results'\nCHECKPOINT_DIR = 'checkpoints'\nDATA_DIR = 'data'\nMY_IMAGES",
    ),
    ("define", "def area(n):\n    return n * n"),
    "## 3. Dataset",
    "raise RuntimeError('needs the dataset')",
    "## 16. Your own images",
    (
        "images",
        "import os\nos.makedirs(MY_RESULTS)\nprint(area(3), sorted(os.listdir(MY_IMAGES)), CHECKPOINT_DIR, MY_RESULTS)",
    ),
    "## 17. Summary",
    "raise RuntimeError('needs results')",
)


def test_own_images(place):
    """Only the cells that are needed run; neither dataset nor download is asked for."""
    place.write(*IMAGES)
    before = place.notebook.read_bytes()
    (place.folder / "mine").mkdir()
    (place.folder / "mine" / "one.PNG").write_bytes(b"x")
    result = place.run("--images", "mine")
    assert result.returncode == 0, result.stderr
    assert outputs(place.folder / "runs" / "images" / "study.ipynb").endswith(
        "9 ['one.PNG'] checkpoints runs/images/results\n"
    )
    result = place.run("--images", "mine", "--results", "found")
    assert result.returncode == 0 and (place.folder / "found").is_dir()
    assert place.notebook.read_bytes() == before


@pytest.mark.parametrize(("name", "sentence"), [("nowhere", "there is no folder"), ("empty", "no picture")])
def test_own_images_that_are_not_there(place, name, sentence):
    place.write(*IMAGES)
    (place.folder / "empty").mkdir()
    result = place.run("--images", name)
    assert result.returncode == 2 and sentence in result.stderr


def test_demo_draws_its_data(place):
    """The whole notebook over drawn smears, under runs/demo, with the note on its pages."""
    place.write(
        (
            "parameters",
            "DATA_DIR = 'BCCD_Dataset'\nDATASET_URL = ''\nVGG16_WEIGHTS = ''\nCHECKPOINT_DIR = 'checkpoints'\n"
            "TRAINING = 'auto'\nNUM_EPOCHS = 50\n"
            "FINETUNE_FROM = ''\nDATA_NOTE = ''\nMY_RESULTS = 'my_results'\nTRAINING",
        ),
        "print(DATA_DIR, CHECKPOINT_DIR, TRAINING, NUM_EPOCHS, FINETUNE_FROM, DATA_NOTE)",
        "import os\nprint(len(os.listdir(DATA_DIR + '/BCCD/JPEGImages')), os.environ.get('BCCD_DATASET'))",
    )
    place.env["BCCD_DATASET"] = "/somewhere/real"
    checkpoints = tree(place.checkpoints)
    result = place.run("--demo", "-p", "NUM_EPOCHS=1", timeout=110)
    assert result.returncode == 0, result.stderr
    said = outputs(place.folder / "runs" / "demo" / "study.ipynb")
    wanted = "runs/demo/BCCD_Dataset runs/demo/checkpoints fresh 1 checkpoints/best_model.pth Drawn smears: no result"
    assert wanted in said and "80 None" in said
    assert "drawn data: nothing that this run shows is a result" in result.stdout
    assert tree(place.checkpoints) == checkpoints


def test_plain_lines_of_a_long_cell(place):
    """Without a terminal the lines of a long cell come as they are printed, quick cells give one line each."""
    place.write(
        "print('quick one')",
        "## 10. Training",
        "import time\nfor i in range(8):\n    print('epoch', i, flush=True)\n    time.sleep(0.5)",
    )
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert "quick one" not in result.stdout
    assert re.search(r"^    epoch 7$", result.stdout, re.M)
    assert re.search(r"^  \[2/2\] 10\. Training: \d\.\d s, 1 output$", result.stdout, re.M)


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_bar_on_a_terminal(place):
    """On a terminal: a bar with section, elapsed and remaining time, and the last line of the running cell below."""
    import pty

    place.write(
        "print(1)",
        "## 10. Training",
        "import time\nfor i in range(8):\n    print('epoch', i, flush=True)\n    time.sleep(0.4)",
    )
    place.env.update(TERM="xterm", PYTHONIOENCODING="utf-8", COLUMNS="100")
    mine, theirs = pty.openpty()
    process = place.start(stdout=theirs, stderr=subprocess.STDOUT)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(mine, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(mine)
    process.wait(timeout=60)
    text = shown.decode("utf-8")
    assert process.returncode == 0, text
    assert re.search(r"█+░+ 2/2 10\. Training \| \d\.\d s, left \?", text)
    assert re.search(r"\r\n  epoch [3-6]", text)
    assert text.rstrip().endswith("study.ipynb")


def test_jupyters_own_run_passes_the_check(place):
    """nbconvert's command on the same notebook: accepted, with a warning that no digest is there."""
    place.write("print(1)", "2")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(place.notebook)]
    done = subprocess.run(command, cwd=place.folder, env=place.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = place.run("--check")
    assert result.returncode == 0, result.stderr
    assert "no digest" in result.stdout


def test_user_startup_files_do_not_shape_the_page(place, tmp_path):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("colour = 'mine'")
    place.env["IPYTHONDIR"] = str(tmp_path / "ipython")
    place.write("print('colour' in globals())")
    assert place.run().returncode == 0
    assert outputs(place.notebook) == "False\n"


def test_the_scripts_folder_need_not_be_current(tmp_path):
    """Without a name the project's notebook is taken: here a folder without one gets one sentence or the project's."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "execute_ssd_notebook.py"), "--check", "missing.ipynb"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 10 and "There is no notebook" in result.stderr
