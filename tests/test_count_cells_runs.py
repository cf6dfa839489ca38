"""The lab's tool as a command: which files count, what is written, how a run goes on, what it says
and how it ends.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT
from lab import (
    SQUARES,
    WorkersHere,
    picture,
    rows_of_squares,
    save_square_finder,
    settings,
    table,
)
from PIL import Image

import count_cells

PROGRAM = ROOT / "count_cells.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_square_finder(tmp_path_factory.mktemp("model") / "squares.onnx")


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Counts in this process, in an empty working folder."""
    monkeypatch.setattr(count_cells, "Workers", WorkersHere)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, squares=SQUARES, size=(640, 480)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(size[0], size[1], squares)).save(path)
    return path


def count(model, *arguments):
    """Run the command in this process; returns its exit code."""
    return count_cells.main(["--model", str(model), *map(str, arguments)])


def counts_of(folder):
    """{name: red cells} of counts.csv, without the sum; None where there is no count."""
    answer = {}
    for row in table(Path(folder) / "counts.csv"):
        if not row["image"].startswith("SUM of"):
            answer[row["image"]] = int(row["RBC"]) if row["RBC"] else None
    return answer


def test_the_tables_are_for_a_spreadsheet(model, here, capsys):
    save(here / "in" / "a.png")
    save(here / "in" / "b.png", SQUARES[:1])
    (here / "in" / "broken.png").write_bytes(b"x")
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    text = (here / "in_cells" / "counts.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbfimage,RBC,RBC least,RBC most,WBC,")
    assert b",remark\r\n" in text
    first, second, failed, total = table(here / "in_cells" / "counts.csv")
    assert (first["RBC"], second["RBC"], total["RBC"]) == ("3", "1", "4")
    assert int(first["RBC least"]) <= 3 <= int(first["RBC most"])
    assert failed["image"] == "broken.png" and failed["remark"].startswith("not readable: ")
    assert not failed["RBC"] and total["image"] == "SUM of 2 images"
    rows = table(here / "in_cells" / "detections.csv")
    assert len(rows) == 4 and {row["touches_border"] for row in rows} == {"0"}
    assert rows[0]["class"] == "RBC" and 0.5 < float(rows[0]["score"]) <= 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Not counted, 1:" and said[1].strip().startswith("broken.png: ")
    assert "2 images counted, 0 of them with a remark; 1 files not counted" in said
    assert said[-2].startswith("Results: in_cells") and said[-1].startswith("3 pictures in ")


def test_a_class_without_measurement_says_so(here, capsys):
    unmeasured = save_square_finder(here / "m.onnx", settings(counting=None))
    save(here / "in" / "a.png")
    assert count(unmeasured, "in") == 0
    row = table(here / "in_cells" / "counts.csv")[0]
    assert row["RBC"] == "3" and row["RBC least"] == "" and row["RBC most"] == ""
    assert "RBC: 3 cells (no interval: this class was not measured" in capsys.readouterr().out


def test_every_file_is_counted_or_named(model, here, capsys):
    """Seven files of fourteen were not mentioned, pictures named *_cells.jpg neither."""
    folder = here / "in"
    good = ["blood_cells.jpg", "red_cells.jpg", "UPPER.JPG", "a.jpe", "b.jfif", "c.webp", "d.gif"]
    good += ["e.jp2", "мазок 7.png", "quotes'and#%.png", "=1+1.png", "a\nb.png", "no ending"]
    for name in good:
        save(folder / f"{name}.tmp.png")
        image = Image.open(folder / f"{name}.tmp.png")
        kind = "JPEG" if name == "no ending" or name.endswith(("jpe", "jfif")) else None
        image.save(folder / name, kind)
        (folder / f"{name}.tmp.png").unlink()
    save(folder / "day2" / "inside.png")
    for name in ("f.heic", "g.svs", "notes.txt", "Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"something else")
    (folder / "folder.jpg").mkdir()
    (folder / "gone.png").symlink_to(folder / "not there.png")
    os.mkfifo(folder / "pipe.png")
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    counts = counts_of("in_cells")
    good[good.index("=1+1.png")] = "'=1+1.png"  # no formula of a spreadsheet
    assert {name for name, cells in counts.items() if cells == 3} == set(good)
    named = {row["image"] for row in table(here / "in_cells" / "detections.csv")}
    assert named == set(good)
    assert {name for name, cells in counts.items() if cells is None} == {
        "f.heic",
        "g.svs",
        "gone.png",
    }
    said = capsys.readouterr().out
    assert "f.heic: HEIC is not read here: save it as JPEG" in said
    assert "No pictures, left out: .hidden.png, Thumbs.db, notes.txt, pipe.png" in said
    assert "Folders inside, left out without --nested: day2, folder.jpg" in said
    assert count(model, "in", "--nested") == count_cells.EXIT_SOME_FAILED
    assert counts_of("in_cells")["day2/inside.png"] == 3


def test_a_folder_without_permission_is_named(model, here, capsys, monkeypatch):
    save(here / "in" / "a.png")
    (here / "in" / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert count(model, "in", "--nested") == 0
    assert "left out (links, or without permission): locked" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes are Linux's")
def test_a_name_that_is_no_utf8_costs_nothing(model, here):
    save(here / "in" / "a.png")
    save(here / "in" / "long" / ("n" * 240 + ".png"))
    shutil.copy(here / "in" / "a.png", os.fsencode(here / "in") + b"/muestra_ni\xf1o.png")
    assert count(model, "in", "--nested", "--voc") == 0
    assert set(counts_of("in_cells").values()) == {3}
    assert "muestra_ni\\xf1o.png" in counts_of("in_cells")
    report = (here / "in_cells" / "report.html").read_text("utf-8")
    assert "muestra_ni\\xf1o.png" in report and "muestra_ni%F1o.png_cells.jpg" in report
    for path in (here / "in_cells" / "voc").rglob("*.xml"):
        ElementTree.parse(path)


def test_names_that_become_one_keep_their_results_apart(model, here):
    save(here / "in" / "a:1.png")
    save(here / "in" / "a_1.png", SQUARES[:1])
    save(here / "in" / 'day"2". ' / "b?.png", SQUARES[:2])
    assert count(model, "in", "--nested", "--voc") == 0
    voc = here / "in_cells" / "voc"
    cells = {}
    for path in voc.rglob("*.xml"):
        parts = path.relative_to(voc).parts
        assert not any(set(part) & set('<>:"|?*\\') or part[-1] in ". " for part in parts)
        tree = ElementTree.parse(path)
        cells[tree.findtext("filename")] = len(tree.findall("object"))
    assert cells == {"a:1.png": 3, "a_1.png": 1, "b?.png": 2}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOENT])
def test_a_name_that_the_file_system_refuses_costs_one_picture(
    model, here, capsys, monkeypatch, number
):
    save(here / "in" / "a.png")
    save(here / "in" / "b.png")
    replace = os.replace

    def refuse(source, target):
        if "a.png" in str(target):
            raise OSError(number, "No such name")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    assert counts_of("in_cells") == {"a.png": None, "b.png": 3}
    words = "a.png: its results cannot be written under its name (No such name): rename it"
    assert words in capsys.readouterr().out


def test_a_full_disk_ends_the_run(model, here, monkeypatch):
    save(here / "in" / "a.png")

    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert count(model, "in") == count_cells.EXIT_OUTPUT
    assert not list(here.rglob("*.tmp"))


def test_a_journal_that_cannot_be_written_ends_the_run_with_a_sentence(here):
    """The line that did not fit was tried again when the file was closed: a traceback."""
    resource = pytest.importorskip("resource")  # limits of a process: not on Windows
    journal = count_cells.Journal(here / "out", {"journal": "count_cells"})
    size = journal.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(count_cells.OutputError, match="The journal cannot be written"):
            journal.append({"name": "a.png"})
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.file.closed and journal.path.stat().st_size == size


def test_tables_that_cannot_be_written_leave_no_file_behind(model, here, capsys):
    save(here / "in" / "a.png")
    (here / "in_cells" / "counts.csv").mkdir(parents=True)  # in the way
    assert count(model, "in") == count_cells.EXIT_OUTPUT
    assert "counts.csv cannot be written" in capsys.readouterr().err
    assert not list(here.rglob(".*.tmp"))


def test_the_journal_of_another_program_is_left_alone(model, here, capsys):
    save(here / "in" / "a.png")
    journal = here / "in_cells" / "journal.jsonl"
    journal.parent.mkdir()
    for content in ('{"event": "start"}\n{"event": "end"}\n', "some words\n", "[1]"):
        journal.write_text(content)
        for arguments in (("in",), ("in", "--fresh")):
            assert count(model, *arguments) == count_cells.EXIT_OUTPUT
            words = "in_cells holds a journal.jsonl of another program: name another folder"
            assert words in capsys.readouterr().err
        assert journal.read_text() == content
    journal.write_text('{"journal": "count_ce')  # ours, cut off by a kill
    assert count(model, "in") == 0


def test_what_could_not_be_read_is_tried_again(model, here, monkeypatch):
    """A fault of the network or of the memory was one for ever."""
    save(here / "in" / "a.png")
    read = count_cells.read_picture

    def fail(path):
        raise count_cells.PictureError("there is not enough memory for it")

    monkeypatch.setattr(count_cells, "read_picture", fail)
    assert count(model, "in") == count_cells.EXIT_NONE_COUNTED
    monkeypatch.setattr(count_cells, "read_picture", read)
    assert count(model, "in") == 0 and counts_of("in_cells") == {"a.png": 3}


def test_drawings_show_what_the_tables_say(model, here, capsys):
    """d.png finds its own scale while a.png is away, then follows the others again."""
    image = rows_of_squares(80, 1280, 960, 110)[0]
    for name in ("a", "b", "c"):
        save(here / "in" / f"{name}.png", (), (1280, 960))
        Image.fromarray(image).save(here / "in" / f"{name}.png")
    Image.fromarray(rows_of_squares(105, 1280, 960, 130)[0]).save(here / "in" / "d.png")
    assert count(model, "in", "--voc") == 0
    table_of_all = tables_of("in_cells")
    drawings = drawings_of("in_cells")
    (here / "in" / "a.png").rename(here / "a.png")
    assert count(model, "in", "--voc") == 0
    assert drawings_of("in_cells") != drawings
    (here / "a.png").rename(here / "in" / "a.png")
    capsys.readouterr()
    assert count(model, "in", "--voc") == 0
    assert tables_of("in_cells") == table_of_all and drawings_of("in_cells") == drawings
    assert "3 of them in an earlier run" in capsys.readouterr().out


def test_tables_of_another_model_go_with_its_drawings(model, here, monkeypatch):
    save(here / "in" / "a.png")
    assert count(model, "in") == 0

    def stop(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(count_cells, "count_task", stop)
    assert count(model, "in", "--fresh") == count_cells.EXIT_INTERRUPTED
    left = {path.name for path in (here / "in_cells").rglob("*") if path.is_file()}
    assert left == {"journal.jsonl"}


def test_several_inputs_and_single_files(model, here):
    save(here / "x" / "a.png")
    save(here / "y" / "a.png", SQUARES[:1])
    assert count(model, "x", "y/a.png", "y", "--output", "out") == 0
    assert counts_of("out") == {"x/a.png": 3, "y/a.png": 1}
    assert count(model, here / "y" / "a.png") == 0
    assert counts_of("y_cells") == {"a.png": 1}


def test_results_keep_apart_what_only_endings_tell_apart(model, here):
    images = {"a.jpg": 3, "a.png": 1, "b.png": 0, "a.bmp": 2}
    for name, cells in images.items():
        save(here / "in" / name, SQUARES[:cells])
    assert count(model, "in", "--voc") == 0
    for name, cells in images.items():
        tree = ElementTree.parse(here / "in_cells" / "voc" / f"{name}.xml")
        assert len(tree.findall("object")) == cells
        assert tree.findtext("filename") == name and tree.findtext("size/width") == "640"
        with Image.open(here / "in_cells" / "annotated" / f"{name}_cells.jpg") as image:
            image.load()


def test_the_folder_of_the_pictures_is_not_written_to_unless_it_is_named(model, here, capsys):
    save(here / "in" / "a.png")
    save(here / "in" / "b.png")
    before = sorted(here.rglob("in/*"))
    assert count(model, "in") == 0
    assert sorted(here.rglob("in/*")) == before
    assert count(model, "in/a.png", "in", ".", "--nested") == 2
    assert "name another folder with --output" in capsys.readouterr().err
    for output in ("in", here / "in", "in/results"):
        for _ in range(2):
            assert count(model, "in", "--nested", "--output", output) == 0
            assert counts_of(output) == {"a.png": 3, "b.png": 3}


def test_nothing_to_count_is_said(model, here, capsys):
    for name in ("absent", "n" * 300, "*.jpg"):
        assert count(model, name) == 2
        assert f"There is no file or folder {name}." in capsys.readouterr().err
    for arguments in ([""], ["in", "--output", ""]):
        with pytest.raises(SystemExit) as ended:
            count(model, *arguments)
        assert ended.value.code == 2
        assert "a name is empty: give a file or a folder" in capsys.readouterr().err
    (here / "in").mkdir()
    (here / "in" / "notes.txt").write_text("x")
    assert count(model, "in") == count_cells.EXIT_NONE_COUNTED
    assert "There is no picture to count." in capsys.readouterr().out
    (here / "in" / "a.png").write_bytes(b"x")
    assert count(model, "in") == count_cells.EXIT_NONE_COUNTED
    assert counts_of("in_cells") == {"a.png": None}
    assert "RBC" not in capsys.readouterr().out  # no totals of no picture
    assert 'class="card"' not in (here / "in_cells" / "report.html").read_text()


@pytest.mark.parametrize("output", [".", "in", "in/results"])
def test_results_may_lie_anywhere(model, here, output):
    """With the output folder around or inside the pictures all of them are counted, each time."""
    save(here / "in" / "a.png")
    save(here / "in" / "day2" / "b.png", SQUARES[:1])
    for _ in range(2):
        assert count(model, "in", "--nested", "-o", output) == 0
        assert counts_of(output) == {"a.png": 3, "day2/b.png": 1}


def test_a_file_that_is_named_counts_whatever_folder_is_named_too(model, here, capsys):
    save(here / "in" / ".a.png")
    save(here / "in" / "day2" / "b.png", SQUARES[:1])
    for inputs in (["in/.a.png", "in"], ["in", "in/.a.png"]):
        assert count(model, *inputs, "in/day2", "-o", "out") == 0
        assert counts_of("out") == {".a.png": 3, "day2/b.png": 1}
        assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({}, "damaged"),
        ({"format_version": 1}, "format 1, this program reads format 2"),
        ({"format_version": 2, "weights": "1"}, "lack precision, class_names"),
        ([1], "damaged"),
    ],
)
def test_a_model_without_fitting_metadata_is_refused(here, capsys, metadata, words):
    save(here / "in" / "a.png")
    bad = save_square_finder(here / "bad.onnx", metadata)
    assert count(bad, "in") == count_cells.EXIT_MODEL
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1 and str(here) not in said


def test_a_model_that_is_none_is_refused(model, here, capsys, monkeypatch):
    save(here / "in" / "a.png")
    whole = Path(model).read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], b"version https://git-lfs..."):
        (here / "bad.onnx").write_bytes(content)
        assert count("bad.onnx", "in") == count_cells.EXIT_MODEL
    assert count("absent.onnx", "in") == count_cells.EXIT_MODEL
    monkeypatch.setattr(count_cells, "models_beside", lambda folder: [])
    assert count_cells.main(["in"]) == count_cells.EXIT_MODEL
    assert "There is no model ssd300_int8.onnx or ssd300.onnx" in capsys.readouterr().err
    assert not (here / "in_cells" / "counts.csv").exists()


def test_of_two_models_the_faster_one_counts_and_the_measurement_is_remembered(
    here, monkeypatch, capsys
):
    (here / "checkpoints").mkdir()
    for name in count_cells.MODEL_NAMES:
        (here / "checkpoints" / name).write_bytes(name.encode())
    int8, float32 = (here / "checkpoints" / name for name in count_cells.MODEL_NAMES)
    monkeypatch.setattr(count_cells, "speed_file", lambda: here / "cache" / "speed.json")
    asked = []

    def ratio(answer):
        return lambda *paths: asked.append(paths) or answer

    monkeypatch.setattr(count_cells, "measured_speed", ratio(0.4))
    assert count_cells.choose_model(None, here) == int8
    monkeypatch.setattr(count_cells, "measured_speed", ratio(1.6))
    assert count_cells.choose_model(None, here) == int8 and len(asked) == 1  # remembered
    for number, content in enumerate(["damaged", "[]", "null"], 2):
        (here / "cache" / "speed.json").write_text(content)
        assert count_cells.choose_model(None, here) == float32 and len(asked) == number
    float32.unlink()
    assert count_cells.choose_model(None, here) == int8 and len(asked) == 4


def tables_of(folder):
    return [(Path(folder) / name).read_bytes() for name in ("counts.csv", "detections.csv")]


def drawings_of(folder):
    """{path: content} of the drawings and VOC files."""
    answer = {}
    for kind in ("annotated", "voc"):
        for path in (Path(folder) / kind).rglob("*.*"):
            answer[str(path)] = path.read_bytes()
    return answer


def test_a_run_goes_on_with_the_model_it_began_with(here, monkeypatch):
    """The clock decides between two models; at another time it decides otherwise."""
    for name in count_cells.MODEL_NAMES:
        save_square_finder(here / name, settings(weights=name))
    save(here / "in" / "a.png")
    monkeypatch.setattr(count_cells, "PROGRAM_FOLDER", here)
    found = count_cells.models_beside(here)
    monkeypatch.setattr(count_cells, "models_beside", lambda folder: found)
    used = []
    for ratio, arguments in ((0.5, []), (2.0, []), (2.0, ["--fresh"]), (0.5, [])):
        monkeypatch.setattr(count_cells, "remembered_speed", lambda *paths, r=ratio: r)
        assert count_cells.main(["in", *arguments]) == 0
        used.append(count_cells.worker_options.model)
    int8, float32 = map(str, found)
    assert used == [int8, int8, float32, float32]


def test_speeds_are_remembered_in_a_cache_or_among_temporary_files(here, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(count_cells.Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert count_cells.speed_file() == here / "cache" / "count_cells" / "speed.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    temporary = Path(count_cells.tempfile.gettempdir())
    assert count_cells.speed_file() == temporary / "count_cells" / "speed.json"
    monkeypatch.setattr(count_cells.Path, "home", lambda: here)
    assert count_cells.speed_file() == here / ".cache" / "count_cells" / "speed.json"


def test_a_run_goes_on_where_it_was(model, here, capsys, monkeypatch):
    for number in range(6):
        save(here / "in" / f"{number}.png", SQUARES[: number % 4])
    assert count(model, "in", "--output", "whole") == 0
    counted = []
    count_one = count_cells.count_task

    def stop_at_fourth(task):
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted.append(task.name)
        return count_one(task)

    monkeypatch.setattr(count_cells, "count_task", stop_at_fourth)
    assert count(model, "in", "--output", "out") == count_cells.EXIT_INTERRUPTED
    assert "The same command goes on from here" in capsys.readouterr().err
    journal = here / "out" / count_cells.JOURNAL_NAME
    leftover = here / "out" / "annotated" / ".begun.tmp"
    leftover.write_bytes(b"a file that a kill cut off")
    with open(journal, "ab") as file:
        file.write(b'{"name": "3.png", "sta')  # a line that a kill cut off
    monkeypatch.setattr(
        count_cells, "count_task", lambda task: counted.append(1) or count_one(task)
    )
    assert count(model, "in", "--output", "out") == 0
    assert len(counted) == 6 and "3 of them in an earlier run" in capsys.readouterr().out
    assert tables_of("out") == tables_of("whole") and not leftover.exists()
    assert count(model, "in", "--output", "out") == 0 and len(counted) == 6


def test_what_changed_is_counted_again(model, here, capsys):
    save(here / "in" / "a.png")
    save(here / "in" / "b.png")
    assert count(model, "in") == 0
    save(here / "in" / "b.png", SQUARES[:1])
    os.utime(here / "in" / "b.png", ns=(1, 1))
    save(here / "in" / "c.png", SQUARES[:2])
    (here / "in_cells" / "annotated" / "a.png_cells.jpg").unlink()
    capsys.readouterr()
    assert count(model, "in") == 0
    assert counts_of("in_cells") == {"a.png": 3, "b.png": 1, "c.png": 2}
    assert "an earlier run" not in capsys.readouterr().out
    (here / "in" / "c.png").unlink()
    assert count(model, "in") == 0
    assert counts_of("in_cells") == {"a.png": 3, "b.png": 1}
    assert "2 of them in an earlier run" in capsys.readouterr().out


def test_another_model_or_other_options_start_anew_and_say_so(model, here, capsys):
    save(here / "in" / "a.png")
    other = save_square_finder(here / "other.onnx", settings(weights="another"))
    assert count(model, "in") == 0
    assert "anew" not in capsys.readouterr().out
    for arguments, words in (
        ((other, "in"), "the results there are of another model"),
        ((other, "in", "--voc"), "the results there are of other options"),
        ((other, "in", "--voc", "--fresh"), "as --fresh asks"),
    ):
        assert count(*arguments) == 0
        assert f"Everything is counted anew: {words}." in capsys.readouterr().out


def test_the_scale_is_decided_in_the_order_of_names(model, here):
    """The first three pictures of a size decide; one without cells is read at their scale."""
    save(here / "in" / "0.png", (), (1280, 960))
    image = rows_of_squares(80, 1280, 960, 110)[0]
    for name in ("1", "2", "3", "4", "5"):
        Image.fromarray(image).save(here / "in" / f"{name}.png")
    Image.fromarray(rows_of_squares(160, 1280, 960, 200)[0]).save(here / "in" / "near.png")
    save(here / "in" / "small.png")
    (here / "in" / "00.png").write_bytes(b"no picture")
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    records = []
    for line in (here / "in_cells" / "journal.jsonl").read_text().splitlines()[1:]:
        records.append(json.loads(line))
    given = {record["name"]: record["given_field"] for record in records}
    decided = given["4.png"]
    assert 0.9 < decided[0] / 640 < 1.1
    assert given["0.png"] == given["3.png"] == given["5.png"] == given["near.png"] == decided
    assert given["1.png"] is None and given["2.png"] is None and given["small.png"] is None
    assert counts_of("in_cells")["near.png"] == 24
    assert count(model, "in", "--own-scale", "--output", "own") == count_cells.EXIT_SOME_FAILED
    assert counts_of("own") == counts_of("in_cells")


def test_an_unforeseen_failure_names_the_picture_and_the_others_count(
    model, here, capsys, monkeypatch
):
    for name in ("a.png", "b.png", "c.png"):
        save(here / "in" / name)
    draw = count_cells.draw_cells
    drawn = []

    def fail_once(*arguments):
        drawn.append(1)
        if len(drawn) == 2:
            raise RuntimeError("nobody foresaw this")
        return draw(*arguments)

    monkeypatch.setattr(count_cells, "draw_cells", fail_once)
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    assert counts_of("in_cells") == {"a.png": 3, "b.png": None, "c.png": 3}
    assert "b.png: RuntimeError: nobody foresaw this" in capsys.readouterr().out
    assert count(model, "in") == 0  # what failed is tried again
    assert counts_of("in_cells") == {"a.png": 3, "b.png": 3, "c.png": 3}


def test_results_that_cannot_be_written_end_the_run_with_a_sentence(model, here, capsys):
    save(here / "in" / "a.png")
    (here / "file").write_text("x")
    assert count(model, "in", "--output", "file") == count_cells.EXIT_OUTPUT
    (here / "out" / "annotated").mkdir(parents=True)
    (here / "out" / "annotated" / "a.png_cells.jpg").mkdir()  # in the way
    assert count(model, "in", "--output", "out") == count_cells.EXIT_OUTPUT
    assert "cannot be written" in capsys.readouterr().err


def test_two_runs_do_not_write_to_the_same_results(model, here, capsys):
    save(here / "in" / "a.png")
    assert count(model, "in") == 0
    with open(here / "in_cells" / "journal.jsonl", "a+b") as other:
        count_cells.lock_file(other)
        assert count(model, "in") == count_cells.EXIT_OUTPUT
    assert "Another run is writing to" in capsys.readouterr().err
    assert count(model, "in") == 0


def test_the_report_needs_nothing_else_and_shows_the_doubtful_first(model, here, monkeypatch):
    for number in range(5):
        save(here / "in" / f"{number}.png", SQUARES[: number % 4])
    save(here / "in" / "<b>&.png")
    monkeypatch.setattr(count_cells, "EMBEDDED_PICTURES", 3)
    assert count(model, "in") == 0
    page = (here / "in_cells" / "report.html").read_text("utf-8")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "&lt;b&gt;&amp;.png" in page and "<b>&.png" not in page
    assert page.count("data:image/jpeg") == 3 and page.count("<svg") == 3
    for link in re.findall(r'href="([^"]+)"', page):
        path = here / "in_cells" / count_cells.urllib.parse.unquote(link)
        assert path.is_file(), link
    captions = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert set(captions) < {"0.png", "1.png", "2.png", "4.png"}  # with too few cells to be sure
    assert "no cells of a usual size" in page


def test_the_histogram_covers_every_number():
    for highest in (0, 1, 7, 40, 41, 999, 123456):
        edges = count_cells.histogram_edges(highest)
        assert edges[0] == 0 and edges[-1] > highest and len(edges) <= 26


# ------------------------------------------------------------------ with real processes


def start(model, *arguments):
    """The command as a process of its own."""
    command = [sys.executable, str(PROGRAM), "--model", str(model), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_signals)


def hear_signals():
    """What a shell starts in the background ignores Ctrl-C, the tests with it: not so here."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_killed_runs_lose_nothing_and_leave_no_process(model, tmp_path):
    for number in range(24):
        save(tmp_path / "in" / f"{number:02}.png", SQUARES[: number % 4])
    whole = start(model, tmp_path / "in", "--output", tmp_path / "whole")
    assert whole.wait(60) == 0, whole.stderr.read()
    output = tmp_path / "out"
    journal = output / "journal.jsonl"
    endings = []
    for how, lines in ((signal.SIGKILL, 5), (signal.SIGINT, 12), (signal.SIGTERM, 18)):
        run = start(model, tmp_path / "in", "--output", output, "--workers", 2)
        while not (journal.is_file() and len(journal.read_bytes().splitlines()) > lines):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        run.send_signal(how)
        endings.append(run.wait(30))
    assert endings == [-signal.SIGKILL, count_cells.EXIT_INTERRUPTED, count_cells.EXIT_TERMINATED]
    run = start(model, tmp_path / "in", "--output", output, "--workers", 1)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and "in an earlier run" in said
    assert tables_of(output) == tables_of(tmp_path / "whole")
    for _ in range(50):
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if str(tmp_path) not in listing:
            break
        time.sleep(0.1)
    assert str(tmp_path) not in listing


def test_waits_for_workers_are_short(monkeypatch):
    """On Windows Ctrl-C is heard only when a wait ends."""
    waits = []

    def watch(futures, timeout=None, return_when=None):
        waits.append(timeout)
        for future in futures:
            if len(waits) % 3 == 0:  # nothing is done at the first two looks
                future.set_result({"name": "a.png"})
        done = {future for future in futures if future.done()}
        return done, set(futures) - done

    monkeypatch.setattr(count_cells.concurrent.futures, "wait", watch)
    workers = count_cells.Workers(1, None)
    monkeypatch.setattr(workers, "submit", lambda task: count_cells.concurrent.futures.Future())
    assert list(workers.run(["a task"])) == [{"name": "a.png"}]
    assert count_cells.result_of(count_cells.concurrent.futures.Future()) == {"name": "a.png"}
    assert len(waits) == 6 and max(waits) <= 1


def test_so_many_workers_as_the_system_takes(monkeypatch):
    assert count_cells.number_of_workers(100, 1000) == 100
    monkeypatch.setattr(count_cells, "MOST_WORKERS", 61)  # on Windows
    assert count_cells.number_of_workers(100, 1000) == 61
    assert count_cells.number_of_workers(100, 3) == 3


def test_a_folder_that_lists_but_does_not_open_its_pictures(model, here, monkeypatch):
    """Path.is_file raises where Python is older than 3.14."""
    save(here / "in" / "a.png")
    save(here / "in" / "b.png")
    stat = os.stat

    def refuse(path, *more, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *more, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert count(model, "in") == count_cells.EXIT_SOME_FAILED
    assert counts_of("in_cells") == {"a.png": None, "b.png": 3}


def test_a_pattern_stands_for_its_files(model, here):
    """The command line of Windows hands *.png on as it is."""
    for name in ("a.png", "b.png", "[1].png"):
        save(here / "in" / name)
    assert count(model, "in/?.png", "in/[1].png") == 0
    assert set(counts_of("in_cells")) == {"a.png", "b.png", "[1].png"}


class KillsItsWorker:
    """A task whose arrival ends the process that reads it."""

    def __init__(self, name):
        self.name = name
        self.stamp = [0, 0]
        self.field = None

    def __reduce__(self):
        return os._exit, (3,)


def test_a_picture_that_ends_its_worker_is_named_and_the_others_count(model, tmp_path):
    tasks = []
    for name in ("a.png", "b.png", "c.png"):
        tasks.append(count_cells.make_task(name, save(tmp_path / name)))
    tasks.insert(1, KillsItsWorker("bad.png"))
    options = count_cells.Options(str(model), str(tmp_path / "out"), False)
    with count_cells.Workers(2, options) as workers:
        records = {record["name"]: record["state"] for record in workers.run(tasks)}
    assert records == {
        "a.png": "counted",
        "b.png": "counted",
        "c.png": "counted",
        "bad.png": "failed",
    }


def test_without_a_package_the_program_says_what_to_install(tmp_path):
    (tmp_path / "tifffile.py").write_text("raise ModuleNotFoundError(name='tifffile')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), "in"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "pip install onnxruntime opencv-python-headless numpy pillow tifffile tqdm" in run.stderr
