#!/usr/bin/env python3
"""Does the cost grow with the work? Steps, not epochs, on 1, 4 and 16 times BCCD, in drawn smears.

    python benchmarks/scaling.py [--times 1 4 16] [--steps 8] [--memory-mb 2000]

205 smears are drawn once; larger sets are copies of them under other names, read and decoded anew.
For each size, in a process of its own: seconds to parse the annotations; a first pass over all
images (read, decode, squeeze, augment, no network) and a second one, in images a second; the
median training step; the peak memory. Prints a Markdown table and how far the times lie from a
straight line through the origin.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from compare import peak_gb, quiet_definitions  # noqa: E402

BCCD_TRAIN = 205


def multiply(folder, times):
    """A dataset of `times` x 205 training smears in `folder`, from the one beside it in 'drawn'."""
    drawn, root = folder / "drawn" / "BCCD", folder / f"x{times}" / "BCCD"
    shutil.copytree(drawn / "ImageSets", root / "ImageSets")
    ids = (drawn / "ImageSets" / "Main" / "train.txt").read_text().split()
    for part, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (root / part).mkdir()
        for copy in range(times):
            for name in ids:
                shutil.copyfile(
                    drawn / part / f"{name}{suffix}", root / part / f"{name}_{copy}{suffix}"
                )
    names = [f"{name}_{copy}" for copy in range(times) for name in ids]
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names) + "\n")
    return root


def measure(root, steps, memory_mb):
    """The figures of one size, as a dictionary."""
    nb = quiet_definitions()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    started = time.perf_counter()
    nb.IMAGE_MEMORY_MB = memory_mb
    split = nb.SmearSplit(root, "train")
    figures = {"images": len(split), "parse": time.perf_counter() - started}
    data = nb.SmearDataset(split, nb.WORKING_SIZE)
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second"):
        started = time.perf_counter()
        for batch in torch.randperm(len(data), generator=generator).split(nb.BATCH_SIZE):
            images, boxes, _ = data.batch(batch)
            nb.augment(images.to(device), boxes, generator, 4 / 3)
        figures[name] = time.perf_counter() - started
    model = nb.build_model(4, None, torch.randn(4, 3, 300, 300) * 50, 0)
    nb.freeze_blocks(model, nb.FROZEN_BLOCKS)  # as the default does where it has ImageNet weights
    run = nb.Run(model, 1, nb.pick_precision(device), device, {})
    seconds = []
    for batch in torch.randperm(len(data), generator=generator)[
        : (steps + 2) * nb.BATCH_SIZE
    ].split(nb.BATCH_SIZE):
        started = time.perf_counter()
        images, boxes, labels = data.batch(batch)
        images, boxes, _ = nb.augment(images.to(device), boxes, generator, 4 / 3)
        nb.training_step(run, images, boxes, labels, torch.zeros(len(batch), dtype=torch.bool))
        seconds.append(time.perf_counter() - started)
    return {**figures, "step": statistics.median(seconds[2:]), "memory": peak_gb(nb, device)}


def main():
    """Draw, measure each size, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=8, help="training steps measured, after two")
    parser.add_argument(
        "--memory-mb",
        type=int,
        default=2000,
        help="IMAGE_MEMORY_MB: squeezed images kept in memory",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.steps, arguments.memory_mb)))
        return
    from synthetic_bccd import draw_dataset

    print(
        "| images | parse, s | first pass, images/s | second pass, images/s | step, s | memory, GB |\n"
        "|---|---|---|---|---|---|"
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_dataset(folder / "drawn", train=BCCD_TRAIN, val=1, test=1, seed=0)
        for times in arguments.times:
            root = multiply(folder, times)
            command = [
                sys.executable,
                __file__,
                "--measure",
                str(root),
                "--steps",
                str(arguments.steps),
                "--memory-mb",
                str(arguments.memory_mb),
            ]
            row = json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            rows.append(row)
            shutil.rmtree(root.parent)
            n = row["images"]
            print(
                f"| {n} | {row['parse']:.2f} | {n / row['first']:.0f} | {n / row['second']:.0f} "
                f"| {row['step']:.2f} | {row['memory']:.2f} |",
                flush=True,
            )
    for name in ("parse", "first", "second"):
        slope = sum(row[name] * row["images"] for row in rows) / sum(
            row["images"] ** 2 for row in rows
        )
        worst = max(abs(row[name] / (slope * row["images"]) - 1) for row in rows)
        print(
            f"{name}: {slope * 1000:.2f} ms an image; farthest from that straight line {worst:.0%}"
        )


if __name__ == "__main__":
    main()
