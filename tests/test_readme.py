"""README.md and README.ru.md: every result they state is the one in checkpoints/metrics.json.

A number that comes from metrics.json is followed by a comment with its path there:
`0.912<!--m:test.map50-->`. Dots separate keys, whole numbers index lists, a key that holds a dot
stands in double quotes.

A run of the page writes metrics.json anew, on whatever processor it runs, and processors round
differently: a score moves in its sixth digit, and now and then a figure moves by a step. MOVES has
how far that may be; `python benchmarks/rounding.py` measures it. Times and speeds belong to a machine
and are not compared at all.
"""

import json
import re
import shlex

import golden
import pytest
from conftest import ROOT

READMES = {"README.md": "Results", "README.ru.md": "Результаты"}
MARKED = re.compile(
    r"(?P<number>[-−]?\d+(?:[.,]\d+)?)(?P<percent>\s?%)?\**<!--\s*m:(?P<path>[^>]+?)\s*-->"
)
# How far rounding may move a figure. With other instruction sets and one thread none moved at all in
# its four digits, but each can only move by steps, and another processor may take one: a box whose
# overlap lies at one of ten thresholds is worth 1 / (10 * 69 * 3) of mAP where it is one of 69
# platelets, a count that is rounded up instead of down one of 57 images. Eight-bit sums saturate on
# processors without VNNI, which none was: the int8 copy may lose there what it may lose at all.
MOVES = {
    "validation": 0.0005,
    "test": 0.0005,
    "test_without_shared_fields": 0.0005,
    "counting": 0.018,
    "export": 0.002,
}
OF_A_MACHINE = ("speed_ms_an_image", "training.minutes", "training.peak_memory_gb")
# in a table of results: a decimal number or a percentage that no comment follows
UNMARKED = re.compile(r"(?<![\w.,@:\[])\d+(?:[.,]\d+\s?%?|\s?%)(?![\w.,:\]])(?!\**<!--)")


def text(name):
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text(encoding="utf-8")


def lookup(metrics, path):
    """The value at a dotted path."""
    for key in re.findall(r'"[^"]*"|[^.]+', path):
        key = key.strip('"')
        metrics = metrics[int(key)] if isinstance(metrics, list) else metrics[key]
    return metrics


def section(body, heading):
    """From a heading that starts with `heading` to the next of the same or a higher level."""
    found = re.search(
        rf"^(#+)\s+{heading}[^\n]*\n(.*?)(?=^#{{1,2}}\s|\Z)", body, re.MULTILINE | re.DOTALL
    )
    assert found, f"no section {heading!r}"
    return found[2]


@pytest.fixture(scope="module")
def metrics():
    return json.loads((ROOT / "checkpoints" / "metrics.json").read_text(encoding="utf-8"))


def allowed_move(path):
    """How far another processor's rounding may move the figure at a path."""
    part = path.split(".")[0]
    return MOVES.get(part, 0.0)


@pytest.mark.parametrize("name", READMES)
def test_numbers_are_those_of_metrics_json(name, metrics):
    if metrics["detector"]["weights"] != golden.stored()["weights"]:
        pytest.skip("metrics.json is of a detector that was trained here, the READMEs are not")
    found = list(MARKED.finditer(text(name)))
    assert len(found) >= 5
    for one in found:
        try:
            value = lookup(metrics, one["path"])
        except (KeyError, IndexError, ValueError, TypeError):
            pytest.fail(f"{name}: metrics.json has no {one['path']}")
        if one["path"].startswith(OF_A_MACHINE):
            continue
        factor = 100 if one["percent"] else 1
        shown = one["number"].replace(",", ".").replace("−", "-")
        last_digit = 10.0 ** -len(shown.partition(".")[2])
        allowed = last_digit / 2 + factor * allowed_move(one["path"]) + 1e-9
        difference = abs(float(shown) - factor * value)
        assert difference <= allowed, f"{name}: {one[0]} but metrics.json has {value}"


def test_rounding_allows_for_rounding_and_no_more():
    """The README's figures would not pass for those of another training: seeds differ by 0.004."""
    assert allowed_move("test.map_50") < 0.001
    assert allowed_move("training.epochs") == 0.0
    assert allowed_move("counting.RBC.count_mae") < 0.02


@pytest.mark.parametrize(("name", "heading"), READMES.items())
def test_every_number_of_the_result_tables_is_checked(name, heading):
    for line in section(text(name), heading).splitlines():
        if line.lstrip().startswith("|"):
            loose = UNMARKED.findall(re.sub(r"`[^`]*`|\([^)]*://[^)]*\)", "", line))
            assert not loose, f"{name}: {loose} in {line!r} name no value of metrics.json"


def test_both_languages_state_the_same():
    english, russian = ({one["path"] for one in MARKED.finditer(text(name))} for name in READMES)
    assert english == russian


@pytest.mark.parametrize("name", READMES)
def test_what_it_points_to_exists(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", text(name)):
        path = (target[0] or target[1]).split("#")[0]
        if "://" not in path and not path.startswith("mailto:"):
            assert (ROOT / path).exists(), f"{name} points to {path}"


@pytest.mark.parametrize("name", READMES)
def test_options_that_it_names_exist(name):
    """Every option in a command of the runner is one that the script has."""
    script = "execute_ssd_notebook.py"
    source = (ROOT / script).read_text(encoding="utf-8")
    seen = 0
    for line in text(name).splitlines():
        if f"python {script}" not in line and f"uv run {script}" not in line:
            continue
        command = line.split(script, 1)[1].split("#")[0].split("`")[0].split("|")[0]
        for word in shlex.split(command, posix=False):
            if word.startswith("-"):
                seen += 1
                option = word.split("=")[0]
                assert f'"{option}"' in source, f"{name}: {script} has no {word}"
    assert seen


@pytest.mark.parametrize("name", READMES)
def test_the_test_command_is_the_one_that_ci_runs(name):
    lines = re.findall(r"^(?:python3|\.venv).*-m pytest$", text(name), re.MULTILINE)
    assert lines == [
        "python3 -m venv .venv && .venv/bin/python -m pip install -r requirements-dev.txt && .venv/bin/python -m pytest"
    ]
    assert (
        "grep -m 1 '^python3 -m venv .*-m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()
    )
