"""The audit finds each fault where it was planted, finds nothing in clean drawn data, and BCCD's known faults."""

import json
import sys

import planting
import pytest
import synthetic_bccd as synthetic
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import find_shared_fields as search  # noqa: E402


@pytest.fixture
def clean(tmp_path):
    """A drawn dataset of 10, 4 and 4 smears that a test may spoil: its BCCD folder."""
    return (
        synthetic.draw_dataset(tmp_path / "BCCD_Dataset", train=10, val=4, test=4, seed=21) / "BCCD"
    )


def load(nb, bccd):
    return {split: nb.SmearSplit(bccd, split) for split in ("train", "val", "test")}


def labels_of(nb, bccd):
    """audit_labels without empty rows: {fault: [(split, id), ...]}, and the whole findings."""
    findings = nb.audit_labels(load(nb, bccd))
    return {fault: [row[:2] for row in rows] for fault, rows in findings.items() if rows}, findings


def shared(nb, bccd):
    """Pairs of (split, id) that share a field, each as a set, with the share in common."""
    datasets = load(nb, bccd)
    split_of = {i: split for split, dataset in datasets.items() for i in dataset.ids}
    pixels, names = search.thumbnails(datasets)
    found = {}
    for i, j, _, common, _ in search.find_shared_fields(pixels):
        found[frozenset((split_of[name], name) for name in (names[i], names[j]))] = common
    return found


def test_clean_data_has_no_fault(nb, clean):
    assert labels_of(nb, clean)[0] == {}
    assert shared(nb, clean) == {}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_zero_area_box(nb, clean, split):
    name = planting.split_ids(clean, split)[2]
    box = planting.zero_area_box(clean, name)
    found, findings = labels_of(nb, clean)
    assert list(found.values()) == [[(split, name)]]
    assert next(rows for rows in findings.values() if rows)[0][2] == box


@pytest.mark.parametrize("class_name", ["RBC", "WBC"])
def test_a_duplicate_box(nb, clean, class_name):
    name = planting.split_ids(clean, "val")[1]
    planting.duplicate_box(clean, name, class_name)
    found, _ = labels_of(nb, clean)
    assert list(found.values()) == [[("val", name)]]
    assert "duplicate" in next(iter(found))


def test_an_image_without_a_red_cell(nb, clean):
    names = planting.split_ids(clean, "train")[3], planting.split_ids(clean, "test")[0]
    for name in names:
        planting.without_red_cells(clean, name)
    found, _ = labels_of(nb, clean)
    assert list(found.values()) == [[("train", names[0]), ("test", names[1])]]


def test_a_near_duplicate_in_another_split(nb, clean):
    name = planting.split_ids(clean, "train")[5]
    copy = planting.near_duplicate(clean, name, "test")
    found = shared(nb, clean)
    assert set(found) == {frozenset({("train", name), ("test", copy)})}
    assert next(iter(found.values())) > 0.95


@pytest.mark.parametrize(
    ("shift", "seed"), [((260, 70), 77), ((-180, 160), 78), ((0, 240), 79), ((330, 0), 80)]
)
def test_fields_that_overlap_across_splits(nb, clean, shift, seed):
    names = planting.overlapping_fields(clean, "train", "test", shift=shift, seed=seed)
    found = shared(nb, clean)
    assert set(found) == {frozenset({("train", names[0]), ("test", names[1])})}
    common = (640 - abs(shift[0])) * (480 - abs(shift[1])) / (640 * 480)
    assert next(iter(found.values())) == pytest.approx(common, abs=0.05)


def test_all_faults_at_once(nb, clean):
    train, val = planting.split_ids(clean, "train"), planting.split_ids(clean, "val")
    planting.zero_area_box(clean, train[0])
    planting.duplicate_box(clean, train[1])
    planting.without_red_cells(clean, val[0])
    copy = planting.near_duplicate(clean, train[2], "val")
    fields = planting.overlapping_fields(clean, "val", "test")
    found, _ = labels_of(nb, clean)
    assert sorted(found.values()) == sorted(
        [[("train", train[0])], [("train", train[1])], [("val", val[0])]]
    )
    assert set(shared(nb, clean)) == {
        frozenset({("train", train[2]), ("val", copy)}),
        frozenset({("val", fields[0]), ("test", fields[1])}),
    }


@pytest.fixture(scope="module")
def real_findings(nb, bccd_root):
    """The label faults of BCCD, and the pairs of images that the committed list has."""
    datasets = load(nb, nb.dataset_root(bccd_root))
    return nb.audit_labels(datasets), nb.read_shared_fields(ROOT / nb.SHARED_FIELDS, datasets)


def test_the_committed_list_is_what_the_search_finds(nb, bccd_root):
    datasets = load(nb, nb.dataset_root(bccd_root))
    pixels, names = search.thumbnails(datasets)
    found = {}
    for i, j, _, share, shift in search.find_shared_fields(pixels):
        found[names[i], names[j]] = (round(share, 4), shift)
    listed = {}
    for row in json.loads((ROOT / nb.SHARED_FIELDS).read_text("utf-8"))["pairs"]:
        listed[tuple(row["images"])] = (row["share"], row["shift"])
    assert found == listed


def rows(findings, word):
    """The (split, number of the image) of the fault whose name holds the word."""
    key = next(name for name in findings if word in name)
    return sorted((split, int(name.split("_")[1])) for split, name, _ in findings[key])


def test_known_label_faults_of_bccd(real_findings):
    findings, _ = real_findings
    assert rows(findings, "zero") == [("train", 343), ("val", 338)]
    duplicates = {("train", n) for n in (20, 100, 251, 403)} | {
        ("val", 104),
        ("val", 331),
        ("test", 284),
    }
    assert set(rows(findings, "duplicate")) == duplicates
    without = [split for split, _ in rows(findings, "RBC")]
    assert {split: without.count(split) for split in ("train", "val", "test")} == {
        "train": 8,
        "val": 4,
        "test": 3,
    }


def test_known_shared_fields_of_bccd(real_findings):
    """29 pairs from different splits are known to share a field; nine test smears share one with a training smear."""
    _, pairs = real_findings
    across = [pair for pair in pairs if pair.first[0] != pair.second[0]]
    assert 26 <= len(across) <= 36
    with_train = set()
    for pair in across:
        if {pair.first[0], pair.second[0]} == {"train", "test"}:
            with_train |= {name for split, name in pair[:2] if split == "test"}
    known = {19, 41, 161, 205, 225, 229, 233, 249, 365}
    found = {int(name.split("_")[1]) for name in with_train}
    assert len(found & known) >= 8 and len(found - known) <= 2
    nearly_identical = [{pair.first[1], pair.second[1]} for pair in pairs if pair.share > 0.95]
    assert {"BloodImage_00037", "BloodImage_00038"} in nearly_identical


def test_without_a_list_or_with_that_of_other_images_nothing_is_shared(nb, clean, tmp_path):
    datasets = load(nb, clean)
    assert nb.read_shared_fields(tmp_path / "absent.json", datasets) == []
    assert nb.read_shared_fields("", datasets) == []
    assert nb.read_shared_fields(ROOT / nb.SHARED_FIELDS, datasets) == []


@pytest.mark.parametrize(("dy", "dx"), [(12, -24), (-12, 24), (0, 0), (40, 5)])
def test_the_rectangles_of_two_images_show_the_same(nb, dy, dx):
    """What the first shows at its rectangle the second shows at its own."""
    import numpy as np

    glass = np.random.default_rng(0).random((200, 200))
    first, second = glass[80:128, 80:144], glass[80 + dy : 128 + dy, 80 + dx : 144 + dx]
    x, y, width, height = nb.overlap_rectangle(dy, dx)
    other_x, other_y, _, _ = nb.overlap_rectangle(-dy, -dx)
    one = first[y : y + height, x : x + width]
    two = second[other_y : other_y + height, other_x : other_x + width]
    assert one.shape == (height, width) and np.array_equal(one, two)


def test_fields_in_one_split_and_strangers(nb):
    """Two crops of one drawn field are found with their share in common, a third picture is not."""
    import torch

    field = torch.rand(1, 1, 17, 26, generator=torch.Generator().manual_seed(4)) * 255
    field = torch.nn.functional.interpolate(field, (68, 104), mode="bicubic")[0, 0]
    pixels = torch.stack([field[:48, :64], field.flip(0)[:48, :64], field[18:66, 10:74]])
    ((first, second, correlation, share, shift),) = search.find_shared_fields(pixels)
    assert (first, second) == (0, 2) and correlation > 0.9
    assert share == pytest.approx(30 * 54 / (48 * 64), abs=0.03)
    assert shift == [18, 10]


def test_pictures_without_contrast_share_nothing(nb):
    import torch

    assert search.find_shared_fields(torch.full((3, 48, 64), 200.0)) == []
    assert search.find_shared_fields(torch.rand(1, 48, 64)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATCH_SIZE", 0),
        ("NUM_EPOCHS", 2.5),
        ("NUM_EPOCHS", True),
        ("KEEP_VISIBLE", 0),
        ("MATCH_IOU", 1.5),
        ("MATCH_IOU", "half"),
        ("TRAINING", "never"),
        ("PRIOR_RATIOS", [[1.5, 2.25]] * 4 + [[1.5]] * 2),
        ("PRIOR_SCALES", [0.1] * 6),
        ("ZOOM_RANGE", [1.4, 0.8]),
        ("FROZEN_BLOCKS", 6),
        ("CLASS_NAMES", ["RBC", "RBC"]),
        ("CLASS_NAMES", []),
        ("PRECISION", "float8"),
        ("FINETUNE_FROM", "checkpoints/best_model.pth"),
    ],
)
def test_constants_that_cannot_work_are_named(nb, name, value):
    nb.check_configuration(vars(nb))
    with pytest.raises(nb.StudyError, match=f"{name} = .*: it must be "):
        nb.check_configuration({**vars(nb), name: value})


def test_every_constant_that_is_checked_exists_and_every_class_has_a_colour(nb, monkeypatch):
    checked = nb.WHOLE_NUMBERS + nb.SHARES + nb.NOT_NEGATIVE + nb.ABOVE_ZERO
    assert all(hasattr(nb, name) for name in checked)
    monkeypatch.setattr(nb, "CLASS_NAMES", [f"class {i}" for i in range(20)])
    colours = [nb.class_colour(label) for label in range(1, 41)]
    assert colours[:20] == colours[20:]  # a skipped cell has the colour of its class
    assert len(set(colours[:7])) == 7


@pytest.mark.parametrize("count", [0, 1, 12])
def test_boxes_of_any_number_are_drawn_and_rare_classes_named(nb, count):
    import numpy as np
    import torch

    labels = torch.tensor(([1] * 10 + [2, 3])[:count], dtype=torch.int64)
    boxes = torch.arange(count)[:, None] * 20.0 + torch.tensor([0, 60, 15, 75])
    _, (axis,) = nb.picture_grid(1, 1)
    nb.draw_boxes(axis, np.zeros((200, 300, 3)), boxes, labels, torch.full((count,), 0.9))
    words = [text.get_text() for text in axis.texts]
    nb.plt.close("all")
    assert len(axis.patches) == count
    assert [word for word in words if word.startswith(tuple(nb.CLASS_NAMES))] == (
        ["WBC 0.90", "Platelets 0.90"] if count == 12 else ["RBC 0.90"] * count
    )
