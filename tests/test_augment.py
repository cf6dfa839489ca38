"""Augmentation and dataset: the boxes go where the cells go, seen in the pixels themselves."""

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
    x0, y0, x1, y1 = [round(side * size) for side in box]
    image[:, :, y0:y1, x0:x1] = 220
    return image


def augment_with(nb, seed, images, boxes, aspect=4 / 3):
    """`augment` with a generator of its own: pixels, boxes, visible shares."""
    return nb.augment(images, boxes, torch.Generator().manual_seed(seed), aspect)


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_the_pixels(nb, no_colour, seed):
    box = (0.30, 0.40, 0.55, 0.70)
    pixels, moved, visible = augment_with(nb, seed, bright_square(box), [torch.tensor([box])])
    assert pixels.shape == (1, 3, 300, 300)
    assert moved[0].shape == (1, 4) and visible[0].shape == (1,)
    bright = pixels[0, 0] > 130
    if not bright.any():
        assert visible[0].item() < nb.CUT_VISIBLE
        return
    ys, xs = bright.nonzero().T
    seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 300
    assert torch.allclose(moved[0][0], seen, atol=2 / 300)
    whole = (moved[0][0, :2] > 0).all() and (moved[0][0, 2:] < 1).all()
    assert visible[0].item() == pytest.approx(1, abs=1e-4) or not whole


@pytest.mark.parametrize("aspect", [4 / 3, 1.0, 0.75])
def test_every_orientation_occurs_and_cells_keep_their_shape(nb, no_colour, aspect):
    """A mark in one corner ends in each of the four; a cell that is round stays round."""
    box = torch.tensor([[0.3, 0.3, 0.3 + 0.15 / aspect, 0.45]])  # a round cell, seen in the square
    dark = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    ratios = []
    corners = set()
    for seed in range(32):
        _, moved, visible = augment_with(nb, seed, dark, [box], aspect)
        x0, y0, x1, y1 = moved[0][0].tolist()
        if visible[0].item() > 0.6 and min(x0, y0) > 0 and max(x1, y1) < 1:
            ratios.append((x1 - x0) / (y1 - y0))
            corners.add((x0 + x1 > 1, y0 + y1 > 1))
    assert len(ratios) > 10
    assert all(ratio == pytest.approx(1 / aspect, rel=1e-3) for ratio in ratios)
    assert len(corners) == 4


def random_cells(images, cells, seed):
    """Boxes (cells, 4) of one size for each of so many images."""
    g = torch.Generator().manual_seed(seed)
    boxes = []
    for _ in range(images):
        low = torch.rand(cells, 2, generator=g) * 0.85
        boxes.append(torch.cat([low, low + 0.12], -1))
    return boxes


def test_a_cell_that_is_inside_is_wholly_visible(nb, no_colour):
    dark = torch.zeros(64, 3, 40, 40, dtype=torch.uint8)
    _, moved, visible = augment_with(nb, 1, dark, random_cells(64, 12, 0))
    moved, visible = torch.stack(moved), torch.stack(visible)
    assert moved.min() >= 0 and moved.max() <= 1
    inside = ((moved > 1e-4) & (moved < 1 - 1e-4)).all(-1)
    assert torch.allclose(visible[inside], torch.ones(()), atol=1e-3)
    assert (visible < 0.01).any() and ((visible > 0.1) & (visible < 0.9)).any()


def test_the_visible_share_is_that_of_the_area(nb, no_colour):
    dark = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    _, moved, visible = augment_with(nb, 1, dark, random_cells(64, 12, 0))
    matrix = nb.random_affines(64, torch.Generator().manual_seed(1), 4 / 3)[:, :, :2]
    whole = 0.12**2 / torch.linalg.det(matrix).abs()[:, None]
    sides = torch.stack(moved)[..., 2:] - torch.stack(moved)[..., :2]
    assert torch.allclose(torch.stack(visible), sides.prod(-1) / whole, atol=1e-3)


def test_a_cut_cell_becomes_a_skipped_one_then_none(nb):
    """Down to KEEP_VISIBLE a cell keeps its label, to CUT_VISIBLE it is skipped, below -1, then 0."""
    visible = torch.tensor([1.0, 0.61, 0.59, 0.13, 0.11, 0.03, 0.02, 0.0])
    expected = {
        2: [2, 2, 5, 5, -1, -1, 0, 0],
        5: [5, 5, 5, 5, -1, -1, 0, 0],  # a skipped cell stays one
        -1: [-1, -1, -1, -1, -1, -1, 0, 0],
    }
    for label, wanted in expected.items():
        labels = torch.full((8,), label)
        assert nb.relabel_cut_cells(labels, visible, classes=3).tolist() == wanted
        assert (labels == label).all()  # the labels of the dataset stay as they are


def test_same_generator_same_batch(nb):
    images = torch.randint(0, 255, (4, 3, 80, 80), dtype=torch.uint8)
    boxes = [torch.tensor([[0.2, 0.2, 0.5, 0.6]])] * 4
    one = augment_with(nb, 5, images, boxes)
    two = augment_with(nb, 5, images, boxes)
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
    assert one[0].min() >= 0 and one[0].max() <= 255


def area_weights(inputs, outputs):
    """(outputs, inputs): the share of each output pixel that lies on each input pixel."""
    low = np.arange(outputs)[:, None] * inputs / outputs
    high = low + inputs / outputs
    first = np.arange(inputs)
    overlap = np.minimum(high, first + 1) - np.maximum(low, first)
    return overlap.clip(0) * outputs / inputs


def test_resizing_averages_the_area_of_each_pixel(nb):
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    small = nb.resize_to_square(picture, 300)
    assert small.shape == (3, 300, 300) and small.dtype == torch.uint8
    rows, columns = area_weights(480, 300), area_weights(640, 300)
    for channel in range(3):
        expected = rows @ picture[..., channel] @ columns.T
        assert np.abs(expected - small[channel].numpy()).max() <= 1


def test_normalize_subtracts_the_mean_colour_of_imagenet(nb):
    grey = torch.full((1, 3, 300, 300), 128, dtype=torch.uint8)
    mean = torch.tensor([123.68, 116.779, 103.939])
    assert torch.allclose(nb.normalize(grey)[0, :, 0, 0], 128 - mean)


def test_a_batch_holds_boxes_as_shares_of_the_image(nb, drawn_bccd):
    split = nb.SmearSplit(nb.dataset_root(drawn_bccd), "train")
    images, boxes, labels = nb.SmearDataset(split, 300).batch([2, 0, 5])
    assert images.shape == (3, 3, 300, 300) and images.dtype == torch.uint8
    for row, index in enumerate([2, 0, 5]):
        _, true_boxes, true_labels = split[index]
        pixels = boxes[row] * torch.tensor([640, 480, 640, 480])
        assert torch.allclose(pixels, true_boxes, atol=1e-3)
        assert torch.equal(labels[row], true_labels)


def test_a_data_loader_gives_the_same_batches(nb, drawn_bccd):
    dataset = nb.SmearDataset(nb.SmearSplit(nb.dataset_root(drawn_bccd), "val"), 64)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=nb.collate)
    for _ in range(2):  # a second pass works as the first
        batches = list(loader)
        assert len(batches) == 2
        images, boxes, labels = dataset.batch([0, 1, 2])
        assert torch.equal(batches[0][0], images)
        for row in range(3):
            assert torch.equal(batches[0][1][row], boxes[row])
            assert torch.equal(batches[0][2][row], labels[row])


@pytest.fixture
def empty_split(nb, tmp_path):
    """Two pictures without a box, one of 64x48 and one of 48x64 pixels, as a split."""
    for name in ["Annotations", "JPEGImages", "ImageSets/Main"]:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    for name, (width, height) in {"a": (64, 48), "b": (48, 64)}.items():
        nb.Image.new("RGB", (width, height)).save(tmp_path / f"JPEGImages/{name}.jpg")
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (tmp_path / f"Annotations/{name}.xml").write_text(f"<annotation>{size}</annotation>")
    return nb.SmearSplit(tmp_path, "train")


def test_a_batch_of_images_without_objects(nb, empty_split):
    images, boxes, labels = nb.SmearDataset(empty_split, 32).batch([0, 1])
    assert images.shape == (2, 3, 32, 32)
    assert [one.shape for one in boxes] == [(0, 4), (0, 4)]
    assert [len(one) for one in labels] == [0, 0]
    pixels, boxes, visible = augment_with(nb, 0, images, boxes)
    assert [one.shape for one in boxes] == [(0, 4), (0, 4)] and len(visible[0]) == 0


def test_the_aspect_is_that_of_each_image(nb, no_colour, empty_split):
    """A turned cell of a square or portrait smear stays round beside one of a 4:3 smear."""
    aspects = nb.SmearDataset(empty_split, 32).aspects
    assert aspects.tolist() == pytest.approx([4 / 3, 3 / 4])
    boxes = [torch.tensor([[0.4, 0.4, 0.4 + 0.1 / aspect, 0.5]]) for aspect in aspects.tolist()]
    for seed in range(20):
        _, moved, visible = augment_with(nb, seed, torch.zeros(2, 3, 8, 8), boxes, aspects)
        for row in range(2):
            sides = moved[row][0, 2:] - moved[row][0, :2]
            if visible[row].item() > 1 - 1e-4:
                assert float(sides[0] / sides[1] * aspects[row]) == pytest.approx(1, abs=1e-3)
