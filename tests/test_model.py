"""SSD300 equals torchvision's ssd300_vgg16; the start of training; VGG-16's features."""

import math

import pytest
import torch
from torchvision.models.detection import ssd300_vgg16


@pytest.fixture(scope="module")
def pair(nb):
    """(ours, torchvision's) with the same random weights; their parts stand in the same order."""
    torch.manual_seed(0)
    reference = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=5).eval()
    with torch.no_grad():
        reference.backbone.scale_weight.uniform_(10, 20)
    model = nb.SSD300(5).eval()
    theirs = [*reference.backbone.state_dict().items()]
    theirs += [
        (f"loc.{key}", value) for key, value in reference.head.regression_head.state_dict().items()
    ]
    theirs += [
        (f"conf.{key}", value)
        for key, value in reference.head.classification_head.state_dict().items()
    ]
    own = model.state_dict()
    ours = [key for key, _ in model.named_parameters()]
    ours.sort(key=lambda key: key.startswith("loc.") + 2 * key.startswith("conf."))
    assert len(ours) == len(theirs)
    for key, (name, value) in zip(ours, theirs, strict=True):
        assert own[key].numel() == value.numel(), (key, name)
        own[key] = value.view_as(own[key])
    model.load_state_dict(own)
    return model, reference


def test_feature_maps_equal_torchvision(pair):
    model, reference = pair
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(1)) * 50
    with torch.no_grad():
        ours, theirs = model.feature_maps(images), list(reference.backbone(images).values())
    assert [tuple(x.shape[1:]) for x in ours] == [
        (512, 38, 38),
        (1024, 19, 19),
        (512, 10, 10),
        (256, 5, 5),
        (256, 3, 3),
        (256, 1, 1),
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_head_outputs_equal_torchvision(pair):
    model, reference = pair
    images = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        locs, scores = model(images)
        outputs = reference.head(list(reference.backbone(images).values()))
    assert locs.shape == (1, 8732, 4) and scores.shape == (1, 8732, 5)
    assert torch.allclose(locs, outputs["bbox_regression"], atol=1e-4)
    assert torch.allclose(scores, outputs["cls_logits"], atol=1e-4)


def test_conv4_3_is_normalised_and_rescaled_from_20(nb):
    torch.manual_seed(0)
    model = nb.SSD300(4).eval()
    with torch.no_grad():
        first = model.feature_maps(torch.randn(1, 3, 300, 300) * 50)[0]
    norms = first.norm(dim=1)
    assert torch.allclose(norms[norms > 1], torch.tensor(20.0), atol=1e-2)


@pytest.mark.parametrize("classes", [2, 7])
def test_any_number_of_classes(nb, classes):
    with torch.no_grad():
        locs, scores = nb.SSD300(classes).eval()(torch.zeros(2, 3, 300, 300))
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, classes)


def test_first_loss_is_that_of_an_undecided_network(nb, vgg_weights, drawn_bccd):
    """With ImageNet features the confidence term starts near its undecided value."""
    split = nb.SmearSplit(nb.dataset_root(drawn_bccd), "train")
    images, boxes, labels = nb.SmearDataset(split, 300).batch(range(4))
    pixels = nb.normalize(images)
    weights = nb.vgg16_features(str(vgg_weights))
    model = nb.build_model(4, weights, pixels, seed=0)
    with torch.no_grad():
        locs, scores = model(pixels)
        loss = nb.MultiBoxLoss(nb.create_prior_boxes())(locs, scores, boxes, labels)
    undecided = 4 * math.log(4)  # one positive and three negatives, each at ln 4
    assert 0.5 * undecided < loss["confidence"].item() < 1.6 * undecided
    assert loss["localization"].item() < 12


def test_the_start_is_as_cautious_with_outputs_for_skipped_cells(nb):
    """The background starts at a probability of 0.7, however many outputs there are."""
    for outputs in (4, 7):
        model = nb.build_model(outputs, None, torch.randn(1, 3, 300, 300) * 50, seed=0)
        for head in model.conf:
            chances = head.bias.view(-1, outputs).softmax(-1)
            assert torch.allclose(chances[:, 0], torch.tensor(0.7))
            assert torch.allclose(chances[:, 1:], torch.tensor(0.3 / (outputs - 1)))
    assert (
        nb.number_of_outputs(["a", "b"], False) == 3 and nb.number_of_outputs(["a", "b"], True) == 5
    )


def test_vgg_weights_arrive_unchanged_and_frozen(nb, vgg_weights):
    weights = nb.vgg16_features(str(vgg_weights))
    raw = torch.load(vgg_weights, map_location="cpu", weights_only=True)
    assert len(weights) == 26
    model = nb.build_model(4, weights, torch.randn(2, 3, 300, 300) * 50, seed=0)
    state = model.vgg.state_dict()
    for key, value in raw.items():
        if key.removeprefix("features.") in state:
            assert torch.equal(state[key.removeprefix("features.")], value.float()), key
    frozen = [not p.requires_grad for p in model.vgg.parameters()]
    assert frozen == [True] * 2 * (0, 2, 4, 7, 10, 13)[nb.FROZEN_BLOCKS] + [False] * (
        26 - 2 * (0, 2, 4, 7, 10, 13)[nb.FROZEN_BLOCKS]
    )


def test_without_weights_it_starts_by_itself(nb):
    model = nb.build_model(4, None, torch.randn(2, 3, 300, 300) * 50, seed=0)
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        locs, scores = model(torch.randn(1, 3, 300, 300) * 50)
    assert torch.isfinite(locs).all() and scores.abs().max() < 10


def test_same_seed_same_start(nb):
    images = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(0)) * 50
    one, two = (nb.build_model(4, None, images, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_wrong_weight_files_are_refused(nb, tmp_path):
    with pytest.raises(nb.StudyError, match="absent.pth"):
        nb.vgg16_features(str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(nb.StudyError, match="text.pth"):
        nb.vgg16_features(str(tmp_path / "text.pth"))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(nb.StudyError, match="part.pth"):
        nb.vgg16_features(str(tmp_path / "part.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(nb.StudyError, match="list.pth"):
        nb.vgg16_features(str(tmp_path / "list.pth"))
