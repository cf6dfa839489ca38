"""The file that ties the notebook to the lab's tool: what the export writes is what the tool reads,
and both find and count the same cells.
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, made_once

import count_cells

# Torch and ONNX Runtime both take half a second of a core for an image in float32: every ninth is
# compared here, and with SSD_TEST_EVERY=1 all; what follows the network is compared on all.
EVERY = int(os.environ.get("SSD_TEST_EVERY", "9"))
CHECKPOINT = ROOT / "checkpoints" / "best_model.pth"


@pytest.fixture(scope="module")
def detector(nb):
    return nb.load_detector(CHECKPOINT)[0]


@pytest.fixture(scope="module")
def val_set(nb, bccd_root):
    return nb.SmearSplit(nb.dataset_root(bccd_root), "val", nb.CLASS_NAMES)


@pytest.fixture(scope="module")
def images(val_set):
    return [val_set.image(index) for index in range(len(val_set))]


@pytest.fixture(scope="module")
def metrics():
    return json.loads((ROOT / "checkpoints" / "metrics.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def counting(metrics):
    return metrics["how_to_count"]


@pytest.fixture(scope="module")
def metadata(nb, detector, counting, images):
    ranges = nb.statistics_ranges(images)
    return nb.counting_metadata(detector, "float32", counting, ranges)


@pytest.fixture(scope="module")
def exported(nb, detector, metadata, tmp_path_factory):
    def export(path):
        nb.export_onnx(detector, len(nb.CLASS_NAMES), path, metadata)

    return made_once(tmp_path_factory, "ssd300.onnx", export)


@pytest.fixture(scope="module")
def quantised(nb, exported, metadata, bccd_root, tmp_path_factory):
    def quantise(path):
        train_set = nb.SmearSplit(nb.dataset_root(bccd_root), "train", nb.CLASS_NAMES)
        samples = nb.SmearDataset(train_set).batch(range(0, len(train_set), 23))[0]
        nb.quantise_onnx(exported, samples, path, {**metadata, "precision": "int8"})

    return made_once(tmp_path_factory, "ssd300_int8.onnx", quantise)


def whole(image):
    return [image.shape[1], image.shape[0]]


def count_all(cells, settings):
    """[(number, least, most)] of an image's cells."""
    counts = count_cells.count_cells(cells, settings)[1]
    return [(count.number, count.least, count.most) for count in counts.values()]


def assert_same_cells(nb, ours, expected, settings, counting):
    """Boxes within a hundredth of a pixel, equal counts and intervals."""
    assert ours["labels"].tolist() == expected["labels"].tolist()
    assert np.abs(ours["boxes"] - expected["boxes"].numpy()).max() <= 0.01
    assert np.abs(ours["scores"] - expected["scores"].numpy()).max() <= 1e-4
    expected_counts = nb.cells_that_count(expected, counting, len(nb.CLASS_NAMES))[1]
    assert count_all(ours, settings) == expected_counts


@pytest.fixture(scope="module")
def float32_cells(exported, images):
    """What the float32 file finds on every ninth image."""
    counter = count_cells.CellCounter(exported, threads=torch.get_num_threads())
    return [counter.find(image, whole(image)) for image in images[::EVERY]]


def test_the_float32_file_finds_and_counts_what_the_notebook_does(
    nb, detector, float32_cells, metadata, images, counting
):
    for image, ours in zip(images[::EVERY], float32_cells, strict=True):
        (expected,) = nb.detect(detector, [image], every_cell=True)
        assert_same_cells(nb, ours, expected, metadata, counting)


def test_the_int8_file_stays_within_bounds_and_is_read_as_the_notebook_reads_it(
    nb, quantised, images, counting, float32_cells
):
    """No count of an image differs from the float32 file's by more than two, the sum of the red
    cells by less than 2%. (Measured on all 87 images: by one, by 0.2%.)
    """
    counter = count_cells.CellCounter(quantised, threads=torch.get_num_threads())
    assert counter.settings["precision"] == "int8" and len(images) == 87
    session = counter.detector.session
    counts = []
    for image in images:
        frame = nb.resize_to_square(image, nb.IMAGE_SIZE)[None].float().numpy()
        boxes, cells = session.run(["boxes", "cells"], {"images": frame})
        outputs = torch.from_numpy(boxes), torch.from_numpy(cells)
        (expected,) = nb.read_detections(outputs, [image], every_cell=True)
        ours = count_cells.select_cells(boxes[0], cells[0], counter.settings)
        height, width = image.shape[:2]
        ours["boxes"] = ours["boxes"] * np.array([width, height, width, height])
        assert_same_cells(nb, ours, expected, counter.settings, counting)
        counts.append([count[0] for count in count_all(ours, counter.settings)])
    exact = []
    for cells in float32_cells:
        exact.append([count[0] for count in count_all(cells, counter.settings)])
    some = np.array(counts[::EVERY])
    assert np.abs(some - exact).max() <= 2
    assert abs(some[:, 0].sum() / np.sum(exact, axis=0)[0] - 1) < 0.02


def test_the_metadata_are_what_the_tool_asks_for(nb, exported, metadata):
    stored = nb.read_metadata(exported)
    assert stored == metadata
    assert set(count_cells.REQUIRED_SETTINGS) < set(stored)
    assert stored["format_version"] == count_cells.FORMAT_VERSION
    assert all(name == name.lower() for name in stored)


def test_no_file_tells_of_the_machine_that_exported_it(exported, quantised):
    """torch writes its stack traces, with paths, into each node; so had the committed file."""
    for path in (exported, quantised, ROOT / "checkpoints" / "ssd300_int8.onnx"):
        content = path.read_bytes()
        for word in (b"site-packages", b"ipykernel", b'File "', str(ROOT).encode()):
            assert word not in content, f"{path.name}: {word}"


def test_a_file_of_these_weights_is_known_again(nb, exported, metadata, tmp_path):
    assert nb.is_export_of(exported, metadata)
    assert nb.is_export_of(exported, {**metadata, "counting": None})  # measured anew: no new file
    assert not nb.is_export_of(exported, {**metadata, "weights": "of another training"})
    assert not nb.is_export_of(exported, {**metadata, "precision": "int8"})
    assert not nb.is_export_of(exported, {**metadata, "count_overlap": 0.3})  # counts otherwise
    assert not nb.is_export_of(exported, {**metadata, "format_version": 1})
    assert not nb.is_export_of(tmp_path / "absent.onnx", metadata)
    (tmp_path / "damaged.onnx").write_bytes(exported.read_bytes()[:1000])
    assert not nb.is_export_of(tmp_path / "damaged.onnx", metadata)


def test_statistics_of_pictures_are_the_same_on_both_sides(nb, images):
    for image in images[:5]:
        ours = count_cells.picture_statistics(image, nb.IMAGE_SIZE)
        assert nb.picture_statistics(image) == pytest.approx(ours, rel=1e-4)


def test_the_pictures_of_the_measurement_get_no_remark(metadata, images):
    for image in images:
        assert count_cells.unlike_remarks(image, whole(image), metadata) == []


def test_a_class_without_an_object_in_validation_has_no_interval(nb):
    """It counted 0 (0 to 0) for ever, where the detector finds 15."""
    matches = []
    for _ in range(4):
        scores = np.array([0.9, 0.8, 0.3])
        right = np.ones((1, 3), bool)
        wrong = np.zeros((1, 3), bool)
        red = nb.Matched(scores, right, 3)
        white = nb.Matched(scores, wrong, 0)
        platelets = nb.Matched(np.empty(0), wrong[:, :0], 0)
        matches.append([red, white, platelets])
    fitted = nb.fit_counting(matches, 3)
    assert nb.count_interval(np.array([0.9, 0.8]), 1, fitted)[1] is not None
    for label in (2, 3):
        counted = nb.count_interval(np.array([0.9, 0.8, 0.1]), label, fitted)
        assert counted == (2, None, None)


def test_the_committed_file_is_of_the_committed_detector(nb, val_set, metrics):
    """A lab takes count_cells.py and this file alone: it counts as metrics.json says it was fitted."""
    counter = count_cells.CellCounter(ROOT / "checkpoints" / "ssd300_int8.onnx")
    settings = counter.settings
    assert settings["precision"] == "int8"
    assert settings["weights"] == metrics["detector"]["weights"]
    fitted = metrics["how_to_count"]
    in_file = settings["counting"]
    # another processor's rounding may move what was fitted by a detection or two
    shares = np.array(fitted["calibration"]["share right"])
    assert np.allclose(in_file["share_right"], shares, atol=0.05)
    assert np.allclose(in_file["cells_per_detection"], fitted["per detection"], atol=0.02)
    assert np.allclose(in_file["spread"], fitted["spread"], atol=0.1)
    labels_by_id = nb.read_complete_labels(ROOT / nb.COMPLETE_LABELS)
    known = [i for i, image_id in enumerate(val_set.ids) if image_id in labels_by_id][:6]
    counted = sum(counter.count(val_set.image(i)).counts["RBC"].number for i in known)
    there = sum(int((labels_by_id[val_set.ids[i]][1] == 1).sum()) for i in known)
    assert abs(counted - there) <= 0.1 * there
