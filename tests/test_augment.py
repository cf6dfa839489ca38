"""Augmentation: the boxes go where the cells go, seen in the pixels themselves."""

import numpy as np
import pytest
import torch


@pytest.fixture
def no_colour(nb, monkeypatch):
    """Geometry alone."""
    monkeypatch.setattr(nb, "COLOUR_STRENGTH", 0.0)


def bright_square(box, size=400):
    """A dark image (1, 3, size, size) uint8 with one bright rectangle, box (4,) xyxy in [0, 1]."""
    image = torch.full((1, 3, size, size), 40, dtype=torch.uint8)
    x0, y0, x1, y1 = (round(v * size) for v in box)
    image[:, :, y0:y1, x0:x1] = 220
    return image


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_the_pixels(nb, no_colour, seed):
    box = (0.30, 0.40, 0.55, 0.70)
    boxes, labels = torch.tensor([[box]]), torch.tensor([[2]])
    generator = torch.Generator().manual_seed(seed)
    pixels, moved, kept = nb.augment(bright_square(box), boxes, labels, generator, 4 / 3)
    assert pixels.shape == (1, 3, 300, 300) and moved.shape == (1, 1, 4) and kept.shape == (1, 1)
    bright = pixels[0, 0] > 130
    if not bright.any():
        assert kept.item() <= 0
        return
    ys, xs = bright.nonzero().T
    seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 300
    assert torch.allclose(moved[0, 0], seen, atol=2 / 300)
    assert kept.item() in (2, 5, -1)


@pytest.mark.parametrize("aspect", [4 / 3, 1.0, 0.75])
def test_every_orientation_occurs_and_cells_keep_their_shape(nb, no_colour, aspect):
    """A mark in one corner ends in each of the four; a cell that is round stays round."""
    box = (0.3, 0.3, 0.3 + 0.15 / aspect, 0.45)  # a round cell, seen in the square
    dark = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    ratios, corners = [], set()
    for seed in range(32):
        generator = torch.Generator().manual_seed(seed)
        _, moved, kept = nb.augment(
            dark, torch.tensor([[box]]), torch.tensor([[1]]), generator, aspect
        )
        x0, y0, x1, y1 = moved[0, 0].tolist()
        if kept.item() == 1 and min(x0, y0) > 0 and max(x1, y1) < 1:
            ratios.append((x1 - x0) / (y1 - y0))
            corners.add((x0 + x1 > 1, y0 + y1 > 1))
    assert len(ratios) > 10
    assert all(ratio == pytest.approx(1 / aspect, rel=1e-3) for ratio in ratios)
    assert len(corners) == 4


def test_what_a_crop_leaves_of_a_cell_decides_its_label(nb, no_colour):
    """Whole cells keep their label; of cut ones it becomes another; padding stays 0."""
    torch.manual_seed(0)
    low = torch.rand(64, 12, 2) * 0.85
    boxes = torch.cat([low, low + 0.12], -1)
    labels = torch.ones(64, 12, dtype=torch.int64)
    labels[:, -1] = 0
    images = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    _, moved, kept = nb.augment(images, boxes, labels, torch.Generator().manual_seed(1), 4 / 3)
    assert (kept[:, -1] == 0).all()
    assert {-1, 0, 1, 4} == set(kept[:, :-1].flatten().tolist())  # 4: as a skipped cell
    sides = moved[..., 2:] - moved[..., :2]
    assert (sides[kept > 0] > 0).all() and moved.min() >= 0 and moved.max() <= 1
    inside = ((moved > 1e-4) & (moved < 1 - 1e-4)).all(-1) & (labels == 1)
    assert (kept[inside] == 1).all()


def test_same_generator_same_batch(nb):
    images = torch.randint(0, 255, (4, 3, 80, 80), dtype=torch.uint8)
    boxes, labels = (
        torch.tensor([[[0.2, 0.2, 0.5, 0.6]]]).repeat(4, 1, 1),
        torch.ones(4, 1, dtype=torch.int64),
    )
    one, two = (
        nb.augment(images, boxes, labels, torch.Generator().manual_seed(5), 4 / 3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].min() >= 0 and one[0].max() <= 255


def area_weights(inputs, outputs):
    """(outputs, inputs): the share of each output pixel that lies on each input pixel."""
    low = np.arange(outputs)[:, None] * inputs / outputs
    overlap = np.minimum(low + inputs / outputs, np.arange(inputs) + 1) - np.maximum(
        low, np.arange(inputs)
    )
    return overlap.clip(0) * outputs / inputs


def test_squeeze_averages_the_area_of_each_pixel(nb):
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    small = nb.squeeze(picture, 300)
    assert small.shape == (3, 300, 300) and small.dtype == torch.uint8
    rows, columns = area_weights(480, 300), area_weights(640, 300)
    for channel in range(3):
        assert np.abs(rows @ picture[..., channel] @ columns.T - small[channel].numpy()).max() <= 1


def test_normalize_subtracts_the_mean_colour_of_imagenet(nb):
    grey = torch.full((1, 3, 300, 300), 128, dtype=torch.uint8)
    assert torch.allclose(
        nb.normalize(grey)[0, :, 0, 0], 128 - torch.tensor([123.68, 116.779, 103.939])
    )


def test_a_batch_holds_boxes_as_shares_of_the_image(nb, drawn_bccd):
    split = nb.SmearSplit(nb.dataset_root(drawn_bccd), "train")
    images, boxes, labels, complete = nb.SmearDataset(split, 300).batch([2, 0, 5])
    assert complete.tolist() == [False] * 3
    assert images.shape == (3, 3, 300, 300) and images.dtype == torch.uint8
    for row, index in enumerate([2, 0, 5]):
        _, true_boxes, true_labels = split[index]
        n = len(true_labels)
        assert torch.allclose(
            boxes[row, :n] * torch.tensor([640, 480, 640, 480]), true_boxes, atol=1e-3
        )
        assert torch.equal(labels[row, :n], true_labels) and (labels[row, n:] == 0).all()


def test_a_data_loader_gives_the_same_batches(nb, drawn_bccd):
    dataset = nb.SmearDataset(nb.SmearSplit(nb.dataset_root(drawn_bccd), "val"), 64)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=nb.collate)
    for _ in range(2):  # a second pass works as the first
        batches = list(loader)
        assert len(batches) == 2
        for one, two in zip(batches[0], dataset.batch([0, 1, 2]), strict=True):
            assert torch.equal(one, two)


def test_a_batch_of_images_without_objects(nb, empty_split):
    images, boxes, labels, _ = nb.SmearDataset(empty_split, 32).batch([0, 1])
    assert (
        images.shape == (2, 3, 32, 32)
        and boxes.shape == (2, 1, 4)
        and labels.tolist() == [[0], [0]]
    )


@pytest.fixture
def empty_split(nb, tmp_path):
    """Two pictures without a box, one of 48x64 and one of 64x48 pixels, as a split."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    for name, (width, height) in {"a": (64, 48), "b": (48, 64)}.items():
        nb.Image.new("RGB", (width, height)).save(tmp_path / f"JPEGImages/{name}.jpg")
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (tmp_path / f"Annotations/{name}.xml").write_text(f"<annotation>{size}</annotation>")
    return nb.SmearSplit(tmp_path, "train")


def test_the_aspect_is_that_of_each_image(nb, no_colour, empty_split):
    """A turned cell of a square or portrait smear stays round beside one of a 4:3 smear."""
    aspects = nb.SmearDataset(empty_split, 32).aspects
    assert aspects.tolist() == pytest.approx([4 / 3, 3 / 4])
    boxes = torch.stack([torch.tensor([[0.4, 0.4, 0.4 + 0.1 / a, 0.5]]) for a in aspects.tolist()])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, moved, kept = nb.augment(
            torch.zeros(2, 3, 8, 8), boxes, torch.ones(2, 1).long(), generator, aspects
        )
        sides = moved[:, 0, 2:] - moved[:, 0, :2]
        assert torch.allclose(
            (sides[:, 0] / sides[:, 1] * aspects)[kept[:, 0] > 0], torch.ones(()), atol=1e-3
        )


def test_a_cut_cell_becomes_a_skipped_one_then_none(nb, no_colour):
    """Down to KEEP_VISIBLE a cell keeps its label, to CUT_VISIBLE it is skipped, below -1."""
    low = torch.rand(64, 12, 2, generator=torch.Generator().manual_seed(0)) * 0.85
    boxes, images = torch.cat([low, low + 0.12], -1), torch.zeros(64, 3, 8, 8)
    results = {}
    for label in (2, 5, -1):
        generator = torch.Generator().manual_seed(1)
        labels = torch.full((64, 12), label)
        _, moved, results[label] = nb.augment(images, boxes, labels, generator, 4 / 3)
    matrix = nb.random_affines(64, torch.Generator().manual_seed(1), 4 / 3)[:, :, :2]
    area = 0.12**2 / torch.linalg.det(matrix).abs()[:, None]
    visible = (moved[..., 2:] - moved[..., :2]).prod(-1) / area
    expected = torch.where(visible >= nb.CUT_VISIBLE, 5, torch.where(visible > 0.02, -1, 0))
    clear = (visible[..., None] - torch.tensor([0.02, 0.12, 0.6])).abs().amin(-1) > 1e-4
    two = torch.where(visible >= nb.KEEP_VISIBLE, 2, expected)
    assert {2, 5, -1, 0} == set(two.flatten().tolist())
    assert torch.equal(results[2][clear], two[clear])
    assert torch.equal(results[5][clear], expected[clear])  # a skipped cell stays one
    assert torch.equal(results[-1][clear], torch.where(expected == 0, 0, -1)[clear])
