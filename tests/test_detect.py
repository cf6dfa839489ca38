"""Detection: torchvision's post-processing on the same head outputs, any image size, and images
without a cell.
"""

import golden
import numpy as np
import pytest
import torch
from torchvision import ops
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList


class Fixed(torch.nn.Module):
    """A detector that answers every image with the same locs (8732, 4) and scores (8732, C)."""

    def __init__(self, priors, locs, scores):
        super().__init__()
        self.register_buffer("priors", priors)
        self.locs, self.scores, self.num_classes = locs, scores, scores.shape[1]

    def forward(self, images):
        assert images.shape[1:] == (3, 300, 300)
        return self.locs.expand(len(images), -1, -1), self.scores.expand(len(images), -1, -1)


def picture(width, height):
    return np.full((height, width, 3), 200, dtype=np.uint8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(640, 480), (300, 300), (37, 911)])
def test_equal_torchvision_postprocessing(nb, seed, size):
    g = torch.Generator().manual_seed(seed)
    locs = torch.randn(8732, 4, generator=g)
    scores = torch.randn(8732, 4, generator=g) * 2 + torch.tensor([5.0, 0, 0, 0])
    priors = nb.create_prior_boxes()
    found = nb.detect(Fixed(priors, locs, scores), [picture(*size)], vote_overlap=1.0)[0]
    reference = ssd300_vgg16(
        weights=None,
        weights_backbone=None,
        num_classes=4,
        score_thresh=0.01,
        nms_thresh=0.45,
        detections_per_img=200,
        topk_candidates=400,
    )
    anchors = ops.box_convert(priors, "cxcywh", "xyxy") * torch.tensor([size[0], size[1]] * 2)
    outputs = {"bbox_regression": locs[None], "cls_logits": scores[None]}
    wanted = reference.postprocess_detections(outputs, [anchors], [(size[1], size[0])])[0]
    assert 20 < len(wanted["boxes"]) == len(found["boxes"]) <= 200
    assert torch.equal(found["labels"], wanted["labels"])
    assert torch.allclose(found["scores"], wanted["scores"], atol=1e-6)
    assert torch.allclose(found["boxes"], wanted["boxes"], atol=2e-2)
    assert found["labels"].dtype == torch.int64 and found["boxes"].dtype == torch.float32


def perfect(nb, boxes, labels, size):
    """A detector that knows the boxes: for each, the prior that overlaps it most says so."""
    priors = nb.create_prior_boxes()
    shares = boxes / torch.tensor([size[0], size[1]] * 2)
    best = ops.box_iou(shares, ops.box_convert(priors, "cxcywh", "xyxy")).argmax(1)
    locs, scores = torch.zeros(8732, 4), torch.tensor([20.0, 0, 0, 0]).repeat(8732, 1)
    locs[best] = nb.encode(shares, priors[best])
    scores[best] = torch.nn.functional.one_hot(labels, 4).float() * (
        20 + torch.rand(len(labels), 1)
    )
    return Fixed(priors, locs, scores)


@pytest.mark.parametrize("size", [(640, 480), (1500, 200), (90, 70)])
def test_boxes_come_back_in_the_pixels_of_the_image(nb, size):
    shares = torch.tensor([[0.1, 0.1, 0.3, 0.35], [0.5, 0.2, 0.8, 0.6], [0.15, 0.7, 0.22, 0.8]])
    boxes, labels = shares * torch.tensor([size[0], size[1]] * 2), torch.tensor([1, 2, 3])
    found = nb.detect(perfect(nb, boxes, labels, size), [picture(*size)], min_score=0.5)[0]
    order = found["labels"].argsort()
    assert found["labels"][order].tolist() == [1, 2, 3]
    assert torch.allclose(found["boxes"][order], boxes, atol=1e-2 * max(size) / 300)


def test_best_first_and_no_more_than_asked(nb):
    g = torch.Generator().manual_seed(1)
    model = Fixed(
        nb.create_prior_boxes(),
        torch.randn(8732, 4, generator=g),
        torch.randn(8732, 4, generator=g) * 2,
    )
    full = nb.detect(model, [picture(64, 64)], vote_overlap=1.0)[0]
    assert len(full["scores"]) == 200 and (full["scores"].diff() <= 0).all()
    assert full["scores"].min() > 0.01
    few = nb.detect(model, [picture(64, 64)], top_k=7, vote_overlap=1.0)[0]
    assert all(torch.equal(few[key], full[key][:7]) for key in ("boxes", "labels", "scores"))
    sure = nb.detect(model, [picture(64, 64)], min_score=0.8, top_k=10**6)[0]
    assert len(sure["scores"]) == 0 or sure["scores"].min() > 0.8
    for label in (1, 2, 3):
        mine = full["boxes"][full["labels"] == label]
        iou = ops.box_iou(mine, mine).fill_diagonal_(0)
        assert iou.numel() == 0 or iou.max() <= 0.45 + 1e-5


def test_voting_moves_each_box_to_the_mean_of_those_near_it(nb):
    """Box voting as a loop: same kept boxes, labels and scores; each box the mean of its
    neighbours by score.
    """
    g = torch.Generator().manual_seed(4)
    low = torch.rand(60, 2, generator=g) * 0.15
    boxes = torch.cat([low, low + 0.5 + 0.1 * torch.rand(60, 2, generator=g)], 1)
    scores = torch.rand(60, 3, generator=g)
    plain = nb.select_detections(boxes, scores, 0.1, 0.45, 200)
    voted = nb.select_detections(boxes, scores, 0.1, 0.45, 200, 0.7)
    assert 0 < len(plain["boxes"]) < 30
    assert torch.equal(plain["labels"], voted["labels"]) and torch.equal(
        plain["scores"], voted["scores"]
    )
    for box, new, label in zip(
        plain["boxes"], voted["boxes"], plain["labels"].tolist(), strict=True
    ):
        total, weight = torch.zeros(4), 0.0
        for other, score in zip(boxes, scores[:, label].tolist(), strict=True):
            if score > 0.1 and ops.box_iou(box[None], other[None]).item() >= 0.7:
                total, weight = total + score * other, weight + score
        assert torch.allclose(new, total / weight, atol=1e-5)


def test_a_box_without_area_is_no_number_that_is_none(nb):
    """Two boxes squashed to a line at the border overlap nothing, not even themselves: voting
    leaves them alone.
    """
    boxes = torch.tensor([[1.0, 0.2, 1.0, 0.4], [0.1, 0.1, 0.3, 0.3], [0.11, 0.1, 0.31, 0.3]])
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.6, 0.4]])
    found = nb.select_detections(boxes, scores, 0.01, 0.45, 200, 0.6)
    assert torch.isfinite(found["boxes"]).all()
    assert found["boxes"][0].tolist() == boxes[0].tolist()
    assert torch.allclose(
        found["boxes"][1], torch.tensor([0.31 / 3, 0.1, 0.91 / 3, 0.3]), atol=1e-6
    )


@pytest.mark.parametrize("classes", [1, 3, 9])
def test_skipped_cells_count_in_one_reading_only(nb, classes):
    g = torch.Generator().manual_seed(classes)
    given = torch.rand(2, 5, 1 + 2 * classes, generator=g).softmax(-1)
    official, every = (nb.read_probabilities(given, classes, every) for every in (False, True))
    assert official.shape == every.shape == (2, 5, 1 + classes)
    assert torch.equal(official, given[..., : 1 + classes])
    assert torch.allclose(every.sum(-1), torch.ones(2, 5)) and torch.equal(
        every[..., 0], given[..., 0]
    )
    for label in range(1, classes + 1):
        assert torch.allclose(every[..., label], given[..., label] + given[..., classes + label])
    assert nb.read_probabilities(official, classes, True) is not None
    assert torch.equal(
        nb.read_probabilities(official, classes, True), official
    )  # nothing skipped was learned


def test_a_skipped_cell_is_found_where_every_cell_is_asked_for(nb):
    priors = nb.create_prior_boxes()
    scores = torch.tensor([9.0, 0, 0, 0, 0, 0, 0]).repeat(8732, 1)
    scores[5000] = torch.tensor([0, 0, 9.0, 0, 0, 0, 0])  # a white cell that has a box
    scores[2000] = torch.tensor([0, 0, 0, 0, 9.0, 0, 0])  # a red cell that would have none
    model, image = Fixed(priors, torch.zeros(8732, 4), scores), picture(640, 480)
    (official,), (every,) = (
        nb.detect(model, [image], min_score=0.5, every_cell=e) for e in (False, True)
    )
    assert official["labels"].tolist() == [2]
    assert sorted(every["labels"].tolist()) == [1, 2]
    assert torch.equal(every["boxes"][every["labels"] == 2], official["boxes"])


def test_the_readings_differ_in_their_suppression(nb):
    """Two boxes with an IoU of 0.33 are two cells in the official reading and one where every cell
    counts.
    """
    outputs = (
        torch.tensor([[[0.0, 0, 0.2, 0.2], [0.1, 0, 0.3, 0.2]]]),
        torch.tensor([[[0.1, 0.9], [0.2, 0.8]]]),
    )
    image, numbers = picture(300, 300), []
    for every in (False, True):
        (found,) = nb.read_detections(outputs, [image], 1, every)
        numbers.append(len(found["labels"]))
    assert numbers == [2, 1]


def test_the_limits_of_the_official_reading_are_those_of_the_evaluation(nb, monkeypatch):
    given = {}
    found = {"boxes": torch.zeros(0, 4)}

    def select(boxes, probabilities, **limits):
        given.update(limits)
        return found

    monkeypatch.setattr(nb, "select_detections", select)
    nb.read_detections((torch.zeros(1, 5, 4), torch.zeros(1, 5, 2)), [picture(9, 9)], 1)
    assert given == {"min_score": 0.01, "max_overlap": 0.45, "top_k": 200, "vote_overlap": 0.6}


def test_an_image_of_several_equals_one_class_at_a_time(nb):
    """Three images at once: the same as one image, one class at a time, by torchvision's NMS."""
    g = torch.Generator().manual_seed(5)
    priors = nb.create_prior_boxes()
    locs = torch.randn(3, 8732, 4, generator=g)
    logits = torch.randn(3, 8732, 4, generator=g) * 2 + torch.tensor([4.0, 0, -2, -30])
    scores = logits.softmax(-1)
    boxes = nb.decode(locs, priors).clamp(0, 1)
    outputs = (boxes, scores)
    found = nb.read_detections(outputs, [picture(1, 1)] * 3, 3, vote_overlap=1.0)
    for b in range(3):
        wanted = []
        for label in (1, 2, 3):
            above = (scores[b, :, label] > 0.01).nonzero()[:, 0]
            order = scores[b, above, label].argsort(descending=True, stable=True)[:400]
            above = above[order]
            above = above[ops.nms(boxes[b, above], scores[b, above, label], 0.45)]
            wanted += [(float(scores[b, p, label]), label, boxes[b, p]) for p in above]
        wanted = sorted(wanted, key=lambda row: -row[0])[:200]
        assert found[b]["scores"].tolist() == [score for score, _, _ in wanted]
        assert found[b]["labels"].tolist() == [label for _, label, _ in wanted]
        wanted_boxes = torch.stack([box for _, _, box in wanted])
        assert torch.allclose(found[b]["boxes"], wanted_boxes, atol=1e-6)
    assert 3 not in found[0]["labels"].tolist() and len(found[0]["labels"]) > 50


def test_a_class_does_not_suppress_another(nb):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 0, 11, 10]])
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.0, 0.8], [0.4, 0.6, 0.0]])
    found = nb.select_detections(boxes, scores, 0.01, 0.45, 200)
    assert found["labels"].tolist() == [1, 2]


def test_half_precision_is_asked_for_and_not_the_default(nb, monkeypatch):
    seen = []
    scores = torch.zeros(8732, 4)
    model = Fixed(nb.create_prior_boxes(), torch.zeros(8732, 4), scores)
    real = nb.forward

    def forward(model, images, dtype):
        seen.append(dtype)
        return real(model, images, dtype)

    monkeypatch.setattr(nb, "forward", forward)
    nb.detect(model, [picture(64, 64)])
    nb.detect(model, [picture(64, 64)], dtype=torch.bfloat16)
    assert seen == [torch.float32, torch.bfloat16]


def test_nothing_found_is_an_empty_answer_of_the_right_shape(nb):
    scores = torch.tensor([30.0, 0, 0, 0]).repeat(8732, 1)
    found = nb.detect(
        Fixed(nb.create_prior_boxes(), torch.zeros(8732, 4), scores), [picture(640, 480)] * 2
    )
    assert len(found) == 2
    for one in found:
        assert (
            one["boxes"].shape == (0, 4)
            and one["labels"].shape == (0,)
            and one["scores"].shape == (0,)
        )
    assert nb.detect(Fixed(nb.create_prior_boxes(), torch.zeros(8732, 4), scores), []) == []


def test_an_image_does_not_depend_on_its_neighbours(nb):
    torch.manual_seed(0)
    model = nb.SSD300(4).eval()
    g = np.random.default_rng(0)
    images = [
        g.integers(0, 255, shape, dtype=np.uint8)
        for shape in ((480, 640, 3), (100, 333, 3), (300, 300, 3))
    ]
    together = nb.detect(model, images, min_score=0.2, top_k=20)
    for image, one in zip(images, together, strict=True):
        alone = nb.detect(model, [image], min_score=0.2, top_k=20)[0]
        assert torch.equal(one["labels"], alone["labels"])
        assert torch.allclose(one["scores"], alone["scores"], atol=1e-5)
        assert torch.allclose(one["boxes"], alone["boxes"], atol=1e-2)


def test_the_default_boxes_of_torchvision_are_served_too(nb):
    """Priors made by torchvision's generator decode to its own default boxes at offset zero."""
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=nb.PAPER_SCALES, clip=False
    )
    maps = [torch.zeros(1, 1, n, n) for n in (38, 19, 10, 5, 3, 1)]
    boxes = generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0]
    priors = ops.box_convert(boxes / 300, "xyxy", "cxcywh")
    scores = torch.tensor([30.0, 0, 0, 0]).repeat(8732, 1)
    scores[5000] = torch.tensor([0, 0, 30.0, 0])
    found = nb.detect(Fixed(priors, torch.zeros(8732, 4), scores), [picture(300, 300)])[0]
    assert found["labels"].tolist() == [2]
    assert torch.allclose(found["boxes"], boxes[5000:5001].clamp(0, 300), atol=1e-3)


def test_the_committed_detector_finds_what_it_found(nb, bccd_root):
    """15 validation images: every stored detection is there again, and no sure one is new."""
    if (
        nb.fingerprint(nb.load_checkpoint(golden.BEST, "detector")["model"])
        != golden.stored()["weights"]
    ):
        pytest.skip("checkpoints/ holds a detector that was trained here: nothing is stored of it")
    stored = golden.stored()["detections"]
    found = golden.detections(nb, bccd_root)
    assert set(stored) == set(found) and len(stored) == 15
    assert sum(map(len, stored.values())) > 100

    def missing(some, others, least):
        others = torch.tensor(others).reshape(-1, 6)
        for label, score, *box in some:
            if score >= least:
                same = (others[:, 0] == label) & ((others[:, 1] - score).abs() < 0.02)
                if not (ops.box_iou(torch.tensor([box]), others[:, 2:])[0][same] > 0.95).any():
                    yield label, score, box

    for name in stored:
        assert not list(missing(stored[name], found[name], golden.LEAST + 0.03)), name
        assert not list(missing(found[name], stored[name], golden.LEAST + 0.03)), name


def test_the_committed_detector_fits_what_people_boxed(nb, bccd_root):
    """Of the boxes of five images whose detections are stored most are among the cells that are
    shown: the detector is one that works.
    """
    split = nb.SmearSplit(nb.dataset_root(bccd_root), "val")
    rows = [split.ids.index(name) for name in list(golden.stored()["detections"])[::3]]
    model, _ = nb.load_detector(golden.BEST)
    cells = nb.detect(model, [split.image(row) for row in rows], every_cell=True, min_score=0.5)
    hits = total = 0
    for row, found in zip(rows, cells, strict=True):
        for box, label in zip(split.boxes[row], split.labels[row], strict=True):
            same = found["boxes"][found["labels"] == label]
            hits += bool((ops.box_iou(box[None], same) >= 0.5).any())
            total += 1
    assert hits / total > 0.9
