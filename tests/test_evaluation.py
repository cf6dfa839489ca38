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
        found_labels = torch.cat(
            [labels[seen], labels[:2], torch.randint(1, 4, (false,), generator=g)]
        )
        scores = torch.rand(len(found_boxes), generator=g)
        order = scores.argsort(descending=True)
        truth.append({"boxes": boxes, "labels": labels})
        found.append(
            {"boxes": found_boxes[order], "labels": found_labels[order], "scores": scores[order]}
        )
    return truth, found


def matches_of(nb, truth, found, classes=3):
    boxes, labels = ([one[key] for one in truth] for key in ("boxes", "labels"))
    return nb.match_all(found, boxes, labels, classes)


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
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    assert nb.mean_average_precision(matches_of(nb, [truth], [none]), 1)[0] == 0
    one = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.tensor([0.9])}
    matches = matches_of(
        nb, [{"boxes": none["boxes"], "labels": none["labels"]}, truth], [one, one], 1
    )
    precision, recall, _ = nb.precision_recall_curve(matches, 1)
    assert precision.tolist() == [0, 0.5] and recall.tolist() == [0, 1]


def test_perfect_detections(nb):
    truth, _ = scene(1)
    found = [{**one, "scores": torch.rand(len(one["labels"]))} for one in truth]
    at_half, average, per_class = nb.mean_average_precision(matches_of(nb, truth, found), 3)
    assert (at_half, average) == (
        pytest.approx(1),
        pytest.approx(1),
    ) and per_class == pytest.approx([1, 1, 1])


def test_precision_and_recall_by_hand(nb):
    """Two objects; detections: true 0.9, double 0.8 of the same object, true 0.7, false 0.6."""
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "labels": torch.tensor([1, 1]),
    }
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [50, 50, 60, 60]])
    found = {
        "boxes": boxes,
        "labels": torch.ones(4, dtype=torch.int64),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    matches = matches_of(nb, [truth], [found], 1)
    precision, recall, scores = nb.precision_recall_curve(matches, 1)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4])
    assert recall.tolist() == pytest.approx([0.5, 0.5, 1, 1]) and scores.tolist() == pytest.approx(
        [0.9, 0.8, 0.7, 0.6]
    )
    # COCO: precision 1 at the 51 recalls up to 0.5, 2/3 at the other 50
    by_hand = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert nb.ap_table(matches, 1)[0, 0] == by_hand
    assert nb.average_precision(matches[0][0].right[0], 2) == by_hand


def slow_bootstrap(nb, matches, classes, samples, seed):
    """The plain way: draw images, put their detections together, sort, measure; again for each sample."""
    drawn = np.random.default_rng(seed).integers(0, len(matches), (samples, len(matches)))
    tables = [nb.mean_average_precision([matches[i] for i in row], classes) for row in drawn]
    parts = (np.array([table[k] for table in tables], float) for k in range(3))
    return [np.moveaxis(np.nanpercentile(part, (2.5, 97.5), axis=0), 0, -1) for part in parts]


@pytest.mark.parametrize("seed", [0, 5])
def test_bootstrap_equals_the_slow_way(nb, seed):
    matches = matches_of(nb, *scene(seed, images=15))
    fast, slow = nb.bootstrap(matches, 3, 40, seed), slow_bootstrap(nb, matches, 3, 40, seed)
    assert [part.shape for part in fast] == [(2,), (2,), (3, 2)]
    for mine, wanted in zip(fast, slow, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-12)
    low, high = fast[0]
    assert low < nb.mean_average_precision(matches, 3)[0] < high


def test_bootstrap_without_objects_and_with_one_image(nb):
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "labels": torch.tensor([1, 1]),
    }
    found = {
        "boxes": truth["boxes"][:1],
        "labels": truth["labels"][:1],
        "scores": torch.tensor([0.9]),
    }
    low_high, _, by_class = nb.bootstrap(matches_of(nb, [truth], [found], 9), 9, 20)
    assert low_high == pytest.approx([51 / 101] * 2)  # there is but one image to draw
    assert np.isnan(by_class[1:]).all()


def test_thresholds_where_detections_and_labels_agree_best(nb):
    scores, true = (
        np.array([0.9, 0.8, 0.7, 0.2, 0.1]),
        np.array([[True, False, True, False, False]]),
    )
    none = nb.Matched(np.zeros(0), np.zeros((1, 0), bool), 0)
    one = nb.Matched(scores, true, 2)
    assert nb.best_thresholds([[one, none]], 2) == [0.7, nb.SHOW_SCORE]
    alarms = nb.Matched(scores, np.zeros((1, 5), bool), 0)  # detections of a class without objects
    assert nb.best_thresholds([[alarms]], 1) == [nb.SHOW_SCORE]


@pytest.mark.parametrize("seed", range(5))
def test_the_plain_average_precision_equals_the_weighted_one(nb, seed):
    """Also where no recall, or each of them, is reached."""
    generator = np.random.default_rng(seed)
    for share in (0.0, 0.3, 1.0):
        right = generator.random(40) < share
        for objects in (max(1, right.sum()), right.sum() + 7):
            plain = nb.average_precision(right, objects)
            once = nb.weighted_average_precision(right, np.ones(40, int), objects)
            assert plain == pytest.approx(once, abs=1e-12)


def test_a_weight_of_two_is_the_detection_twice(nb):
    right, times = np.array([True, False, True, False, True]), np.array([2, 1, 0, 3, 1])
    repeated = nb.average_precision(np.repeat(right, times), 6)
    assert nb.weighted_average_precision(right, times, 6) == pytest.approx(repeated, abs=1e-12)


def test_kinds_of_errors(nb):
    """Each kind once, placed by hand."""
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10], [300, 0, 310, 10]]
    )
    labels = torch.tensor([1, 2, 1, 1])
    shifted = [
        boxes[0],
        boxes[0] + 1,
        boxes[1],
        boxes[2] + torch.tensor([6.0, 0, 6, 0]),
        boxes[1] + 6,
        boxes[0] + 50,
    ]
    found = {"boxes": torch.stack(shifted), "labels": torch.tensor([1, 1, 1, 1, 1, 1])}
    found["scores"] = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.5])
    kinds, missed = nb.error_kinds(nb.shown_cells(found, [0.5, 0.5]), boxes, labels)
    assert kinds.tolist() == [
        "right",
        "duplicate",
        "class",
        "localisation",
        "background",
        "background",
    ]
    assert missed.tolist() == [False, True, True, True]
    both = {"boxes": boxes[1:2] + 4, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    assert nb.error_kinds(both, boxes, labels)[0].tolist() == ["both"]
    sure = nb.shown_cells(found, [0.55, 0.5])
    assert nb.error_kinds(sure, boxes[:0], labels[:0])[0].tolist() == ["background"] * 5
    assert nb.image_f1(kinds, missed) == pytest.approx(2 * 1 / (2 + 5 + 3))
    nothing, one = np.array([], str), torch.ones(1, dtype=torch.bool)
    assert nb.image_f1(nothing, one[:0]) == 1 and nb.image_f1(nothing, one) == 0


@pytest.mark.parametrize("objects", [0, 3])
def test_evaluate_gives_plain_numbers(nb, objects):
    """Ten classes, one image, most classes without objects: no exception, and only what JSON can hold."""
    import json

    names = [f"class {i}" for i in range(10)]
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])[:objects]
    labels = torch.tensor([1, 1, 9])[:objects]
    found = {"boxes": boxes + 0.5, "labels": labels, "scores": torch.full((objects,), 0.8)}
    measured = nb.evaluate(nb.match_all([found], [boxes], [labels], 10), names, [0.5] * 10)
    json.dumps(measured, allow_nan=False)
    assert measured["images"] == 1 and list(measured["ap_50"]) == names
    assert measured["map_50"] == (1 if objects else None)
    assert measured["detections"]["class 0"] == (2 if objects else 0)
