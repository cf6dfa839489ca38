"""The project's files agree with each other."""

import re
import subprocess

from conftest import ROOT


def requirements(text):
    """{package: what follows its name} of requirement lines."""
    line = r"^\s*\"?([A-Za-z][\w-]*)\s*([<>=!~][^\"\n,#]*)?\"?,?\s*$"
    found = {}
    for name, bound in re.findall(line, text, re.MULTILINE):
        found[name.lower()] = bound.strip()
    return found


def test_the_runners_header_names_what_requirements_names():
    listed = requirements((ROOT / "requirements.txt").read_text())
    script = (ROOT / "execute_ssd_notebook.py").read_text()
    header = re.search(r"^# /// script\n(.*?)^# ///", script, re.MULTILINE | re.DOTALL)[1]
    block = re.search(r"dependencies = \[(.*?)\]", header, re.DOTALL)[1].replace("#", " ")
    inline = requirements(block)
    assert inline and "torch" in listed
    listed.pop("jupyter")  # for people; the runner needs only parts of it
    assert inline == listed


def test_only_what_a_clone_needs_is_committed():
    tracked = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        return  # an archive without git: nothing to look at
    names = [line.partition("\t")[2] for line in tracked.stdout.splitlines()]
    allowed = (
        "best_model.pth",
        "ssd300_int8.onnx",
        "metrics.json",
        "detections.jpg",
        "accepted_recipes.json",
        ".gitignore",
    )
    for name in names:
        assert not name.startswith(("BCCD_Dataset/", "runs/")), name
        if name.startswith("checkpoints/"):
            assert name.partition("/")[2] in allowed, name
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 50e6, name
