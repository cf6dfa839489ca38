"""What a run of the script publishes, where, and what it says: real kernels, small notebooks."""

import os
import re
import subprocess

import nbformat
import pytest
from runner_helpers import DATA, FETCH, PARAMETERS, Place, nbconvert_in_place, outputs, tree

import execute_ssd_notebook as runner

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "кровь study")


def test_published_page(place, capsys):
    """Clean, stamped, accepted by --check; a second run changes no byte; checkpoints stay."""
    place.write(
        "## 1. Setup",
        "import sys, warnings\nwarnings.warn('old')\nprint('to', end='')\nprint(' join')\n"
        "print('e', file=sys.stderr)",
        "import time\nfor i in range(20):\n    print(f'\\r{i * 5}%', end='', flush=True)\n"
        "    time.sleep(0.01)",
        "## 2. Picture",
        "import matplotlib_inline, os\nprint(os.environ['MPLBACKEND'], 'colour' in globals())",
        "from IPython.display import display, update_display\ndisplay('first', display_id='x')\n"
        "print('between')\nprint('joined')",
        "update_display('second', display_id='x')\n7",
        metadata={"language_info": {"name": "python", "version": "3.99"}},
    )
    place.env["MPLBACKEND"] = "Agg"  # a page would have no figures
    place.env["IPYTHONDIR"] = str(place.folder / "ipython")  # the user's own
    place.put("ipython/profile_default/startup/00.py", "colour = 'mine'")
    checkpoints = tree(place.checkpoints)
    result = place.run()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first = place.notebook.read_bytes()
    notebook = nbformat.reads(first.decode(), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
    assert [cell.id for cell in notebook.cells] == [f"cell-{n}" for n in range(7)]
    assert all("execution" not in cell.metadata for cell in code)
    assert (code[0].outputs[0].name, code[0].outputs[0].text) == ("stdout", "to join\n")
    assert re.fullmatch(r"\d+\.py:2: UserWarning: old\ne\n", code[0].outputs[1].text)  # no folder
    assert code[1].outputs[0].text == "95%"
    assert code[2].outputs[0].text == "module://matplotlib_inline.backend_inline False\n"
    assert code[3].outputs[0].data["text/plain"] == "'second'"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "execute_ssd_notebook"}
    assert tree(place.checkpoints) == checkpoints
    assert place.left_over() == []
    assert not (place.folder / "study.partial.ipynb").exists()

    assert place.call(capsys)[0] == 0
    assert place.notebook.read_bytes() == first
    assert place.call(capsys, "--check")[0] == 0


def test_overrides_go_under_runs(place, capsys):
    """The run's own notebook has an injected cell, its folders are its own; the page stays."""
    source = PARAMETERS[1] + "\nDATA_DIR = 'data'\nCOUNT"
    names = "COUNT, RATE, CHECKPOINT_DIR, DATA_DIR, os.path.isdir(CHECKPOINT_DIR)"
    place.write("import os", ("parameters", source), f"print({names})")
    before = place.notebook.read_bytes()
    code, out, err = place.call(capsys, "-p", "COUNT=4", "-p", "RATE=1")
    assert code == 0, err
    page = place.folder / "runs" / "custom" / "study.ipynb"
    assert "4 1.0 runs/custom/checkpoints data True\n" in outputs(page)
    tags = [cell.metadata.get("tags") for cell in nbformat.read(page, as_version=4).cells]
    assert tags == [None, ["parameters"], ["injected-parameters"], None]
    assert place.notebook.read_bytes() == before
    code, out, err = place.call(capsys, "-p", "COUNT=5", "--output", "runs/five/page.ipynb")
    assert code == 0, err
    assert "5 0.1 runs/five/checkpoints" in outputs(place.folder / "runs" / "five" / "page.ipynb")


def test_options_reach_the_kernel(place, capsys):
    """Paths relative to the notebook, so that no page names a folder of this machine."""
    place.put("data/BCCD/x", "")
    place.put("w.pth", "weights")
    place.env["SSD_RUN_ID"] = "of another run, which --fresh must not go on with"
    names = "SSD_TRAINING BCCD_DATASET BCCD_URL VGG16_WEIGHTS SSD_STAGING SSD_NO_INSTALL".split()
    source = DATA[1]
    source += "\nVGG16_WEIGHTS = ''\nTRAINING = 'auto'\nCHECKPOINT_DIR = 'checkpoints'\nTRAINING"
    place.write(
        ("parameters", source),
        FETCH,
        f"import os\nprint(*(os.environ[n] for n in {names}), len(os.environ['SSD_RUN_ID']))",
    )
    before = place.notebook.read_bytes()
    data = place.folder / "data"
    where = ("--dataset", str(data), "--dataset-url", "a-mirror", "--output", "../new/page.ipynb")
    code, out, err = place.call(capsys, "--fresh", "--weights", "w.pth", *where)
    assert code == 0, err
    said = outputs(place.folder.parent / "new" / "page.ipynb")
    assert said.endswith("fresh data a-mirror w.pth checkpoints/.staging 1 32\n")
    assert "  defined\n  looking into a-mirror\n" in out
    assert place.notebook.read_bytes() == before


def test_fetch_cells_without_a_folder_to_fetch_to(place, capsys):
    """No DATA_DIR, and a variable that is set but empty."""
    place.env["BCCD_DATASET"] = ""
    place.write(PARAMETERS, FETCH, "print('ran')")
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert "2 dataset\n  the notebook asks for none\n" in out


LONG = """import time
for i in range(8):
    print('epoch', i, flush=True)
    time.sleep(0.5)
for i in range(4):
    print(f'\\rimages {i}', end='', flush=True)
    time.sleep(0.4)"""


def test_plain_lines_of_a_long_cell(place, capsys, monkeypatch):
    """Lines of a long cell come as they are printed, a progress bar now and then."""
    monkeypatch.setattr(runner, "SILENT_SECONDS", 0.6)
    place.write("print('quick one')", "## 10. Training", LONG)
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert "quick one" not in out
    assert re.search(r"^    epoch 7$", out, re.M)
    assert re.search(
        r"^  cell 2 of 2 \(10\. Training\): running for \d\.\d s: images [12]$", out, re.M
    )
    assert re.search(r"^  cell 2 of 2 \(10\. Training\): \d\.\d s, outputs: 1$", out, re.M)


has_terminals = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")


def run_on_a_terminal(place):
    """The exit code of a run, and all that it wrote to a terminal."""
    import pty

    place.env.update(TERM="xterm", PYTHONIOENCODING="utf-8", COLUMNS="100")
    mine, theirs = pty.openpty()
    process = place.start(stdout=theirs, stderr=subprocess.STDOUT)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(mine, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(mine)
    return process.wait(timeout=60), shown.decode("utf-8")


@has_terminals
def test_a_line_in_place_on_a_terminal(place):
    """A line with section, elapsed time and the last line of the running cell, in place."""
    place.write("print(1)", "## 10. Training", LONG)
    code, text = run_on_a_terminal(place)
    assert code == 0, text
    assert re.search(r"cell 2 of 2 \(10\. Training\) \d\.\d s epoch [2-7]", text)
    assert re.search(r"10\. Training\) \d\.\d s images [1-3]", text)
    assert text.rstrip().endswith("study.ipynb")


@has_terminals
def test_an_error_on_a_terminal_has_a_line_of_its_own(place):
    place.write("print(1)", "import time\ntime.sleep(1)\nraise ValueError('no')")
    code, text = run_on_a_terminal(place)
    assert code == 6, text
    line = text.splitlines()[-1]
    assert line.rpartition("\x1b[K")[2].startswith("error: Cell 2 of 2 failed"), line


def test_jupyters_own_run_passes_the_check(place, capsys):
    """nbconvert's command on the same notebook: accepted, with a warning about the digest."""
    place.write("print(1)", "2")
    command = nbconvert_in_place(place.notebook)
    done = subprocess.run(command, cwd=place.folder, env=place.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, out, err = place.call(capsys, "--check")
    assert code == 0, err
    assert "! outputs belong to this code" in out and "no digest" in out


def test_a_page_that_jupyter_ran_again_passes_the_check(place, capsys):
    """Published, edited, run again by nbconvert: it warns; a run of the script renews the stamp."""
    place.write("print(1)", "2")
    assert place.call(capsys)[0] == 0
    page = nbformat.read(place.notebook, as_version=4)
    page.cells[0].source = "print('changed')"
    page.cells.append(nbformat.v4.new_code_cell(""))
    nbformat.write(page, place.notebook)
    code, out, err = place.call(capsys, "--check")
    assert code == 9
    assert "the code was edited after the run, run it again by this script" in err
    command = nbconvert_in_place(place.notebook)
    subprocess.run(command, cwd=place.folder, env=place.env, capture_output=True, check=True)
    code, out, err = place.call(capsys, "--check")
    assert code == 0, err
    assert re.search(r"! outputs belong to this code .* a run of this script renews the stamp", out)
    assert place.call(capsys)[0] == 0
    code, out, err = place.call(capsys, "--check")
    assert code == 0, err
    assert "!" not in out


@pytest.mark.parametrize("minor", [0, 4])
def test_older_formats_with_overrides(place, capsys, minor):
    """Colab, classic Jupyter and VS Code save them; cells have no ids there."""
    data = (
        "from IPython.display import display\ndisplay({'application/json': {'a': [1]}}, raw=True)"
    )
    place.write(PARAMETERS, "print('COUNT is', COUNT)", data, minor=minor)
    code, out, err = place.call(capsys, "-p", "COUNT=5")
    assert code == 0, err
    page = place.folder / "runs" / "custom" / "study.ipynb"
    assert outputs(page).endswith("COUNT is 5\n")
    notebook = nbformat.read(page, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat_minor == minor
    code, out, err = place.call(capsys)
    assert code == 0, err


def test_a_table_that_is_shown_anew_prints_no_more_than_one(place, capsys, monkeypatch):
    monkeypatch.setattr(runner, "OUTPUT_LIMIT", 10_000)
    place.write(
        "from IPython.display import clear_output\n"
        "for i in range(20):\n    clear_output(wait=True)\n    print(f'{i:2}' * 500)"
    )
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert outputs(place.notebook) == "19" * 500 + "\n"


def test_cells_that_are_not_code_to_be_executed(place, capsys):
    """Empty and skipped cells count nowhere, an expected error is none; a run and --check agree."""
    place.write(
        "",
        ("raises-exception", "1 / 0"),
        " \n",
        ("skip-execution", "raise RuntimeError('takes hours')"),
        "print('goes on')",
        "",
    )
    for arguments in ((), ("--check",)):
        code, out, err = place.call(capsys, *arguments)
        assert code == 0, out + err
        assert "all code cells executed                     2 of 2" in out
        assert "2 of 2, coverage 100.0%" in out
        assert "0 errors, 1 expected" in out
        assert "executed in order                           1 to 2" in out
    notebook = nbformat.read(place.notebook, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells]
    assert counts == [None, 1, None, None, 2, None]


def test_outputs_of_a_skipped_cell_are_kept(place, capsys):
    """As nbclient does: somebody has executed it once, and it takes hours."""
    place.write(("skip-execution", "train()"), "print('now')")
    page = nbformat.read(place.notebook, as_version=4)
    kept = nbformat.v4.new_output("stream", name="stdout", text="trained\n")
    page.cells[0].outputs = [kept]
    page.cells[0].execution_count = 7
    nbformat.write(page, place.notebook)
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert outputs(place.notebook) == "trained\nnow\n"
