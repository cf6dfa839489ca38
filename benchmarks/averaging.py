#!/usr/bin/env python3
"""What the running average of the weights is worth: a training's last step beside its average.

    python benchmarks/averaging.py --dataset BCCD_Dataset --last checkpoints/last.pth [MORE ...]

Each last.pth holds both: the weights after the last step, and their average. Printed for each, on
BCCD's validation images, in float32: the validation loss and the official mAP of the two.
"""

import argparse
import os
from pathlib import Path

import torch
from compare import ROOT, quiet_definitions


def measure(nb, state, val_data, pictures):
    """(validation loss, mAP@0.5, mAP@[.5:.95]) of a network with these weights."""
    outputs = nb.number_of_outputs(nb.CLASS_NAMES, with_skipped=True)
    model = nb.SSD300(outputs)
    model.load_state_dict(state)
    model = model.to(memory_format=torch.channels_last).eval()
    loss = sum(nb.validation_loss(model, val_data, torch.float32))
    found = nb.detect(model, pictures)
    classes = len(nb.CLASS_NAMES)
    split = val_data.split
    matches = nb.match_all(found, split.boxes, split.labels, classes)
    return loss, *nb.mean_average_precision(matches, classes)[:2]


def main():
    """Measure both sets of weights of each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--last", nargs="+", default=[ROOT / "checkpoints" / "last.pth"])
    arguments = parser.parse_args()
    nb = quiet_definitions()
    root = nb.dataset_root(arguments.dataset)
    val = nb.SmearSplit(root, "val")
    labels = nb.read_complete_labels(ROOT / nb.COMPLETE_LABELS)
    val_data = nb.EveryCellDataset(val, nb.IMAGE_SIZE, labels)
    pictures = [val.image(i) for i in range(len(val))]
    print("epoch | rate at its end | weights   | validation loss | mAP@0.5 | mAP@[.5:.95]")
    for path in arguments.last:
        content = torch.load(Path(path), map_location="cpu", weights_only=True)
        rate = content["history"][-1]["learning_rate"]
        for name, key in [("last step", "model"), ("average", "averaged")]:
            loss, at_half, average = measure(nb, content[key], val_data, pictures)
            print(
                f"{content['epoch']:5} | {rate:15.5f} | {name:9} | {loss:15.3f} | {at_half:7.4f} "
                f"| {average:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
