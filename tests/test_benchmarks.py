"""The benchmarks compare like with like: the same VGG, the same splits, sets that really are so many times larger."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes, Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import scaling  # noqa: E402
import train_side_by_side  # noqa: E402
from faster_loss import faster_loss  # noqa: E402


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
    assert frozen == [f"backbone.features.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]


def test_torchvisions_recipe_keeps_boxes_inside_the_image():
    recipe = train_side_by_side.reference_recipe()
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 120, 160), dtype=np.uint8))
    boxes, labels = torch.tensor([[10.0, 20.0, 60.0, 70.0], [90.0, 40.0, 150.0, 110.0]]), torch.tensor([1, 2])
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


def test_a_multiplied_set_is_that_many_times_larger(nb, tmp_path):
    from synthetic_bccd import draw_dataset

    draw_dataset(tmp_path / "drawn", train=2, val=1, test=1, seed=3)
    root = scaling.multiply(tmp_path, 3)
    split = nb.SmearSplit(root, "train")
    assert len(split) == 6 and len(set(split.ids)) == 6
    assert np.array_equal(split.image(0), split.image(2)) and torch.equal(split.boxes[1], split.boxes[5])


@pytest.mark.parametrize("unlabelled_score", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_faster_loss_equals_the_notebooks(nb, seed, unlabelled_score):
    """Loss and gradients, with padding and cut cells anywhere among the boxes and one image without any."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(5, 9, 2, generator=g) * 0.8
    boxes = torch.cat([low, low + 0.02 + 0.2 * torch.rand(5, 9, 2, generator=g)], -1)
    labels = torch.randint(-1, 4, (5, 9), generator=g)
    labels[4] = 0
    priors, answers = nb.create_prior_boxes(), []
    locs, scores = (torch.randn(5, len(priors), 4, generator=g) for _ in range(2))
    for kind in (nb.MultiBoxLoss, faster_loss(nb)):
        given = [x.clone().requires_grad_() for x in (locs, scores)]
        loss = kind(priors, unlabelled_score=unlabelled_score)(*given, boxes, labels)
        sum(loss.values()).backward()
        answers.append([loss["localization"].detach(), loss["confidence"].detach(), *(x.grad for x in given)])
    for expected, got in zip(*answers, strict=True):
        assert expected.any() and torch.allclose(got, expected, rtol=1e-5, atol=1e-7)
    faster = faster_loss(nb)(priors)  # a GPU takes the whole batch at once
    apart, together = faster.objects(boxes, labels), faster.together(boxes, labels)
    assert torch.equal(apart[0], together[0])
    assert torch.equal(apart[1][apart[0] > 0], together[1][apart[0] > 0])


def test_the_faster_loss_without_objects_is_zero(nb):
    priors = nb.create_prior_boxes()
    nothing = (
        torch.zeros(2, 8732, 4),
        torch.randn(2, 8732, 4),
        torch.zeros(2, 1, 4),
        torch.zeros(2, 1, dtype=torch.int64),
    )
    assert all(value == 0 for value in faster_loss(nb)(priors)(*nothing).values())
