#!/usr/bin/env python3
"""Show that two editions of the notebook train the same detector, and accept the newer recipe.

    python benchmarks/same_training.py --dataset BCCD_Dataset [--old a21a4e8] [--steps 30] [--accept]

Old and new code start from the same VGG-16 weights and the same seed and train side by side, each
by its own `train_epoch`, on the same images in the same order, in float32. Printed after each few
steps: how far the weights, their running average and the validation loss differ. Where all is equal
bit for bit, the rewrite changed nothing. Where only the order of sums or of random draws changed,
the differences must be as small as such a change alone brings: `--noise` shows them, by training the
old code twice, the second time with the images of each batch in reverse order.

--accept adds the new recipe to checkpoints/accepted_recipes.json, by the fingerprint of
checkpoints/best_model.pth, if the weights are equal bit for bit.
"""

import argparse
import json
import os
import subprocess
import tempfile
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


def reverse_batches(side):
    """Let an edition see the images of each batch in reverse order: other sums, the same step."""
    batch = side.train_data.batch
    step = side.nb.step_in_memory

    def reversed_step(run, *tensors):
        return step(run, *[tensor.flip(0) for tensor in tensors])

    side.train_data.batch = batch
    side.nb.step_in_memory = reversed_step


def compare(old, new, epochs):
    """Train both side by side; True if all weights are equal bit for bit at the end."""
    print("steps | loss old, new | validation old, new | weights differ by | averages | equal")
    for _ in range(epochs):
        terms = old.train_epoch(), new.train_epoch()
        losses = old.validate(), new.validate()
        gap, equal = largest_difference(old.weights(), new.weights())
        average_gap, equal_averages = largest_difference(old.averaged(), new.averaged())
        number = len(old.weights())
        sums = [f"{sum(pair):.6f}" for pair in terms + losses]
        print(
            f"{old.run.steps:5} | {sums[0]}, {sums[1]} | {sums[2]}, {sums[3]} | {gap:.2e} | "
            f"{average_gap:.2e} | {equal} and {equal_averages} of {number}",
            flush=True,
        )
    return equal == equal_averages == number


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
    parser.add_argument("--noise", action="store_true", help="the old code against itself")
    parser.add_argument("--accept", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    steps_an_epoch = min(10, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        path = edition_of(arguments.old, folder)
        old = Side(path, "old_edition", arguments.dataset, 8 * steps_an_epoch)
        newer = path if arguments.noise else NOTEBOOK
        new = Side(newer, "new_edition", arguments.dataset, 8 * steps_an_epoch)
    if arguments.noise:
        reverse_batches(new)
    print(f"old: {arguments.old}, recipe {old.recipe}; new: recipe {new.recipe}")
    alike = compare(old, new, arguments.steps // steps_an_epoch)
    print("equal bit for bit" if alike else "not equal bit for bit")
    if arguments.accept and alike and not arguments.noise:
        accept(new)


if __name__ == "__main__":
    main()
