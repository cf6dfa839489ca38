"""Places that a run may not write, files that belong to others, mounted files, and what a failed run leaves."""

import errno
import os
import shutil
import subprocess

import pytest
from runner_helpers import DATA, FETCH, PARAMETERS, Place, outputs, tree

import execute_ssd_notebook as runner

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="owners, modes and mounts of POSIX"),
]
SOMEBODY = 65534
STAGES = """import os
from pathlib import Path
staging = Path(os.environ['SSD_STAGING'])
(staging / 'metrics.json').write_text('new')
(staging / 'detections.jpg').write_bytes(b'a picture')
(Path(CHECKPOINT_DIR) / 'last.pth').write_bytes(b'the training')
print('ran')"""


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "study folder")


@pytest.fixture
def protected(place):
    """The place as a checkout that is only read."""
    place.put("BCCD_Dataset/BCCD/x", "")
    place.write(PARAMETERS, DATA, FETCH, STAGES)
    folders = [place.folder, place.checkpoints]
    for folder in folders:
        folder.chmod(0o555)
    yield place
    for folder in folders:
        folder.chmod(0o755)


def mount(*arguments):
    """Mount something, or skip the test where that is not allowed."""
    command = ["mount", *map(str, arguments)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


# -- a checkout that is only read


def test_a_protected_checkout_is_named(protected, capsys):
    code, out, err = protected.call(capsys)
    assert code == 11
    assert "(study folder is write-protected): make it writable" in err
    assert "room" not in err


def test_a_protected_checkout_with_the_output_elsewhere(protected, capsys):
    """Nothing in it is written; what belongs to the page lies below runs/ beside the page."""
    before = tree(protected.folder)
    elsewhere = protected.folder.parent / "elsewhere"
    page = elsewhere / "page.ipynb"
    code, out, err = protected.call(capsys, "--output", str(page))
    assert code == 0, err
    assert outputs(page).endswith("ran\n")
    assert tree(protected.folder) == before
    assert protected.left_over() == []
    checkpoints = elsewhere / "runs" / "page" / "checkpoints"
    assert (checkpoints / "metrics.json").read_text() == "new"
    assert (checkpoints / "best_model.pth").read_bytes() == b"the trained weights"
    assert "checkpoints is write-protected: this run works on a copy of it" in out
    for arguments in (("-p", "COUNT=4"), ("--fresh",)):
        code, out, err = protected.call(capsys, "--output", str(page), *arguments)
        assert code == 0, err
        assert tree(protected.folder) == before


def test_a_protected_checkout_gets_its_dataset_elsewhere(place, capsys):
    fetch = "def fetch_dataset(folder, url, say=None):\n    folder.mkdir(parents=True)\n"
    fetch += "    return folder\ndef dataset_root(folder):\n    return folder\n"
    shown = "import os\nprint(os.environ['BCCD_DATASET'])"
    place.write(DATA, ("fetch", fetch + "print('defined')"), shown)
    place.folder.chmod(0o555)
    page = place.folder.parent / "elsewhere" / "page.ipynb"
    code, out, err = place.call(capsys, "--output", str(page))
    place.folder.chmod(0o755)
    assert code == 0, err
    dataset = page.parent / "runs" / "page" / "BCCD_Dataset"
    assert dataset.is_dir()
    assert str(dataset) in outputs(page)


def test_a_file_system_that_is_only_read(place):
    place.write(PARAMETERS, STAGES)
    mount("--bind", place.folder, place.folder)
    try:
        mount("-o", "remount,bind,ro", place.folder)
        refused = place.run()
        page = place.folder.parent / "elsewhere" / "page.ipynb"
        done = place.run("--output", str(page))
    finally:
        subprocess.run(["umount", str(place.folder)], check=True)
    assert refused.returncode == 11
    assert "write-protected): make it writable" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert outputs(page).endswith("ran\n")


def test_advice_is_for_the_fault():
    """Room is asked for where room lacks, and nowhere else."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        failure = runner.storage_failure("X", OSError(number, os.strerror(number)))
        assert "make room" in failure.sentence
    for number in (errno.EACCES, errno.EPERM, errno.EROFS):
        failure = runner.storage_failure("X", OSError(number, os.strerror(number)))
        assert "make it writable" in failure.sentence
    failure = runner.storage_failure("X", OSError(errno.EISDIR, "Is a directory"))
    assert "room" not in failure.sentence


# -- owners and locks


def test_owner_and_mode_are_kept(place, capsys):
    """Somebody's study, run once as root: all of it is somebody's afterwards, what is new too."""
    writes = """
os.makedirs('checkpoints/more/deep', exist_ok=True)
os.makedirs('my_results/deep', exist_ok=True)
open('my_results/deep/counts.csv', 'w').close()
assert COUNT < 5"""
    place.write(PARAMETERS, STAGES + writes)
    place.notebook.chmod(0o640)
    as_root = os.geteuid() == 0
    owner = os.geteuid()
    if as_root:
        owner = SOMEBODY
        for path in (place.folder, *place.folder.rglob("*")):
            os.chown(path, owner, owner)
    code, out, err = place.call(capsys)
    assert code == 0, err
    code, out, err = place.call(capsys, "-p", "COUNT=4")
    assert code == 0, err
    code, out, err = place.call(capsys, "-p", "COUNT=5")
    assert code == 6
    for path in place.folder.rglob("*"):
        assert path.stat().st_uid == owner, path
    assert place.notebook.stat().st_mode & 0o777 == 0o640
    assert (place.checkpoints / "detections.jpg").is_file()
    assert (place.folder / "runs" / "custom" / "study.failed.ipynb").is_file()


def test_a_file_of_another_owner_stays_theirs(place, capsys):
    """In root's own study one file is somebody else's."""
    if os.geteuid() != 0:
        return  # nobody else can give files away
    place.write(PARAMETERS, STAGES)
    metrics = place.checkpoints / "metrics.json"
    os.chown(metrics, SOMEBODY, SOMEBODY)
    assert place.call(capsys)[0] == 0
    assert metrics.read_text() == "new"
    assert metrics.stat().st_uid == SOMEBODY
    assert place.notebook.stat().st_uid == 0


def test_others_can_open_the_lock(place, capsys):
    before = os.umask(0o077)
    try:
        place.write(PARAMETERS, "print(1)")
        assert place.call(capsys)[0] == 0
    finally:
        os.umask(before)
    locks = [place.folder / ".study.ipynb.lock", place.folder / ".checkpoints.lock"]
    for lock in locks:
        assert lock.stat().st_mode & 0o777 == 0o666


def test_a_lock_that_cannot_be_opened_is_named(place, capsys, monkeypatch):
    from filelock import FileLock

    def refuse(lock, timeout):
        raise PermissionError(errno.EACCES, "Permission denied", lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    place.write("print(1)")
    code, out, err = place.call(capsys)
    assert code == 11
    assert ".study.ipynb.lock cannot be opened (Permission denied)" in err
    assert "another user's run" not in err  # there is no lock, the folder is not ours
    assert "room" not in err
    place.put(".study.ipynb.lock", "")
    code, out, err = place.call(capsys)
    assert code == 11
    assert ".study.ipynb.lock cannot be opened (Permission denied)" in err
    assert "remove it when no run works here" in err


# -- files that are mounted by themselves


def test_a_notebook_that_is_a_mount_point(place):
    """As by docker run -v NOTEBOOK:NOTEBOOK: no rename replaces it."""
    place.write("print('ran')")
    place.put("../outside.ipynb", place.notebook.read_bytes())
    outside = place.folder.parent / "outside.ipynb"
    mount("--bind", outside, place.notebook)
    try:
        assert runner.is_mount_point(place.notebook)
        done = place.run()
        assert outputs(place.notebook) == "ran\n"
    finally:
        subprocess.run(["umount", str(place.notebook)], check=True)
    assert done.returncode == 0, done.stderr
    assert outputs(outside) == "ran\n"
    assert outputs(place.notebook) == ""
    assert place.left_over() == []


def test_a_mounted_notebook_that_is_only_read(place):
    """Said before the first cell."""
    place.write("open('ran', 'w').close()\nprint('ran')")
    mount("--bind", place.notebook, place.notebook)
    try:
        mount("-o", "remount,bind,ro", place.notebook)
        done = place.run()
    finally:
        subprocess.run(["umount", str(place.notebook)], check=True)
    assert done.returncode == 11
    assert "study.ipynb is write-protected" in done.stderr
    assert not (place.folder / "ran").exists()


@pytest.fixture
def mounted(place, monkeypatch):
    """The place, where no rename replaces the notebook, without a mount."""
    rename = os.replace

    def replace(old, new):
        if new == place.notebook:
            raise OSError(errno.EBUSY, "Device or resource busy", str(new))
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    return place


def test_what_no_rename_replaces_is_written_in_place(mounted, capsys):
    mounted.write("print('ran')")
    number = mounted.notebook.stat().st_ino
    code, out, err = mounted.call(capsys)
    assert code == 0, err
    assert outputs(mounted.notebook) == "ran\n"
    assert mounted.notebook.stat().st_ino == number
    assert mounted.left_over() == []


def failing_copy(monkeypatch, place, failures):
    """The first so many copies into the notebook break off halfway."""
    copyfile = shutil.copyfile
    left = [failures]

    def copy(source, target, **options):
        if target == place.notebook and left[0] > 0:
            left[0] -= 1
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copyfile(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copy)


def failing_run(mounted, monkeypatch, capsys, failures):
    """A run whose result cannot be copied in place. Returns (the notebook before, what was said)."""
    mounted.write("print('ran')")
    before = mounted.notebook.read_bytes()
    failing_copy(monkeypatch, mounted, failures)
    code, out, err = mounted.call(capsys)
    assert code == 11
    assert outputs(mounted.folder / "study.failed.ipynb") == "ran\n"
    return before, err


def test_a_write_in_place_that_breaks_off_is_taken_back(mounted, monkeypatch, capsys):
    before, err = failing_run(mounted, monkeypatch, capsys, failures=1)
    assert "study.ipynb cannot be replaced (No space left on device): make room" in err
    assert mounted.notebook.read_bytes() == before
    assert mounted.left_over() == []


def test_nothing_is_lost_where_that_cannot_be_taken_back(mounted, monkeypatch, capsys):
    before, err = failing_run(mounted, monkeypatch, capsys, failures=2)
    kept = mounted.folder / ".study.ipynb.before"
    assert f"its old content is in {kept}" in err
    assert kept.read_bytes() == before


# -- what a failed run leaves


def test_after_any_error_the_outputs_are_kept_and_named(place, monkeypatch, capsys):
    """An error in the script itself; a later run deletes nothing before it succeeded."""
    place.write("print('hours of work')")
    before = place.notebook.read_bytes()

    def fail(*arguments):
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "check_page", fail)
        for name in ("study.failed.ipynb", "study.failed-2.ipynb"):
            code, out, err = place.call(capsys)
            assert code == 1
            assert "An error in this script: RuntimeError: unforeseen." in err
            assert f"Outputs so far: {name}; study.ipynb is unchanged." in err
            assert outputs(place.folder / name) == "hours of work\n"
    assert place.notebook.read_bytes() == before
    place.put("study.partial.ipynb", before)
    place.put("study.other.ipynb", before)
    place.put("study-2.failed.ipynb", before)  # of another notebook, study-2.ipynb
    code, out, err = place.call(capsys)
    assert code == 0, err
    assert "study.failed-2.ipynb of an earlier run is removed" in out
    notebooks = sorted(path.name for path in place.folder.glob("*.ipynb"))
    assert notebooks == ["study-2.failed.ipynb", "study.ipynb", "study.other.ipynb"]


def test_a_result_that_its_format_does_not_allow_is_kept(place, monkeypatch, capsys):
    place.write("print('so far')")
    clean = runner.cleaned

    def spoil(notebook):
        page = clean(notebook)
        page.cells[0]["id"] = "not allowed!"
        return page

    monkeypatch.setattr(runner, "cleaned", spoil)
    code, out, err = place.call(capsys)
    assert code == 9
    assert "no valid notebook of format 4.5" in err
    assert "Outputs so far: study.failed.ipynb" in err
