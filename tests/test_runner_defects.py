"""Defects that the runner once had, each by the harm it did.

Every test runs the script as a process and knows it by its command line alone.
"""

import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import NOTEBOOK
from runner_helpers import DATA, FETCH, PARAMETERS, Place, finish, git_repository, outputs, tree
from synthetic_bccd import draw_dataset

import execute_ssd_notebook as runner

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX"),
]
RUNNING = "import time\nopen('running', 'w').close()\nprint('so far', flush=True)\n"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path / "study")
    (tmp_path / "temporary").mkdir()
    made.env["TMPDIR"] = str(tmp_path / "temporary")
    return made


def fetch_cells():
    """The notebook's own cells that fetch the dataset."""
    found = []
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "fetch" in cell.metadata.get("tags", ()):
            found.append(("fetch", cell.source))
    return found


def small_files():
    """Called in the child at its start: files end at 60,000 bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def ignore_ctrl_c():
    """Called in the child at its start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def small_dataset(folder):
    """Three drawn smears in BCCD's layout."""
    return draw_dataset(folder, train=1, val=1, test=1)


def test_2_a_clone_with_the_users_commits_is_left_alone(place):
    """Relabelled, committed, and one picture missing: nothing of it may be removed."""
    mirror = small_dataset(place.folder.parent / "mirror")
    address = git_repository(mirror)
    clone = place.folder / "BCCD_Dataset"
    subprocess.run(["git", "clone", "-q", address, str(clone)], check=True)
    label = min((clone / "BCCD" / "Annotations").iterdir())
    label.write_text(label.read_text() + "<!-- relabelled for a week -->")
    git_repository(clone)
    (clone / "BCCD" / "JPEGImages" / f"{label.stem}.jpg").unlink()
    before = tree(clone)
    place.write(DATA, *fetch_cells())
    place.run("--dataset-url", address)
    assert tree(clone) == before


def test_3_a_signal_while_the_kernel_ends_is_heard(place):
    """The kernel takes two seconds to go; Ctrl-C in them must not end in a published page."""
    slow = "open('closing', 'w').close(); import time; time.sleep(2)"
    place.write(f"import atexit\natexit.register(lambda: exec({slow!r}))\nprint('registered')")
    before = place.notebook.read_bytes()
    process = place.start()
    place.wait_for("closing")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stdout
    assert place.notebook.read_bytes() == before
    assert place.kernels() == []


def test_4_a_lock_file_is_never_removed(place):
    """A lock file that its holder removes is held twice: by who waits for it, and by who comes."""
    place.write(RUNNING + "time.sleep(1)")
    process = place.start()
    place.wait_for("running")
    (lock,) = place.folder.glob("*study.ipynb.lock")
    held = lock.stat().st_ino
    assert finish(process).returncode == 0
    assert lock.stat().st_ino == held


@pytest.mark.parametrize(("error", "code"), [("DatasetError", 4), ("WeightsError", 5)])
def test_5_the_notebooks_own_faults_have_their_codes(place, error, code):
    place.write(f"class {error}(ValueError): pass\nraise {error}('mend it')")
    done = place.run()
    assert done.returncode == code, done.stderr
    assert f"failed with {error}: mend it." in done.stderr


def test_5_their_sentences_are_shown_to_the_end(place):
    """What to do stands at the end of a sentence that begins with a long path."""
    place.write(f"raise ValueError({'a/' * 100 + 'img.xml: mend it'!r})")
    done = place.run()
    assert done.returncode == 6, done.stderr
    assert "img.xml: mend it. Outputs so far" in done.stderr


@pytest.mark.parametrize("how", ["option", "variable"])
def test_an_empty_address_is_a_value(place, how):
    """No mirror is asked; the notebook's own address is not taken in its place."""
    place.write(DATA, FETCH)
    arguments = ["--dataset-url", ""]
    if how == "variable":
        place.env["BCCD_URL"] = ""
        arguments = []
    done = place.run(*arguments)
    assert done.returncode == 4
    assert "Could not clone (no answer)" in done.stderr  # not "somewhere"


def test_a_folder_of_data_that_is_named_is_there(place):
    """Nothing is cloned into a name with a slip; ~ is the home also behind an equals sign."""
    place.write(DATA, FETCH)
    done = place.run("-p", "DATA_DIR=my_dta")
    assert done.returncode == 4
    assert "There is no folder" in done.stderr and not (place.folder / "my_dta").exists()
    (place.folder / "home" / "smears" / "BCCD").mkdir(parents=True)
    place.env["HOME"] = str(place.folder / "home")
    done = place.run("-p", "DATA_DIR=~/smears")
    assert done.returncode == 0, done.stderr
    assert not (place.folder / "~").exists()


def test_9_two_runs_that_fetch_at_once_share_the_dataset(place):
    address = git_repository(small_dataset(place.folder.parent / "mirror"))
    git = subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip()
    place.put("bin/git", f'#!/bin/sh\ncase "$*" in *clone*) sleep 1;; esac\nexec {git} "$@"\n')
    (place.folder / "bin" / "git").chmod(0o755)
    place.env["PATH"] = f"{place.folder / 'bin'}{os.pathsep}{place.env['PATH']}"
    place.write(DATA, *fetch_cells(), "print('ran')")
    processes = []
    for name in ("a", "b"):
        processes.append(place.start("--dataset-url", address, "--output", f"{name}.ipynb"))
    for process in processes:
        done = finish(process)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((place.folder / "BCCD_Dataset" / "BCCD" / "JPEGImages").iterdir())) == 3
    assert not list(place.folder.glob("*BCCD_Dataset?*"))


def test_10_a_killed_run_leaves_no_key_of_its_kernel(place):
    place.write(RUNNING + "time.sleep(60)")
    process = place.start()
    place.wait_for("running")
    process.kill()
    finish(process)
    place.write("print('ran')")
    assert place.run().returncode == 0
    assert os.listdir(place.env["TMPDIR"]) == []
    assert place.left_over() == []


STAGED = """import os
from pathlib import Path
folder = Path(os.environ.get('SSD_STAGING', 'checkpoints'))
folder.joinpath('best_model.pth').write_bytes(b'new weights')
folder.joinpath('metrics.json').write_text('new')
Path('checkpoints/last.pth').write_bytes(b'the training')
print('ran')"""


def without_training(files):
    """Files of a `tree` but the one that a training writes while it runs."""
    kept = dict(files)
    kept.pop(Path("last.pth"), None)
    return kept


def test_12_page_weights_and_metrics_change_together(place):
    """A late failure leaves all three as they were; a good run changes all three."""
    place.write(PARAMETERS, STAGED, "silent = 1", "silent = 2")
    before = tree(place.checkpoints)
    assert place.run().returncode == 9  # too many silent cells
    assert without_training(tree(place.checkpoints)) == before
    place.write(PARAMETERS, STAGED)
    assert place.run().returncode == 0
    assert (place.checkpoints / "best_model.pth").read_bytes() == b"new weights"
    assert (place.checkpoints / "metrics.json").read_text() == "new"
    assert place.left_over() == []


def test_12_a_file_that_cannot_be_replaced_takes_the_others_back(place):
    odd = (
        "import os",
        "open(os.environ['SSD_STAGING'] + '/zz.json', 'w').close()",
        "print(os.mkdir('checkpoints/zz.json'))",
    )
    place.write(PARAMETERS, STAGED, "\n".join(odd))
    page = place.notebook.read_bytes()
    checkpoints = tree(place.checkpoints)
    done = place.run()
    assert done.returncode == 11
    assert "zz.json cannot be replaced" in done.stderr
    assert without_training(tree(place.checkpoints)) == checkpoints
    assert place.notebook.read_bytes() == page
    assert "Outputs so far: study.failed.ipynb; study.ipynb is unchanged." in done.stderr
    assert "new weights" not in outputs(place.folder / "study.failed.ipynb")


def test_12_what_cannot_be_taken_back_outlives_the_next_run(place, capsys, monkeypatch):
    place.write(PARAMETERS, STAGED)
    place.put("checkpoints/best_model.pth", "weeks of work")
    rename = runner.replace

    def refuse_the_page(new, old):
        if old == place.notebook:
            raise PermissionError(13, "it is open elsewhere")
        rename(new, old)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "replace", refuse_the_page)
        patch.setattr(runner, "take_back", lambda done, before: False)
        code, out, err = place.call(capsys)
    assert code == 11
    kept = Path(re.search(r"what was there before is kept in (\S+)", err)[1])
    assert place.call(capsys)[0] == 0
    assert (place.checkpoints / "best_model.pth").read_text() == "new weights"
    assert (kept / "best_model.pth").read_text() == "weeks of work"


def test_13_an_earlier_runs_outputs_are_not_shown_as_this_ones(place):
    """No copy of this run can be saved on a full disk; that of a killed run lies there, and stays."""
    place.limit = small_files
    place.write("print('x' * 100_000)", "print('still here')\nopen('second', 'w').close()")
    before = place.notebook.read_bytes()
    earlier = before.replace(b"still here", b"long ago")
    place.put("study.partial.ipynb", earlier)
    done = place.run()
    assert done.returncode == 11, done.stderr
    assert "warning: the working copy cannot be saved (File too large); going on" in done.stdout
    assert "error: The result cannot be written (File too large)" in done.stderr
    assert (place.folder / "second").exists()
    assert "Outputs so far: study.failed.ipynb" in done.stderr
    assert b"long ago" not in (place.folder / "study.failed.ipynb").read_bytes()
    assert place.notebook.read_bytes() == before
    assert (place.folder / "study.partial.ipynb").read_bytes() == earlier
    assert place.left_over() == []


def test_13_a_signal_that_was_to_be_ignored_is(place):
    """As under nohup, or in the background of a script."""
    place.limit = ignore_ctrl_c
    place.write(RUNNING + "time.sleep(1.5)\nprint('to the end')")
    process = place.start()
    place.wait_for("running")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert outputs(place.notebook) == "so far\nto the end\n"


def flip(data, position, bits=255):
    """The bytes with some bits of one of them changed."""
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def test_14_damage_of_every_kind_is_found(tmp_path):
    path = tmp_path / "best_model.pth"
    torch.save({"weights": torch.arange(1000.0)}, path)
    assert runner.find_damage(path) == ""
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # of the first file, in the table at the end
    kinds = {
        "cut": data[: len(data) // 2],
        "content": flip(data, len(data) // 2),
        "encrypted": flip(data, entry + 8, 1),
        "compression": flip(data, entry + 10, 8),
        "both sizes": flip(flip(data, entry + 22), entry + 26),
    }
    for kind, content in kinds.items():
        path.write_bytes(content)
        assert runner.find_damage(path) != "", kind


def test_14_a_damaged_detector_is_said_before_the_training(place):
    path = place.checkpoints / "best_model.pth"
    torch.save({"weights": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    place.write(PARAMETERS)
    done = place.run()
    assert done.returncode == 0, done.stderr
    early = done.stdout.partition("4 execute")[0]
    assert re.search(r"warning: .*best_model\.pth is damaged \(.+\)", early)
