"""Ways to start the script: alone with the notebook, under other names, by other Pythons' flags, without streams."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat import v4
from runner_helpers import PARAMETERS, SCRIPT, Place, finish, outputs, write_notebook

import execute_ssd_notebook as runner

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="streams are closed as POSIX does"),
]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "study folder")


@pytest.fixture
def alone(tmp_path):
    """A folder with the script and the project's notebook, a small one, and nothing else."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    write_notebook(folder / runner.NOTEBOOK, PARAMETERS, "print('ran')")
    return folder


def start(folder, *command, **kwargs):
    """Run a command of this Python to its end, in an environment that knows nothing of the project."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    env.update(kwargs.pop("env", {}))
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=90, **kwargs
    )


# -- where the script lies, and how it is called


def test_two_files_alone(alone):
    assert start(alone, SCRIPT.name, "-h").returncode == 0
    done = start(alone, SCRIPT.name)
    assert done.returncode == 0, done.stderr
    assert outputs(alone / runner.NOTEBOOK).endswith("ran\n")
    done = start(alone, SCRIPT.name, "--check")
    assert done.returncode == 0, done.stderr
    assert "✓ outputs belong to this code" in done.stdout


def test_from_another_folder_under_another_name_and_by_a_link(alone, tmp_path):
    """The notebook is looked for in this folder, beside the script, and where a link leads."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(SCRIPT, alone / "hand in.py")
    (elsewhere / "link.py").symlink_to(alone / SCRIPT.name)
    names = ["../alone/execute_ssd_notebook.py", alone / "hand in.py", "link.py"]
    for name in names:
        done = start(elsewhere, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f" min: {alone / runner.NOTEBOOK}\n")
    done = start(elsewhere, alone / "hand in.py", "--check", f"../alone/{runner.NOTEBOOK}")
    assert done.returncode == 0, done.stderr


def test_as_a_module_and_from_standard_input(alone):
    done = start(alone, "-m", "execute_ssd_notebook", "--check", env={"PYTHONPATH": "."})
    assert "coverage 0.0%" in done.stdout
    with open(SCRIPT, encoding="utf-8") as text:
        done = start(alone, "-", stdin=text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["-I", "-Werror"])
def test_flags_of_python(alone, flag):
    done = start(alone, flag, SCRIPT.name)
    assert done.returncode == 0, done.stderr
    done = start(alone, flag, SCRIPT.name, "--check")
    assert done.returncode == 0, done.stderr
    assert "Exit codes: 0 done" in start(alone, flag, SCRIPT.name, "-h").stdout


@pytest.mark.parametrize("variable", ["PYTHONSAFEPATH=1", "PYTHONOPTIMIZE=2", "PYTHONUTF8=0"])
def test_variables_of_python(alone, variable):
    """The kernel gets no PYTHONOPTIMIZE: assertions of the page are to be checked."""
    write_notebook(alone / runner.NOTEBOOK, "import sys\nprint('optimized', sys.flags.optimize)")
    name, _, value = variable.partition("=")
    done = start(alone, SCRIPT.name, env={name: value})
    assert done.returncode == 0, done.stderr
    assert outputs(alone / runner.NOTEBOOK) == "optimized 0\n"
    assert "Exit codes: 0 done" in start(alone, SCRIPT.name, "-h", env={name: value}).stdout


def test_fetch_cells_keep_their_assertions_and_docstrings(alone):
    fetch = "def fetch_dataset(folder, url, say=None):\n    'Text.'\n"
    fetch += "    say(str(fetch_dataset.__doc__))\n    assert False, 'checked'\n"
    fetch += "dataset_root = str\nprint('defined')"
    write_notebook(alone / runner.NOTEBOOK, ("parameters", "DATA_DIR = 'data'"), ("fetch", fetch))
    done = start(alone, "-OO", SCRIPT.name)
    assert done.returncode == 1
    assert "  Text.\n" in done.stdout
    assert "AssertionError: checked" in done.stderr


# -- standard streams


def closed(*numbers):
    """Called in the child at its start: closes these streams."""

    def close():
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2)])
def test_closed_streams(place, numbers):
    """As under a service: it runs, also what it starts, and the files keep their own numbers."""
    place.limit = closed(*numbers)
    place.write("import os\nprint('started', os.system('echo something'))")
    done = finish(place.start())
    assert done.returncode == 0, done.stderr
    assert "started 0" in outputs(place.notebook)


def test_with_standard_error_closed_the_sentence_is_on_standard_output(place):
    place.limit = closed(2)
    done = finish(place.start())
    assert done.returncode == 10
    assert "error: There is no notebook" in done.stdout


def test_no_stream_at_all(place, capsys, monkeypatch):
    """As under pythonw, where both are None."""
    place.write("print('ran')")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    code = runner.main([str(place.notebook)])
    assert code == 0
    assert outputs(place.notebook) == "ran\n"
    assert runner.main([str(place.folder / "nowhere.ipynb")]) == 10


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_stream_that_is_full(place):
    place.write("print('ran')")
    with open("/dev/full", "w") as full:
        done = finish(place.start(stdout=full, stderr=full))
        assert done.returncode == 0
        assert outputs(place.notebook) == "ran\n"
        place.notebook.unlink()
        assert finish(place.start(stdout=full, stderr=full)).returncode == 10


# -- in a Jupyter cell


def test_in_a_jupyter_cell(place):
    """There a loop runs already, and the streams are Jupyter's own."""
    place.write("print('ran')")
    shutil.copy(SCRIPT, place.folder)
    cells = [
        "%run execute_ssd_notebook.py study.ipynb",
        "%run execute_ssd_notebook.py --check study.ipynb",
        "%run -e execute_ssd_notebook.py nowhere.ipynb",
        "import threading, execute_ssd_notebook\n"
        "thread = threading.Thread(target=execute_ssd_notebook.main, args=[['study.ipynb']])\n"
        "thread.start()\nthread.join()",
    ]
    outer = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    nbformat.write(outer, place.folder / "outer.ipynb")
    options = ["--to", "notebook", "--execute", "--inplace", "--allow-errors"]
    done = start(place.folder, "-m", "nbconvert", *options, "outer.ipynb")
    assert done.returncode == 0, done.stderr
    said = []
    for cell in nbformat.read(place.folder / "outer.ipynb", as_version=4).cells:
        said.append("".join(output.get("text", "") for output in cell.outputs))
    assert "done in " in said[0]
    assert "coverage 100.0%" in said[1]
    assert "error: There is no notebook" in said[2]
    assert "done in " in said[3]
    assert outputs(place.notebook) == "ran\n"


def test_handlers_of_signals_are_put_back(place, capsys):
    import signal

    before = signal.getsignal(signal.SIGINT)
    place.write("print('ran')")
    assert place.call(capsys)[0] == 0
    assert signal.getsignal(signal.SIGINT) is before
