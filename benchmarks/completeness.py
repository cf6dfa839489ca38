#!/usr/bin/env python3
"""Measure best_model.pth on BCCD's validation images: with and without box voting, and against complete labels.

    python benchmarks/completeness.py --dataset BCCD_Dataset [--labels val.json]

--labels: a JSON file of boxes that leave no cell out, {"images": {image id: [[class name, x0, y0, x1, y1], ...]}}, in
pixels of the image. With it the script prints the mAP of the same detections against those boxes; what BCCD's labels
leave within reach (the detections on cells that only the complete labels have taken out, and the complete boxes of the
cells that BCCD boxed, scored as if a detector had found them); how many of the detections that BCCD has no box for lie
on a cell there; and the errors of the counts. The test split is not touched.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, quiet_definitions

SAME_CELL = 0.3  # IoU from which a box of either labelling is the same cell


def read_complete(path, class_names):
    """{image id: (boxes (n, 4), labels (n,))} of a file of complete labels."""
    answer = {}
    for image_id, rows in json.loads(Path(path).read_text())["images"].items():
        boxes = torch.tensor([row[1:] for row in rows], dtype=torch.float32).reshape(-1, 4)
        answer[image_id] = boxes, torch.tensor([class_names.index(row[0]) + 1 for row in rows], dtype=torch.int64)
    return answer


def best_overlap(nb, boxes, labels, others, other_labels):
    """(n,) the largest IoU of each box (n, 4) with one of `others` (m, 4) of its own class; 0 where there is none."""
    overlap = nb.ops.box_iou(boxes, others) * (labels[:, None] == other_labels)  # (n, m)
    return torch.cat([overlap, torch.zeros(len(boxes), 1)], 1).amax(1)


def figures(nb, found, truth, classes):
    """One line: mAP@0.5, mAP@[.5:.95], AP@0.5 of each class; truth: pairs of boxes and labels."""
    matches = [nb.match_detections(f, *pair, classes) for f, pair in zip(found, truth, strict=True)]
    at_half, average, by_class = nb.mean_average_precision(matches, classes)
    return f"mAP@0.5 {at_half:.4f}  mAP@[.5:.95] {average:.4f}  " + " ".join(f"{value:.3f}" for value in by_class)


def background_errors(nb, found, official, complete, thresholds):
    """Detections above their class's threshold, IoU below 0.1 to any official box: how many; how many on a cell."""
    errors = cells = 0
    for detections, (boxes, _), (all_boxes, all_labels) in zip(found, official, complete, strict=True):
        limits = torch.tensor(thresholds)[detections["labels"] - 1]
        sure = detections["scores"] >= limits
        own, labels = detections["boxes"][sure], detections["labels"][sure]
        free = ~(nb.ops.box_iou(own, boxes) >= 0.1).any(1)
        on_cell = best_overlap(nb, own, labels, all_boxes, all_labels) >= 0.5
        errors, cells = errors + int(free.sum()), cells + int((free & on_cell).sum())
    return errors, cells


def without_unboxed_cells(nb, found, official, complete):
    """The detections without those on a cell that only the complete labels have; what fits an official box stays."""
    answer = []
    for detections, given, (all_boxes, all_labels) in zip(found, official, complete, strict=True):
        unboxed = best_overlap(nb, all_boxes, all_labels, *given) < SAME_CELL
        own, labels = detections["boxes"], detections["labels"]
        on_unboxed = best_overlap(nb, own, labels, all_boxes[unboxed], all_labels[unboxed]) >= 0.5
        keep = ~on_unboxed | (best_overlap(nb, own, labels, *given) >= 0.5)
        answer.append({key: value[keep] for key, value in detections.items()})
    return answer


def second_opinion(nb, official, complete):
    """The complete boxes of the cells that BCCD boxed, as detections of score 1: what a second labelling reaches."""
    answer = []
    for given, (boxes, labels) in zip(official, complete, strict=True):
        known = best_overlap(nb, boxes, labels, *given) >= SAME_CELL
        answer.append({"boxes": boxes[known], "labels": labels[known], "scores": torch.ones(int(known.sum()))})
    return answer


def count_error(found, truth, label, threshold):
    """Mean absolute and mean signed error of the count of one class at a score threshold."""
    counts = [int(((f["labels"] == label) & (f["scores"] >= threshold)).sum()) for f in found]
    errors = np.array(counts) - [int((labels == label).sum()) for _, labels in truth]
    return np.abs(errors).mean(), errors.mean()


def main():
    """Detect once for each setting and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--labels", help="complete labels of validation images")
    arguments = parser.parse_args()
    nb = quiet_definitions()
    model, names = nb.load_detector(ROOT / "checkpoints" / "best_model.pth")
    val = nb.SmearSplit(nb.dataset_root(arguments.dataset), "val")
    official = list(zip(val.boxes, val.labels, strict=True))
    images, classes = [val.image(index) for index in range(len(val))], len(names)
    print(f"{len(val)} validation images; AP@0.5 of {', '.join(names)} at the end of each line")
    print("no voting:         ", figures(nb, nb.detect(model, images, vote_overlap=1.0), official, classes))
    found = nb.detect(model, images)
    print("as on the page:    ", figures(nb, found, official, classes))
    if not arguments.labels:
        return
    complete = read_complete(arguments.labels, names)
    some = [index for index, image_id in enumerate(val.ids) if image_id in complete]
    found, official = [found[index] for index in some], [official[index] for index in some]
    truth = [complete[val.ids[index]] for index in some]
    print(f"{len(some)} of them have complete labels")
    print("official labels:   ", figures(nb, found, official, classes))
    print("complete labels:   ", figures(nb, found, truth, classes))
    forgiven = without_unboxed_cells(nb, found, official, truth)
    print("official, unboxed cells forgiven:", figures(nb, forgiven, official, classes))
    second = second_opinion(nb, official, truth)
    print("official, boxed cells as the complete labels draw them:", figures(nb, second, official, classes))
    counted = json.loads((ROOT / "checkpoints" / "metrics.json").read_text())["validation"]["count_threshold"]
    thresholds = [counted[name] for name in names]
    errors, cells = background_errors(nb, found, official, truth, thresholds)
    print(f"above the counting thresholds {errors} detections lie where BCCD has no box; {cells} of them are on a cell")
    for label, name in enumerate(names, 1):
        for threshold in (thresholds[label - 1], 0.1):
            off = [count_error(found, labels, label, threshold) for labels in (official, truth)]
            print(
                f"count of {name} at score {threshold:.3g}: off by {off[0][0]:.2f} an image against the official "
                f"labels, {off[1][0]:.2f} against the complete ones (mean {off[1][1]:+.2f})"
            )


if __name__ == "__main__":
    main()
