"""How much longer a run by execute_ssd_notebook.py takes than plain `jupyter nbconvert --execute`.

Both execute the same notebook of 40 cells, in turn, several times; the figure is the median of the ratios of the
pairs. The cells do a little work and print as a study does: text, a table, a picture, a stream of progress lines.

    python benchmarks/runner_overhead.py --rounds 7 --seconds 0.25
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
from runner_helpers import nbconvert_in_place  # noqa: E402

KINDS = (
    "print('cell', {number})",
    "[{{'row': i, 'value': i * i}} for i in range(40)]",
    "for i in range(40):\n    print('step', i, flush=True)",
    "from IPython.display import Image\nImage(data=b'\\x89PNG\\r\\n\\x1a\\n' + bytes(60_000), format='png')",
)


def write_notebook(path: Path, cells: int, seconds: float) -> None:
    """A notebook of so many code cells; each works for `seconds`."""
    made = [v4.new_markdown_cell("# Benchmark")]
    for number in range(cells):
        work = f"import time\nend = time.perf_counter() + {seconds}\n"
        work += "while time.perf_counter() < end:\n    pass\n"
        shown = KINDS[number % len(KINDS)].format(number=number)
        made.append(v4.new_code_cell(work + shown))
    nbformat.write(v4.new_notebook(cells=made), path)


def timed(command: list[str], folder: Path) -> float:
    """Seconds that a command takes; it has to succeed."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints the seconds of each pair and the median ratio; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.25, help="work of each cell")
    options = parser.parse_args()
    commands = {
        "plain": nbconvert_in_place("page.ipynb"),
        "runner": [sys.executable, str(ROOT / "execute_ssd_notebook.py"), "page.ipynb"],
    }
    plain_seconds = []
    runner_seconds = []
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(options.rounds + 1):
            order = ["runner", "plain"]
            if number % 2:
                order.reverse()
            times = {}
            for kind in order:
                write_notebook(folder / "page.ipynb", options.cells, options.seconds)
                times[kind] = timed(commands[kind], folder)
            if number == 0:
                continue  # the first pair warms the disk's cache
            ratio = times["runner"] / times["plain"]
            plain_seconds.append(times["plain"])
            runner_seconds.append(times["runner"])
            ratios.append(ratio)
            said = f"nbconvert {times['plain']:.2f} s, runner {times['runner']:.2f} s"
            print(f"{said}, ratio {ratio:.3f}", flush=True)
    result = {
        "cells": options.cells,
        "seconds_per_cell": options.seconds,
        "rounds": len(ratios),
        "nbconvert_s": round(statistics.median(plain_seconds), 2),
        "runner_s": round(statistics.median(runner_seconds), 2),
        "median_ratio": round(statistics.median(ratios), 3),
        "processors": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
