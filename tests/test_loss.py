"""Matching, mining and loss against a slow loop from the paper (Liu et al. 2016, section 2.2)."""

import math
import time
from typing import NamedTuple

import pytest
import torch
from torchvision import ops

CLASSES = 4  # with the background


class Batch(NamedTuple):
    """A small batch: priors (P, 4) cxcywh, a network's answers, and the objects of each image."""

    priors: torch.Tensor
    locs: torch.Tensor  # (B, P, 4)
    scores: torch.Tensor  # (B, P, CLASSES)
    boxes: list  # (n, 4) xyxy in [0, 1]
    labels: list  # (n,)


def example(seed, objects=(4, 1, 7), priors=300):
    """A random batch with so many objects on its images."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(priors, 2, generator=g)
    side = 0.05 + 0.4 * torch.rand(priors, 2, generator=g)
    boxes = []
    labels = []
    for number in objects:
        low = torch.rand(number, 2, generator=g) * 0.6
        size = 0.08 + 0.3 * torch.rand(number, 2, generator=g)
        boxes.append(torch.cat([low, low + size], 1))
        labels.append(torch.randint(1, CLASSES, (number,), generator=g))
    locs = torch.randn(len(objects), priors, 4, generator=g) * 2
    scores = torch.randn(len(objects), priors, CLASSES, generator=g) * 2
    return Batch(torch.cat([centre, side], 1), locs, scores, boxes, labels)


def call(criterion, batch, **changes):
    """The loss of a batch, some of its parts changed."""
    batch = batch._replace(**changes)
    return criterion(batch.locs, batch.scores, batch.boxes, batch.labels)


# --- the paper as a slow loop over numbers


def slow_iou(a, b):
    """The IoU of two boxes, lists of four corners."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


def slow_match(priors, boxes):
    """For each prior its object or None: any overlap of 0.5, first of all one for each object."""
    corners = ops.box_convert(priors, "cxcywh", "xyxy").tolist()
    boxes = boxes.tolist()
    matched = [None] * len(corners)
    pairs = []
    for p, corner in enumerate(corners):
        overlaps = [slow_iou(box, corner) for box in boxes]
        for i, overlap in enumerate(overlaps):
            pairs.append((-overlap, i, p))
        if overlaps and max(overlaps) >= 0.5:
            matched[p] = overlaps.index(max(overlaps))
    served = set()
    taken = set()
    for _, i, p in sorted(pairs):  # the closest pair first: no two objects share a prior
        if i not in served and p not in taken:
            served.add(i)
            taken.add(p)
            matched[p] = i
    return matched


def slow_offsets(box, prior):
    """Equation 2 of the paper, divided by the variances 0.1 and 0.2."""
    x0, y0, x1, y1 = box
    cx, cy, w, h = prior
    return [
        ((x0 + x1) / 2 - cx) / w / 0.1,
        ((y0 + y1) / 2 - cy) / h / 0.1,
        math.log((x1 - x0) / w) / 0.2,
        math.log((y1 - y0) / h) / 0.2,
    ]


def smooth_l1(error):
    """Half a square up to 1, a line beyond."""
    error = abs(error)
    return 0.5 * error * error if error < 1 else error - 0.5


class SlowLoss:
    """The loss of a batch by loops: its two terms, and for each image the positive and mined priors."""

    def __init__(self, batch):
        self.localization = 0.0
        self.confidence = 0.0
        self.positives = []  # {prior: label} of each image
        self.mined = []  # priors of each image
        self.matched = []
        for b in range(len(batch.boxes)):
            self.add_image(batch, b)
        n = max(1, sum(len(one) for one in self.positives))
        self.localization /= n
        self.confidence /= n

    def add_image(self, batch, b):
        """Add the terms of one image."""
        matched = slow_match(batch.priors, batch.boxes[b])
        loss = (-batch.scores[b].double().log_softmax(-1)).tolist()
        positives = {}
        for p, i in enumerate(matched):
            if i is None:
                continue
            positives[p] = int(batch.labels[b][i])
            self.confidence += loss[p][positives[p]]
            wanted = slow_offsets(batch.boxes[b][i].tolist(), batch.priors[p].tolist())
            for predicted, target in zip(batch.locs[b, p].tolist(), wanted, strict=True):
                self.localization += smooth_l1(predicted - target)
        background = [p for p, i in enumerate(matched) if i is None]
        background.sort(key=lambda p: -loss[p][0])
        mined = background[: 3 * len(positives)]
        self.confidence += sum(loss[p][0] for p in mined)
        self.positives.append(positives)
        self.mined.append(set(mined))
        self.matched.append(matched)


# --- matching


@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_the_loop(nb, seed):
    batch = example(seed)
    classes, objects = nb.MultiBoxLoss(batch.priors).match(batch.boxes, batch.labels)
    assert classes.shape == objects.shape == (len(batch.boxes), len(batch.priors))
    for b in range(len(batch.boxes)):
        for p, i in enumerate(slow_match(batch.priors, batch.boxes[b])):
            assert classes[b, p] == (0 if i is None else batch.labels[b][i])
            assert i is None or objects[b, p] == i


def test_every_object_keeps_its_best_prior(nb):
    """Objects that overlap no prior by 0.5 are learnt by the best one all the same."""
    priors = nb.create_prior_boxes()
    thin, tiny, tall = [0.1, 0.1, 0.9, 0.12], [0.5, 0.5, 0.505, 0.505], [0.3, 0.6, 0.32, 0.99]
    boxes = torch.tensor([thin, tiny, tall])
    iou = ops.box_iou(boxes, ops.box_convert(priors, "cxcywh", "xyxy"))
    assert (iou.amax(1) < 0.5).all()
    classes, _ = nb.MultiBoxLoss(priors).match([boxes], [torch.tensor([1, 2, 3])])
    assert sorted(classes[classes > 0].tolist()) == [1, 2, 3]
    for i in range(3):
        p = (classes[0] == i + 1).nonzero().item()
        assert iou[i, p] == iou[i].max()


@pytest.mark.parametrize("seed", range(20))
def test_two_objects_never_share_a_prior(nb, seed):
    """Small cells less than a position of the finest map apart: each keeps a prior of its own."""
    g = torch.Generator().manual_seed(seed)
    low = 0.3 + 0.4 * torch.rand(8, 1, 2, generator=g) + torch.tensor([[0.0, 0.0], [0.004, 0.002]])
    low = low.reshape(16, 2)
    boxes = torch.cat([low, low + 0.02], -1)
    criterion = nb.MultiBoxLoss(nb.create_prior_boxes())
    best = nb.box_iou(boxes, criterion.corners).argmax(1)
    assert len(best.unique()) < 16  # the best priors alone would not do
    classes, objects = criterion.match([boxes], [torch.arange(1, 17)])
    assert classes[classes > 0].unique().tolist() == list(range(1, 17))
    assert torch.equal(classes[classes > 0], objects[classes > 0] + 1)


def test_more_objects_than_priors_end(nb):
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 5)
    classes, _ = nb.match_one_image(boxes, torch.ones(5).long(), nb.quarters[:2], 0.5)
    assert classes.tolist() == [1, 1]


def test_matching_changes_nothing_that_it_is_given(nb):
    batch = example(1)
    before = batch.boxes[0].clone(), batch.labels[0].clone()
    nb.MultiBoxLoss(batch.priors).match(batch.boxes, batch.labels)
    assert torch.equal(batch.boxes[0], before[0]) and torch.equal(batch.labels[0], before[1])


@pytest.mark.parametrize("number", [0, 5000, 5776, 8731])
def test_the_map_of_a_prior(nb, number):
    maps = {0: 0, 5000: 0, 5776: 1, 8731: 5}
    assert nb.map_of_prior(number) == maps[number]


# --- loss


@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_the_loop(nb, seed):
    batch = example(seed)
    loss = call(nb.MultiBoxLoss(batch.priors), batch)
    slow = SlowLoss(batch)
    assert set(loss) == {"localization", "confidence"}
    assert loss["localization"].item() == pytest.approx(slow.localization, rel=1e-4)
    assert loss["confidence"].item() == pytest.approx(slow.confidence, rel=1e-4)


def test_mined_are_the_hardest_three_for_one(nb):
    batch = example(9)
    classes, _ = nb.MultiBoxLoss(batch.priors).match(batch.boxes, batch.labels)
    chosen = nb.mine_negatives(batch.scores, classes, 3)
    slow = SlowLoss(batch)
    for b in range(len(batch.boxes)):
        assert set(chosen[b].nonzero().flatten().tolist()) == slow.mined[b]
        assert len(slow.mined[b]) == 3 * len(slow.positives[b])


def test_more_negatives_are_not_mined_than_there_are(nb):
    classes = torch.tensor([[1, 1, 0, -1], [0, 0, 0, 0]])
    chosen = nb.mine_negatives(torch.zeros(2, 4, 3), classes, 3)
    assert chosen.tolist() == [[False, False, True, False], [False] * 4]


def test_gradient_is_the_derivative_of_the_paper(nb):
    """Softmax minus one-hot, and the difference cut to -1..1; both over N, zero elsewhere."""
    batch = example(3)
    locs = batch.locs.clone().requires_grad_(True)
    scores = batch.scores.clone().requires_grad_(True)
    loss = call(nb.MultiBoxLoss(batch.priors), batch, locs=locs, scores=scores)
    (loss["localization"] + loss["confidence"]).backward()
    slow = SlowLoss(batch)
    n = sum(len(one) for one in slow.positives)
    wanted_locs = torch.zeros_like(locs)
    wanted_scores = torch.zeros_like(scores)
    softmax = batch.scores.softmax(-1)
    for b in range(len(batch.boxes)):
        answers = dict.fromkeys(slow.mined[b], 0)
        answers.update(slow.positives[b])
        for p, label in answers.items():
            wanted_scores[b, p] = softmax[b, p]
            wanted_scores[b, p, label] -= 1
        for p in slow.positives[b]:
            box = batch.boxes[b][slow.matched[b][p]].tolist()
            target = torch.tensor(slow_offsets(box, batch.priors[p].tolist()))
            wanted_locs[b, p] = (batch.locs[b, p] - target).clamp(-1, 1)
    assert torch.allclose(locs.grad, wanted_locs / n, atol=1e-5)
    assert torch.allclose(scores.grad, wanted_scores / n, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, 8])
def test_finite_without_objects(nb, padding):
    """An image without objects, also in a batch of none, gives zero and a zero gradient."""
    batch = example(1)
    locs = batch.locs.clone().requires_grad_(True)
    scores = batch.scores.clone().requires_grad_(True)
    boxes = torch.zeros(3, padding, 4)
    labels = torch.zeros(3, padding, dtype=torch.int64)
    loss = nb.MultiBoxLoss(batch.priors)(locs, scores, boxes, labels)
    total = loss["localization"] + loss["confidence"]
    total.backward()
    assert total.item() == 0
    assert torch.isfinite(locs.grad).all() and torch.isfinite(scores.grad).all()


def test_an_empty_image_beside_a_full_one(nb):
    batch = example(2, objects=(5, 0))
    loss = call(nb.MultiBoxLoss(batch.priors), batch)
    first = {"locs": batch.locs[:1], "scores": batch.scores[:1]}
    first.update({"boxes": batch.boxes[:1], "labels": batch.labels[:1]})
    alone = call(nb.MultiBoxLoss(batch.priors), batch, **first)
    for key in loss:
        assert torch.isfinite(loss[key])
        assert loss[key].item() == pytest.approx(alone[key].item(), rel=1e-5)


def test_padding_does_not_matter(nb):
    """Boxes and labels may also be tensors (B, M, 4) and (B, M), padded by label 0 anywhere."""
    batch = example(5, objects=(3, 2, 1))
    boxes = torch.zeros(3, 8, 4)
    labels = torch.zeros(3, 8, dtype=torch.int64)
    for b in range(3):
        places = torch.arange(len(batch.labels[b])) * 2 + 1
        boxes[b, places] = batch.boxes[b]
        labels[b, places] = batch.labels[b]
    criterion = nb.MultiBoxLoss(batch.priors)
    lists = call(criterion, batch)
    padded = call(criterion, batch, boxes=boxes, labels=labels)
    assert all(torch.equal(lists[key], padded[key]) for key in lists)
    classes, objects = criterion.match(boxes, labels)
    assert torch.equal(labels.gather(1, objects)[classes > 0], classes[classes > 0])


def test_extreme_scores_stay_finite(nb):
    batch = example(6)
    locs, scores = batch.locs * 1e3, batch.scores * 1e4
    loss = call(nb.MultiBoxLoss(batch.priors), batch, locs=locs, scores=scores)
    assert all(torch.isfinite(value) for value in loss.values())


def test_parts_of_a_batch_add_up(nb):
    """The sums of the images, over the number of positives of all, are the loss of the batch."""
    batch = example(7)
    criterion = nb.MultiBoxLoss(batch.priors)
    whole = call(criterion, batch)
    localization = confidence = positives = 0
    for i in range(3):
        part = slice(i, i + 1)
        sums = criterion.sums(
            batch.locs[part], batch.scores[part], batch.boxes[part], batch.labels[part]
        )
        localization += sums[0].item()
        confidence += sums[1].item()
        positives += sums[2]
    assert localization / positives == pytest.approx(whole["localization"].item(), rel=1e-5)
    assert confidence / positives == pytest.approx(whole["confidence"].item(), rel=1e-5)


def test_the_real_number_of_priors_is_quick(nb):
    """8732 priors, a batch of 8: well under a second, so no Python loop over priors."""
    g = torch.Generator().manual_seed(0)
    low = torch.rand(8, 20, 2, generator=g) * 0.7
    boxes = torch.cat([low, low + 0.2], -1)
    labels = torch.randint(1, 4, (8, 20), generator=g)
    criterion = nb.MultiBoxLoss(nb.create_prior_boxes())
    locs, scores = torch.randn(8, 8732, 4, generator=g), torch.randn(8, 8732, 4, generator=g)
    criterion(locs, scores, boxes, labels)
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    criterion(locs, scores, boxes, labels)
    assert time.process_time() - start < 2


# --- labels that leave cells out


def with_skipped_outputs(batch, seed=0):
    """The batch's scores with three more outputs for skipped cells, (B, P, 7)."""
    g = torch.Generator().manual_seed(seed)
    more = torch.randn(*batch.scores.shape[:2], 3, generator=g)
    return torch.cat([batch.scores, more], -1)


def partial(nb, batch, scores=None, labels=None, complete=(True, True, True)):
    """The loss of section 9b, with outputs for skipped cells unless scores say otherwise."""
    scores = with_skipped_outputs(batch) if scores is None else scores
    labels = batch.labels if labels is None else labels
    criterion = nb.PartialLabelLoss(batch.priors)
    return criterion(batch.locs, scores, batch.boxes, labels, torch.tensor(complete))


def test_an_ignored_object_is_neither_found_nor_background(nb):
    """Label -1, a cell that a crop cut: no prior learns it, and the priors on it are not mined."""
    batch = example(8, objects=(3, 2, 3))
    criterion = nb.PartialLabelLoss(batch.priors)
    ignored = [labels.clone() for labels in batch.labels]
    removed = [labels.clone() for labels in batch.labels]
    for b in range(3):
        ignored[b][1] = -1
        removed[b][1] = 0
    classes, _ = criterion.match(batch.boxes, ignored)
    without, _ = criterion.match(batch.boxes, removed)
    assert torch.equal(classes > 0, without > 0)
    chosen = nb.mine_negatives(batch.scores, classes, 3)
    corners = ops.box_convert(batch.priors, "cxcywh", "xyxy")
    for b in range(3):
        on_it = ops.box_iou(batch.boxes[b][1:2], corners)[0] > 0.5
        assert not (chosen[b] & on_it & (classes[b] <= 0)).any()
    loss = partial(nb, batch, labels=ignored)
    assert all(torch.isfinite(value) for value in loss.values())


def test_background_and_skipped_are_one_answer_where_labels_are_incomplete(nb):
    """There the loss of a mined prior is -log(p(background) + p(skipped)), by a slow reference; an
    image whose every cell is known is judged by the paper's loss.
    """
    batch = example(4)
    scores = with_skipped_outputs(batch).requires_grad_()
    complete = [True, False, False]
    found = partial(nb, batch, scores=scores, complete=complete)["confidence"]
    classes, _ = nb.MultiBoxLoss(batch.priors).match(batch.boxes, batch.labels)
    expected = 0.0
    mined = []
    for b in range(3):
        p = scores[b].detach().double().softmax(-1)
        nothing = p[:, 0] if complete[b] else p[:, 0] + p[:, 4:].sum(-1)
        positive = (classes[b] > 0).nonzero()[:, 0].tolist()
        free = (classes[b] == 0).nonzero()[:, 0].tolist()
        free.sort(key=lambda i, nothing=nothing: float(nothing[i]))
        mined.append(free[: 3 * len(positive)])
        expected -= sum(math.log(p[i, classes[b, i]]) for i in positive)
        expected -= sum(math.log(nothing[i]) for i in mined[b])
    assert found.item() == pytest.approx(expected / int((classes > 0).sum()), rel=1e-4)
    found.backward()
    gradient = scores.grad[1][mined[1]]  # of the mined priors of an incomplete image
    assert (gradient[:, 1:4] > 0).all()  # no box would be drawn: boxed cells become less likely
    assert (gradient[:, [0, 4, 5, 6]] < 0).all()  # background and skipped ones more, by their share
    ratio = gradient / scores.detach()[1][mined[1]].softmax(-1)
    assert torch.allclose(ratio[:, [4, 5, 6]], ratio[:, :1].expand(-1, 3), rtol=1e-3)


def test_complete_labels_do_not_change_the_loss_of_the_paper(nb):
    batch = example(6)
    scores = with_skipped_outputs(batch)
    plain = call(nb.MultiBoxLoss(batch.priors), batch, scores=scores)
    known = partial(nb, batch, scores=scores)
    assert all(torch.equal(plain[key], known[key]) for key in plain)


def test_skipped_cells_are_targets_of_their_own_or_left_out(nb):
    """Labels above C are classes where the model has outputs for them; else they count like -1."""
    batch = example(7)
    skipped = []
    ignored = []
    for labels in batch.labels:
        second = torch.arange(len(labels)) % 2 == 1
        skipped.append(torch.where(second, labels + 3, labels))
        ignored.append(torch.where(second, -1, labels))
    assert any((labels > 3).any() for labels in skipped)
    wide = with_skipped_outputs(batch)
    loss = partial(nb, batch, scores=wide, labels=skipped)
    slow = SlowLoss(batch._replace(scores=wide, labels=skipped))
    assert loss["confidence"].item() == pytest.approx(slow.confidence, rel=1e-4)
    narrow = partial(nb, batch, scores=batch.scores, labels=skipped)
    left_out = partial(nb, batch, scores=batch.scores, labels=ignored)
    assert all(torch.equal(narrow[key], left_out[key]) for key in narrow)


def test_the_hardest_negatives_are_what_nobody_boxed(nb):
    """At most twelve, the hardest first, none on a label, none on another."""
    priors, boxes = nb.create_prior_boxes(), torch.tensor([[0.1, 0.1, 0.3, 0.3]])
    scores = torch.randn(8732, 4, generator=torch.Generator().manual_seed(0))
    mined = torch.rand(8732, generator=torch.Generator().manual_seed(1)) < 0.05
    found, chances = nb.hardest_negatives(mined, priors, scores, boxes)
    assert len(chances) == 12 and torch.equal(chances, chances.sort(descending=True).values)
    assert (ops.box_iou(found, boxes) < 0.1).all()
    assert (ops.box_iou(found, found).fill_diagonal_(0) < 0.11).all()
    free = ops.box_iou(ops.box_convert(priors, "cxcywh", "xyxy"), boxes)[:, 0] < 0.1
    assert chances[0] == (1 - scores.softmax(-1)[:, 0])[mined & free].max()
