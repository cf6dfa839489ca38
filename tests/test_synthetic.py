"""synthetic_bccd.py: the same bytes for the same seed, boxes equal to what was drawn, BCCD's layout."""

import hashlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import synthetic_bccd as synthetic
from PIL import Image

TESTS = Path(synthetic.__file__).parent


def digest(root):
    """File name -> digest of every file under root."""
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def extent(mask):
    """xyxy edges of the true pixels of a mask (height, width)."""
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_same_seed_same_bytes(tmp_path):
    one = synthetic.draw_dataset(tmp_path / "one", train=3, val=1, test=1, seed=5)
    two = synthetic.draw_dataset(tmp_path / "two", train=3, val=1, test=1, seed=5)
    other = synthetic.draw_dataset(tmp_path / "other", train=3, val=1, test=1, seed=6)
    assert digest(one) == digest(two)
    assert digest(one) != digest(other)


def test_a_smear_does_not_depend_on_how_many_are_drawn(tmp_path):
    few = synthetic.draw_dataset(tmp_path / "few", train=1, val=0, test=0)
    many = synthetic.draw_dataset(tmp_path / "many", train=2, val=1, test=0)
    name = "BCCD/JPEGImages/Smear_00000.jpg"
    assert (few / name).read_bytes() == (many / name).read_bytes()


def test_a_process_of_its_own_draws_the_same(tmp_path):
    here = synthetic.draw_dataset(tmp_path / "here", train=1, val=1, test=1, seed=3)
    program = (
        "import sys, synthetic_bccd\n"
        "synthetic_bccd.draw_dataset(sys.argv[1], train=1, val=1, test=1, seed=3)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "there")]
    subprocess.run(command, cwd=TESTS, check=True)
    assert digest(here) == digest(tmp_path / "there")


@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_the_extent_of_the_masks(seed):
    image, boxes, labels, masks = synthetic.draw_smear(
        np.random.default_rng(seed), return_masks=True
    )
    assert image.shape == (480, 640, 3) and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and labels.dtype == np.int64
    assert len(boxes) == len(labels) == len(masks) > 0
    assert np.array_equal(boxes, [extent(mask) for mask in masks])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 640 and boxes[:, 3].max() <= 480


@pytest.mark.parametrize("label", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_box_fits_what_is_seen(label, seed):
    """From the picture alone: a lone cell on an even field stands out just where its box says."""
    image, boxes, labels = synthetic.draw_smear(
        np.random.default_rng(seed), counts={label: 1}, texture=False
    )
    assert labels.tolist() == [label]
    darker = (synthetic.BACKGROUND - image).max(axis=2) > 12
    assert np.abs(np.array(extent(darker)) - boxes[0]).max() <= 3


def test_every_stain_lies_in_a_box():
    image, boxes, _ = synthetic.draw_smear(np.random.default_rng(8), texture=False)
    outside = np.ones(image.shape[:2], dtype=bool)
    for x0, y0, x1, y1 in boxes.astype(int):
        outside[max(y0 - 4, 0) : y1 + 4, max(x0 - 4, 0) : x1 + 4] = False
    assert outside.any()
    assert np.abs(image[outside] - synthetic.BACKGROUND).max() <= 2


def test_smears_overlap_and_are_cut_by_the_border_as_real_ones_are():
    cut = overlapping = red = 0
    sizes = {1: [], 2: [], 3: []}
    for seed in range(12):
        _, boxes, labels, masks = synthetic.draw_smear(
            np.random.default_rng(seed), return_masks=True
        )
        at_border = (boxes[:, :2].min(1) == 0) | (boxes[:, 2] == 640) | (boxes[:, 3] == 480)
        cut += int((at_border & (labels == 1)).sum())
        red += int((labels == 1).sum())
        overlapping += int((masks[labels == 1].sum(0) > 1).any())
        for box, label in zip(boxes[~at_border], labels[~at_border], strict=True):
            sizes[int(label)].append(max(box[2] - box[0], box[3] - box[1]))
    assert red / 12 > 8
    assert 0.1 < cut / red < 0.6
    assert overlapping >= 9
    medians = {label: float(np.median(values)) for label, values in sizes.items()}
    assert 95 < medians[1] < 120 and 140 < medians[2] < 240 and 32 < medians[3] < 50


def test_counts_and_size_are_respected():
    image, boxes, labels = synthetic.draw_smear(
        np.random.default_rng(0), size=(1000, 300), counts={1: 4, 3: 2}
    )
    assert image.shape == (300, 1000, 3)
    assert sorted(labels.tolist()) == [1, 1, 1, 1, 3, 3]
    _, boxes, labels, masks = synthetic.draw_smear(
        np.random.default_rng(0), counts={}, return_masks=True
    )
    assert boxes.shape == (0, 4) and labels.shape == (0,) and masks.shape == (0, 480, 640)
    with pytest.raises(ValueError, match="unknown labels"):
        synthetic.draw_smear(np.random.default_rng(0), counts={4: 1})
    with pytest.raises(ValueError, match="too small"):
        synthetic.draw_smear(np.random.default_rng(0), size=(640, 10))


def test_layout_and_annotations(tmp_path):
    root = synthetic.draw_dataset(tmp_path / "drawn", train=4, val=2, test=1, seed=1)
    splits = {
        split: (root / "BCCD" / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        for split in ("train", "val", "test", "trainval")
    }
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 4,
        "val": 2,
        "test": 1,
        "trainval": 6,
    }
    assert set(splits["trainval"]) == set(splits["train"]) | set(splits["val"])
    names = splits["trainval"] + splits["test"]
    assert len(set(names)) == 7
    for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        assert sorted(path.name for path in (root / "BCCD" / folder).iterdir()) == sorted(
            n + suffix for n in names
        )
    # what the XML says is what draw_smear returned, and the JPEG is the picture
    image, boxes, labels = synthetic.draw_smear(np.random.default_rng([1, 0, 0]))
    tree = ElementTree.parse(root / "BCCD" / "Annotations" / f"{splits['train'][0]}.xml")
    keys = ("xmin", "ymin", "xmax", "ymax")
    read = [[float(box.findtext(key)) for key in keys] for box in tree.iter("bndbox")]
    assert np.array_equal(read, boxes)
    assert [o.findtext("name") for o in tree.iter("object")] == [
        synthetic.CLASS_NAMES[i - 1] for i in labels
    ]
    assert (tree.findtext("size/width"), tree.findtext("size/height")) == ("640", "480")
    with Image.open(root / "BCCD" / "JPEGImages" / tree.findtext("filename")) as picture:
        assert picture.size == (640, 480) and picture.mode == "RGB"
        assert np.abs(np.asarray(picture).astype(int) - image).mean() < 5


def test_other_class_names(tmp_path):
    names = ("red & round", "white", "plate")
    root = synthetic.draw_dataset(tmp_path / "named", train=3, val=0, test=0, class_names=names)
    seen = {
        o.findtext("name")
        for path in (root / "BCCD" / "Annotations").iterdir()
        for o in ElementTree.parse(path).iter("object")
    }
    assert seen <= set(names) and "red & round" in seen
    with pytest.raises(ValueError, match="three different class names"):
        synthetic.draw_dataset(tmp_path / "twice", class_names=("a", "a", "b"))


def test_nothing_is_drawn_over_a_folder_that_exists(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        synthetic.draw_dataset(mine, train=1, val=0, test=0)
    assert [path.name for path in mine.iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="-1 images cannot be drawn"):
        synthetic.draw_dataset(tmp_path / "new", train=-1)
    assert not (tmp_path / "new").exists()
