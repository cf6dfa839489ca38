"""Box arithmetic of the notebook against torchvision.ops and by property."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision import ops

quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def random_boxes(seed, count, size=1.0, side=0.01):
    """(count, 4) xyxy boxes about inside [0, size], their sides at least `side` of it."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * size
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, torch.maximum(high, low + side * size)], 1)


@quick
@given(seeds, st.integers(0, 12), st.integers(0, 12))
def test_iou_equals_torchvision(nb, seed, n, m):
    a, b = random_boxes(seed, n), random_boxes(seed + 1, m)
    assert torch.allclose(nb.box_iou(a, b), ops.box_iou(a, b), atol=1e-6)


@quick
@given(seeds)
def test_iou_by_property(nb, seed):
    a, b = random_boxes(seed, 6, 640), random_boxes(seed + 1, 6, 640)
    iou = nb.box_iou(a, b)
    assert ((iou >= 0) & (iou <= 1)).all()
    assert torch.allclose(iou, nb.box_iou(b, a).T, atol=1e-6)
    assert torch.allclose(nb.box_iou(a, a).diagonal(), torch.ones(6), atol=1e-6)
    assert torch.allclose(iou, nb.box_iou(a * 3 + 7, b * 3 + 7), atol=1e-4)


def test_iou_known_values(nb):
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor(
        [[1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    )
    assert torch.allclose(nb.box_iou(a, b), torch.tensor([[1 / 7, 0.0, 0.5, 0.0]]))
    assert nb.box_iou(b[3:], b[3:]).item() == 0  # no area, no overlap, no NaN


def test_iou_of_a_batch(nb):
    a, b = random_boxes(1, 10).view(2, 5, 4), random_boxes(2, 6).view(2, 3, 4)
    expected = torch.stack([ops.box_iou(x, y) for x, y in zip(a, b, strict=True)])
    assert torch.allclose(nb.box_iou(a, b), expected, atol=1e-6)


@quick
@given(seeds)
def test_conversions_equal_torchvision_and_undo_each_other(nb, seed):
    boxes = random_boxes(seed, 8)
    centred = nb.xyxy_to_cxcywh(boxes)
    assert torch.allclose(centred, ops.box_convert(boxes, "xyxy", "cxcywh"), atol=1e-6)
    assert torch.allclose(nb.cxcywh_to_xyxy(centred), boxes, atol=1e-6)


@quick
@given(seeds)
def test_encode_and_decode_are_inverse(nb, seed):
    boxes, priors = random_boxes(seed, 20), nb.xyxy_to_cxcywh(random_boxes(seed + 1, 20))
    offsets = nb.encode(boxes, priors)
    assert torch.allclose(nb.decode(offsets, priors), boxes, atol=1e-5)
    assert torch.allclose(
        nb.encode(nb.cxcywh_to_xyxy(priors), priors), torch.zeros(20, 4), atol=1e-4
    )


@quick
@given(seeds)
def test_encode_equals_torchvision_box_coder(nb, seed):
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))  # the variances 0.1 and 0.2
    boxes, anchors = (
        random_boxes(seed, 20, side=0.05),
        random_boxes(seed + 1, 20, side=0.05),
    )  # it clamps beyond 62:1
    offsets = nb.encode(boxes, nb.xyxy_to_cxcywh(anchors))
    assert torch.allclose(offsets, coder.encode_single(boxes, anchors), atol=1e-3, rtol=1e-4)
    assert torch.allclose(
        nb.decode(offsets, nb.xyxy_to_cxcywh(anchors)),
        coder.decode_single(offsets, anchors),
        atol=1e-5,
    )


def test_encode_by_hand(nb):
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.5, 0.5, 0.7, 0.9]])  # centre (0.6, 0.7), 0.2 x 0.4
    assert torch.allclose(nb.encode(box, prior), torch.tensor([[5.0, 5.0, 0.0, 0.0]]), atol=1e-5)
    wide = torch.tensor([[0.3, 0.3, 0.7, 0.7]])  # twice as wide
    assert torch.allclose(
        nb.encode(wide, prior), torch.tensor([[0.0, 0.0, math.log(2) / 0.2, 0.0]]), atol=1e-5
    )


@quick
@given(seeds, st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.45, 0.7, 1.0]))
def test_nms_equals_torchvision(nb, seed, count, overlap):
    boxes = random_boxes(seed, count)
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) / max(count, 1)
    assert (
        nb.non_maximum_suppression(boxes, scores, overlap).tolist()
        == ops.nms(boxes, scores, overlap).tolist()
    )


@pytest.mark.parametrize("count", [0, 1])
def test_nms_of_few(nb, count):
    kept = nb.non_maximum_suppression(random_boxes(0, count), torch.ones(count), 0.5)
    assert kept.shape == (count,) and kept.dtype == torch.int64
