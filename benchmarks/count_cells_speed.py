#!/usr/bin/env python3
"""The lab's tool beside what it replaces: seconds, memory, kills, throughput, in one run.

    git worktree add /tmp/old a21a4e8
    python benchmarks/count_cells_speed.py --old /tmp/old --model checkpoints/ssd300_int8.onnx

The old side is `execute_ssd_notebook.py --images` of that checkout, run by this Python with its
own checkpoints/; the new side is count_cells.py, by --python if it has an environment of its own.
Both count the same pictures, in turn. Prints the rows of a table and, with --kill and --memory,
what a run of many pictures does that is killed three times, and how its memory grows.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("counts.csv", "detections.csv")


def unpack_pictures(folder):
    """BCCD's pictures from data/, in the order of names."""
    with zipfile.ZipFile(ROOT / "data" / "BCCD_Dataset.zip") as bundle:
        names = [name for name in bundle.namelist() if name.endswith(".jpg")]
        for name in names:
            (folder / Path(name).name).write_bytes(bundle.read(name))
    return sorted(folder.iterdir())


def folder_of(pictures, number, folder):
    """A folder of so many pictures; they begin anew where there are more than BCCD has."""
    folder.mkdir()
    for place in range(number):
        source = pictures[place % len(pictures)]
        shutil.copy(source, folder / f"{place:05}_{source.name}")
    return folder


def children_of(process):
    """A process and all its descendants, by id (Linux)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = []
    waiting = [process]
    while waiting:
        current = waiting.pop()
        found.append(current)
        waiting += parents.get(current, [])
    return found


def memory_of(process):
    """Megabytes of a process and its descendants, shared pages counted once each (PSS), and as
    often as they are mapped (RSS): (pss, rss).
    """
    sums = {"Pss:": 0, "Rss:": 0}
    for member in children_of(process):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[0] in sums:
                sums[words[0]] += int(words[1])
    return sums["Pss:"] / 1000, sums["Rss:"] / 1000


def new_command(arguments, pictures, output, *options):
    """The command line of count_cells.py."""
    command = [arguments.python, str(ROOT / "count_cells.py"), str(pictures)]
    command += ["--model", str(arguments.model), "--output", str(output)]
    return [*command, *options]


def run_new(arguments, pictures, output, *options):
    """Seconds of count_cells.py, start included; it must succeed."""
    started = time.perf_counter()
    command = new_command(arguments, pictures, output, *options)
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def run_old(arguments, pictures, output):
    """Seconds of the runner's --images in the old checkout, start included."""
    started = time.perf_counter()
    command = [sys.executable, "execute_ssd_notebook.py", "--images", str(pictures)]
    command += ["--results", str(output), "--output", str(output) + ".ipynb"]
    environment = {**os.environ, "SSD_NO_INSTALL": "1"}
    subprocess.run(command, cwd=arguments.old, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def compare_speed(arguments, pictures, work):
    """Rows of the table: 40 pictures by both, in turn."""
    folder = folder_of(pictures, 40, work / "forty")
    seconds = {"old": [], "new": []}
    for repeat in range(arguments.repeats):
        if arguments.old:
            seconds["old"].append(run_old(arguments, folder, work / f"old{repeat}"))
        seconds["new"].append(run_new(arguments, folder, work / f"new{repeat}"))
        print({name: round(times[-1], 1) for name, times in seconds.items() if times}, flush=True)
    new = statistics.median(seconds["new"])
    print(f"40 pictures, start included: new {new:.1f} s", end="")
    if arguments.old:
        old = statistics.median(seconds["old"])
        print(f", old {old:.1f} s, new / old {new / old:.2f}", end="")
    print(f" (medians of {arguments.repeats})")


def compare_workers(arguments, pictures, work):
    """Pictures a second with one worker and with two."""
    folder = folder_of(pictures, arguments.pictures, work / "throughput")
    rates = {}
    for workers in (1, 2):
        output = work / f"workers{workers}"
        seconds = run_new(arguments, folder, output, "--workers", str(workers))
        rates[workers] = arguments.pictures / seconds
        print(f"{workers} workers: {seconds:.1f} s, {rates[workers]:.2f} pictures/s", flush=True)
    same = read_tables(work / "workers1") == read_tables(work / "workers2")
    print(f"two workers / one: {rates[2] / rates[1]:.2f}; tables equal: {same}")


def read_tables(folder):
    """The bytes of both tables."""
    return [(folder / name).read_bytes() for name in TABLES]


def kill_three_times(arguments, pictures, work):
    """A run that is killed three times gives the tables of one that is not."""
    folder = folder_of(pictures, arguments.kill, work / "killed")
    run_new(arguments, folder, work / "whole")
    output = work / "interrupted"
    journal = output / "journal.jsonl"
    for part in (1, 2, 3):
        process = subprocess.Popen(
            new_command(arguments, folder, output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while lines_of(journal) < part * arguments.kill // 4:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed when {lines_of(journal) - 1} pictures were done", flush=True)
        time.sleep(1)
    last = subprocess.run(
        new_command(arguments, folder, output), check=True, capture_output=True, text=True
    )
    print(last.stdout.splitlines()[-1])
    same = read_tables(output) == read_tables(work / "whole")
    print(f"{arguments.kill} pictures, killed three times: tables byte for byte equal: {same}")


def lines_of(journal):
    """Lines of the journal, 0 where there is none yet."""
    if not journal.is_file():
        return 0
    return journal.read_bytes().count(b"\n")


def watch_memory(arguments, pictures, work):
    """The memory of a run over many pictures, as it goes on."""
    folder = folder_of(pictures, arguments.memory, work / "many")
    output = work / "memory"
    process = subprocess.Popen(
        new_command(arguments, folder, output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peaks = {}  # by tenths of the pictures
    while process.poll() is None:
        pss, rss = memory_of(process.pid)
        tenth = 10 * lines_of(output / "journal.jsonl") // (arguments.memory + 1)
        old_pss, old_rss = peaks.get(tenth, (0, 0))
        peaks[tenth] = (max(pss, old_pss), max(rss, old_rss))
        time.sleep(0.2)
    for tenth, (pss, rss) in sorted(peaks.items()):
        print(f"after {tenth * 10}%: {pss:.0f} MB (each mapping counted: {rss:.0f} MB)")
    highest = max(pss for pss, _ in peaks.values())
    print(f"{arguments.memory} pictures: peak {highest:.0f} MB, exit {process.returncode}")


def main():
    """Print the rows that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "ssd300_int8.onnx")
    parser.add_argument("--python", default=sys.executable, help="that runs count_cells.py")
    parser.add_argument("--old", type=Path, help="a checkout of a21a4e8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=200, help="for one worker and two; 0: not")
    parser.add_argument("--kill", type=int, default=0, help="so many pictures, killed three times")
    parser.add_argument("--memory", type=int, default=0, help="so many pictures, memory watched")
    arguments = parser.parse_args()
    arguments.model = arguments.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "bccd").mkdir()
        pictures = unpack_pictures(work / "bccd")
        if arguments.repeats:
            compare_speed(arguments, pictures, work)
        if arguments.pictures:
            compare_workers(arguments, pictures, work)
        if arguments.kill:
            kill_three_times(arguments, pictures, work)
        if arguments.memory:
            watch_memory(arguments, pictures, work)


if __name__ == "__main__":
    main()
