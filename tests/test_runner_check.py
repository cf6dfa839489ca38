"""The parts of the runner that need no kernel: checklist, cleaning, parameters, options."""

import copy
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat import v4
from runner_helpers import DATA, PARAMETERS, ROOT, SCRIPT, Place, write_notebook

from ssd_runner import packages, page, plan
from ssd_runner.console import Failure


def executed(count=4):
    """A notebook as a good run leaves it."""
    cells = [v4.new_markdown_cell("## 1. First")]
    for number in range(1, count + 1):
        output = v4.new_output("stream", name="stdout", text=f"{number}\n")
        source = f"print({number})"
        cells.append(v4.new_code_cell(source, execution_count=number, outputs=[output]))
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata[page.STAMP] = {"source_sha256": page.source_digest(notebook)}
    return notebook


def verdicts(notebook, size=1000, folder=ROOT, draft=False):
    """Verdicts other than "ok", by the last word of the line's name."""
    lines = page.check(notebook, size, folder, draft, "failure")
    return {name.split()[-1]: verdict for name, verdict, _ in lines if verdict != "ok"}


def shown(**data):
    """A rich output; __ stands for / in the names."""
    data = {kind.replace("__", "/"): value for kind, value in data.items()}
    return v4.new_output("display_data", data=data)


ERROR = v4.new_output("error", ename="E", evalue="", traceback=[])
WIDGET = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda n, last: None, {}),
        (
            lambda n, last: last.update(execution_count=None),
            {"executed": "failure", "order": "failure"},
        ),
        (lambda n, last: last.update(execution_count=99), {"order": "failure"}),
        (lambda n, last: last.update(outputs=[]), {}),  # 11 of 12 are over 90%
        (lambda n, last: [c.update(outputs=[]) for c in n.cells[-2:]], {"cells": "failure"}),
        (lambda n, last: last.update(outputs=[ERROR]), {"errors": "failure"}),
        (lambda n, last: last.update(source="print(0)"), {"code": "failure"}),
        (lambda n, last: n.metadata.pop(page.STAMP), {"code": "warning"}),
        (lambda n, last: n.metadata.update(widgets={"application/x": {}}), {"it": "failure"}),
        (lambda n, last: n.metadata.update(widgets={"application/x": {"state": {}}}), {}),
        (
            lambda n, last: last.outputs.append(shown(text__html="<script>1</script>")),
            {"it": "failure"},
        ),
        (lambda n, last: last.outputs.append(shown(text__html="<b>Las Vegas</b>")), {}),
        (
            lambda n, last: last.outputs.append(shown(**{"image/svg+xml": "<svg/>"})),
            {"it": "failure"},
        ),
        (lambda n, last: last.outputs.append(shown(**{"image/svg+xml": "", "image/png": "a"})), {}),
        (
            lambda n, last: last.outputs.append(shown(**{"application/vnd.plotly.v1+json": {}})),
            {"it": "failure"},
        ),
        (lambda n, last: last.outputs.append(shown(**WIDGET)), {"it": "failure"}),
    ],
)
def test_each_fault_of_a_page(action, expected):
    notebook = executed(12)
    action(notebook, notebook.cells[-1])
    assert verdicts(notebook) == expected


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
    notebook, folder = executed(), type(tmp_path)("/study/кровь")
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


def test_check_as_a_command(tmp_path):
    """A tick a line with the measured numbers; 9 with one sentence if not; nothing is written."""
    path = tmp_path / "page.ipynb"
    nbformat.write(executed(), path)

    def run(encoding):
        command = [sys.executable, str(SCRIPT), "--check", str(path)]
        env = {"PYTHONIOENCODING": encoding}
        return subprocess.run(command, capture_output=True, encoding=encoding, env=env)

    done = run("utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓") == 8 and "4 of 4, coverage 100.0%" in done.stdout
    notebook = executed()
    notebook.cells[-1].source = "print('edited')"
    nbformat.write(notebook, path)
    edited = path.read_bytes()
    done = run("ascii")
    assert done.returncode == 9
    assert done.stdout.count("[x]") == 7 and "[ ] outputs belong to this code" in done.stdout
    said = r"error: page\.ipynb does not pass: outputs belong to this code: .*run it again\.\n"
    assert re.fullmatch(said, done.stderr)
    assert path.read_bytes() == edited and [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


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
    assert page.terminal_text(raw) == text
    pieces = ""
    for piece in raw:  # as it may arrive, piece by piece
        pieces = page.joined(pieces, piece)
    assert page.terminal_text(pieces) == text


def test_a_progress_bar_stays_short():
    text = "before\n"
    for step in range(10_000):
        text = page.joined(text, f"\rimages: {step:5}/10000")
    assert page.terminal_text(text) == "before\nimages:  9999/10000" and len(text) < 100


def test_clean_notebook(tmp_path):
    notebook = executed(1)
    cell = notebook.cells[-1]
    cell.outputs = [v4.new_output("stream", name="stdout", text=f"\r{i}%") for i in range(50)]
    cell.outputs += [
        v4.new_output("stream", name="stderr", text="w"),
        v4.new_output("stream", name="stdout", text="end"),
    ]
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    language = {"name": "python", "version": "3.99"}
    notebook.metadata.update(widgets={}, language_info=language, kernelspec={"name": "lab"})
    untouched = copy.deepcopy(notebook)
    clean, size = page.write(notebook, tmp_path / "page.ipynb")
    data = (tmp_path / "page.ipynb").read_bytes()
    assert notebook == untouched
    texts = [(output.name, output.text) for output in clean.cells[-1].outputs]
    assert texts == [("stdout", "49%end"), ("stderr", "w")]
    assert "execution" not in clean.cells[-1].metadata and "widgets" not in clean.metadata
    assert clean.metadata["language_info"] == {"name": "python"}
    assert clean.metadata["kernelspec"]["name"] == "python3"
    nbformat.validate(clean)
    page.write(clean, tmp_path / "page.ipynb")
    assert (tmp_path / "page.ipynb").read_bytes() == data and size == len(data)


def test_section_titles():
    sources = ["# Study", "## 1. **Setup**", "text", "## 2. Data\ntext\n## 3. `Prior` boxes"]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(source) for source in sources])
    assert page.titles(notebook) == ["", "1. Setup", "1. Setup", "3. Prior boxes"]


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
    result = plan.overrides([pair], DEFAULTS)[pair.partition("=")[0]]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "pair",
    ["EPOCHS=abc", "EPOCHS=1.5", "EPOCHS=True", "EPOCHS=", "RATE=x", "RATE=1e999", "RATE=nan",
     "RATE=True", "ON=1", "ON=maybe", "NAMES=RBC", "SIZE=5", "epochs=3",
     "EPOCHS", "=3"],
)  # fmt: skip
def test_refused_overrides(pair):
    with pytest.raises(Failure) as failure:
        plan.overrides([pair], DEFAULTS)
    assert failure.value.code == 2 and "\n" not in failure.value.sentence


def test_parameters_are_read_without_running_them():
    source = "A = 1\nB = 2.5\nC = print('no')\nD = [1, 2]\nE = -1\nif A:\n    F = 1\nx.y = 3"
    cell = v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    found = plan.constants(v4.new_notebook(cells=[cell]))
    assert found == {"A": 1, "B": 2.5, "C": None, "D": [1, 2], "E": -1}


def test_inject_replaces_an_earlier_cell(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)", PARAMETERS, "print(2)")
    notebook = nbformat.read(path, as_version=4)
    for value in (4, 5):
        plan.inject(notebook, {"COUNT": value, "TITLE": "it's"})
    tags = [page.tags(cell) for cell in notebook.cells]
    assert tags == [set(), {"parameters"}, {"injected-parameters"}, set()]
    space = {}
    exec(notebook.cells[2].source, space)
    assert space["COUNT"] == 5 and space["TITLE"] == "it's"
    nbformat.validate(notebook)
    plan.inject(notebook, {})
    assert len(notebook.cells) == 3


# -- packages and the command line


def test_packages():
    assert packages.problems(["no-such-module>=1"]) == {
        "no-such-module>=1": "no-such-module is missing"
    }
    assert packages.problems(["packaging>=1", "opencv-python>=4", "pillow>=1"]) == {}
    (said,) = packages.problems(["packaging>=999"]).values()
    assert said.endswith("is older than 999")
    needed, optional = packages.requirements(SCRIPT)
    assert "torch>=2.5" in needed and "onnx>=1.16" in optional


def test_exit_codes_and_options_fit_one_screen():
    command = [sys.executable, str(SCRIPT), "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert len(text.splitlines()) <= 34 and max(map(len, text.splitlines())) <= 100
    for code in (*range(13), 129, 130, 143):
        assert re.search(rf"\b{code}\b", text.partition("Exit codes")[2]), code
    options = "--check --demo -p --dataset --dataset-url --weights --images --results --output"
    for option in f"{options} --html --fresh --install --retries --timeout --stall --quiet".split():
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
    assert done.stdout.strip() == "['execute_ssd_notebook', 'ssd_runner']", done.stderr


def test_a_run_with_overrides_writes_below_runs_alone(tmp_path):
    """Whatever --output says: checkpoints, results and drawn data stay below runs/."""
    from execute_ssd_notebook import Console, Signals, read_options

    place = Place(tmp_path / "study")
    place.write(PARAMETERS, DATA)
    for output in ("../elsewhere/page.ipynb", "page.ipynb", "runs/page.ipynb", "runs/a/page.ipynb"):
        path = str(place.folder / output)
        options = read_options([str(place.notebook), "--demo", "--output", path], "")
        job = plan.Job(options, Console(quiet=True), Signals())
        folder = "runs/a" if "/a/" in output else "runs/page"
        assert job.values["CHECKPOINT_DIR"] == f"{folder}/checkpoints"
        assert job.values["DATA_DIR"] == f"{folder}/BCCD_Dataset"
