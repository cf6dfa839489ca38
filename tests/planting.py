"""Faults for the tests of the audit: each function spoils a drawn dataset in one way. `bccd` is its BCCD folder."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic_bccd import draw_smear, write_example

OBJECT = re.compile(r"\t<object>.*?</object>\n", re.DOTALL)


def split_ids(bccd, split):
    """The image ids of a split."""
    return (Path(bccd) / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def _annotation(bccd, name):
    return Path(bccd) / "Annotations" / f"{name}.xml"


def _objects(text, class_name):
    return [found for found in OBJECT.findall(text) if f"<name>{class_name}</name>" in found]


def _add_to_split(bccd, split, name):
    with open(Path(bccd) / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
        file.write(f"{name}\n")


def zero_area_box(bccd, name, class_name="RBC", at=(504, 337)):
    """Add a box without area; returns it as xyxy."""
    box = (*at, *at)
    path = _annotation(bccd, name)
    sides = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    item = f"\t<object><name>{class_name}</name><bndbox>{sides}</bndbox></object>\n"
    path.write_text(path.read_text().replace("</annotation>", item + "</annotation>"))
    return list(map(float, box))


def duplicate_box(bccd, name, class_name="RBC", shift=1):
    """Box one cell a second time, `shift` pixels aside."""
    path = _annotation(bccd, name)
    text = path.read_text()
    item = max(
        _objects(text, class_name), key=lambda o: float(re.search(r"<xmax>([\d.]+)", o)[1]) < 600
    )
    moved = re.sub(r"<(x\w+)>([\d.]+)<", lambda m: f"<{m[1]}>{float(m[2]) + shift:g}<", item)
    path.write_text(text.replace("</annotation>", moved + "</annotation>"))


def without_red_cells(bccd, name, class_name="RBC"):
    """Take every red cell's box away; the cells stay in the picture."""
    path = _annotation(bccd, name)
    text = path.read_text()
    for item in _objects(text, class_name):
        text = text.replace(item, "")
    path.write_text(text)


def near_duplicate(bccd, name, split, new_name="Smear_90000"):
    """Photograph a smear a second time, a little brighter and noisier, into another split; returns the new id."""
    with Image.open(Path(bccd) / "JPEGImages" / f"{name}.jpg") as picture:
        pixels = np.asarray(picture).astype(float)
    pixels = pixels * 1.03 + np.random.default_rng(1).normal(0, 2, pixels.shape)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.save(Path(bccd) / "JPEGImages" / f"{new_name}.jpg", quality=85)
    text = _annotation(bccd, name).read_text().replace(f"{name}.jpg", f"{new_name}.jpg")
    _annotation(bccd, new_name).write_text(text)
    _add_to_split(bccd, split, new_name)
    return new_name


def overlapping_fields(
    bccd, split_a, split_b, shift=(260, 70), seed=77, names=("Smear_91000", "Smear_91001")
):
    """Draw one wide field and cut two windows of 640 x 480 from it, `shift` pixels apart, into two splits."""
    width, height = 640 + abs(shift[0]), 480 + abs(shift[1])
    image, boxes, labels = draw_smear(np.random.default_rng(seed), size=(width, height))
    first = max(0, -shift[0]), max(0, -shift[1])
    corners = first, (first[0] + shift[0], first[1] + shift[1])
    for name, split, (x, y) in zip(names, (split_a, split_b), corners, strict=True):
        moved = boxes - np.array([x, y, x, y])
        inside = np.stack([moved[:, ::2].clip(0, 640), moved[:, 1::2].clip(0, 480)], 2).reshape(
            -1, 4
        )
        share = np.prod(inside[:, 2:] - inside[:, :2], 1) / np.prod(moved[:, 2:] - moved[:, :2], 1)
        keep = share > 0.4
        write_example(Path(bccd), name, image[y : y + 480, x : x + 640], inside[keep], labels[keep])
        _add_to_split(bccd, split, name)
    return names
