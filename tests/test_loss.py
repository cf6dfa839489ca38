"""Matching, mining and loss against a slow loop from the paper (Liu et al. 2016, section 2.2)."""

import math

import pytest
import torch
from torchvision import ops

CLASSES = 4


def example(seed, images=3, count=300, objects=(4, 1, 7)):
    """Priors (P, 4) cxcywh, scores and locs, and padded boxes and labels of a small batch."""
    g = torch.Generator().manual_seed(seed)
    centre, side = torch.rand(count, 2, generator=g), 0.05 + 0.4 * torch.rand(count, 2, generator=g)
    priors = torch.cat([centre, side], 1)
    boxes, labels = torch.zeros(images, 8, 4), torch.zeros(images, 8, dtype=torch.int64)
    for row, n in enumerate(objects):
        low = torch.rand(n, 2, generator=g) * 0.6
        boxes[row, :n] = torch.cat([low, low + 0.08 + 0.3 * torch.rand(n, 2, generator=g)], 1)
        labels[row, :n] = torch.randint(1, CLASSES, (n,), generator=g)
    locs = torch.randn(images, count, 4, generator=g) * 2
    scores = torch.randn(images, count, CLASSES, generator=g) * 2
    return priors, locs, scores, boxes, labels


def slow_match(priors, boxes, labels):
    """For each prior its object or None: any overlap of 0.5, first of all one for each object."""
    corners = ops.box_convert(priors, "cxcywh", "xyxy").tolist()

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    objects = [
        (i, box)
        for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True))
        if label
    ]
    matched = [None] * len(corners)
    for p, corner in enumerate(corners):
        best = max(((iou(box, corner), i) for i, box in objects), default=(0, None))
        if best[0] >= 0.5:
            matched[p] = best[1]
    pairs = sorted(
        (-iou(box, corner), i, p) for i, box in objects for p, corner in enumerate(corners)
    )
    served, taken = set(), set()
    for _, i, p in pairs:  # the closest pair first: no two objects share a prior
        if i not in served and p not in taken:
            served.add(i)
            taken.add(p)
            matched[p] = i
    return matched


def slow_offsets(box, prior):
    """Equation 2 of the paper, divided by the variances 0.1 and 0.2."""
    (x0, y0, x1, y1), (cx, cy, w, h) = box, prior
    return [
        ((x0 + x1) / 2 - cx) / w / 0.1,
        ((y0 + y1) / 2 - cy) / h / 0.1,
        math.log((x1 - x0) / w) / 0.2,
        math.log((y1 - y0) / h) / 0.2,
    ]


def slow_loss(priors, locs, scores, boxes, labels):
    """(localization, confidence), and per image which priors are positive and which are mined."""
    localization = confidence = 0.0
    positives, mined = [], []
    for b in range(len(boxes)):
        matched = slow_match(priors, boxes[b], labels[b])
        log_softmax = scores[b].double().log_softmax(-1).tolist()
        positive = [p for p, i in enumerate(matched) if i is not None]
        for p in positive:
            target = slow_offsets(boxes[b, matched[p]].tolist(), priors[p].tolist())
            for predicted, wanted in zip(locs[b, p].tolist(), target, strict=True):
                d = abs(predicted - wanted)
                localization += 0.5 * d * d if d < 1 else d - 0.5
            confidence -= log_softmax[p][int(labels[b, matched[p]])]
        negatives = sorted(
            (p for p, i in enumerate(matched) if i is None), key=lambda p: log_softmax[p][0]
        )
        negatives = negatives[: 3 * len(positive)]
        confidence -= sum(log_softmax[p][0] for p in negatives)
        positives.append({p: int(labels[b, matched[p]]) for p in positive})
        mined.append(set(negatives))
    n = max(1, sum(map(len, positives)))
    return localization / n, confidence / n, positives, mined


@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_the_loop(nb, seed):
    priors, _, _, boxes, labels = example(seed)
    classes, item = nb.MultiBoxLoss(priors).match(boxes, labels)
    assert classes.shape == item.shape == (len(boxes), len(priors))
    for b in range(len(boxes)):
        matched = slow_match(priors, boxes[b], labels[b])
        assert classes[b].tolist() == [0 if i is None else int(labels[b, i]) for i in matched]
        assert all(item[b, p] == i for p, i in enumerate(matched) if i is not None)


@pytest.mark.parametrize("seed", range(4))
def test_matching_image_by_image_equals_the_whole_batch_at_once(nb, seed):
    """A CPU goes image by image, a GPU takes the batch; padding and cut cells stand anywhere."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(5, 9, 2, generator=g) * 0.8
    boxes = torch.cat([low, low + 0.02 + 0.2 * torch.rand(5, 9, 2, generator=g)], -1)
    labels = torch.randint(-1, 4, (5, 9), generator=g)
    labels[4] = 0
    criterion = nb.MultiBoxLoss(nb.create_prior_boxes())
    classes, item = criterion.match(boxes, labels)
    together, items = nb.match_priors(boxes, labels, criterion.corners, criterion.match_iou)
    assert torch.equal(classes, together) and (classes < 0).any() and (classes > 0).any()
    assert torch.equal(item[classes > 0], items[classes > 0])
    assert torch.equal(labels.gather(1, item)[classes > 0], classes[classes > 0])


@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_the_loop(nb, seed):
    priors, locs, scores, boxes, labels = example(seed)
    loss = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    localization, confidence, _, _ = slow_loss(priors, locs, scores, boxes, labels)
    assert set(loss) == {"localization", "confidence"}
    assert loss["localization"].item() == pytest.approx(localization, rel=1e-4)
    assert loss["confidence"].item() == pytest.approx(confidence, rel=1e-4)


def test_mined_are_the_hardest_three_for_one(nb):
    priors, locs, scores, boxes, labels = example(9)
    criterion = nb.MultiBoxLoss(priors)
    chosen = nb.mine_negatives(scores, criterion.match(boxes, labels)[0], 3)
    _, _, positives, mined = slow_loss(priors, locs, scores, boxes, labels)
    for b in range(len(boxes)):
        assert set(chosen[b].nonzero().flatten().tolist()) == mined[b]
        assert len(mined[b]) == 3 * len(positives[b])


def test_gradient_is_the_derivative_of_the_paper(nb):
    """Softmax minus one-hot, and the difference cut to -1..1; both over N, zero elsewhere."""
    priors, locs, scores, boxes, labels = example(3)
    locs.requires_grad_(True)
    scores.requires_grad_(True)
    loss = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    (loss["localization"] + loss["confidence"]).backward()
    _, _, positives, mined = slow_loss(priors, locs.detach(), scores.detach(), boxes, labels)
    n = sum(map(len, positives))
    want_locs, want_scores = torch.zeros_like(locs), torch.zeros_like(scores)
    softmax = scores.detach().softmax(-1)
    for b in range(len(boxes)):
        matched = slow_match(priors, boxes[b], labels[b])
        for p, label in [*positives[b].items(), *((p, 0) for p in mined[b])]:
            want_scores[b, p] = softmax[b, p]
            want_scores[b, p, label] -= 1
        for p in positives[b]:
            target = torch.tensor(slow_offsets(boxes[b, matched[p]].tolist(), priors[p].tolist()))
            want_locs[b, p] = (locs.detach()[b, p] - target).clamp(-1, 1)
    assert torch.allclose(locs.grad, want_locs / n, atol=1e-5)
    assert torch.allclose(scores.grad, want_scores / n, atol=1e-5)


@pytest.mark.parametrize("width", [0, 1, 8])
def test_finite_without_objects(nb, width):
    """An image without objects, also in a batch of none, gives zero and a zero gradient."""
    priors, locs, scores, _, _ = example(1)
    locs.requires_grad_(True)
    scores.requires_grad_(True)
    boxes, labels = (
        torch.zeros(3, max(width, 1), 4),
        torch.zeros(3, max(width, 1), dtype=torch.int64),
    )
    loss = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    total = loss["localization"] + loss["confidence"]
    total.backward()
    assert total.item() == 0
    assert torch.isfinite(locs.grad).all() and torch.isfinite(scores.grad).all()


def test_an_empty_image_beside_a_full_one(nb):
    priors, locs, scores, boxes, labels = example(2, images=2, objects=(5, 0))
    loss = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    alone = nb.MultiBoxLoss(priors)(locs[:1], scores[:1], boxes[:1], labels[:1])
    for key in loss:
        assert torch.isfinite(loss[key]) and loss[key].item() == pytest.approx(
            alone[key].item(), rel=1e-5
        )


def test_padding_does_not_matter(nb):
    priors, locs, scores, boxes, labels = example(5, objects=(3, 2, 1))
    short = nb.MultiBoxLoss(priors)(locs, scores, boxes[:, :3], labels[:, :3])
    long = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    assert all(short[key].item() == pytest.approx(long[key].item(), rel=1e-6) for key in short)


def test_extreme_scores_stay_finite(nb):
    priors, locs, scores, boxes, labels = example(6)
    loss = nb.MultiBoxLoss(priors)(locs * 1e3, scores * 1e4, boxes, labels)
    assert all(torch.isfinite(value) for value in loss.values())


def test_parts_of_a_batch_add_up(nb):
    """Micro-batches with the whole batch's number of positives equal the whole batch."""
    priors, locs, scores, boxes, labels = example(7)
    criterion = nb.MultiBoxLoss(priors)
    whole = criterion(locs, scores, boxes, labels)
    positives = (criterion.match(boxes, labels)[0] > 0).sum()
    parts = [
        criterion(*(x[i : i + 1] for x in (locs, scores, boxes, labels)), positives=positives)
        for i in range(3)
    ]
    for key in whole:
        assert sum(part[key].item() for part in parts) == pytest.approx(whole[key].item(), rel=1e-5)


def test_every_object_keeps_its_best_prior(nb):
    """Objects that overlap no prior by 0.5 are learnt by the best one all the same."""
    priors = nb.create_prior_boxes()
    boxes = torch.tensor(
        [[[0.1, 0.1, 0.9, 0.12], [0.5, 0.5, 0.505, 0.505], [0.3, 0.6, 0.32, 0.99]]]
    )
    iou = ops.box_iou(boxes[0], ops.box_convert(priors, "cxcywh", "xyxy"))
    assert (iou.amax(1) < 0.5).all()
    classes, _ = nb.MultiBoxLoss(priors).match(boxes, torch.tensor([[1, 2, 3]]))
    assert sorted(classes[classes > 0].tolist()) == [1, 2, 3]
    for i in range(3):
        p = (classes[0] == i + 1).nonzero().item()
        assert iou[i, p] == iou[i].max()


def test_an_ignored_object_is_neither_found_nor_background(nb):
    """Label -1, a cell that a crop cut: no prior learns it, and the priors on it are not mined."""
    priors, locs, scores, boxes, labels = example(8, objects=(3, 2, 3))
    criterion = nb.MultiBoxLoss(priors)
    ignored = labels.clone()
    ignored[:, 1] = -1
    classes, _ = criterion.match(boxes, ignored)
    removed = labels.clone()
    removed[:, 1] = 0
    assert torch.equal(classes > 0, criterion.match(boxes, removed)[0] > 0)
    chosen = nb.mine_negatives(scores, classes, 3)
    corners = ops.box_convert(priors, "cxcywh", "xyxy")
    for b in range(len(boxes)):
        on_it = ops.box_iou(boxes[b, 1:2], corners)[0] > 0.5
        assert not (chosen[b] & on_it & (classes[b] <= 0)).any()
    assert all(torch.isfinite(value) for value in criterion(locs, scores, boxes, ignored).values())


@pytest.mark.parametrize("seed", range(20))
def test_two_objects_never_share_a_prior(nb, seed):
    """Small cells less than a cell of the finest map apart: each keeps a prior of its own."""
    g = torch.Generator().manual_seed(seed)
    low = (
        0.3 + 0.4 * torch.rand(1, 8, 1, 2, generator=g) + torch.tensor([[0.0, 0.0], [0.004, 0.002]])
    )
    low = low.reshape(1, 16, 2)
    boxes, labels = torch.cat([low, low + 0.02], -1), torch.arange(1, 17)[None]
    criterion = nb.MultiBoxLoss(nb.create_prior_boxes())
    best = nb.box_iou(boxes[0], criterion.corners).argmax(1)
    assert len(best.unique()) < 16  # the best priors alone would not do
    classes, item = criterion.match(boxes, labels)
    assert classes[classes > 0].unique().tolist() == list(range(1, 17))
    assert torch.equal(classes[classes > 0], item[classes > 0] + 1)


def test_more_objects_than_priors_end(nb):
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5]] * 5])
    classes, _ = nb.match_priors(boxes, torch.ones(1, 5).long(), nb.quarters[:2], 0.5)
    assert classes.tolist() == [[1, 1]]


def test_background_and_skipped_are_one_answer_where_labels_are_incomplete(nb):
    """There the loss of a mined prior is -log(p(background) + p(skipped)), by a slow reference; an
    image whose every cell is known is judged by the paper's loss.
    """
    priors, locs, scores, boxes, labels = example(4)
    scores = torch.cat([scores, torch.randn(*scores.shape[:2], 3)], -1).requires_grad_()
    complete = torch.tensor([True, False, False])
    criterion = nb.MultiBoxLoss(priors)
    found = criterion(locs, scores, boxes, labels, complete)["confidence"]
    classes, expected, used = criterion.match(boxes, labels)[0], 0.0, []
    for b in range(3):
        p = scores[b].detach().double().softmax(-1)
        nothing = p[:, 0] if complete[b] else p[:, 0] + p[:, 4:].sum(-1)
        positive = (classes[b] > 0).nonzero()[:, 0].tolist()
        free = (classes[b] == 0).nonzero()[:, 0].tolist()
        hardest = sorted(free, key=lambda i: float(nothing[i]))[: 3 * len(positive)]
        expected -= sum(math.log(p[i, classes[b, i]]) for i in positive)
        expected -= sum(math.log(nothing[i]) for i in hardest)
        used.append((positive, hardest))
    assert found.item() == pytest.approx(expected / int((classes > 0).sum()), rel=1e-4)
    found.backward()
    gradient = scores.grad[1][used[1][1]]  # of the mined priors of an incomplete image
    assert (gradient[:, 1:4] > 0).all()  # no box would be drawn: boxed cells become less likely
    assert (gradient[:, [0, 4, 5, 6]] < 0).all()  # background and skipped ones more, by their share
    ratio = gradient / scores.detach()[1][used[1][1]].softmax(-1)
    assert torch.allclose(ratio[:, [4, 5, 6]], ratio[:, :1].expand(-1, 3), rtol=1e-3)


def test_complete_labels_do_not_change_the_loss_of_the_paper(nb):
    priors, locs, scores, boxes, labels = example(6)
    scores = torch.cat([scores, torch.randn(*scores.shape[:2], 3)], -1)
    plain = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels)
    known = nb.MultiBoxLoss(priors)(locs, scores, boxes, labels, torch.ones(3, dtype=torch.bool))
    assert all(torch.equal(plain[key], known[key]) for key in plain)


def test_skipped_cells_are_targets_of_their_own_or_left_out(nb):
    """Labels above C are classes where the model has outputs for them; else they count like -1."""
    priors, locs, scores, boxes, labels = example(7)
    skipped = torch.where(labels > 0, labels + 3 * (torch.arange(8) % 2), labels)
    wide = torch.cat([scores, torch.randn(*scores.shape[:2], 3)], -1)
    classes, _ = nb.MultiBoxLoss(priors).match(boxes, skipped)
    assert (classes > 3).any()
    loss = nb.MultiBoxLoss(priors)(locs, wide, boxes, skipped)
    expected = slow_loss(priors, locs, wide, boxes, skipped)
    assert loss["confidence"].item() == pytest.approx(expected[1], rel=1e-4)
    narrow = nb.MultiBoxLoss(priors)(locs, scores, boxes, skipped)
    ignored = nb.MultiBoxLoss(priors)(locs, scores, boxes, torch.where(skipped > 3, -1, skipped))
    assert all(torch.equal(narrow[key], ignored[key]) for key in narrow)
    known, dropped = (nb.MultiBoxLoss(priors).match(boxes, skipped, n)[0] for n in (7, 4))
    assert torch.equal(known, classes) and dropped.max() <= 3  # counts what the loss counts


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


def test_the_real_number_of_priors_is_quick(nb):
    """8732 priors, a batch of 8: well under a second, so no Python loop over priors."""
    import time

    g = torch.Generator().manual_seed(0)
    priors = nb.create_prior_boxes()
    low = torch.rand(8, 20, 2, generator=g) * 0.7
    boxes = torch.cat([low, low + 0.2], -1)
    labels = torch.randint(1, 4, (8, 20), generator=g)
    criterion = nb.MultiBoxLoss(priors)
    locs, scores = torch.randn(8, 8732, 4, generator=g), torch.randn(8, 8732, 4, generator=g)
    criterion(locs, scores, boxes, labels)
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    criterion(locs, scores, boxes, labels)
    assert time.process_time() - start < 2
