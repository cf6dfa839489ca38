#!/usr/bin/env python3
"""Measure how best_model.pth counts cells, on BCCD's validation images and their complete labels.

    python benchmarks/counting.py --dataset BCCD_Dataset [--checkpoint FILE] [--no-runner]

Prints the official mAP; for each class the F1 at IoU 0.5 and the error of the count, by the usual
threshold (fitted to official labels) and as own images are counted (fitted to complete labels, each
image by what others taught), and the share of true counts inside the 95% intervals; what the labels
leave within reach; the same pictures resized, turned and extended; and, unless --no-runner, the
seconds that `--images` takes for 40 pictures. The test split is not touched.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, quiet_definitions
from PIL import Image

SAME_CELL = 0.3  # IoU from which a box of either labelling is the same cell


def best_overlap(nb, boxes, labels, others, other_labels):
    """(n,) the largest IoU of each box (n, 4) with one of `others` (m, 4) of its own class; 0
    where there is none.
    """
    overlap = nb.ops.box_iou(boxes, others) * (labels[:, None] == other_labels)  # (n, m)
    return torch.cat([overlap, torch.zeros(len(boxes), 1)], 1).amax(1)


def matched(nb, found, truth, classes):
    """`match_all` with truth as pairs of boxes and labels."""
    return nb.match_all(found, *zip(*truth, strict=True), classes)


def threshold_by_labels(rows, label):
    """The usual way: the score from which on the counts of a class have the least error."""
    grid = np.round(np.arange(0.05, 0.96, 0.01), 2)
    counts = np.array([(row[label - 1][0][:, None] >= grid).sum(0) for row in rows])
    objects = np.array([row[label - 1][2] for row in rows])
    return float(grid[np.abs(counts - objects[:, None]).mean(0).argmin()])


def quality(nb, found, truth, classes):
    """One line: mAP@0.5, mAP@[.5:.95], AP@0.5 of each class; truth: pairs of boxes and labels."""
    at_half, average, *rest = nb.mean_average_precision(matched(nb, found, truth, classes), classes)
    return f"mAP@0.5 {at_half:.4f}  mAP@[.5:.95] {average:.4f}  " + " ".join(
        f"{value:.3f}" for value in rest[0]
    )


def without_unboxed_cells(nb, found, official, complete):
    """The detections without those on a cell that only the complete labels have; what fits an
    official box stays.
    """
    answer = []
    for detections, given, (all_boxes, all_labels) in zip(found, official, complete, strict=True):
        unboxed = best_overlap(nb, all_boxes, all_labels, *given) < SAME_CELL
        own, labels = detections["boxes"], detections["labels"]
        on_unboxed = best_overlap(nb, own, labels, all_boxes[unboxed], all_labels[unboxed]) >= 0.5
        keep = ~on_unboxed | (best_overlap(nb, own, labels, *given) >= 0.5)
        answer.append({key: value[keep] for key, value in detections.items()})
    return answer


def second_opinion(nb, official, complete):
    """The complete boxes of the cells that BCCD boxed, as detections of score 1: what a second
    labelling reaches.
    """
    answer = []
    for given, (boxes, labels) in zip(official, complete, strict=True):
        known = best_overlap(nb, boxes, labels, *given) >= SAME_CELL
        answer.append(
            {"boxes": boxes[known], "labels": labels[known], "scores": torch.ones(int(known.sum()))}
        )
    return answer


def counted_folder(counter, images):
    """Images as a folder's own are counted: [(cells that count, [(count, least, most)], remark)]."""
    counter.fields = {}
    return [counter.count(image) for image in images]


def resized(images, truth, factor):
    """Images and their boxes at another size."""
    sizes = [(round(image.shape[1] * factor), round(image.shape[0] * factor)) for image in images]
    kind = Image.Resampling.BICUBIC
    images = [
        np.asarray(Image.fromarray(i).resize(size, kind))
        for i, size in zip(images, sizes, strict=True)
    ]
    return images, [(boxes * factor, labels) for boxes, labels in truth]


def turned(images, truth):
    """Images and their boxes turned by 90 degrees."""
    answer = []
    for image, (boxes, labels) in zip(images, truth, strict=True):
        x0, y0, x1, y1 = boxes.T
        answer.append((torch.stack([image.shape[0] - y1, x0, image.shape[0] - y0, x1], 1), labels))
    return [np.ascontiguousarray(np.rot90(image, -1)) for image in images], answer


def extended(images):
    """Images continued by their mirror images to 1.5 times their sides."""
    pads = [((0, i.shape[0] // 2), (0, i.shape[1] // 2), (0, 0)) for i in images]
    return [np.pad(image, pad, mode="symmetric") for image, pad in zip(images, pads, strict=True)]


def before_the_seam(answers, images, label):
    """Counted cells of a class that end inside the original images: at the seam, where mirrored
    halves join, there are others than in the image alone.
    """
    total = 0
    for (found, *_), image in zip(answers, images, strict=True):
        inside = (found["boxes"][:, 2:] < torch.tensor(image.shape[1::-1]) - 4).all(1)
        total += int((inside & (found["labels"] == label)).sum())
    return total


def folder_rows(nb, counter, images, truth, names):
    """Print how the counts of the same smears change with their size."""
    label, first = counter.usual["label"], None
    title = f"{names[label - 1]}, {len(images)} smears"
    print(f"| {title} | cells counted | change | F1 | remarks |\n|---|---|---|---|---|")
    for factor in (1.0, 0.5, 0.71, 1.41, 2.0, "turned upright"):
        if factor == "turned upright":
            name, (pictures, cells) = factor, turned(images, truth)
        else:
            name, (pictures, cells) = f"resized by {factor}", resized(images, truth, factor)
        answers = counted_folder(counter, pictures)
        total = sum(counts[label - 1][0] for _, counts, _ in answers)
        found = [{**f, "scores": torch.ones(len(f["labels"]))} for f, _, _ in answers]
        rows = matched(nb, found, cells, len(names))
        figures = nb.count_figures(rows, label, [len(row[label - 1][0]) for row in rows])
        remarks, first = sum(bool(remark) for *_, remark in answers), first or total
        change = total / max(first, 1) - 1
        print(f"| {name} | {total} | {change:+.1%} | {figures['f1']:.3f} | {remarks} |", flush=True)
    few = images[:12]
    alone, wider = (
        before_the_seam(counted_folder(counter, pictures), few, label)
        for pictures in (few, extended(few))
    )
    print(f"{len(few)} smears extended by half: {wider} cells away from the seam, {alone} without")


def runner_seconds(split):
    """Seconds of `--images` on 40 pictures, start included, and the exit code: with the detector
    and the int8 copy in checkpoints/.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        for _, picture in split.files[:40]:
            shutil.copy(picture, Path(folder) / "in")
        command = [sys.executable, "execute_ssd_notebook.py", "--images", f"{folder}/in"]
        command += ["--results", f"{folder}/out", "--output", f"{folder}/page.ipynb"]
        started = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
        return time.perf_counter() - started, code


def main():
    """Detect once, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--labels", default=ROOT / "data" / "complete_labels.json")
    parser.add_argument("--checkpoint", default=ROOT / "checkpoints" / "best_model.pth")
    parser.add_argument("--no-runner", action="store_true", help="do not time `--images`")
    arguments = parser.parse_args()
    nb = quiet_definitions()
    nb.CHECKPOINT_DIR = str(Path(arguments.checkpoint).parent)
    counter = nb.CellCounter(arguments.checkpoint)
    model, names = nb.load_detector(arguments.checkpoint, nb.DEVICE)
    classes = len(names)
    complete = nb.read_complete_labels(arguments.labels, names)
    val = nb.SmearSplit(nb.dataset_root(arguments.dataset), "val", names)
    images = [val.image(index) for index in range(len(val))]
    found, every = nb.detect_both(model, images, num_classes=classes)
    official = list(zip(val.boxes, val.labels, strict=True))
    print(
        f"{len(val)} validation images, torch in float32; at the end of a line AP@0.5 of",
        *names,
    )
    print("official labels:", quality(nb, found, official, classes))
    some = [index for index, image_id in enumerate(val.ids) if image_id in complete]
    truth = [complete[val.ids[index]] for index in some]
    part = [official[index] for index in some]
    few, all_cells = ([reading[index] for index in some] for reading in (found, every))
    print(f"{len(some)} of them have complete labels")
    print("official labels:", quality(nb, few, part, classes))
    print("complete labels, official reading:", quality(nb, few, truth, classes))
    print("complete labels, every cell:", quality(nb, all_cells, truth, classes))
    print(
        "official labels, unboxed cells forgiven:",
        quality(nb, without_unboxed_cells(nb, few, part, truth), part, classes),
    )
    print(
        "official labels, boxes as the complete ones draw them:",
        quality(nb, second_opinion(nb, part, truth), part, classes),
    )
    rows, usual_rows = matched(nb, all_cells, truth, classes), matched(nb, few, truth, classes)
    counts = nb.counts_on_others(rows, classes)
    print("\n| class | cells an image | way | off by | mean | F1 | intervals hold |")
    print("|---|---|---|---|---|---|---|")
    for label, name in enumerate(names, 1):
        cut = threshold_by_labels(matched(nb, found, official, classes), label)
        usual = [int((row[label - 1][0] >= cut).sum()) for row in usual_rows]
        objects = np.array([row[label - 1][2] for row in rows])
        number, low, high = counts[:, label - 1].T.astype(int)
        inside = f"{np.mean((low <= objects) & (objects <= high)):.1%}"
        for way, best, held, reading in (
            (f"score {cut:.2f}", usual, "", usual_rows),
            ("expected", number, inside, rows),
        ):
            f = nb.count_figures(reading, label, best)
            error = f"{f['count_mae']:.2f} | {f['count_bias']:+.2f} | {f['f1']:.3f}"
            print(f"| {name} | {objects.mean():.1f} | {way} | {error} | {held} |")
    if not counter.counting:  # not measured by section 13: fitted to the images that it counts
        counter.counting = nb.fit_counting(rows, classes)
        counter.usual = counter.counting["usual"] = nb.usual_cells(every, val)
    print(f"\nown images by {counter.kind}")
    folder_rows(nb, counter, [images[index] for index in some], truth, names)
    if not arguments.no_runner:
        seconds, code = runner_seconds(val)
        print(f"--images, 40 pictures, start included: {seconds:.1f} s, exit {code}")


if __name__ == "__main__":
    main()
