"""Where the data and the weights come from: the folder that is there, a clone, the shipped copy."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, ROOT
from runner_helpers import git_repository, tree

SHIPPED = ROOT / "data" / "BCCD_Dataset.zip"
NOWHERE = "file:///nowhere/at/all"


@contextlib.contextmanager
def silent_server():
    """The address of a server that accepts every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held, stop = [], threading.Event()

        def accept():
            server.settimeout(0.2)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    held.append(server.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/bccd.git"
        finally:
            stop.set()
            thread.join()
            [connection.close() for connection in held]


def test_the_folder_that_is_there_is_taken_and_nobody_is_asked(nb, bccd_root):
    before = tree(bccd_root)
    with silent_server() as url:
        assert nb.fetch_dataset(bccd_root, url) == bccd_root
    assert tree(bccd_root) == before


@pytest.mark.parametrize("server", ["absent", "silent", "none"])
def test_where_no_server_answers_the_shipped_copy_is_unpacked(nb, bccd_root, tmp_path, server):
    said, started = [], time.monotonic()
    with silent_server() as silent:
        url = {"absent": NOWHERE, "silent": silent, "none": ""}[server]
        folder = nb.fetch_dataset(tmp_path / "deep" / "BCCD_Dataset", url, SHIPPED, said.append)
    assert time.monotonic() - started < 20
    assert tree(folder) == tree(bccd_root)
    assert os.listdir(folder.parent) == ["BCCD_Dataset"]  # nothing is left beside it
    assert "shipped copy" in said[-1]


def test_without_a_server_and_a_shipped_copy_one_sentence_and_nothing_left(nb, tmp_path):
    with pytest.raises(nb.DatasetError, match="by hand"):
        nb.fetch_dataset(tmp_path / "BCCD_Dataset", NOWHERE, tmp_path / "absent.zip")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spoil", ["cut", "changed", "text"])
def test_a_damaged_copy_gets_one_sentence(nb, tmp_path, spoil):
    data = bytearray(SHIPPED.read_bytes())
    if spoil == "changed":
        data[len(data) // 2] ^= 255
    (tmp_path / "BCCD.zip").write_bytes(
        {"cut": data[:-5000], "changed": data, "text": b"no archive"}[spoil]
    )
    with pytest.raises(nb.DatasetError, match=r"BCCD\.zip is damaged: restore it") as caught:
        nb.fetch_dataset(tmp_path / "BCCD_Dataset", "", tmp_path / "BCCD.zip")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["BCCD.zip"]


def test_a_full_disk_is_no_damaged_copy(nb, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(nb.shutil, "unpack_archive", full)
    with pytest.raises(nb.DatasetError, match="cannot be unpacked here .*: make room") as caught:
        nb.fetch_dataset(tmp_path / "BCCD_Dataset", "", SHIPPED)
    assert "damaged" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_something_else_is_left_alone(nb, tmp_path):
    (tmp_path / "holidays").mkdir()
    (tmp_path / "holidays" / "beach.txt").write_text("sun")
    with pytest.raises(nb.DatasetError, match="holidays"):
        nb.fetch_dataset(tmp_path / "holidays", "", SHIPPED)
    assert tree(tmp_path) == {Path("holidays/beach.txt"): b"sun"}


@pytest.fixture(scope="module")
def mirror(bccd_root, tmp_path_factory):
    """A git repository with BCCD's files, and its folder."""
    folder = tmp_path_factory.mktemp("mirror")
    shutil.copytree(bccd_root, folder / "BCCD_Dataset")
    return git_repository(folder / "BCCD_Dataset"), folder / "BCCD_Dataset"


def test_a_clone_has_the_bytes_of_the_repository_whatever_git_is_told(
    nb, mirror, bccd_root, tmp_path, monkeypatch, capsys
):
    """Windows' git turns line ends by default; the annotations' bytes are part of the recipe."""
    (tmp_path / "config").write_text("[core]\n\tautocrlf = true\n\teol = crlf\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    folder = nb.fetch_dataset(tmp_path / "BCCD_Dataset", mirror[0], SHIPPED)
    assert {name: data for name, data in tree(folder).items() if name.parts[0] != ".git"} == tree(
        bccd_root
    )
    assert capsys.readouterr().out == ""
    subprocess.run(["git", "checkout", "--quiet", "."], cwd=folder, check=True)  # and later too
    assert tree(folder / "BCCD") == tree(bccd_root / "BCCD")


def test_a_clone_of_other_content_is_not_taken_silently(nb, mirror, tmp_path, capsys):
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "--quiet", mirror[0], str(other)], check=True)
    (other / "BCCD" / "Annotations" / "BloodImage_00000.xml").write_text("<annotation/>")
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "config", name, "x"], cwd=other, check=True)
    subprocess.run(["git", "commit", "--quiet", "-am", "relabelled"], cwd=other, check=True)
    folder = nb.fetch_dataset(tmp_path / "BCCD_Dataset", other.as_uri(), SHIPPED)
    assert (folder / "BCCD" / "Annotations" / "BloodImage_00000.xml").read_text() == "<annotation/>"
    said = capsys.readouterr().out
    assert said.startswith("1 files of ") and "DATASET_URL" in said and said.count("\n") == 1


@pytest.mark.parametrize("source", ["clone", "copy"])
def test_two_runs_at_once_share_the_folder(nb, mirror, bccd_root, tmp_path, source):
    url = mirror[0] if source == "clone" else ""
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(nb.fetch_dataset, tmp_path / "BCCD_Dataset", url, SHIPPED) for _ in range(4)
        ]
        assert {run.result() for run in runs} == {tmp_path / "BCCD_Dataset"}
    assert tree(tmp_path / "BCCD_Dataset" / "BCCD") == tree(bccd_root / "BCCD")
    assert os.listdir(tmp_path) == ["BCCD_Dataset"]


def test_the_cells_that_fetch_need_the_standard_library_alone(tmp_path):
    """So the runner can execute them before anything is installed; -S hides every installed package."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = "\n\n".join(cell.source for cell in cells if "fetch" in cell.metadata.get("tags", ()))
    program = (
        f"{source}\nprint(fetch_dataset({str(tmp_path / 'BCCD_Dataset')!r}, '', {str(SHIPPED)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "BCCD_Dataset" / "BCCD" / "Annotations").is_dir()


def test_an_image_in_two_splits_is_refused(nb, bccd_root):
    root = nb.dataset_root(bccd_root)
    splits = {split: nb.SmearSplit(root, split) for split in ("val", "test")}
    nb.check_dataset(splits)
    splits["test"].ids = [*splits["test"].ids[:-1], splits["val"].ids[0]]
    with pytest.raises(nb.DatasetError, match=splits["val"].ids[0]):
        nb.check_dataset(splits)


@pytest.fixture
def no_network(monkeypatch):
    """torchvision's download fails, and every attempt is noted."""
    asked = []

    def fail(url, **_):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    return asked


def test_weights_come_from_the_named_file_else_from_data_else_from_torchvision(
    nb, vgg_weights, no_network, tmp_path
):
    shipped = nb.vgg16_features(shipped=vgg_weights)
    assert len(shipped) == 26 and all(value.dtype == torch.float32 for value in shipped.values())
    named = {key: torch.full_like(value, 0.5).half() for key, value in shipped.items()}
    torch.save(named, tmp_path / "mine.pth")
    mine = nb.vgg16_features(str(tmp_path / "mine.pth"), shipped=vgg_weights)
    assert all((value == 0.5).all() for value in mine.values())
    assert no_network == []
    assert (
        nb.vgg16_features(shipped=tmp_path / "absent.pth", download=False) is None
        and no_network == []
    )
    assert nb.vgg16_features(shipped=tmp_path / "absent.pth") is None and len(no_network) == 1


def test_no_training_from_scratch_replaces_a_good_detector(nb, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no data/ here
    (tmp_path / "checkpoints").mkdir()
    best = tmp_path / "checkpoints" / "best_model.pth"
    torch.save({"kind": "detector"}, best)
    with pytest.raises(nb.WeightsError, match="would replace"):
        nb.weights_for_training("checkpoints")
    best.write_bytes(best.read_bytes()[:200])  # a damaged one is no loss
    assert nb.weights_for_training("checkpoints") == (None, "random numbers")


def test_a_run_says_what_it_lacks_what_that_costs_and_where_to_get_it(nb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # neither data/ nor checkpoints/ here
    weights = {"features.0.weight": torch.zeros(1)}
    alone = nb.what_is_missing("train", None, {})
    signs = ["vgg16_features.pth", "best_model.pth", "complete_labels.json"]
    assert len(alone) == 3
    for sentence, sign in zip(alone, signs, strict=True):
        assert sign in sentence and ":**" in sentence
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best_model.pth").write_bytes(b"")
    assert nb.what_is_missing("train", weights, {"an image": ()}) == []
    assert nb.what_is_missing("train", None, {"an image": ()}) == []  # they are downloaded
    assert nb.what_is_missing("reuse", None, {"an image": ()}) == []
    (only,) = nb.what_is_missing("reuse", None, {})
    assert "complete_labels.json" in only
    monkeypatch.setattr(nb, "COMPLETE_LABELS", "")  # not wanted: nothing is missing
    assert nb.what_is_missing("reuse", None, {}) == []


def test_shipped_files_are_those_that_data_readme_names():
    named = dict(
        re.findall(
            r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$",
            (ROOT / "data" / "README.md").read_text(),
            re.MULTILINE,
        )
    )
    there = {path.name for path in (ROOT / "data").iterdir()} - {"README.md"}
    assert set(named) == there
    for name, digest in named.items():
        assert hashlib.sha256((ROOT / "data" / name).read_bytes()).hexdigest() == digest, name


def test_complete_labels_speak_of_training_and_validation_images_alone(nb, bccd_root):
    images = json.loads((ROOT / "data" / "complete_labels.json").read_text())["images"]
    root = nb.dataset_root(bccd_root)
    counts = {
        split: sum(name in images for name in nb.read_split(root, split))
        for split in ("train", "val", "test")
    }
    assert counts == {"train": 124, "val": 57, "test": 0} and len(images) == 181
    for rows in images.values():
        assert all(
            row[0] in nb.CLASS_NAMES and 0 <= row[1] < row[3] <= 640 and 0 <= row[2] < row[4] <= 480
            for row in rows
        )
