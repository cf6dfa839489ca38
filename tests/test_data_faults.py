"""Data of one's own: each kind of fault is met before training, in a sentence that says what to do."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_bccd import draw_dataset

RED, WHITE = "RBC", "WBC"


def annotation(objects, size=(64, 48)):
    """A VOC annotation; objects: (class name, (x0, y0, x1, y1)), any of them as text."""
    text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, box in objects:
        sides = ""
        for side, value in zip(["xmin", "ymin", "xmax", "ymax"], box, strict=True):
            sides += f"<{side}>{value}</{side}>"
        text += f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
    return text + "</annotation>"


@pytest.fixture
def folder(tmp_path):
    """An empty dataset: the folder with Annotations, ImageSets and JPEGImages."""
    for name in ["Annotations", "ImageSets/Main", "JPEGImages"]:
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def add_image(folder, image_id, objects=((RED, (5, 5, 30, 30)),), picture=None, size=(64, 48)):
    """Add one image with its annotation; a grey picture by default."""
    (folder / "Annotations" / f"{image_id}.xml").write_text(annotation(objects, size))
    path = folder / "JPEGImages" / f"{image_id}.jpg"
    if picture is None:
        Image.new("RGB", size, (200, 180, 190)).save(path)
    else:
        path.write_bytes(picture)


def write_list(folder, split, content):
    """Write the list of a split, as text or bytes."""
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def refusal(nb, action):
    """The sentence of the DatasetError that an action raises."""
    with pytest.raises(nb.DatasetError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) > 30
    return message


# --- lists of ids


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_in_any_unicode_is_read_by_its_mark(nb, folder, encoding, end):
    for image_id in ["a", "b", "größe"]:
        add_image(folder, image_id)
    text = end.join(["a", "b", "größe", ""])
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    write_list(folder, "train", mark + text.encode(encoding))
    assert nb.read_split(folder, "train") == ["a", "b", "größe"]


def test_a_big_endian_list(nb, folder):
    add_image(folder, "a")
    write_list(folder, "train", b"\xfe\xff" + "a\n".encode("utf-16-be"))
    assert nb.read_split(folder, "train") == ["a"]


@pytest.mark.parametrize("content", ["größe\n".encode("latin-1"), "a\n".encode("utf-16-le")])
def test_a_list_in_no_known_encoding_is_named(nb, folder, content):
    add_image(folder, "a")
    write_list(folder, "train", content)
    message = refusal(nb, lambda: nb.read_split(folder, "train"))
    assert "train.txt" in message and "UTF-8" in message


@pytest.mark.parametrize("image_id", ["smear 1", "my smear of may", "-1 x", "smear 1 ", "a.b", "1"])
def test_ids_with_blanks(nb, folder, image_id):
    image_id = image_id.strip()
    add_image(folder, image_id)
    write_list(folder, "train", f"  {image_id} \t\r\n\r\n")
    split = nb.SmearSplit(folder, "train")
    assert split.ids == [image_id] and split.image(0).shape == (48, 64, 3)


def test_the_form_of_vocs_lists_of_a_class(nb, folder):
    """An id and 1, 0 or -1; an image of that whole name comes first."""
    for image_id in ["a", "b", "c", "c 1"]:
        add_image(folder, image_id)
    write_list(folder, "train", "a  1\nb -1\nc 1\n")
    assert nb.read_split(folder, "train") == ["a", "b", "c 1"]


@pytest.mark.parametrize("line", ["a b", "a b " * 100, "a,b", "a;b", "a.jpg", "JPEGImages/a"])
def test_a_line_that_names_no_file_is_named_as_it_stands(nb, folder, line):
    for image_id in ["a", "b"]:
        add_image(folder, image_id)
    write_list(folder, "train", f"a\n{line}\n")
    message = refusal(nb, lambda: nb.read_split(folder, "train"))
    assert line.strip()[:80] in message and "line 2" in message and "one image id a line" in message


# --- pictures


def grey_deep(kind, bits=16):
    """A picture of 48 x 64 pixels with so many bits in 16, as the bytes of a file."""
    pixels = np.linspace(0, 2**bits - 1, 48 * 64).reshape(48, 64).astype(np.uint16)
    return cv2.imencode(kind, pixels)[1].tobytes()


def colour_deep(kind):
    """The same in colour."""
    pixels = np.full((48, 64, 3), 40000, np.uint16)
    return cv2.imencode(kind, pixels)[1].tobytes()


DEEP = {
    "16-bit grey PNG": grey_deep(".png"),
    "16-bit grey TIFF": grey_deep(".tif"),
    "12-bit grey TIFF": grey_deep(".tif", 12),
    "16-bit colour PNG": colour_deep(".png"),
    "16-bit colour TIFF": colour_deep(".tif"),
    "floating TIFF": cv2.imencode(".tif", np.ones((48, 64), np.float32))[1].tobytes(),
}


@pytest.mark.parametrize("picture", DEEP.values(), ids=DEEP.keys())
def test_pictures_of_more_than_eight_bits_are_refused_before_training(nb, folder, picture):
    add_image(folder, "deep", picture=picture)
    write_list(folder, "train", "deep\n")
    message = refusal(nb, lambda: nb.SmearSplit(folder, "train"))
    assert "deep.jpg" in message and "8 bits" in message


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_eight_bit_pictures_of_any_kind_are_read(nb, folder, mode):
    path = folder / "JPEGImages" / "one.jpg"
    Image.new("RGB", (64, 48), (200, 180, 190)).convert(mode).save(path, format="PNG")
    (folder / "Annotations" / "one.xml").write_text(annotation([(RED, (5, 5, 30, 30))]))
    write_list(folder, "train", "one\n")
    image, boxes, _ = nb.SmearSplit(folder, "train")[0]
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8 and len(boxes) == 1


# --- boxes


@pytest.mark.parametrize(
    "box",
    [
        (0.1, 0.2, 0.4, 0.6),
        (0, 0, 1, 1),
        ("0.0", "0.0", "0.05", "1.0"),
        (0.5, 0.5, 0.5, 0.5),
        (10.2, 10, 10.9, 20),
        (10, 20.1, 30, 20.6),
    ],
)
def test_coordinates_as_shares_of_the_image_are_refused(nb, folder, box):
    add_image(folder, "one", [(RED, box)])
    write_list(folder, "train", "one\n")
    message = refusal(nb, lambda: nb.SmearSplit(folder, "train"))
    assert "one.xml" in message and "shares" in message


@pytest.mark.parametrize("box", [(10, 10, 11, 11), (0, 0, 2, 2), (20, 20, 20, 20), (1, 1, 1, 30)])
def test_small_boxes_and_boxes_without_area_are_no_shares(nb, folder, box):
    add_image(folder, "one", [(RED, box)])
    write_list(folder, "train", "one\n")
    split = nb.SmearSplit(folder, "train")
    assert len(split.boxes[0]) + len(split.dropped) == 1


def test_difficult_objects_count_like_others(nb, folder):
    add_image(folder, "one", [(RED, (5, 5, 30, 30))])
    path = folder / "Annotations" / "one.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    write_list(folder, "train", "one\n")
    assert nb.SmearSplit(folder, "train").labels[0].tolist() == [1]
    page = (nb.__file__, "difficult")  # and the page says so
    assert page[1] in notebook_text()


def notebook_text():
    """All text of the page."""
    import nbformat
    from conftest import NOTEBOOK

    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


# --- splits


def splits_of(nb, folder, **objects):
    """The splits of a dataset of one image each; objects: split -> objects of its image."""
    datasets = {}
    for split, its_objects in objects.items():
        add_image(folder, split, its_objects)
        write_list(folder, split, f"{split}\n")
        datasets[split] = nb.SmearSplit(folder, split)
    return datasets


ONE_OF_EACH = [(RED, (5, 5, 30, 30)), (WHITE, (30, 10, 60, 40)), ("Platelets", (1, 40, 7, 46))]


@pytest.mark.parametrize("empty", ["train", "val", "test"])
@pytest.mark.parametrize("objects", [[], [(RED, (9, 9, 9, 9))]], ids=["none", "without area"])
def test_a_split_without_objects_is_refused(nb, folder, empty, objects):
    given = dict.fromkeys(["train", "val", "test"], ONE_OF_EACH)
    given[empty] = objects
    datasets = splits_of(nb, folder, **given)
    message = refusal(nb, lambda: nb.check_dataset(datasets))
    assert empty in message and "object" in message


def test_good_splits_have_no_remark(nb, folder):
    given = dict.fromkeys(["train", "val", "test"], ONE_OF_EACH)
    assert nb.check_dataset(splits_of(nb, folder, **given)) == []


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_class_without_an_object_is_said(nb, folder, split):
    given = dict.fromkeys(["train", "val", "test"], ONE_OF_EACH)
    given[split] = ONE_OF_EACH[:1] + ONE_OF_EACH[2:]
    (remark,) = nb.check_dataset(splits_of(nb, folder, **given))
    assert split in remark and WHITE in remark


def matched(nb, scores, right, objects):
    """A `Matched` of one IoU threshold."""
    return nb.Matched(np.array(scores), np.array([right], bool), objects)


def test_a_class_without_an_object_in_validation_counts_by_the_plain_threshold(nb):
    red = matched(nb, [0.9, 0.8, 0.1], [True, True, False], 2)
    white = matched(nb, [0.9, 0.6, 0.4], [False, False, False], 0)
    never_found = matched(nb, [], [], 0)
    matches = [[red, white, never_found], [red, white, never_found]]
    counting = nb.fit_counting(matches, 3)
    json.dumps(counting, allow_nan=False)
    assert nb.count_interval(white.scores, 2, counting) == (2, None, None)
    assert nb.count_interval(never_found.scores, 3, counting) == (0, None, None)
    number, low, high = nb.count_interval(red.scores, 1, counting)
    assert low <= number <= high
    others = nb.cross_validated_counts(matches, 3)
    assert others[:, 1].tolist() == [[2, None, None]] * 2
    found = {"labels": torch.tensor([1, 2, 2]), "scores": torch.tensor([0.9, 0.8, 0.4])}
    cells, counts = nb.cells_that_count(found, counting, 3)
    assert counts[1] == (1, None, None) and (cells["labels"] == 2).sum() == 1
    figures = nb.count_figures(matches, 2, [2, 2])
    assert figures["count_mae"] == 2.0
    assert nb.best_thresholds(matches, 3)[1:] == [nb.SHOW_SCORE] * 2


# --- complete labels of other data


@pytest.fixture
def drawn(nb, tmp_path):
    """Splits of drawn smears and complete labels that fit: the official boxes and one more cell."""
    root = draw_dataset(tmp_path / "BCCD_Dataset", train=4, val=2, test=1, seed=8) / "BCCD"
    datasets = {split: nb.SmearSplit(root, split) for split in ["train", "val", "test"]}
    labels_by_id = {}
    for split in ["train", "val"]:
        dataset = datasets[split]
        for image_id, boxes, labels in zip(dataset.ids, dataset.boxes, dataset.labels, strict=True):
            more = torch.cat([boxes + 2, torch.tensor([[600.0, 440, 639, 479]])])
            more = more.clamp(max=torch.tensor([640.0, 480, 640, 480]))
            labels_by_id[image_id] = (more, torch.cat([labels, torch.tensor([1])]))
    return datasets, labels_by_id


def test_complete_labels_that_fit_are_applied(nb, drawn):
    datasets, labels_by_id = drawn
    fitting, remark = nb.complete_labels_that_fit(labels_by_id, datasets)
    assert remark == "" and set(fitting) == set(labels_by_id)
    fitting, _ = nb.complete_labels_that_fit({**labels_by_id, "elsewhere": (0, 0)}, datasets)
    assert set(fitting) == set(labels_by_id)


def scaled(labels_by_id, factors):
    """Complete labels of pictures of another size."""
    factors = torch.tensor(factors)
    return {key: (boxes * factors, labels) for key, (boxes, labels) in labels_by_id.items()}


def mirrored(labels_by_id):
    """Complete labels of mirrored pictures."""
    answer = {}
    for key, (boxes, labels) in labels_by_id.items():
        flipped = boxes.clone()
        flipped[:, 0], flipped[:, 2] = 640 - boxes[:, 2], 640 - boxes[:, 0]
        answer[key] = (flipped, labels)
    return answer


def of_other_images(labels_by_id):
    """Complete labels under exchanged ids."""
    ids = list(labels_by_id)
    return {ids[i]: labels_by_id[ids[i - 1]] for i in range(len(ids))}


def without_class(labels_by_id, label):
    """Complete labels in which a class has another name, so that it is left out."""
    answer = {}
    for key, (boxes, labels) in labels_by_id.items():
        answer[key] = (boxes[labels != label], labels[labels != label])
    return answer


STRANGERS = {
    "larger pictures": lambda labels: scaled(labels, [2.0, 2, 2, 2]),
    "smaller pictures": lambda labels: scaled(labels, [0.65, 0.867, 0.65, 0.867]),
    "shares": lambda labels: scaled(labels, [1 / 640, 1 / 480, 1 / 640, 1 / 480]),
    "mirrored": mirrored,
    "other images": of_other_images,
    "red cells of another name": lambda labels: without_class(labels, 1),
    "white cells of another name": lambda labels: without_class(labels, 2),
    "nothing at all": lambda labels: scaled(labels, [0.0, 0, 0, 0]),
}


@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS.keys())
def test_complete_labels_of_other_data_are_not_applied(nb, drawn, change):
    datasets, labels_by_id = drawn
    fitting, remark = nb.complete_labels_that_fit(change(labels_by_id), datasets)
    assert fitting == {}
    assert "not applied" in remark and remark.endswith(".") and "\n" not in remark


def test_one_image_of_other_content_goes_without_its_complete_labels(nb, drawn):
    datasets, labels_by_id = drawn
    first = datasets["train"].ids[0]
    flipped = mirrored(labels_by_id)
    mixed = {**labels_by_id, first: flipped[first]}
    fitting, remark = nb.complete_labels_that_fit(mixed, datasets)
    assert set(fitting) == set(labels_by_id) - {first}
    assert first in remark and "not applied" in remark


def test_other_class_names_read_from_the_file_do_not_belong(nb, drawn, tmp_path):
    """As in a dataset that says Erythrocyte where the file of complete labels says RBC."""
    datasets, labels_by_id = drawn
    rows = {}
    for key, (boxes, labels) in labels_by_id.items():
        names = [nb.CLASS_NAMES[label - 1] for label in labels.tolist()]
        rows[key] = [[name, *box] for name, box in zip(names, boxes.tolist(), strict=True)]
    path = tmp_path / "complete.json"
    path.write_text(json.dumps({"images": rows}))
    other_names = ["Erythrocyte", *nb.CLASS_NAMES[1:]]
    for dataset in datasets.values():
        dataset.class_names = other_names
    labels_by_id = nb.read_complete_labels(path, other_names)
    fitting, remark = nb.complete_labels_that_fit(labels_by_id, datasets)
    assert fitting == {} and "Erythrocyte" in remark
