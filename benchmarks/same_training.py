#!/usr/bin/env python3
"""Show that two editions of the notebook train the same detector, and accept the newer recipe.

    python benchmarks/same_training.py --dataset BCCD_Dataset [--old a21a4e8] [--steps 30] [--accept]
    python benchmarks/same_training.py --dataset BCCD_Dataset --speed

Old and new code start from the same VGG-16 weights and the same seed and train side by side, each
by its own `train_epoch`, on the same images in the same order, in float32. Printed after each few
steps: how far the weights, their running average and the validation loss differ.

Of background priors whose loss is exactly the same (they are common: a border of one colour gives
the same outputs at many positions) mining may take any, and another way of sorting takes others. So
the new code trains twice: as it is, and with the old edition's `mine_negatives`. Without the ties
the weights must be equal bit for bit; with them, the differences are what such a choice alone brings.

--speed times in turn steps of both, and detections of both with the committed detector, in float32
and bfloat16, and stops there.

--accept adds the new recipe to checkpoints/accepted_recipes.json, by the fingerprint of
checkpoints/best_model.pth, if the weights without the ties are equal bit for bit.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import torch
from compare import ROOT, load_definitions

NOTEBOOK = ROOT / "ssd_bccd_detection.ipynb"


def edition_of(commit, folder):
    """The notebook of a commit as a file in a folder."""
    path = Path(folder) / f"{commit}.ipynb"
    name = f"{commit}:{NOTEBOOK.name}"
    text = subprocess.run(["git", "show", name], cwd=ROOT, capture_output=True, check=True).stdout
    path.write_bytes(text)
    return path


class Side:
    """One edition of the notebook with a run under way."""

    def __init__(self, notebook, name, dataset, images_an_epoch):
        self.nb = load_definitions(notebook, name)
        self.nb.VERSIONS = {}
        self.nb.DEVICE = torch.device("cpu")
        self.build(dataset)
        self.run.passes = images_an_epoch / len(self.train_data)

    def build(self, dataset):
        """Read the data and start a run, by the names of the edition."""
        nb = self.nb
        root = nb.dataset_root(dataset)
        weights = nb.vgg16_features(str(ROOT / "data" / "vgg16_features.pth"))
        labels = nb.read_complete_labels(ROOT / nb.COMPLETE_LABELS)
        if hasattr(nb, "EveryCellDataset"):
            splits = {split: nb.SmearSplit(root, split) for split in ["train", "val"]}
            labels, _ = nb.complete_labels_that_fit(labels, splits)
            self.recipe = nb.recipe_digest(vars(nb), list(splits.values()), labels)
            self.train_data = nb.EveryCellDataset(splits["train"], nb.WORKING_SIZE, labels)
            self.val_data = nb.EveryCellDataset(splits["val"], nb.IMAGE_SIZE, labels)
            self.nb.PRECISION = "float32"  # the recipe has that of the page
            self.run = nb.new_run(self.train_data, weights)
            return
        train = nb.SmearSplit(root, "train", complete=labels)  # up to a21a4e8
        val = nb.SmearSplit(root, "val", complete=labels)
        self.recipe = nb.recipe_digest(vars(nb), (train, val))
        self.train_data = nb.SmearDataset(train, nb.WORKING_SIZE)
        self.val_data = nb.SmearDataset(val)
        self.nb.PRECISION = "float32"
        self.run = nb.new_run(train, weights)

    def train_epoch(self):
        """A short epoch; the mean loss terms."""
        terms, _ = self.nb.train_epoch(self.run, self.train_data)
        return terms

    def validate(self, images=8):
        """The validation loss of the averaged weights on some images."""
        if hasattr(self.nb, "EveryCellDataset"):
            model = self.nb.SSD300(self.run.model.num_classes)
            model.load_state_dict(self.nb.averaged_state(self.run))
            return self.nb.validation_loss(model, self.val_data, torch.float32, range(images))
        return self.nb.validate(self.run, [self.val_data.batch(range(images))])

    @functools.cached_property
    def detector(self):
        """The committed detector."""
        return self.nb.load_detector(ROOT / "checkpoints" / "best_model.pth")[0]

    def detect(self, images, dtype):
        """Detections of the committed detector, computed in dtype."""
        if hasattr(self.nb, "EveryCellDataset"):
            return self.nb.detect(self.detector, images, dtype=dtype)
        self.nb.detection_precision = lambda device: dtype
        return self.nb.detect(self.detector, images)

    def weights(self):
        """{name: tensor} of what is trained."""
        named = self.run.model.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    def averaged(self):
        """{name: tensor} of the running average of what is trained."""
        if isinstance(self.run.averaged, list):
            return dict(zip(self.weights(), self.run.averaged, strict=True))
        named = self.run.averaged.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}


def largest_difference(first, second):
    """The largest difference of two dictionaries of tensors, and how many are equal bit for bit."""
    largest = 0.0
    equal = 0
    for name, one in first.items():
        other = second[name]
        equal += int(torch.equal(one, other))
        largest = max(largest, float((one - other).abs().max()))
    return largest, equal


def compare(old, new, name):
    """Print how far two sides are apart; True if all weights are equal bit for bit."""
    gap, equal = largest_difference(old.weights(), new.weights())
    average_gap, equal_averages = largest_difference(old.averaged(), new.averaged())
    number = len(old.weights())
    print(
        f"{old.run.steps:5} | {name:12} | weights differ by {gap:.1e}, averages by {average_gap:.1e} "
        f"| {equal} and {equal_averages} of {number} equal",
        flush=True,
    )
    return equal == equal_averages == number


def seconds_of(function):
    """How long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare_speed(old, new, images, rounds=5, steps=3):
    """Print the median seconds of a training step and of a detection, old and new in turn.

    images: list of (H, W, 3) uint8; each round detects all of them in one call.
    """
    print("what                          | old s | new s | new / old")
    for dtype in [torch.float32, torch.bfloat16]:
        seconds = {"step": ([], []), "detection": ([], [])}
        for _ in range(rounds + 1):
            for place, side in enumerate([old, new]):
                side.run.dtype = dtype
                side.run.passes = steps * side.nb.BATCH_SIZE / len(side.train_data)
                seconds["step"][place].append(seconds_of(side.train_epoch) / steps)
                detect = functools.partial(side.detect, images, dtype)
                seconds["detection"][place].append(seconds_of(detect) / len(images))
        for what, (old_seconds, new_seconds) in seconds.items():
            first = statistics.median(old_seconds[1:])  # without the round that warms up
            second = statistics.median(new_seconds[1:])
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            print(f"{name:29} | {first:5.3f} | {second:5.3f} | {second / first:.3f}", flush=True)


def accept(side):
    """Add a recipe to the accepted ones of the committed detector."""
    path = ROOT / "checkpoints" / "accepted_recipes.json"
    content = side.nb.load_checkpoint(ROOT / "checkpoints" / "best_model.pth", "detector")
    weights = side.nb.fingerprint(content["model"])
    accepted = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    recipes = accepted.setdefault(weights, [])
    if side.recipe not in [content["recipe"], *recipes]:
        recipes.append(side.recipe)
    path.write_text(json.dumps(accepted, indent=1) + "\n", encoding="utf-8")
    print(f"{path.name}: {weights} is the detector of {content['recipe']}, {', '.join(recipes)}")


def main():
    """Train both editions and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--old", default="a21a4e8", help="the commit of the older notebook")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--accept", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    steps_an_epoch = min(10, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        path = edition_of(arguments.old, folder)
        old = Side(path, "old_edition", arguments.dataset, 8 * steps_an_epoch)
        new = Side(NOTEBOOK, "new_edition", arguments.dataset, 8 * steps_an_epoch)
        same = Side(NOTEBOOK, "new_edition_old_ties", arguments.dataset, 8 * steps_an_epoch)
    if arguments.speed:
        images = [new.train_data.split.image(i) for i in range(8)]
        compare_speed(old, new, images)
        return
    same.nb.mine_negatives = old.nb.mine_negatives
    print(f"old: {arguments.old}, recipe {old.recipe}; new: recipe {new.recipe}")
    print("steps | new side     | differences")
    for _ in range(arguments.steps // steps_an_epoch):
        losses = [sum(side.train_epoch()) for side in (old, new, same)]
        alike = compare(old, same, "old ties")
        compare(old, new, "as it is")
        print(
            "      | mean loss of old, new, new with old ties:", *[f"{loss:.6f}" for loss in losses]
        )
    losses = [sum(side.validate()) for side in (old, new, same)]
    print("validation loss:", *[f"{loss:.6f}" for loss in losses])
    print("equal bit for bit but for ties" if alike else "not equal bit for bit")
    if arguments.accept and alike:
        accept(new)


if __name__ == "__main__":
    main()
