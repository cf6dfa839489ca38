"""Average precision against torchmetrics (faster-coco-eval), and small cases counted by hand."""

import math

import numpy as np
import pytest
import torch

metrics = pytest.importorskip("torchmetrics.detection")
pytest.importorskip("faster_coco_eval")


def reference():
    """COCO's evaluation; the thresholds in double precision, as COCO has them (torchmetrics' own are single)."""
    return metrics.MeanAveragePrecision(
        backend="faster_coco_eval",
        class_metrics=True,
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )


def scene(seed, images=12, missed=0.2, false=3, jitter=8.0):
    """Random truth and detections: most objects found a little off, some missed, some false, some of another class."""
    g = torch.Generator().manual_seed(seed)
    truth, found = [], []
    for _ in range(images):
        n = int(torch.randint(0, 9, (1,), generator=g))
        low = torch.rand(n, 2, generator=g) * 500
        boxes = torch.cat([low, low + 30 + 90 * torch.rand(n, 2, generator=g)], 1)
        labels = torch.randint(1, 4, (n,), generator=g)
        seen = torch.rand(n, generator=g) > missed
        extra = torch.rand(false, 2, generator=g) * 500
        found_boxes = torch.cat([boxes[seen], boxes[:2], torch.cat([extra, extra + 60], 1)])
        found_boxes = found_boxes + jitter * torch.randn(found_boxes.shape, generator=g)
        found_labels = torch.cat([labels[seen], labels[:2], torch.randint(1, 4, (false,), generator=g)])
        scores = torch.rand(len(found_boxes), generator=g)
        order = scores.argsort(descending=True)
        truth.append({"boxes": boxes, "labels": labels})
        found.append({"boxes": found_boxes[order], "labels": found_labels[order], "scores": scores[order]})
    return truth, found


def matches_of(nb, truth, found, classes=3):
    return [nb.match_detections(f, t["boxes"], t["labels"], classes) for f, t in zip(found, truth, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_map_equals_torchmetrics(nb, seed):
    truth, found = scene(seed)
    metric = reference()
    metric.update(found, truth)
    wanted = metric.compute()
    at_half, average, per_class = nb.mean_average_precision(matches_of(nb, truth, found), 3)
    assert 0.05 < wanted["map_50"] < 0.95
    assert at_half == pytest.approx(wanted["map_50"].item(), abs=1e-4)
    assert average == pytest.approx(wanted["map"].item(), abs=1e-4)
    assert len(per_class) == 3


def test_a_class_without_objects_is_left_out(nb):
    truth, found = scene(3)
    for one in truth:
        keep = one["labels"] != 2
        one["boxes"], one["labels"] = one["boxes"][keep], one["labels"][keep]
    metric = reference()
    metric.update(found, truth)
    at_half, _, per_class = nb.mean_average_precision(matches_of(nb, truth, found), 3)
    assert math.isnan(per_class[1])
    assert at_half == pytest.approx(metric.compute()["map_50"].item(), abs=1e-4)


def test_no_detections_and_no_objects(nb):
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    assert nb.mean_average_precision(matches_of(nb, [truth], [none]), 1)[0] == 0
    one = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.tensor([0.9])}
    matches = matches_of(nb, [{"boxes": none["boxes"], "labels": none["labels"]}, truth], [one, one], 1)
    precision, recall, _ = nb.precision_recall(matches, 1)
    assert precision.tolist() == [0, 0.5] and recall.tolist() == [0, 1]


def test_perfect_detections(nb):
    truth, _ = scene(1)
    found = [{**one, "scores": torch.rand(len(one["labels"]))} for one in truth]
    at_half, average, per_class = nb.mean_average_precision(matches_of(nb, truth, found), 3)
    assert (at_half, average) == (pytest.approx(1), pytest.approx(1)) and per_class == pytest.approx([1, 1, 1])


def test_precision_and_recall_by_hand(nb):
    """Two objects; detections: true 0.9, double 0.8 of the same object, true 0.7, false 0.6."""
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([1, 1])}
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [50, 50, 60, 60]])
    found = {"boxes": boxes, "labels": torch.ones(4, dtype=torch.int64), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    matches = matches_of(nb, [truth], [found], 1)
    precision, recall, scores = nb.precision_recall(matches, 1)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4])
    assert recall.tolist() == pytest.approx([0.5, 0.5, 1, 1]) and scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    # COCO: precision 1 at the 51 recalls up to 0.5, 2/3 at the other 50
    assert nb.average_precision(matches, 1) == pytest.approx((51 + 50 * 2 / 3) / 101)
