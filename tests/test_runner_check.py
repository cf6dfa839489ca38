"""The parts of the runner that need no kernel: checklist, cleaning, parameters, options."""

import ast
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from runner_helpers import DATA, PARAMETERS, ROOT, SCRIPT, Place, write_notebook

import execute_ssd_notebook as runner


def stamp(notebook):
    """Stamp a notebook as a run does."""
    notebook.metadata[runner.STAMP] = {
        "source_sha256": runner.source_digest(notebook),
        "outputs_sha256": runner.outputs_digest(notebook),
    }


def executed(count=4):
    """A notebook as a good run leaves it."""
    cells = [v4.new_markdown_cell("## 1. First")]
    for number in range(1, count + 1):
        output = v4.new_output("stream", name="stdout", text=f"{number}\n")
        source = f"print({number})"
        cells.append(v4.new_code_cell(source, execution_count=number, outputs=[output]))
    notebook = v4.new_notebook(cells=cells)
    stamp(notebook)
    return notebook


def verdicts(notebook, size=1000, folder=ROOT, draft=False):
    """Verdicts other than "ok", by the last word of the line's name."""
    found = {}
    for name, verdict, _ in runner.check_page(notebook, size, folder, draft, "failure"):
        if verdict != "ok":
            found[name.split()[-1]] = verdict
    return found


def measured(notebook):
    """What was measured, by the line's name."""
    found = {}
    for name, _, text in runner.check_page(notebook, 1000, ROOT, False, "failure"):
        found[name] = text
    return found


# -- the faults of a page, each in one cell of twelve


def test_a_good_page():
    assert verdicts(executed(12)) == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"execution_count": None}, {"executed": "failure", "order": "failure"}),
        ({"execution_count": 99}, {"order": "failure"}),
        ({"outputs": []}, {}),  # 11 of 12 are over 90%
        ({"source": "print(0)"}, {"code": "failure"}),
    ],
)
def test_faults_of_a_cell(change, expected):
    notebook = executed(12)
    notebook.cells[-1].update(change)
    assert verdicts(notebook) == expected


def test_two_silent_cells_of_twelve():
    notebook = executed(12)
    for cell in notebook.cells[-2:]:
        cell.outputs = []
    assert verdicts(notebook) == {"cells": "failure"}
    assert verdicts(notebook, draft=True) == {"cells": "warning"}


def test_an_error():
    notebook = executed(12)
    notebook.cells[-1].outputs = [v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert verdicts(notebook) == {"errors": "failure"}
    notebook.cells[-1].metadata["tags"] = ["raises-exception"]
    assert verdicts(notebook) == {}
    assert measured(notebook)["no errors"] == "0 errors, 1 expected"


def test_no_stamp():
    notebook = executed(12)
    del notebook.metadata[runner.STAMP]
    assert verdicts(notebook) == {"code": "warning"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"text/html": "<script>1</script>"}, {"it": "failure"}),
        ({"text/html": "<b>Las Vegas</b>"}, {}),
        ({"image/svg+xml": "<svg/>"}, {"it": "failure"}),
        ({"image/svg+xml": "", "image/png": "a"}, {}),
        ({"application/vnd.plotly.v1+json": {}}, {"it": "failure"}),
        (
            {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"},
            {"it": "failure"},
        ),
    ],
)
def test_what_github_shows(data, expected):
    notebook = executed(12)
    notebook.cells[-1].outputs.append(v4.new_output("display_data", data=data))
    assert verdicts(notebook) == expected


def test_widget_metadata():
    notebook = executed()
    notebook.metadata["widgets"] = {"application/x": {}}
    assert verdicts(notebook) == {"it": "failure"}
    notebook.metadata["widgets"] = {"application/x": {"state": {}}}
    assert verdicts(notebook) == {}


def test_size():
    assert verdicts(executed(), 2_000_000) == {}
    assert verdicts(executed(), 2_000_001) == {"MB": "warning"}
    assert verdicts(executed(), 5_000_001) == {"MB": "failure"}


@pytest.mark.parametrize(
    "text",
    [
        "/home/anna/BCCD/x.jpg", "see /root/x", "/Users/anna/x", r"C:\Users\anna", "('/tmp/x')",
        "/var/folders/xy/T/a", "ipykernel_4711", "/study/кровь/x",
    ],
)  # fmt: skip
def test_machine_paths(text, tmp_path):
    notebook = executed()
    folder = type(tmp_path)("/study/кровь")
    notebook.cells[-1].outputs[0]["text"] = text
    assert verdicts(notebook, folder=folder) == {"machine": "failure"}
    assert verdicts(notebook, folder=folder, draft=True) == {"machine": "warning"}
    notebook.cells[-1].outputs[0]["name"] = "stderr"  # a library's warning
    assert verdicts(notebook, folder=folder) == {"machine": "warning"}


@pytest.mark.parametrize(
    "text",
    ["https://example.org/home/x", "BCCD_Dataset/BCCD", "a/tmp/b", "ratio 3/root 2", "s/tmp"],
)
def test_no_machine_paths(text):
    notebook = executed()
    notebook.cells[-1].outputs[0]["text"] = text
    assert verdicts(notebook) == {}


# -- cells that are no code to be executed


@pytest.mark.parametrize("source", ["", " ", "\n\n", "\t\n "])
def test_empty_cells_are_no_code(source):
    """Not in any line of the checklist, wherever they stand, and not in the digest."""
    notebook = executed(2)
    lines = measured(notebook)
    for place in (0, 2, len(notebook.cells) + 2):
        notebook.cells.insert(place, v4.new_code_cell(source))
    assert verdicts(notebook) == {}
    assert measured(notebook) == lines


def test_skipped_cells_are_not_counted():
    notebook = executed(2)
    skipped = v4.new_code_cell("import torch", metadata={"tags": ["skip-execution"]})
    notebook.cells.insert(1, skipped)
    assert verdicts(notebook) == {}
    assert measured(notebook)["all code cells executed"] == "2 of 2"


def test_outputs_of_a_cell_that_is_not_executed_are_on_the_page_too():
    notebook = executed(2)
    tags = {"tags": ["skip-execution"]}
    output = v4.new_output("stream", name="stdout", text="/home/anna/x")
    notebook.cells.append(v4.new_code_cell("1", metadata=tags, outputs=[output]))
    assert verdicts(notebook) == {"machine": "failure"}
    said = measured(notebook)["no paths of one machine"]
    assert said == "'/home/anna' in a cell that is not executed"


# -- the stamp: other programs keep it and cannot renew it


def saved_by_jupyter(notebook):
    """What Jupyter changes when it saves a page that was not executed again."""
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99"}
    notebook.metadata["widgets"] = {}
    for cell in notebook.cells:
        cell.metadata["scrolled"] = True
        cell.metadata["trusted"] = True
        for output in cell.get("outputs", []):
            if output.output_type == "display_data":
                output["metadata"] = {"needs_background": "light"}
                output["data"]["image/png"] = output["data"]["image/png"].rstrip("\n")
    notebook.cells.append(v4.new_code_cell(""))


def page_with_a_picture():
    """A stamped page with streams and a picture, after it was written and read again."""
    notebook = executed(3)
    picture = v4.new_output("display_data", data={"image/png": "iVBORw0KGgo=\n"})
    notebook.cells[-1].outputs.append(picture)
    stamp(notebook)
    return nbformat.reads(nbformat.writes(notebook), as_version=4)


def test_a_page_that_jupyter_saved_is_as_it_was():
    notebook = page_with_a_picture()
    saved_by_jupyter(notebook)
    assert verdicts(notebook) == {}


def test_code_edited_after_the_run_fails():
    notebook = page_with_a_picture()
    notebook.cells[1].source = "print(2 - 1)"
    saved_by_jupyter(notebook)
    assert verdicts(notebook) == {"code": "failure"}
    assert "edited after the run, run it again" in measured(notebook)["outputs belong to this code"]


@pytest.mark.parametrize("key", ["execution", "executionInfo", "ExecuteTime", "papermill"])
def test_edited_and_executed_elsewhere_with_the_same_outputs_warns(key):
    """Jupyter, Colab and others note when they executed a cell; our pages carry no such times."""
    notebook = page_with_a_picture()
    notebook.cells[1].source = "print(2 - 1)"
    for cell in notebook.cells:
        cell.metadata[key] = {"start_time": "2026-11-28T16:49:15"}
    assert verdicts(notebook) == {"code": "warning"}
    said = measured(notebook)["outputs belong to this code"]
    assert "a run of this script renews the stamp" in said
    clean = runner.cleaned(notebook)
    assert verdicts(clean) == {}
    clean.cells[1].source = "print(3 - 2)"
    assert verdicts(clean) == {"code": "failure"}


def test_edited_and_executed_elsewhere_with_other_outputs_warns():
    notebook = page_with_a_picture()
    notebook.cells[1].source = "print(10)"
    notebook.cells[1].outputs[0]["text"] = "10\n"
    assert verdicts(notebook) == {"code": "warning"}


def test_executed_elsewhere_without_an_edit():
    notebook = page_with_a_picture()
    notebook.cells[1].outputs[0]["text"] = "another processor\n"
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-11-28T16:49:15"}
    assert verdicts(notebook) == {}


# -- --check as a command


def run_check(path, encoding="utf-8"):
    """The script's --check in a process of its own."""
    command = [sys.executable, str(SCRIPT), "--check", str(path)]
    env = {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, encoding=encoding, env=env)


def test_check_as_a_command(tmp_path):
    """A tick a line with the measured numbers; 9 with one sentence if not; nothing is written."""
    path = tmp_path / "page.ipynb"
    nbformat.write(executed(), path)
    done = run_check(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓") == 8
    assert "4 of 4, coverage 100.0%" in done.stdout
    notebook = executed()
    notebook.cells[-1].source = "print('edited')"
    nbformat.write(notebook, path)
    edited = path.read_bytes()
    done = run_check(path, "ascii")
    assert done.returncode == 9
    assert done.stdout.count("[x]") == 7
    assert "[ ] outputs belong to this code" in done.stdout
    said = r"error: page\.ipynb does not pass: outputs belong to this code: .*run it again.*\.\n"
    assert re.fullmatch(said, done.stderr)
    assert path.read_bytes() == edited
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("minor", range(6))
def test_every_format_of_notebooks_is_read(tmp_path, minor):
    path = write_notebook(tmp_path / "a.ipynb", PARAMETERS, "print(1)", minor=minor)
    notebook, _ = runner.read_notebook(path)
    assert notebook.nbformat_minor == minor
    runner.inject(notebook, {"COUNT": 4})
    nbformat.validate(notebook)
    assert ("id" in notebook.cells[1]) == (minor == 5)


def test_ids_that_the_format_does_not_know_or_that_it_lacks_are_mended(tmp_path, recwarn):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)", "print(2)")
    text = path.read_text()
    path.write_text(text.replace('"nbformat_minor": 5', '"nbformat_minor": 4'))
    notebook, _ = runner.read_notebook(path)
    assert "id" not in notebook.cells[0]
    path.write_text(re.sub(r'"id": "cell-\d",\s*', "", text))
    notebook, _ = runner.read_notebook(path)
    assert notebook.cells[0].id != notebook.cells[1].id
    assert not recwarn.list


# -- clean pages


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a\nb\n", "a\nb\n"),
        ("10%\r20%\r100%\n", "100%\n"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("10%\r", "10%"),
    ],
)
def test_terminal_text(raw, text):
    assert runner.terminal_text(raw) == text
    pieces = ""
    for piece in raw:  # as it may arrive, piece by piece
        pieces = runner.joined(pieces, piece)
    assert runner.terminal_text(pieces) == text


def test_a_progress_bar_stays_short():
    text = "before\n"
    for step in range(10_000):
        text = runner.joined(text, f"\rimages: {step:5}/10000")
    assert runner.terminal_text(text) == "before\nimages:  9999/10000"
    assert len(text) < 100


def test_clean_notebook(tmp_path):
    notebook = executed(1)
    cell = notebook.cells[-1]
    cell.outputs = []
    for percent in range(50):
        cell.outputs.append(v4.new_output("stream", name="stdout", text=f"\r{percent}%"))
    cell.outputs.append(v4.new_output("stream", name="stderr", text="w"))
    cell.outputs.append(v4.new_output("stream", name="stdout", text="end"))
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    notebook.metadata["widgets"] = {}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99"}
    notebook.metadata["kernelspec"] = {"name": "lab"}
    untouched = copy.deepcopy(notebook)
    path = tmp_path / "page.ipynb"
    clean, size = runner.write_page(notebook, path)
    data = path.read_bytes()
    assert notebook == untouched
    texts = []
    for output in clean.cells[-1].outputs:
        texts.append((output.name, output.text))
    assert texts == [("stdout", "49%end"), ("stderr", "w")]
    assert "execution" not in clean.cells[-1].metadata
    assert "widgets" not in clean.metadata
    assert clean.metadata["language_info"] == {"name": "python"}
    assert clean.metadata["kernelspec"]["name"] == "python3"
    nbformat.validate(clean)
    runner.write_page(clean, path)
    assert path.read_bytes() == data
    assert size == len(data)
    assert verdicts(nbformat.read(path, as_version=4)) == {}


def test_half_a_character_can_be_written(tmp_path):
    notebook = executed(1)
    notebook.cells[-1].outputs[0]["text"] = "a name: \udcf1.jpg"
    path = tmp_path / "page.ipynb"
    runner.write_page(notebook, path)
    page = nbformat.read(path, as_version=4)
    assert page.cells[-1].outputs[0]["text"] == "a name: \udcf1.jpg"
    assert verdicts(page) == {}


def test_section_titles():
    sources = ["# Study", "## 1. **Setup**", "text", "## 2. Data\ntext\n## 3. `Prior` boxes"]
    cells = [v4.new_markdown_cell(source) for source in sources]
    titles = runner.section_titles(v4.new_notebook(cells=cells))
    assert titles == ["", "1. Setup", "1. Setup", "3. Prior boxes"]


# -- parameters

DEFAULTS = {
    "EPOCHS": 50, "RATE": 1e-3, "NAME": "a", "ON": True, "NAMES": ["RBC"], "SIZE": (1, 2),
    "NOTHING": None, "RATIOS": [[1.5], [1.5, 2.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("EPOCHS=3", 3), ("RATE=1", 1.0), ("RATE=2e-4", 2e-4), ("NAME=b c", "b c"),
        ("NAME='b'", "b"), ("NAME=3", "3"), ("NAME=", ""), ("NAME=a=b", "a=b"), ("ON=false", False),
        ("ON=True", True), ("NAMES=['WBC', 'x']", ["WBC", "x"]), ("NAMES=[]", []),
        ("SIZE=[3, 4]", (3, 4)), ("NOTHING=5", 5), ("EPOCHS=-1", -1), ("NAME=Клетки", "Клетки"),
        ("RATIOS=[[2], [3, 4.5]]", [[2], [3, 4.5]]),
    ],
)  # fmt: skip
def test_overrides(pair, value):
    result = runner.read_overrides([pair], DEFAULTS)[pair.partition("=")[0]]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "pair",
    ["EPOCHS=abc", "EPOCHS=1.5", "EPOCHS=True", "EPOCHS=", "RATE=x", "RATE=1e999", "RATE=nan",
     "RATE=True", "ON=1", "ON=maybe", "NAMES=RBC", "NAMES={['RBC']}", "SIZE=5", "epochs=3",
     "EPOCHS", "=3"],
)  # fmt: skip
def test_refused_overrides(pair):
    with pytest.raises(runner.Failure) as failure:
        runner.read_overrides([pair], DEFAULTS)
    assert failure.value.code == 2
    assert "\n" not in failure.value.sentence


def test_parameters_are_read_without_running_them():
    source = "%matplotlib inline\n!pip list\n"
    source += "A = 1\nB = 2.5\nC = print('no')\nD = [1, 2]\nE = -1\nif A:\n    F = 1\nx.y = 3"
    cell = v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    found = runner.read_constants(v4.new_notebook(cells=[cell]))
    assert found == {"A": 1, "B": 2.5, "C": None, "D": [1, 2], "E": -1}


def test_inject_replaces_an_earlier_cell(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)", PARAMETERS, "print(2)")
    notebook = nbformat.read(path, as_version=4)
    for value in (4, 5):
        runner.inject(notebook, {"COUNT": value, "TITLE": "it's"})
    tags = [runner.tags(cell) for cell in notebook.cells]
    assert tags == [set(), {"parameters"}, {"injected-parameters"}, set()]
    space = {}
    exec(notebook.cells[2].source, space)
    assert space["COUNT"] == 5
    assert space["TITLE"] == "it's"
    nbformat.validate(notebook)
    runner.inject(notebook, {})
    assert len(notebook.cells) == 3


# -- packages and the command line


def test_packages():
    missing = runner.find_problems(["no-such-module>=1"])
    assert missing == {"no-such-module>=1": "no-such-module is missing"}
    assert runner.find_problems(["packaging>=1", "opencv-python>=4", "pillow>=1"]) == {}
    old = runner.find_problems(["packaging>=999"])
    assert old["packaging>=999"].endswith("is older than 999")
    needed, optional = runner.read_requirements(SCRIPT)
    assert "torch>=2.5" in needed
    assert "onnx>=1.16" in optional


def test_exit_codes_and_options_fit_one_screen():
    command = [sys.executable, str(SCRIPT), "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert len(text.splitlines()) <= 34
    assert max(map(len, text.splitlines())) <= 100
    exit_codes = text.partition("Exit codes")[2]
    for code in (*range(13), 129, 130, 143):
        assert re.search(rf"\b{code}\b", exit_codes), code
    options = "--check -p --dataset --dataset-url --weights --output --fresh --install"
    for option in f"{options} --retries --timeout".split():
        assert f"  {option} " in text, option


def test_starts_with_the_standard_library_only():
    """Nothing but the standard library is imported before the packages were checked."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport execute_ssd_notebook\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['execute_ssd_notebook']", done.stderr


def test_an_older_python_can_read_the_script():
    """It has to get as far as the sentence about its version."""
    source = SCRIPT.read_text()
    ast.parse(source, feature_version=(3, 7))


def test_an_older_python_is_told(monkeypatch, capsys):
    def python_version():
        return "3.9.18"

    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr("platform.python_version", python_version)
    for arguments in ([], ["--check"], ["--help"]):
        assert runner.main(arguments) == 3
        said = capsys.readouterr().err
        assert said == "error: needs Python 3.10 or newer, this is 3.9.18\n"


def test_a_check_that_runs_nothing_needs_nbformat_alone(monkeypatch, tmp_path, capsys):
    """Who reviews a page need not install torch."""
    asked = []

    def find_problems(requirements):
        asked.extend(requirements)
        return {}

    monkeypatch.setattr(runner, "find_problems", find_problems)
    path = write_notebook(tmp_path / "page.ipynb", "1")
    runner.main(["--check", str(path)])
    capsys.readouterr()
    assert len(asked) == 1 and asked[0].startswith("nbformat>=")


def test_a_folders_flag_of_windows_protects_nothing(monkeypatch, tmp_path):
    """Explorer sets it on Documents and the like; of a file it means what it says."""
    (tmp_path / "file").touch(mode=0o444)
    tmp_path.chmod(0o555)
    monkeypatch.setattr(runner.os, "access", lambda path, mode: True)
    try:
        assert runner.is_protected(tmp_path)
        monkeypatch.setattr(runner.os, "name", "nt")
        assert not runner.is_protected(tmp_path) and runner.is_protected(tmp_path / "file")
    finally:
        monkeypatch.undo()
        tmp_path.chmod(0o755)


def test_a_file_that_is_held_for_a_moment_is_replaced_all_the_same(monkeypatch, tmp_path):
    """On Windows a virus scanner looks into new files."""
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new")
    tries = []
    really = os.replace

    def held_twice(one, other):
        tries.append(one)
        if len(tries) < 3:
            raise PermissionError(13, "held")
        really(one, other)

    monkeypatch.setattr(runner.os, "replace", held_twice)
    with pytest.raises(PermissionError):
        runner.rename(new, old)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(runner.os, "name", "nt")
    runner.rename(new, old)
    monkeypatch.undo()
    assert old.read_text() == "new" and len(tries) == 3


def test_as_root_strangers_files_beside_a_result_are_left_alone(monkeypatch, tmp_path):
    """What others made beside --output while the run went on is not given to anybody."""
    place = Place(tmp_path / "study")
    place.write(PARAMETERS)
    target = tmp_path / "elsewhere" / "page.ipynb"
    target.parent.mkdir()
    options = runner.read_options([str(place.notebook), "--output", str(target)])
    owners = runner.Owners(runner.Job(options, runner.Console(), runner.Signals()))
    (target.parent / "a stranger's").touch()
    target.touch()
    paths = owners.paths()
    assert target in paths and place.notebook in paths
    assert target.parent / "a stranger's" not in paths


def test_older_pythons_that_are_here(tmp_path):
    said = re.compile(r"error: needs Python 3\.10 or newer, this is 3\.\d\.\d+\n")
    for python in Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python"):
        command = [str(python), str(SCRIPT)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 3
        assert said.fullmatch(done.stderr), done.stderr


def test_a_run_with_overrides_writes_below_runs_alone(tmp_path):
    """Whatever --output says: checkpoints and results stay below runs/."""
    place = Place(tmp_path / "study")
    place.write(PARAMETERS, DATA)
    for output in ("../elsewhere/page.ipynb", "page.ipynb", "runs/page.ipynb", "runs/a/page.ipynb"):
        path = str(place.folder / output)
        arguments = [str(place.notebook), "-p", "COUNT=4", "--output", path]
        options = runner.read_options(arguments)
        job = runner.Job(options, runner.Console(), runner.Signals())
        folder = "runs/page"
        if "/a/" in output:
            folder = "runs/a"
        assert job.values["CHECKPOINT_DIR"] == f"{folder}/checkpoints"
