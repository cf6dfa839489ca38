"""--check and the parts of the runner that need no kernel: checklist, cleaning, parameters, tables against files."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from runner_helpers import PARAMETERS, ROOT, SCRIPT, write_notebook

import execute_ssd_notebook as runner


def executed(count: int = 4) -> nbformat.NotebookNode:
    """A notebook as a good run leaves it."""
    cells = [v4.new_markdown_cell("## 1. First")]
    for number in range(1, count + 1):
        output = v4.new_output("stream", name="stdout", text=f"{number}\n")
        cells.append(v4.new_code_cell(f"print({number})", execution_count=number, outputs=[output]))
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata[runner.STAMP] = {"source_sha256": runner.source_digest(notebook)}
    return notebook


def verdicts(notebook, size: int = 1000, **kwargs) -> dict[str, str]:
    """Verdicts other than "ok", by a word of the line's name."""
    checks = runner.check_notebook(notebook, size, **kwargs)
    return {check.name.split()[-1]: check.verdict for check in checks if check.verdict != "ok"}


def rich(**data) -> nbformat.NotebookNode:
    return v4.new_output("display_data", data={kind.replace("__", "/"): value for kind, value in data.items()})


def test_good_page_passes():
    assert verdicts(executed()) == {}


def change(action):
    notebook = executed(12)
    action(notebook)
    return notebook


def last(notebook):
    return notebook.cells[-1]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda n: last(n).update(execution_count=None), {"executed": "failure", "order": "failure"}),
        (lambda n: last(n).update(execution_count=99), {"order": "failure"}),
        (lambda n: last(n).update(outputs=[]), {}),  # 11 of 12 are over 90%
        (lambda n: [c.update(outputs=[]) for c in n.cells[-2:]], {"cells": "failure"}),
        (
            lambda n: last(n).update(outputs=[v4.new_output("error", ename="E", evalue="", traceback=[])]),
            {"errors": "failure"},
        ),
        (lambda n: last(n).update(source="print(0)"), {"code": "failure"}),
        (lambda n: n.metadata.pop(runner.STAMP), {"code": "warning"}),
        (lambda n: n.metadata.update(widgets={"application/x": {}}), {"it": "failure"}),
        (lambda n: n.metadata.update(widgets={"application/x": {"state": {}}}), {}),
        (lambda n: last(n).outputs.append(rich(text__html="<script>1</script>", text__plain="x")), {"it": "failure"}),
        (lambda n: last(n).outputs.append(rich(text__html="<b>1</b>", text__plain="x")), {}),
        (lambda n: last(n).outputs.append(rich(**{"image/svg+xml": "<svg/>"})), {"it": "failure"}),
        (lambda n: last(n).outputs.append(rich(**{"image/svg+xml": "<svg/>", "image/png": "aaaa"})), {}),
        (lambda n: last(n).outputs.append(rich(**{"application/vnd.plotly.v1+json": {}})), {"it": "failure"}),
        (lambda n: last(n).outputs.append(rich(**{"application/vnd.jupyter.widget-view+json": {}})), {"it": "failure"}),
    ],
)
def test_each_fault_of_a_page(action, expected):
    assert verdicts(change(action)) == expected


def test_expected_error_is_no_error():
    notebook = executed()
    last(notebook).update(outputs=[v4.new_output("error", ename="E", evalue="", traceback=[])])
    last(notebook).metadata["tags"] = ["raises-exception"]
    assert verdicts(notebook) == {}


@pytest.mark.parametrize(
    ("size", "expected"), [(2_000_000, {}), (2_000_001, {"small": "warning"}), (5_000_001, {"small": "failure"})]
)
def test_size(size, expected):
    assert verdicts(executed(), size) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/home/anna/BCCD/x.jpg", "see /root/x", "/Users/anna/x", r"C:\Users\anna", "('/tmp/x')", "/var/folders/xy/T/a",
        "ipykernel_4711", "D:\\study\\x",
    ],
)  # fmt: skip
def test_machine_paths(text):
    notebook = executed()
    last(notebook).outputs[0]["text"] = text
    assert verdicts(notebook, folders=("D:\\study",)) == {"machine": "failure"}
    assert verdicts(notebook, folders=("D:\\study",), draft=True) == {"machine": "warning"}
    last(notebook).outputs[0]["name"] = "stderr"  # a library's warning
    assert verdicts(notebook, folders=("D:\\study",)) == {"machine": "warning"}


@pytest.mark.parametrize(
    "text", ["https://example.org/home/x", "BCCD_Dataset/BCCD", "a/tmp/b", "ratio 3/root 2", "s/tmp"]
)
def test_no_machine_paths(text):
    notebook = executed()
    last(notebook).outputs[0]["text"] = text
    assert verdicts(notebook) == {}


def test_check_as_a_command(tmp_path):
    """A tick a line with the measured numbers; 9 with one sentence if something is wrong; nothing is written."""
    path = tmp_path / "page.ipynb"
    nbformat.write(executed(), path)
    command = [sys.executable, str(SCRIPT), "--check", str(path)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env={"PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("✓") == 8 and "4 of 4, coverage 100.0%" in result.stdout
    result = subprocess.run(command, capture_output=True, encoding="ascii", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stdout.count("[x]") == 8
    notebook = executed()
    notebook.cells[-1].source = "print('edited')"
    nbformat.write(notebook, path)
    edited = path.read_bytes()
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env={"PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 9 and "✗ outputs belong to this code" in result.stdout
    assert re.fullmatch(
        r"error: page\.ipynb does not pass: outputs belong to this code: .*run it again\.\n", result.stderr
    )
    assert path.read_bytes() == edited and [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


# -- clean pages


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb\n", "a\nb\n"),
        ("10%\r20%\r100%\n", "100%\n"),
        ("long line\rshort\n", "shortline\n"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("10%\r", "10%"),
        ("ab\bc", "ac"),
        ("busy\r\x1b[Kdone", "done"),
    ],
)
def test_terminal_text(raw, shown):
    assert runner.terminal_text(raw) == shown


def test_clean_notebook():
    notebook = executed(1)
    cell = last(notebook)
    cell.outputs = [v4.new_output("stream", name="stdout", text=f"\r{i}%") for i in range(50)]
    cell.outputs += [
        v4.new_output("stream", name="stderr", text="w"),
        v4.new_output("stream", name="stdout", text="end"),
    ]
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    notebook.metadata.update(
        widgets={"a": {}}, language_info={"name": "python", "version": "3.99"}, kernelspec={"name": "lab"}
    )
    untouched = copy.deepcopy(notebook)
    clean = runner.clean_notebook(notebook)
    assert notebook == untouched
    assert [(o.name, o.text) for o in last(clean).outputs] == [("stdout", "49%end"), ("stderr", "w")]
    assert "execution" not in last(clean).metadata and "widgets" not in clean.metadata
    assert "version" not in clean.metadata["language_info"] and clean.metadata["kernelspec"]["name"] == "python3"
    assert last(clean).id == cell.id
    nbformat.validate(clean)
    assert runner.notebook_bytes(clean) == runner.notebook_bytes(runner.clean_notebook(clean))


def test_section_titles():
    sources = ["# Study", "## 1. **Setup**", "text", "### part", "## 2. Data\ntext\n## 3. `Prior` boxes"]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(source) for source in sources])
    assert runner.cell_titles(notebook) == ["", "1. Setup", "1. Setup", "1. Setup", "3. Prior boxes"]


# -- parameters

DEFAULTS = {"EPOCHS": 50, "RATE": 1e-3, "NAME": "a", "ON": True, "NAMES": ["RBC"], "SIZE": (1, 2), "NOTHING": None}


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("EPOCHS=3", 3), ("RATE=1", 1.0), ("RATE=2e-4", 2e-4), ("NAME=b c", "b c"), ("NAME='b'", "b"), ("NAME=3", "3"),
        ("NAME=", ""), ("NAME=a=b", "a=b"), ("ON=false", False), ("ON=True", True),
        ("NAMES=['WBC', 'x']", ["WBC", "x"]),
        ("NAMES=[]", []), ("SIZE=[3, 4]", (3, 4)), ("NOTHING=5", 5), ("EPOCHS=-1", -1), ("NAME=Клетки", "Клетки"),
    ],
)  # fmt: skip
def test_overrides(pair, value):
    result = runner.parse_overrides([pair], DEFAULTS)[pair.partition("=")[0]]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "pair",
    ["EPOCHS=abc", "EPOCHS=1.5", "EPOCHS=True", "EPOCHS=", "RATE=x", "RATE=1e999", "RATE=nan", "ON=1", "ON=maybe",
     "NAMES=RBC", "NAMES=[1]", "SIZE=5", "epochs=3", "EPOCHS", "=3"],
)  # fmt: skip
def test_refused_overrides(pair):
    with pytest.raises(runner.Failure) as failure:
        runner.parse_overrides([pair], DEFAULTS)
    assert failure.value.code == 2 and "\n" not in failure.value.sentence


def test_parameters_are_read_without_running_them():
    source = "A = 1\nB: float = 2.5\nC = 2 * 60\nD = print('no')\nE = [1, 2]\nF = -1\nif A:\n    G = 1\nx.y = 3"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source, metadata={"tags": ["parameters"]})])
    found = runner.notebook_parameters(notebook)
    assert found == {"A": 1, "B": 2.5, "C": 120, "D": runner.UNKNOWN, "E": [1, 2], "F": -1}


def test_inject_replaces_an_earlier_cell(tmp_path):
    notebook = nbformat.read(write_notebook(tmp_path / "a.ipynb", "print(1)", PARAMETERS, "print(2)"), as_version=4)
    for value in (4, 5):
        runner.inject(notebook, {"COUNT": value, "TITLE": "it's"})
    assert [runner.tags(cell) for cell in notebook.cells] == [[], ["parameters"], ["injected-parameters"], []]
    space: dict = {}
    exec(notebook.cells[2].source, space)
    assert space["COUNT"] == 5 and space["TITLE"] == "it's"
    nbformat.validate(notebook)
    runner.inject(notebook, {})
    assert len(notebook.cells) == 3


# -- the table at the top


def requirements(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {re.split(r"[><=]", line)[0]: line for line in lines if line and not line.startswith("-")}


def test_one_set_of_requirements():
    """The header that uv reads, the table and requirements.txt name the same versions."""
    header = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(encoding="utf-8"), re.S).group(1)
    in_header = set(re.findall(r'"([^"]+)",', header.partition("dependencies")[2]))
    table = {*runner.RUNNER_PACKAGES.values(), *runner.PROJECT.packages.values()}
    assert in_header == table
    listed = requirements(ROOT / "requirements.txt")
    assert {name: line for name, line in listed.items() if name != "jupyter"} == {
        re.split(r"[><=]", line)[0]: line for line in table
    }


def test_weights_address_is_torchvisions():
    vgg = pytest.importorskip("torchvision.models.vgg")
    weights = vgg.VGG16_Weights.IMAGENET1K_FEATURES
    assert weights.url == runner.PROJECT.weights_url
    assert weights.meta["_file_size"] * 2**20 / 1e6 == pytest.approx(runner.PROJECT.weights_megabytes, abs=1)
    layers = vgg.make_layers(vgg.cfgs["D"]).state_dict()
    names = {f"features.{name}" for name in layers if name.endswith("weight")}
    assert names == set(runner.PROJECT.weights_keys)
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    assert runner.hub_folder() == folder


def test_exit_codes_are_documented():
    help_text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True).stdout
    for code in runner.Exit:
        assert re.search(rf"^ +(\d+, )*{code.value}\b", help_text, re.M), code
    options = "--check --demo -p --dataset --dataset-url --weights --images --results --output --html --fresh"
    for option in f"{options} --install --retries --timeout --stall --quiet --report".split():
        assert f"  {option} " in help_text, option


def test_starts_with_the_standard_library_only():
    """Nothing but the standard library is imported before the dependencies were checked."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport execute_ssd_notebook\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "['execute_ssd_notebook']", result.stderr


def test_versions():
    assert runner.version_numbers("2.15.0+cpu") == (2, 15, 0)
    assert runner.version_numbers("2.2") <= runner.version_numbers("2.2.0rc1")
    assert runner.requirement_problem("no_such_module", "no-such-module>=1") == "no-such-module is missing"


def test_report_of_imports(tmp_path):
    sources = (
        "import numpy as np\nfrom torch import nn\n%matplotlib inline\n!ls",
        "def f():\n    import onnx",
        "try:\n    import cv2\nexcept ImportError:\n    pass",
        "for",
    )
    notebook = nbformat.read(write_notebook(tmp_path / "a.ipynb", *sources), as_version=4)
    assert runner.imported_modules(notebook) == ({"numpy", "torch"}, {"onnx", "cv2"})


def test_timings_file_of_another_kind_is_ignored(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "timings.json").write_text(json.dumps(["x"]))
    options = runner.make_parser().parse_args([])
    one = runner.Runner(options)
    one.plan = runner.Plan(
        runner.PROJECT, tmp_path / "a.ipynb", tmp_path / "a.ipynb", tmp_path, {}, False, None, None, 0
    )
    assert one.load_timings() == {}
