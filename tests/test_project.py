"""The project's files agree with each other."""

import re
import subprocess

from conftest import ROOT


def requirements(text):
    """{package: what follows its name} of requirement lines."""
    found = re.findall(
        r"^\s*\"?([A-Za-z][\w-]*)\s*([<>=!~][^\"\n,#]*)?\"?,?\s*$", text, re.MULTILINE
    )
    return {name.lower(): (bound or "").strip() for name, bound in found}


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
    names = [line.split("\t", 1)[1] for line in tracked.stdout.splitlines()]
    assert not [
        name
        for name in names
        if name.startswith(("BCCD_Dataset/", "runs/")) or name.endswith(".onnx")
    ]
    checkpoints = {name for name in names if name.startswith("checkpoints/")}
    allowed = ("best_model.pth", "metrics.json", "detections.jpg", "accepted_recipes.json")
    assert checkpoints <= {f"checkpoints/{name}" for name in allowed}
    assert all((ROOT / name).stat().st_size < 50e6 for name in names if (ROOT / name).is_file())
