#!/usr/bin/env python3
"""Find images that show the same spot of glass, and write them to data/shared_fields.json.

    python benchmarks/find_shared_fields.py --dataset BCCD_Dataset [--output FILE]

Two pictures of one spot differ by a shift. Each pair of images is correlated at each shift, which a
Fourier transform does at once (Lewis, "Fast normalized cross-correlation", 1995), on small copies
in which each pixel was compared with its surroundings, so that lamp and stain do not count.

A pair counts if the correlation r at some shift is too high for chance. Fisher's z = atanh(r) of n
independent pixels varies by 1 / sqrt(n), and n is in proportion to the share of the image that both
have in common at that shift. So z * sqrt(share) must reach EVIDENCE. On BCCD it falls off smoothly up
to 0.357 for pairs that have nothing in common; the clear pairs begin at 0.426.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, quiet_definitions
from PIL import Image
from torch.nn import functional as F

WIDTH, HEIGHT = 64, 48  # of the small copies
EVIDENCE = 0.37
LEAST_SHARE = 0.1  # of an image that two must have in common
GREY_NOISE = 2  # grey levels of 255 that are noise


def thumbnails(datasets):
    """Small grey copies of all images, (n, 48, 64) float, and their ids."""
    copies = []
    names = []
    for dataset in datasets.values():
        for index, image_id in enumerate(dataset.ids):
            grey = Image.fromarray(dataset.image(index)).convert("L")
            small = grey.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
            copies.append(np.asarray(small))
            names.append(image_id)
    return torch.from_numpy(np.stack(copies)).float(), names


def local_mean(images):
    """The mean of the 5x5 pixels around each pixel: (n, h, w) -> (n, h, w)."""
    padded = F.pad(images[:, None], (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(padded, 5, stride=1)[:, 0]


def flattened(pixels):
    """Half-size copies (n, h / 2, w / 2) in which brightness and contrast are alike everywhere."""
    images = F.avg_pool2d(pixels, 2)
    images = images - local_mean(images)
    return images / (local_mean(images**2).sqrt() + GREY_NOISE)


class Spectra:
    """The Fourier transforms of images (n, h, w), of their squares, and of a frame of ones."""

    def __init__(self, images):
        self.height, self.width = images.shape[1:]
        self.shape = (2 * self.height, 2 * self.width)  # room for each shift
        self.ones = torch.fft.rfft2(torch.ones(self.height, self.width), s=self.shape)
        self.image = torch.fft.rfft2(images, s=self.shape)
        self.square = torch.fft.rfft2(images**2, s=self.shape)

    def products(self, first, second):
        """Sums of products of two images at each shift, from their spectra."""
        return torch.fft.irfft2(first * second.conj(), s=self.shape)

    def shift(self, y, x):
        """A place in the table of shifts as (dy, dx): its second halves are negative."""
        if y >= self.height:
            y -= self.shape[0]
        if x >= self.width:
            x -= self.shape[1]
        return y, x


def find_shared_fields(pixels, evidence=EVIDENCE, least=LEAST_SHARE):
    """Pairs that show the same spot: [(i, j, correlation, share, (dy, dx))], best first.

    pixels: small copies (n, h, w); (dy, dx): the shift of i against j in their pixels.
    """
    spectra = Spectra(flattened(pixels))
    size = spectra.height * spectra.width
    share = spectra.products(spectra.ones, spectra.ones).round() / size  # in common
    needed = (evidence / share.sqrt()).tanh()
    needed = needed.masked_fill(share < least, math.inf)
    norm_first = spectra.products(spectra.square, spectra.ones).clamp(min=1).rsqrt()
    norm_second = spectra.products(spectra.ones, spectra.square).clamp(min=1).rsqrt()
    found = []
    for i in range(len(pixels) - 1):
        products = spectra.products(spectra.image[i], spectra.image[i + 1 :])
        correlation = products * norm_first[i] * norm_second[i + 1 :]
        best, place = (correlation / needed).flatten(1).max(1)
        for k in (best >= 1).nonzero()[:, 0].tolist():
            y, x = divmod(int(place[k]), spectra.shape[1])
            dy, dx = spectra.shift(y, x)
            value, common = correlation[k, y, x].item(), share[y, x].item()
            found.append((i, i + 1 + k, value, common, [2 * dy, 2 * dx]))
    return sorted(found, key=lambda row: -row[2])


def main():
    """Search the dataset and write the pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--output", default=ROOT / "data" / "shared_fields.json")
    arguments = parser.parse_args()
    nb = quiet_definitions()
    root = nb.dataset_root(arguments.dataset)
    datasets = {split: nb.SmearSplit(root, split) for split in ["train", "val", "test"]}
    pixels, names = thumbnails(datasets)
    lines = []
    for i, j, correlation, share, shift in find_shared_fields(pixels):
        row = {"images": [names[i], names[j]], "share": round(share, 4), "shift": shift}
        row["correlation"] = round(correlation, 4)
        lines.append(json.dumps(row))
    note = (
        "Images that show one spot of glass: benchmarks/find_shared_fields.py. shift: (dy, dx) of "
    )
    note += f"the first against the second in copies of {WIDTH}x{HEIGHT} pixels."
    text = f'{{"note": {json.dumps(note)},\n"pairs": [\n' + ",\n".join(lines) + "\n]}\n"
    Path(arguments.output).write_text(text, encoding="utf-8")
    print(f"{len(lines)} pairs in {arguments.output}")


if __name__ == "__main__":
    main()
