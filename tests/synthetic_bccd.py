"""Draw labelled blood smears that look like BCCD's, in BCCD's own folder layout: data for the tests.

The boxes are exact (the extent of what was drawn, clipped by the border), the same seed gives the same bytes, and
nothing is downloaded. Drawn smears exercise the code; what a detector reaches on them says nothing about blood.

How a smear is drawn: every cell adds stain (optical density per colour channel) to an empty field, and the picture is
the light that comes through, `background * exp(-density)`. Overlapping cells therefore darken each other as in a
real smear. Cells lie across the border as well; one that would show less than a part of itself is not drawn,
so that everything that is seen has a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

CLASS_NAMES = ("RBC", "WBC", "Platelets")
RBC, WBC, PLATELET = 1, 2, 3  # labels; 0 is the background

SIZE = (640, 480)  # width, height of a BCCD image
JPEG_QUALITY = 92

# light that passes the empty field, and the stain of each substance: -ln(colour / background)
BACKGROUND = np.array([203.0, 207.0, 204.0])
HAEMOGLOBIN = np.array([0.14, 0.32, 0.32])
CYTOPLASM = np.array([0.10, 0.27, 0.03])
GRANULE = np.array([0.13, 0.32, 0.06])
CHROMATIN = np.array([0.92, 1.22, 0.08])
PLATELET_STAIN = np.array([0.50, 0.68, 0.03])


# --------------------------------------------------------------------------------------------------------------
# shapes


class _Blob:
    """A closed outline around a centre: an ellipse of the given half axes with a few waves on its rim."""

    def __init__(self, rng, cx, cy, half_width, half_height, waviness=0.03, waves=(2, 3, 4)):
        self.cx, self.cy = float(cx), float(cy)
        self.a, self.b = float(half_width), float(half_height)
        self.angle = rng.uniform(0, math.pi)
        self.waves = [
            (k, waviness * rng.normal() * 2 / k, rng.uniform(0, 2 * math.pi)) for k in waves
        ]
        self.radius = math.sqrt(self.a * self.b)
        self.reach = (
            max(self.a, self.b) * (1 + sum(abs(amplitude) for _, amplitude, _ in self.waves)) + 8
        )

    def depth(self, xs, ys):
        """Pixels inside the rim, about (negative outside), and the relative radius (1 on the rim), at (ys, xs)."""
        dx, dy = xs[None, :] - self.cx, ys[:, None] - self.cy
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u, v = (dx * cos + dy * sin) / self.a, (dy * cos - dx * sin) / self.b
        rho, theta = np.hypot(u, v), np.arctan2(v, u)
        rim = np.ones_like(rho)
        for k, amplitude, phase in self.waves:
            rim += amplitude * np.cos(k * theta + phase)
        return (rim - rho) * self.radius, rho / rim

    def window(self, width, height):
        """The pixel columns and rows that the blob can touch, as slices clipped by the field."""
        x0, x1 = (min(max(int(self.cx + sign * self.reach), 0), width) for sign in (-1, 1))
        y0, y1 = (min(max(int(self.cy + sign * self.reach), 0), height) for sign in (-1, 1))
        return slice(x0, x1), slice(y0, y1)


def _soft(depth, blur):
    """Coverage in 0..1 of a rim that is `blur` pixels wide; 0.5 exactly where the depth is zero."""
    return 0.5 * (1 + np.tanh(depth / blur))


def _smooth_noise(rng, height, width, grain):
    """Random texture (height, width) with spots of about `grain` pixels, mean 0 and deviation of about 1."""
    rows, columns = max(2, math.ceil(height / grain) + 1), max(2, math.ceil(width / grain) + 1)
    coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


# --------------------------------------------------------------------------------------------------------------
# cells: each returns the stain over its window, (rows, columns, 3), for the depth of its outline


def _stain_rbc(rng, blob, depth, rho, blur):
    body = _soft(depth, blur)
    pallor = rng.uniform(0.35, 0.9) if rng.random() < 0.72 else rng.uniform(0.0, 0.25)
    centre, edge = rng.uniform(0.38, 0.62), rng.uniform(0.08, 0.16)
    pale = pallor * 0.5 * (1 - np.tanh((rho - centre) / edge))
    rim = 0.35 * np.exp(-(((depth - 3) / 3) ** 2))
    strength = rng.uniform(0.75, 1.15)
    stain = strength * (body * (1 - pale) + rim * body)[..., None] * HAEMOGLOBIN
    if rng.random() < 0.2:  # a refractile bubble: a bright dot with a dark ring
        distance = np.hypot(
            *np.meshgrid(*(np.arange(n) - n / 2 - rng.uniform(-18, 18) for n in rho.shape[::-1]))
        )
        size = rng.uniform(3, 7)
        ring = np.exp(-(((distance - size) / 1.6) ** 2)) - 0.7 * np.exp(
            -((distance / (0.6 * size)) ** 2)
        )
        stain += (0.35 * ring * body)[..., None] * np.array([0.7, 1.1, 0.8])
    return stain


def _stain_wbc(rng, blob, depth, rho, blur, xs, ys):
    body = _soft(depth, blur)
    granular = rng.random() < 0.25
    texture = _smooth_noise(rng, *depth.shape, grain=4 if granular else 7)
    substance = (GRANULE if granular else CYTOPLASM) * rng.uniform(0.8, 1.3)
    stain = (body * np.clip(1 + (0.35 if granular else 0.18) * texture, 0.1, None))[
        ..., None
    ] * substance
    r = blob.radius
    if rng.random() < 0.25:  # one large round nucleus
        shift = rng.uniform(-0.1, 0.1, 2) * r
        lobes = [
            _Blob(
                rng, blob.cx + shift[0], blob.cy + shift[1], *(r * rng.uniform(0.68, 0.82, 2)), 0.04
            )
        ]
    else:  # lobes along an arc
        count = int(rng.integers(2, 6))
        start, turn = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.15) * rng.choice([-1, 1])
        size = {2: 0.38, 3: 0.34, 4: 0.30, 5: 0.27}[count]
        lobes = []
        for i in range(count):
            angle, away = start + i * turn, r * rng.uniform(0.36, 0.5)
            lobes.append(
                _Blob(
                    rng,
                    blob.cx + away * math.cos(angle),
                    blob.cy + away * math.sin(angle),
                    *(r * size * rng.uniform(0.85, 1.2, 2)),
                    0.07,
                )
            )
    nucleus = np.zeros_like(depth)
    for lobe in lobes:
        nucleus = np.maximum(nucleus, _soft(lobe.depth(xs, ys)[0], 2.5))
    nucleus *= body * _soft(depth - 3, 3)
    clumps = np.clip(1 + 0.12 * _smooth_noise(rng, *depth.shape, grain=9), 0.6, 1.4)
    strength = rng.uniform(0.75, 1.1)
    return (
        stain * (1 - 0.6 * nucleus[..., None])
        + strength * (nucleus * clumps)[..., None] * CHROMATIN
    )


def _stain_platelet(rng, blob, depth, rho, blur):
    """A small cloud without a sharp rim, purple to blue, that fades out at its outline."""
    texture = np.clip(1 + 0.12 * _smooth_noise(rng, *depth.shape, grain=6), 0.5, 1.5)
    cloud = 0.5 * (1 + np.tanh((rng.uniform(0.62, 0.72) - rho) / rng.uniform(0.2, 0.3)))
    colour = PLATELET_STAIN * np.array([1.0, rng.uniform(0.7, 1.05), rng.uniform(0.2, 1.5)])
    cloud *= _soft(depth + 1, 1.5)  # nothing beyond the outline
    return rng.uniform(0.75, 1.3) * (cloud * texture)[..., None] * colour


# --------------------------------------------------------------------------------------------------------------
# where cells lie


def _visible_share(cx, cy, r, width, height):
    """Share of a disc's bounding box that lies inside the field."""
    w = min(cx + r, width) - max(cx - r, 0)
    h = min(cy + r, height) - max(cy - r, 0)
    return max(w, 0) * max(h, 0) / (4 * r * r)


def _place(rng, label, r, placed, width, height, tries=60):
    """A free centre for a cell of radius r, or None. `placed` holds (label, cx, cy, r) of the cells so far."""
    least = {RBC: 0.4, WBC: 0.6, PLATELET: 0.9}[label]
    red = [cell for cell in placed if cell[0] == RBC]
    for _ in range(tries):
        if label == RBC and red and rng.random() < 0.35:  # touching or overlapping a neighbour
            _, nx, ny, nr = red[int(rng.integers(len(red)))]
            angle, gap = rng.uniform(0, 2 * math.pi), (r + nr) * rng.uniform(0.72, 1.0)
            cx, cy = nx + gap * math.cos(angle), ny + gap * math.sin(angle)
        else:
            cx, cy = rng.uniform(-0.2 * r, width + 0.2 * r), rng.uniform(-0.2 * r, height + 0.2 * r)
        if _visible_share(cx, cy, r, width, height) < least:
            continue
        for other, ox, oy, other_r in placed:
            closest = (
                0.7 if label == other == RBC else 0.88 if {label, other} == {RBC, WBC} else 1.0
            )
            if math.hypot(cx - ox, cy - oy) < closest * (r + other_r):
                break
        else:
            return cx, cy
    return None


def _draw_counts(rng, area):
    """How many cells of each label a field of `area` BCCD images gets: BCCD's own frequencies."""
    return {
        WBC: max(1, int(rng.poisson(0.06 * area) + round(area))),
        RBC: int(rng.poisson(11.5 * area)) + 1,
        PLATELET: int(rng.poisson(1.3 * area)),
    }


def draw_smear(
    rng: np.random.Generator,
    size: tuple[int, int] = SIZE,
    counts: Mapping[int, int] | None = None,
    texture: bool = True,
    return_masks: bool = False,
):
    """Draw one smear.

    rng: a numpy Generator, the only source of chance.
    size: (width, height) in pixels; a wide field can be cut into windows that overlap.
    counts: cells per label (1 RBC, 2 WBC, 3 platelet); BCCD's frequencies if None. Where no room is left, fewer are
        drawn: the labels that come back are the truth.
    texture: False leaves out uneven light and sensor noise.
    return_masks: also return the cells' masks.

    Returns image (height, width, 3) uint8 RGB, boxes (n, 4) float32 xyxy (edges in pixels, 0..width, so that
    xmax - xmin is the width of what is seen), labels (n,) int64, and with `return_masks` masks (n, height, width) bool.
    Raises ValueError for a size under 64 pixels or an unknown label.
    """
    width, height = int(size[0]), int(size[1])
    if min(width, height) < 64:
        raise ValueError(f"a smear of {width}x{height} pixels is too small: at least 64 a side")
    if counts is None:
        counts = _draw_counts(rng, width * height / (SIZE[0] * SIZE[1]))
    unknown = set(counts) - {RBC, WBC, PLATELET}
    if unknown:
        raise ValueError(f"unknown labels {sorted(unknown)}: 1 is RBC, 2 WBC, 3 platelet")

    blur = rng.uniform(1.2, 2.2)
    scale = rng.uniform(0.93, 1.07)
    density = np.zeros((height, width, 3))
    placed, boxes, labels, masks = [], [], [], []
    for label in (WBC, RBC, PLATELET):
        for _ in range(int(counts.get(label, 0))):
            if label == RBC:
                r, aspect, waviness = scale * rng.normal(51.5, 4.0), rng.uniform(0.8, 1.0), 0.025
            elif label == WBC:
                r, aspect, waviness = scale * rng.uniform(70, 115), rng.uniform(0.87, 1.0), 0.02
            else:
                r, aspect, waviness = (
                    scale * float(np.clip(rng.normal(20.0, 3.0), 14, 30)),
                    rng.uniform(0.8, 1.0),
                    0.05,
                )
            centre = _place(rng, label, r, placed, width, height)
            if centre is None:
                continue
            blob = _Blob(rng, *centre, r / math.sqrt(aspect), r * math.sqrt(aspect), waviness)
            columns, rows = blob.window(width, height)
            xs, ys = (
                np.arange(columns.start, columns.stop) + 0.5,
                np.arange(rows.start, rows.stop) + 0.5,
            )
            depth, rho = blob.depth(xs, ys)
            inside = depth > 0
            if label == RBC:
                stain = _stain_rbc(rng, blob, depth, rho, blur)
            elif label == WBC:
                stain = _stain_wbc(rng, blob, depth, rho, blur, xs, ys)
            else:
                stain = _stain_platelet(rng, blob, depth, rho, blur)
            placed.append((label, *centre, r))
            density[rows, columns] += stain
            seen_x, seen_y = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
            x0, y0 = columns.start, rows.start
            boxes.append((x0 + seen_x[0], y0 + seen_y[0], x0 + seen_x[-1] + 1, y0 + seen_y[-1] + 1))
            labels.append(label)
            if return_masks:
                mask = np.zeros((height, width), dtype=bool)
                mask[rows, columns] = inside
                masks.append(mask)

    # thick stain saturates a little, as overlapping red cells do
    density = 1.6 * (1 - np.exp(-density / 1.6)) * 1.08
    light = BACKGROUND + (rng.normal(0, [2.0, 2.0, 3.0]) if texture else 0)
    if texture:
        light = light * (1 + 0.025 * _smooth_noise(rng, height, width, grain=320))[..., None]
    image = light * np.exp(-density)
    if texture:
        image += 1.5 * _smooth_noise(rng, height, width, grain=6)[..., None]
        image += rng.normal(0, 2.0, image.shape)
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)

    order = rng.permutation(len(labels))
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)[order]
    labels = np.array(labels, dtype=np.int64)[order]
    if return_masks:
        stacked = np.stack(masks)[order] if masks else np.zeros((0, height, width), dtype=bool)
        return image, boxes, labels, stacked
    return image, boxes, labels


# --------------------------------------------------------------------------------------------------------------
# files


def voc_xml(
    filename: str, size: tuple[int, int], boxes, labels, class_names: Sequence[str] = CLASS_NAMES
) -> str:
    """The Pascal VOC annotation of one image, as text.

    boxes (n, 4) xyxy and labels (n,) from 1 on, named by `class_names[label - 1]`; `size` is (width, height).
    """
    lines = [
        "<annotation>",
        "\t<folder>JPEGImages</folder>",
        f"\t<filename>{escape(filename)}</filename>",
        "\t<source>\n\t\t<database>Drawn</database>\n\t</source>",
        f"\t<size>\n\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t\t<depth>3</depth>\n\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for box, label in zip(boxes, labels, strict=True):
        name = escape(class_names[int(label) - 1])
        lines.append(f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>")
        lines.append("\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            lines.append(f"\t\t\t<{key}>{float(value):g}</{key}>")
        lines.append("\t\t</bndbox>\n\t</object>")
    return "\n".join(lines) + "\n</annotation>\n"


def write_example(
    bccd: Path, name: str, image, boxes, labels, class_names: Sequence[str] = CLASS_NAMES
) -> None:
    """Write one image and its annotation into the `BCCD` folder `bccd` (JPEGImages and Annotations are made)."""
    bccd = Path(bccd)
    for folder in ("JPEGImages", "Annotations"):
        (bccd / folder).mkdir(parents=True, exist_ok=True)
    height, width = image.shape[:2]
    Image.fromarray(image).save(
        bccd / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=2
    )
    xml = voc_xml(f"{name}.jpg", (width, height), boxes, labels, class_names)
    (bccd / "Annotations" / f"{name}.xml").write_bytes(xml.encode("utf-8"))


def write_splits(bccd: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Write ImageSets/Main/{train,val,test,trainval}.txt of the `BCCD` folder: one image id a line."""
    folder = Path(bccd) / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: list(splits.get(split, ())) for split in ("train", "val", "test")}
    names["trainval"] = sorted(names["train"] + names["val"])
    for split, ids in names.items():
        (folder / f"{split}.txt").write_bytes("".join(f"{name}\n" for name in ids).encode("utf-8"))


def draw_dataset(
    root: str | Path,
    train: int = 48,
    val: int = 16,
    test: int = 16,
    seed: int = 0,
    class_names: Sequence[str] = CLASS_NAMES,
) -> Path:
    """Draw a dataset in BCCD's layout under `root` and return `root` as a Path.

    root/BCCD/{Annotations,JPEGImages}/Smear_NNNNN.{xml,jpg} and root/BCCD/ImageSets/Main/{train,val,test,trainval}.txt.
    The same arguments give the same bytes (with the same numpy and pillow), and a smear does not depend on how many
    others are drawn.

    train, val, test: numbers of images. class_names: names for red cells, white cells and platelets, in this order.
    Raises ValueError for a negative number or not three different names, FileExistsError where `root` exists.
    """
    root = Path(root)
    if len(class_names) != 3 or len(set(class_names)) != 3:
        raise ValueError(f"three different class names are needed, not {list(class_names)}")
    numbers = {"train": train, "val": val, "test": test}
    for split, number in numbers.items():
        if number < 0:
            raise ValueError(f"{split}: {number} images cannot be drawn")
    root.mkdir(parents=True)
    bccd, splits, serial = root / "BCCD", {}, 0
    for folder in ("JPEGImages", "Annotations"):
        (bccd / folder).mkdir(parents=True)
    for index, (split, number) in enumerate(numbers.items()):
        splits[split] = []
        for i in range(number):
            image, boxes, labels = draw_smear(np.random.default_rng([seed, index, i]))
            name = f"Smear_{serial:05d}"
            write_example(bccd, name, image, boxes, labels, class_names)
            splits[split].append(name)
            serial += 1
    write_splits(bccd, splits)
    return root
