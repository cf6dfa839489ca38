"""How far the figures of metrics.json move when only the processor's rounding differs.

The page runs several times with the same detector, each time in a folder of its own and with another
instruction set or number of threads, as on another machine. Printed is how far each group of figures
moves from the first run. tests/test_readme.py allows what was measured here and no more.

    python benchmarks/rounding.py [--dataset BCCD_Dataset] [--keep FOLDER]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ["ssd_bccd_detection.ipynb", "execute_ssd_notebook.py", "checkpoints/best_model.pth"]
FILES += ["data/BCCD_Dataset.zip", "data/complete_labels.json", "data/vgg16_features.pth"]
SETTINGS = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
MEASURED = ["validation", "test", "test_without_shared_fields", "counting", "export"]


def copy_project(folder):
    """Copy what a run needs into an empty folder."""
    for name in FILES:
        source = ROOT / name
        if source.is_file():  # another edition of the project may lack one
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if (ROOT / "data").is_dir():
        shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)


def run_page(folder, variables, dataset):
    """Execute the page in a folder; returns the content of its metrics.json."""
    command = [sys.executable, "execute_ssd_notebook.py"]
    if dataset:
        command += ["--dataset", str(Path(dataset).resolve())]
    environment = dict(os.environ)
    environment.update(variables)
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "checkpoints" / "metrics.json").read_text("utf-8"))


def numbers(tree, path=""):
    """{dotted path: number} of a tree of dictionaries and lists."""
    found = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            found.update(numbers(value, f"{path}.{key}" if path else key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            found.update(numbers(value, f"{path}.{index}"))
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        found[path] = float(tree)
    return found


def group_of(path):
    """The kind of a figure: its path without split, class and position."""
    words = [word for word in path.split(".") if not word.isdigit()]
    return ".".join(word for word in words if word in KINDS) or path


KINDS = {
    "map_50", "map", "map_50_interval", "map_interval", "ap_50", "ap", "ap_50_interval", "f1",
    "detections", "count_threshold", "count_mae", "count_bias", "interval_holds", "errors",
    "box_difference", "score_difference", "validation_map_50", "validation_map", "megabytes",
    "images", "objects",
}  # fmt: skip


def largest_moves(reports):
    """{kind of figure: (largest difference from the first report, its path)}."""
    first = numbers({name: reports[0][name] for name in MEASURED if name in reports[0]})
    moves = {}
    for report in reports[1:]:
        for path, value in numbers({n: report[n] for n in MEASURED if n in report}).items():
            move = abs(value - first.get(path, value))
            kind = group_of(path)
            if move > moves.get(kind, (-1.0, ""))[0]:
                moves[kind] = (move, path)
    return moves


def main():
    """Run the page under each setting and print how far the figures move."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", metavar="DIR", help="an existing copy of BCCD")
    parser.add_argument("--keep", metavar="FOLDER", help="keep each metrics.json there")
    options = parser.parse_args()
    reports = []
    for name, variables in SETTINGS.items():
        with tempfile.TemporaryDirectory() as temporary:
            copy_project(Path(temporary))
            report = run_page(Path(temporary), variables, options.dataset)
        reports.append(report)
        validation, test = report["validation"], report["test"]
        print(
            f"{name:10} validation {validation['map_50']:.4f} {validation['map']:.4f}, "
            f"test {test['map_50']:.4f} {test['map']:.4f}",
            flush=True,
        )
        if options.keep:
            Path(options.keep).mkdir(parents=True, exist_ok=True)
            target = Path(options.keep) / f"{name.replace(' ', '_')}.json"
            target.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for kind, (move, path) in sorted(largest_moves(reports).items(), key=lambda row: -row[1][0]):
        print(f"{kind:20} moves by {move:.4f} at most ({path})")


if __name__ == "__main__":
    main()
