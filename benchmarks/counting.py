#!/usr/bin/env python3
"""Measure how best_model.pth counts cells, on BCCD's validation images and their complete labels.

    python benchmarks/counting.py --dataset BCCD_Dataset [--checkpoint FILE] [--models FILE ...]

Prints the official mAP; for each class the F1 at IoU 0.5 and the error of the count, by the usual
threshold (fitted to official labels) and as own images are counted (fitted to complete labels, each
image by what others taught), and the share of true counts inside the 95% intervals; what the labels
leave within reach; the same for what count_cells.py counts with the exported files (their
calibration was fitted to these images); and its counts of the same pictures resized, turned and
extended. The test split is not touched.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, quiet_definitions
from PIL import Image

sys.path.insert(0, str(ROOT))
import count_cells  # noqa: E402

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


def counted_alone(counter, images):
    """Images as `count_cells.py --own-scale` counts them: [CountedPicture]."""
    return [counter.count(image) for image in images]


def as_detections(counted, names):
    """A CountedPicture's cells as the notebook's detections, boxes, labels, scores."""
    labels = [names.index(name) + 1 for name in counted.classes]
    return {
        "boxes": torch.from_numpy(counted.boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.from_numpy(counted.scores),
    }


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


def before_the_seam(answers, images, name):
    """Counted cells of a class that end inside the original images: at the seam, where mirrored
    halves join, there are others than in the image alone.
    """
    total = 0
    for counted, image in zip(answers, images, strict=True):
        height, width = image.shape[:2]
        inside = (counted.boxes[:, 2] < width - 4) & (counted.boxes[:, 3] < height - 4)
        is_class = np.array(counted.classes) == name
        total += int((inside & is_class).sum())
    return total


def folder_rows(nb, counter, images, truth, names):
    """Print how the counts of the same smears change with their size."""
    label = counter.settings["usual"]["label"]
    name = names[label - 1]
    first = None
    print(f"| {name}, {len(images)} smears | cells counted | change | F1 | remarks |")
    print("|---|---|---|---|---|")
    for factor in (1.0, 0.5, 0.71, 1.41, 2.0, "turned upright"):
        if factor == "turned upright":
            title = factor
            pictures, cells = turned(images, truth)
        else:
            title = f"resized by {factor}"
            pictures, cells = resized(images, truth, factor)
        answers = counted_alone(counter, pictures)
        total = sum(counted.counts[name].number for counted in answers)
        if first is None:
            first = total
        found = [as_detections(counted, names) for counted in answers]
        rows = matched(nb, found, cells, len(names))
        figures = nb.count_figures(rows, label, [len(row[label - 1][0]) for row in rows])
        remarks = sum(bool(counted.remark) for counted in answers)
        change = total / max(first, 1) - 1
        print(
            f"| {title} | {total} | {change:+.1%} | {figures['f1']:.3f} | {remarks} |", flush=True
        )
    few = images[:12]
    alone = before_the_seam(counted_alone(counter, few), few, name)
    wider = before_the_seam(counted_alone(counter, extended(few)), few, name)
    print(f"{len(few)} smears extended by half: {wider} cells away from the seam, {alone} without")


def tool_rows(nb, way, answers, truth, names):
    """Print F1, count errors and intervals of what count_cells.py counted, class by class."""
    found = [as_detections(counted, names) for counted in answers]
    rows = matched(nb, found, truth, len(names))
    for label, name in enumerate(names, 1):
        counts = [counted.counts[name] for counted in answers]
        objects = [row[label - 1][2] for row in rows]
        inside = []
        for count, cells in zip(counts, objects, strict=True):
            if count.least is not None:
                inside.append(count.least <= cells <= count.most)
        held = f"{np.mean(inside):.1%}" if inside else ""
        f = nb.count_figures(rows, label, [count.number for count in counts])
        error = f"{f['count_mae']:.2f} | {f['count_bias']:+.2f} | {f['f1']:.3f}"
        print(f"| {name} | {np.mean(objects):.1f} | {way} | {error} | {held} |", flush=True)


def whole_pictures(counter, images):
    """Images counted with each as one field, which is how section 13 measured."""
    return [counter.count(image, [image.shape[1], image.shape[0]]) for image in images]


def main():
    """Detect once, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--labels", default=ROOT / "data" / "complete_labels.json")
    parser.add_argument("--checkpoint", default=ROOT / "checkpoints" / "best_model.pth")
    parser.add_argument(
        "--models",
        nargs="*",
        type=Path,
        default=[ROOT / "checkpoints" / name for name in count_cells.MODEL_NAMES],
        help="files of count_cells.py; those that are not there are left out",
    )
    arguments = parser.parse_args()
    nb = quiet_definitions()
    nb.CHECKPOINT_DIR = str(Path(arguments.checkpoint).parent)
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
    counts = nb.cross_validated_counts(rows, classes)
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
    some_images = [images[index] for index in some]
    counters = []
    for path in arguments.models:
        if path.is_file():
            counters.append(count_cells.CellCounter(path, threads=torch.get_num_threads()))
    for counter in counters:
        kind = counter.settings["precision"]
        tool_rows(nb, f"{kind} file", whole_pictures(counter, some_images), truth, names)
        answers = counted_alone(counter, some_images)
        tool_rows(nb, f"{kind} file, own scale", answers, truth, names)
    if counters:
        print(f"\nown images by {counters[0].detector.path.name}")
        folder_rows(nb, counters[0], some_images, truth, names)


if __name__ == "__main__":
    main()
