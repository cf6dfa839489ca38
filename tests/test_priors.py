"""The 8732 prior boxes: torchvision's generator, the paper's numbers, the true boxes they reach."""

import math

import pytest
import torch
from torchvision import ops
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

MAPS = [38, 19, 10, 5, 3, 1]
RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
VOC_SCALES = [0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075]


def generated(scales, ratios):
    """torchvision's default boxes for a 300 x 300 image, (8732, 4) cxcywh in [0, 1]."""
    generator = DefaultBoxGenerator(ratios, scales=scales, clip=False)
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    boxes = generator(images, [torch.zeros(1, 1, cells, cells) for cells in MAPS])[0] / 300
    return ops.box_convert(boxes, "xyxy", "cxcywh")


@pytest.mark.parametrize("scales", [VOC_SCALES, [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]])
def test_equal_torchvision_for_equal_scales(nb, scales):
    priors = nb.create_prior_boxes(scales=scales, ratios=RATIOS, base_ratio=1.0)
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32
    assert torch.allclose(priors, generated(scales, RATIOS), atol=1e-5)


def test_ours_equal_torchvision_but_for_the_base_ratio(nb):
    square = nb.create_prior_boxes(base_ratio=1.0)
    assert torch.allclose(square, generated(nb.PRIOR_SCALES, nb.PRIOR_RATIOS), atol=1e-5)
    stretched = nb.create_prior_boxes(base_ratio=0.64)
    assert torch.allclose(stretched, square * torch.tensor([1, 1, 0.8, 1.25]), atol=1e-5)
    assert torch.equal(
        nb.create_prior_boxes(), nb.create_prior_boxes(base_ratio=nb.PRIOR_BASE_RATIO)
    )


def test_numbers_of_the_paper(nb):
    assert list(nb.FEATURE_MAPS) == MAPS
    priors = nb.create_prior_boxes(scales=VOC_SCALES, ratios=RATIOS, base_ratio=1.0)
    assert (
        sum(n * n * k for n, k in zip(MAPS, (4, 6, 6, 6, 4, 4), strict=True)) == len(priors) == 8732
    )
    # first cell of conv4_3: 30 px, sqrt(30 * 60) px, and 30 px at 2:1 and 1:2
    w = 0.1 * math.sqrt(2)
    sides = torch.tensor([[0.1, 0.1], [math.sqrt(0.02)] * 2, [w, w / 2], [w / 2, w]])
    assert torch.allclose(
        priors[:4], torch.cat([torch.full((4, 2), 0.5 / 38), sides], 1), atol=1e-6
    )
    assert torch.allclose(priors[-4:, :2], torch.full((4, 2), 0.5))
    areas = (priors[:, 2] * priors[:, 3]).sqrt()
    assert areas.min().item() == pytest.approx(0.1) and areas.max().item() == pytest.approx(
        math.sqrt(0.9 * 1.075)
    )


def test_centres_lie_inside_and_rows_run_first_along_x(nb):
    priors = nb.create_prior_boxes()
    assert ((priors[:, :2] > 0) & (priors[:, :2] < 1)).all() and (priors[:, 2:] > 0).all()
    first_row = priors[: 38 * 4].view(38, 4, 4)
    assert (first_row[:, :, 1] == first_row[0, 0, 1]).all()
    assert (first_row[1:, 0, 0] > first_row[:-1, 0, 0]).all()


def test_clipping_cuts_at_the_border_only(nb):
    free, clipped = nb.create_prior_boxes(), nb.create_prior_boxes(clip=True)
    corners = ops.box_convert(clipped, "cxcywh", "xyxy")
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert torch.allclose(corners, ops.box_convert(free, "cxcywh", "xyxy").clamp(0, 1), atol=1e-6)


def test_priors_reach_the_real_cells(nb, bccd_root):
    """Nearly every training box of each class has a prior of IoU 0.5; the paper's are no better."""
    import xml.etree.ElementTree as ElementTree

    boxes = {name: [] for name in ("RBC", "WBC", "Platelets")}
    for name in (bccd_root / "BCCD/ImageSets/Main/train.txt").read_text().split():
        tree = ElementTree.parse(bccd_root / "BCCD" / "Annotations" / f"{name}.xml")
        for item in tree.iter("object"):
            box = [
                float(item.find("bndbox").findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")
            ]
            if box[2] > box[0] and box[3] > box[1]:
                boxes[item.findtext("name")].append(box)
    scale = torch.tensor([640, 480, 640, 480])

    def coverage(priors, name):
        iou = ops.box_iou(
            torch.tensor(boxes[name]) / scale, ops.box_convert(priors, "cxcywh", "xyxy")
        )
        return (iou.amax(1) >= 0.5).float().mean().item()

    ours = {name: coverage(nb.create_prior_boxes(), name) for name in boxes}
    paper = {
        name: coverage(
            nb.create_prior_boxes(scales=VOC_SCALES, ratios=RATIOS, base_ratio=1.0), name
        )
        for name in boxes
    }
    assert min(ours.values()) > 0.97, ours
    assert all(ours[name] >= paper[name] - 0.005 for name in boxes), (ours, paper)
