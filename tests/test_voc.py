"""Reading Pascal VOC: good files exactly, each kind of bad file refused in one sentence."""

import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import synthetic_bccd as synthetic
import torch
from conftest import ROOT
from PIL import Image

SIZE = "<size><width>640</width><height>480</height><depth>3</depth></size>"


def item(name="RBC", box=(10, 20, 110, 120)):
    """One <object>; a coordinate of None is left out."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    sides = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True) if value is not None
    )
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


@pytest.fixture
def write(tmp_path):
    """Write the text of an annotation and return its path."""

    def write(text):
        path = tmp_path / "broken one.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_good_file(nb, write):
    items = item("WBC", (1, 2.5, 640, 480)) + item("Platelets", (0, 0, 30, 40))
    text = f"<annotation>{SIZE}{items}</annotation>"
    boxes, labels = nb.parse_voc_annotation(write(text))
    assert boxes.tolist() == [[1, 2.5, 640, 480], [0, 0, 30, 40]] and boxes.dtype == torch.float32
    assert labels.tolist() == [2, 3] and labels.dtype == torch.int64


def test_no_objects(nb, write):
    boxes, labels = nb.parse_voc_annotation(write(f"<annotation>{SIZE}</annotation>"))
    assert boxes.shape == (0, 4) and labels.shape == (0,)
    assert boxes.dtype == torch.float32 and labels.dtype == torch.int64


def test_a_zero_area_box_is_read_for_the_audit_to_name(nb, write):
    boxes, _ = nb.parse_voc_annotation(
        write(f"<annotation>{SIZE}{item(box=(504, 337, 504, 337))}</annotation>")
    )
    assert boxes.tolist() == [[504, 337, 504, 337]]


BAD = {
    "no size": f"<annotation>{item()}</annotation>",
    "size without a number": f"<annotation>{SIZE.replace('640', 'wide')}{item()}</annotation>",
    "size of zero": f"<annotation>{SIZE.replace('640', '0')}{item()}</annotation>",
    "size of NaN": f"<annotation>{SIZE.replace('640', 'nan')}{item()}</annotation>",
    "unknown class": f"<annotation>{SIZE}{item('Eosinophil')}</annotation>",
    "class in other letters": f"<annotation>{SIZE}{item('rbc')}</annotation>",
    "no class": f"<annotation>{SIZE}{item('')}</annotation>",
    "reversed x": f"<annotation>{SIZE}{item(box=(110, 20, 10, 120))}</annotation>",
    "reversed y": f"<annotation>{SIZE}{item(box=(10, 120, 110, 20))}</annotation>",
    "negative": f"<annotation>{SIZE}{item(box=(-30, 20, 110, 120))}</annotation>",
    "NaN": f"<annotation>{SIZE}{item(box=('nan', 20, 110, 120))}</annotation>",
    "infinite": f"<annotation>{SIZE}{item(box=(10, 20, 'inf', 120))}</annotation>",
    "outside right": f"<annotation>{SIZE}{item(box=(600, 20, 700, 120))}</annotation>",
    "outside below": f"<annotation>{SIZE}{item(box=(10, 420, 110, 520))}</annotation>",
    "no number": f"<annotation>{SIZE}{item(box=('ten', 20, 110, 120))}</annotation>",
    "a side missing": f"<annotation>{SIZE}{item(box=(10, 20, None, 120))}</annotation>",
    "no box": f"<annotation>{SIZE}<object><name>RBC</name></object></annotation>",
    "truncated": f"<annotation>{SIZE}{item()}"[:-20],
    "empty": "",
    "not XML": "\x89PNG no annotation at all",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_by_name(nb, write, text):
    path = write(text)
    with pytest.raises(nb.AnnotationError) as caught:
        nb.parse_voc_annotation(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) - len(str(path)) > 20 and "\n" not in message


def test_a_missing_annotation(nb, tmp_path):
    with pytest.raises(nb.AnnotationError, match="absent.xml"):
        nb.parse_voc_annotation(tmp_path / "absent.xml")


def test_an_entity_bomb_is_refused_at_once(nb, write):
    names = "abcdefghij"
    entities = "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip(names, names[1:], strict=False)
    )
    head = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "boom">{entities}]>'
    bomb = f"{head}<annotation>{SIZE}&j;</annotation>"
    start = time.perf_counter()
    with pytest.raises(nb.AnnotationError):
        nb.parse_voc_annotation(write(bomb))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_an_external_entity_reads_nothing(nb, write, tmp_path, scheme):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP-SECRET")
    target = secret.as_uri() if scheme == "file" else "http://127.0.0.1:9/nothing"
    text = (
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY s SYSTEM "{target}">]>'
        f"<annotation>{SIZE}{item('&s;')}</annotation>"
    )
    with pytest.raises(nb.AnnotationError) as caught:
        nb.parse_voc_annotation(write(text))
    assert "TOP-SECRET" not in str(caught.value)


def test_other_class_names(nb, write):
    path = write(f"<annotation>{SIZE}{item('Lymphocyte')}</annotation>")
    assert nb.parse_voc_annotation(path, ["RBC", "Lymphocyte"])[1].tolist() == [2]


# --- splits, images, the whole dataset


@pytest.fixture
def small(tmp_path):
    """A drawn dataset of 3, 1 and 1 smears that a test may break; the folder with Annotations."""
    return (
        synthetic.draw_dataset(tmp_path / "BCCD_Dataset", train=3, val=1, test=1, seed=2) / "BCCD"
    )


def test_the_drawn_dataset_reads_exactly(nb, small):
    dataset = nb.SmearSplit(small, "train")
    assert len(dataset) == 3
    for index in range(3):
        image, boxes, labels = dataset[index]
        drawn, true_boxes, true_labels = synthetic.draw_smear(np.random.default_rng([2, 0, index]))
        assert image.shape == (480, 640, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - drawn).mean() < 5
        assert np.array_equal(boxes, true_boxes) and np.array_equal(labels, true_labels)


def test_images_beyond_the_memory_budget_are_read_again(nb, small, monkeypatch):
    monkeypatch.setattr(nb, "IMAGE_MEMORY_MB", 2 * 3 * 300**2 / 1e6)  # two squeezed images
    data = nb.SmearDataset(nb.SmearSplit(small, "train"))
    expected = [nb.resize_to_square(data.split.image(i), 300) for i in range(3)]
    for _ in range(2):
        assert all(torch.equal(data[i][0], expected[i]) for i in range(3))
    assert [data[i][0] is data[i][0] for i in range(3)] == [True, True, False]


def test_a_zero_area_box_is_dropped_and_named(nb, small):
    path = small / "Annotations" / "Smear_00001.xml"
    path.write_text(
        path.read_text().replace("</annotation>", item(box=(50, 60, 50, 60)) + "</annotation>")
    )
    before = len(ElementTree.parse(path).findall("object"))
    dataset = nb.SmearSplit(small, "train")
    assert len(dataset[1][1]) == len(dataset[1][2]) == before - 1
    assert dataset.dropped == [("Smear_00001", [50.0, 60.0, 50.0, 60.0])]


def test_an_image_without_objects(nb, small):
    (small / "Annotations" / "Smear_00000.xml").write_text(f"<annotation>{SIZE}</annotation>")
    image, boxes, labels = nb.SmearSplit(small, "train")[0]
    assert image.shape == (480, 640, 3) and boxes.shape == (0, 4) and labels.shape == (0,)


def test_an_empty_split(nb, small):
    (small / "ImageSets" / "Main" / "val.txt").write_text("\n\n")
    with pytest.raises(nb.DatasetError, match=r"val\.txt"):
        nb.SmearSplit(small, "val")


def test_a_missing_split(nb, small):
    (small / "ImageSets" / "Main" / "val.txt").unlink()
    with pytest.raises(nb.DatasetError, match=r"val\.txt"):
        nb.SmearSplit(small, "val")


@pytest.mark.parametrize("part", ["Annotations/Smear_00002.xml", "JPEGImages/Smear_00002.jpg"])
def test_an_id_without_its_file(nb, small, part):
    (small / part).unlink()
    with pytest.raises(nb.DatasetError, match="Smear_00002"):
        nb.SmearSplit(small, "train")


@pytest.mark.parametrize("keep", [0, 40, 5000])
def test_a_truncated_image(nb, small, keep):
    path = small / "JPEGImages" / "Smear_00000.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(nb.DatasetError, match=r"Smear_00000\.jpg"):
        nb.SmearSplit(small, "train")[0]


def test_a_folder_that_is_not_bccd(nb, tmp_path):
    (tmp_path / "holidays").mkdir()
    with pytest.raises(nb.DatasetError, match="holidays"):
        nb.dataset_root(tmp_path / "holidays")


def test_read_image_turns_by_exif_and_makes_rgb(nb, tmp_path):
    picture = Image.new("L", (40, 20), 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "grey.jpg", exif=exif)
    assert nb.read_image(tmp_path / "grey.jpg").shape == (40, 20, 3)


def test_real_dataset_reads_whole(nb, bccd_root):
    root = nb.dataset_root(bccd_root)
    sizes, counts, dropped = {}, np.zeros(4, dtype=int), []
    for split in ("train", "val", "test"):
        dataset = nb.SmearSplit(root, split)
        sizes[split] = len(dataset)
        dropped += dataset.dropped
        for labels in dataset.labels:
            counts += np.bincount(labels, minlength=4)
    assert sizes == {"train": 205, "val": 87, "test": 72}
    assert len(dropped) == 2
    assert counts.tolist() == [0, 4155 - 2, 372, 361]


# --- defects that a review found


def test_a_byte_order_mark_in_a_split_file(nb, small):
    path = small / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert nb.SmearSplit(small, "train").ids[0] == "Smear_00000"


def test_a_size_that_is_not_the_image_is_refused(nb, small):
    """Also where the picture is turned by its EXIF tag: its boxes would lie elsewhere."""
    path = small / "JPEGImages" / "Smear_00001.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as picture:
        picture.save(path, exif=exif)
    with pytest.raises(
        nb.AnnotationError, match="Smear_00001.xml: states a size of 640x480.*480x640"
    ):
        nb.SmearSplit(small, "train")
    xml = small / "Annotations" / "Smear_00001.xml"
    xml.write_text("<annotation><size><width>480</width><height>640</height></size></annotation>")
    assert nb.SmearSplit(small, "train").sizes == [(640, 480), (480, 640), (640, 480)]


def test_the_digest_of_the_data_hears_content_and_not_line_ends(nb, small):
    def digest(split="train", labels_by_id=None):
        return nb.data_digest([nb.SmearSplit(small, split)], labels_by_id or {})

    first, path = digest(), small / "Annotations" / "Smear_00001.xml"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert digest() == first  # git on Windows
    path.write_bytes(whole.replace(b"<name>RBC", b"<name>WBC", 1))
    assert digest() != first
    path.write_bytes(whole)
    known = {"Smear_00001": (torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([1]))}
    assert digest(labels_by_id=known) != first
    lists = small / "ImageSets" / "Main"
    (lists / "val.txt").write_text((lists / "train.txt").read_text())
    assert digest("val") != first  # the same files in another split


def test_complete_labels_name_the_skipped_cells(nb, small, tmp_path):
    official = nb.SmearSplit(small, "train")
    red = official.boxes[1][official.labels[1] == 1][0]
    rows = [["RBC", *(red + 1).tolist()], ["RBC", 600, 440, 639, 479], ["WBC", *red.tolist()]]
    rows += [["Ring", 1, 1, 9, 9], ["RBC", 5, 5, 5, 9]]
    path = tmp_path / "complete.json"
    path.write_text(nb.json.dumps({"images": {"Smear_00001": rows, "elsewhere": rows}}))
    known = nb.read_complete_labels(path)
    boxes, labels = known["Smear_00001"]
    assert boxes.shape == (3, 4)
    assert labels.tolist() == [1, 1, 2]  # no unknown class, no box without area
    data = nb.EveryCellDataset(official, 32, known)
    assert data.complete.tolist() == [False, True, False] and data.count_skipped() == 2
    boxes, labels = data.targets(1)
    number = len(official.labels[1])
    assert labels[number:].tolist() == [4, 5]  # 5: no white cell was boxed there
    assert boxes[number].tolist() == [600, 440, 639, 479]
    assert torch.equal(boxes[:number], official.boxes[1])  # the official ones stay
    _, boxes, labels = data.batch([0, 1])
    assert sorted(labels[1][labels[1] > 3].tolist()) == [4, 5]
    assert boxes[1][-1].tolist() == pytest.approx((red / torch.tensor([640, 480] * 2)).tolist())


@pytest.mark.parametrize("path", ["", "nowhere.json"])
def test_no_complete_labels(nb, small, path):
    assert nb.read_complete_labels(path) == {}
    data = nb.EveryCellDataset(nb.SmearSplit(small, "train"), 32, {})
    assert not data.complete.any() and data.count_skipped() == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": [1]}', '{"images": {"a": [["RBC", 1, 2]]}}', "\x00"]
)
def test_a_file_that_holds_no_complete_labels(nb, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(nb.AnnotationError, match="other.json"):
        nb.read_complete_labels(tmp_path / "other.json")


def test_the_complete_labels_that_are_shipped(nb, bccd_root):
    """124 training and 57 validation images, and about 2,200 red cells that BCCD left out."""
    root = nb.dataset_root(bccd_root)
    datasets = {split: nb.SmearSplit(root, split) for split in ("train", "val", "test")}
    known = nb.read_complete_labels(ROOT / nb.COMPLETE_LABELS)
    fitting, remark = nb.complete_labels_that_fit(known, datasets)
    assert remark == "" and fitting.keys() == known.keys()
    counts = {}
    for split, dataset in datasets.items():
        data = nb.EveryCellDataset(dataset, 32, known)
        labels = torch.cat([data.targets(i)[1] for i in range(len(data))])
        skipped = labels[labels > 3].bincount(minlength=7)[4:].tolist()
        counts[split] = (int(data.complete.sum()), skipped)
    assert counts == {
        "train": (124, [1517, 3, 38]),
        "val": (57, [685, 1, 19]),
        "test": (0, [0, 0, 0]),
    }


def test_constants_that_cannot_work_are_refused(nb):
    nb.check_configuration(vars(nb))
    for name, value in {
        "KEEP_VISIBLE": 0,
        "PRIOR_RATIOS": [[1.5, 2], [1.5, 2.25], [1.5, 2.25], [1.5, 2.25], [1.5], [1.5]],
        "PRIOR_SCALES": [0.07, 0.15, 0.28, 0.45, 0.62, 0.8],
    }.items():
        with pytest.raises(nb.StudyError, match=name):
            nb.check_configuration({**vars(nb), name: value})
