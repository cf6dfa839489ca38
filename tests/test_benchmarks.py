"""The benchmarks compare like with like: the same VGG, the same splits, sets that really are so
many times larger.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.tv_tensors import BoundingBoxes, Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import counting  # noqa: E402
import scaling  # noqa: E402
import train_side_by_side  # noqa: E402
from lab import NAMES, rows_of_squares, save_square_finder  # noqa: E402
from synthetic_bccd import draw_dataset  # noqa: E402

from count_cells import CellCounter  # noqa: E402


def test_torchvisions_side_starts_from_the_same_vgg_and_freezes_conv1_alone(nb):
    torch.manual_seed(0)
    base = nb.vgg16_base()
    weights = {f"features.{key}": value for key, value in base.state_dict().items()}
    model = train_side_by_side.torchvision_model(nb, weights, 4)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.backbone.features(images), base[:23](images))  # conv4_3
        deep = base[:23](images)
        assert torch.equal(model.backbone.extra[0][:7](deep), base[23:](deep))  # conv5_3
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [
        f"backbone.features.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")
    ]


def test_torchvisions_recipe_keeps_boxes_inside_the_image():
    recipe = train_side_by_side.reference_recipe()
    image = torch.from_numpy(
        np.random.default_rng(0).integers(0, 255, (3, 120, 160), dtype=np.uint8)
    )
    boxes, labels = (
        torch.tensor([[10.0, 20.0, 60.0, 70.0], [90.0, 40.0, 150.0, 110.0]]),
        torch.tensor([1, 2]),
    )
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        given = BoundingBoxes(boxes, format="XYXY", canvas_size=(120, 160))
        pixels, target = recipe(Image(image), {"boxes": given, "labels": labels})
        sizes.add(tuple(pixels.shape[1:]))
        assert pixels.dtype == torch.float32 and 0 <= pixels.min() and pixels.max() <= 1
        assert len(target["boxes"]) == len(target["labels"])
        limit = torch.tensor([pixels.shape[2], pixels.shape[1]] * 2)
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= limit).all()
    assert len(sizes) > 5  # zoomed out and cropped


def test_a_trial_of_each_side_is_logged_with_what_it_was(nb, tmp_path, monkeypatch, capsys):
    data = draw_dataset(tmp_path / "BCCD_Dataset", train=2, val=2, test=1, seed=11)
    torch.manual_seed(0)
    weights = {f"features.{key}": value for key, value in nb.vgg16_base().state_dict().items()}
    torch.save(weights, tmp_path / "vgg.pth")
    given = [
        "--dataset",
        str(data),
        "--weights",
        str(tmp_path / "vgg.pth"),
        "--output",
        str(tmp_path / "out"),
    ]
    given += ["--epochs", "1", "--seed", "7", "--clip", "20", "--rates", "0.0001"]
    monkeypatch.setattr(sys, "argv", ["train_side_by_side.py", *given])
    train_side_by_side.main()
    ours, theirs = map(json.loads, (tmp_path / "out" / "trials.jsonl").read_text().splitlines())
    assert (ours["side"], theirs["side"]) == ("ours", "torchvision")
    assert (ours["clip"], theirs["clip"]) == (None, 20.0)  # ours clips by its own recipe
    assert all(
        trial["seed"] == 7 and trial["rate"] == 0.0001 and trial["epochs"] == 1
        for trial in (ours, theirs)
    )
    assert all(
        0 <= trial["validation"]["map"] <= trial["validation"]["map_50"] <= 1
        for trial in (ours, theirs)
    )
    assert "conv5_3 above zero" in capsys.readouterr().out


def test_a_multiplied_set_is_that_many_times_larger(nb, tmp_path):
    from synthetic_bccd import draw_dataset

    draw_dataset(tmp_path / "drawn", train=2, val=1, test=1, seed=3)
    root = scaling.multiply(tmp_path, 3)
    split = nb.SmearSplit(root, "train")
    assert len(split) == 6 and len(set(split.ids)) == 6
    assert np.array_equal(split.image(0), split.image(2)) and torch.equal(
        split.boxes[1], split.boxes[5]
    )


def test_what_the_labels_leave_within_reach(nb):
    complete = [(torch.tensor([[0, 0, 10, 10], [50, 50, 60, 60.0]]), torch.tensor([2, 1]))]
    official = [(torch.tensor([[0, 0, 10, 10.0]]), torch.tensor([2]))]
    found = {  # an official cell, a cell without a box, the same of another class, and nothing
        "boxes": torch.tensor([[0, 0, 10, 10], *[[50, 50, 60, 61]] * 2, [80, 80, 90, 90.0]]),
        "labels": torch.tensor([2, 1, 2, 1]),
        "scores": torch.tensor([0.9, 0.9, 0.9, 0.9]),
    }
    left = counting.without_unboxed_cells(nb, [found], official, complete)[0]
    assert left["labels"].tolist() == [
        2,
        2,
        1,
    ]  # the detection of the cell without a box is forgiven
    same = counting.without_unboxed_cells(nb, [found], official, official)[0]
    assert same["labels"].tolist() == found["labels"].tolist()
    drawn = counting.second_opinion(nb, official, complete)[0]
    assert (drawn["boxes"].tolist(), drawn["labels"].tolist()) == ([[0, 0, 10, 10]], [2])


def test_pictures_and_their_boxes_change_together():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 30:36] = 255
    truth = [(torch.tensor([[30.0, 10, 36, 20]]), torch.tensor([1]))]

    def box_of(picture):
        rows, columns = np.nonzero(picture[..., 0] > 128)
        return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]

    for pictures, cells in (counting.resized([image], truth, 2), counting.turned([image], truth)):
        assert np.abs(np.array(box_of(pictures[0])) - cells[0][0].numpy()[0]).max() <= 1
    (wider,) = counting.extended([image])
    assert wider.shape == (60, 90, 3) and np.array_equal(wider[:40, :60], image)


def test_smears_of_every_size_are_counted_and_compared(nb, tmp_path, capsys):
    counter = CellCounter(save_square_finder(tmp_path / "squares.onnx"))
    image, cells = rows_of_squares(80, 640, 480, 110)
    corners = [[x, y, x + 80, y + 80] for x in range(5, 560, 110) for y in range(5, 400, 110)]
    truth = [(torch.tensor(corners).float(), torch.ones(cells, dtype=torch.int64))]
    counting.tool_rows(nb, "way", counting.whole_pictures(counter, [image]), truth, NAMES)
    assert f"| RBC | {cells}.0 | way | 0.00 | +0.00 | 1.000 | 100.0% |" in capsys.readouterr().out
    counting.folder_rows(nb, counter, [image], truth, NAMES)
    *rows, last = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ", 1)[1] for row in rows] == [f"{cells} | +0.0% | 1.000 | 0 |"] * 6
    assert f" {cells} cells away from the seam, {cells} without" in last
