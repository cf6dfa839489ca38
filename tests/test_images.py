"""Your own images (section 16): any size and format, tiles that meet, broken files listed, tables
of what was found.
"""

import csv
import functools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import ops


class FindsDarkSquares(torch.nn.Module):
    """Stands in for the detector: answers with the box of every dark square in the picture, as
    class 1, surely.
    """

    def __init__(self, nb):
        super().__init__()
        self.nb, self.num_classes = nb, 4
        self.register_buffer("priors", nb.create_prior_boxes())
        self.corners = ops.box_convert(self.priors, "cxcywh", "xyxy")

    def forward(self, images):
        locs, scores = torch.zeros(len(images), 8732, 4), torch.zeros(len(images), 8732, 4)
        scores[..., 0] = 30
        grey = (images + images.new_tensor(self.nb.VGG_MEAN).view(1, 3, 1, 1)).mean(1)
        for row, picture in enumerate(grey):
            dark = (picture < 110).numpy().astype(np.uint8)
            for x, y, w, h, area in cv2.connectedComponentsWithStats(dark)[2][1:].tolist():
                if area > 20:
                    box = torch.tensor([[x, y, x + w, y + h]]) / 300
                    best = ops.box_iou(box, self.corners)[0].argmax()
                    locs[row, best] = self.nb.encode(box, self.priors[best : best + 1])[0]
                    scores[row, best] = torch.tensor([0, 30.0, 0, 0])
        return locs, scores


NAMES = ["RBC", "WBC", "Platelets"]
COUNTING = {  # as section 13 leaves it; sure detections are right
    "calibration": {"edges": [0.01, 0.5], "share right": [[0.0, 1.0]] * 3},
    "per detection": [1.0] * 3,
    "spread": [1.0] * 3,
    "usual": {"label": 1, "size": None, "image": [640, 480]},
    "labels": "complete",
    "images": 57,
}


@pytest.fixture
def detector(nb, monkeypatch):
    """The stand-in, also for search_folder; the file named as the checkpoint is never read."""
    model = FindsDarkSquares(nb)
    content = {"counting": COUNTING, "class_names": NAMES, "model": {}}
    monkeypatch.setattr(nb, "load_detector", lambda *a, **k: (model, NAMES))
    monkeypatch.setattr(nb, "load_checkpoint", lambda *a, **k: content)
    monkeypatch.setattr(nb, "detection_precision", lambda device: torch.float32)
    return model


@pytest.fixture
def find(nb, detector):
    return functools.partial(nb.detect, detector, every_cell=True, num_classes=3)


FIELD = [640, 480]


def picture(width, height, squares):
    """A light picture (height, width, 3) with dark squares (x, y, side)."""
    image = np.full((height, width, 3), 230, dtype=np.uint8)
    for x, y, side in squares:
        image[y : y + side, x : x + side] = 40
    return image


@pytest.mark.parametrize("length", [1, 100, 640, 703, 705, 960, 1300, 2000, 8000])
@pytest.mark.parametrize("tile", [480, 640])
def test_tiles_cover_a_side_and_overlap(nb, length, tile):
    starts = nb.tile_starts(length, tile, 240)
    if len(starts) == 1:
        assert starts == [0] and length <= 1.1 * tile
        return
    assert starts[0] == 0 and starts[-1] == length - tile
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert min(gaps) > 0 and max(gaps) <= tile - 240 + 1


def boxes_of(squares):
    return torch.tensor([[x, y, x + s, y + s] for x, y, s in squares], dtype=torch.float32)


def each_found_once(found, truth, least=0.85):
    """Every true box has a detection of its own, and there is no other."""
    best = ops.box_iou(truth, found["boxes"]).max(1)
    return (
        len(found["boxes"]) == len(truth) == len(set(best.indices.tolist()))
        and best.values.min() > least
    )


@pytest.mark.parametrize(
    "size", [(640, 480), (800, 600), (960, 480), (1500, 1100), (2100, 400), (480, 640), (300, 1600)]
)
def test_each_cell_of_a_picture_is_found_once_and_in_place(nb, find, size):
    g = np.random.default_rng(3)
    squares = []
    for x in range(10, size[0] - 110, 150):
        for y in range(10, size[1] - 110, 150):
            squares.append(
                (x + int(g.integers(0, 20)), y + int(g.integers(0, 20)), int(g.integers(50, 100)))
            )
    squares[0] = (0, 0, 80)  # at the border of the picture, where nothing may be dropped
    found = nb.detect_large(find, picture(*size, squares), FIELD)
    assert each_found_once(found, boxes_of(squares))
    assert (found["scores"].diff() <= 1e-6).all()


def test_a_picture_of_one_and_a_half_fields_is_read_in_tiles(nb):
    """960x720 squeezed whole showed cells two thirds as large as they are known, and half of them
    were lost.
    """
    image = np.zeros((720, 960, 3), np.uint8)
    assert [tile[2:] for tile in nb.cut_tiles(image, FIELD)] == [(640, 480)] * 4
    assert nb.cut_tiles(image[:, :700], FIELD)[0][2:] == (700, 480)
    assert nb.cut_tiles(image[:100, :200], FIELD) == [
        (0, 0, 480, 360)
    ]  # not blown up to a whole field


def test_an_upright_picture_is_turned_and_its_boxes_are_turned_back(nb, find):
    squares = [(20, 30, 60), (300, 500, 90)]
    shapes = []

    def watch(images, **limits):
        shapes.extend(image.shape[:2] for image in images)
        return find(images, **limits)

    found = nb.detect_large(watch, picture(480, 640, squares), FIELD)
    assert shapes == [(480, 640)] and each_found_once(found, boxes_of(squares))


@pytest.mark.parametrize("side, x", [(260, 390), (330, 350), (100, 560)])
def test_a_cell_that_every_tile_cuts_survives(nb, find, side, x):
    """Tiles of a 1040x480 picture end at 640 and begin at 400: a cell of 260 pixels between is
    whole in neither.
    """
    found = nb.detect_large(find, picture(1040, 480, [(x, 80, side), (100, 300, 80)]), FIELD)
    assert each_found_once(found, boxes_of([(x, 80, side), (100, 300, 80)]), 0.9)


def test_a_part_a_few_pixels_from_the_border_is_not_counted_again(nb):
    """A cell of 90 pixels, and a part of it that a tile saw and that ends four pixels before the
    tile does.
    """
    boxes = torch.tensor([[600.0, 100, 690, 190], [600, 100, 636, 190]])
    found = {
        "boxes": boxes,
        "labels": torch.ones(2, dtype=torch.int64),
        "scores": torch.tensor([0.8, 0.9]),
    }
    joined = nb.join_parts(found, torch.tensor([False, True]), 0.25)
    assert joined["boxes"].tolist() == [[600, 100, 690, 190]]

    def find_four_off(frames, **limits):
        box = torch.tensor([[320.0, 240, 636, 336]])
        return [{"boxes": box, "labels": torch.ones(1), "scores": torch.ones(1)} for _ in frames]

    marked = []
    plain, nb.join_parts = (
        nb.join_parts,
        lambda found, cut, overlap: marked.extend(cut.tolist()) or found,
    )
    try:
        nb.detect_large(find_four_off, np.zeros((480, 1040, 3), np.uint8), FIELD)
    finally:
        nb.join_parts = plain
    assert marked == [
        True,
        False,
    ]  # in the left tile it ends at an inner border, in the right one at the picture's


def test_no_overlap_at_all_can_be_asked_for(nb):
    boxes = torch.tensor([[0.0, 0, 100, 100], [95, 0, 195, 100], [500, 0, 600, 100]])
    found = {
        "boxes": boxes,
        "labels": torch.ones(3, dtype=torch.int64),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    asked = []

    def find(frames, **limits):
        asked.append(limits)
        return [dict(found) for _ in frames]

    tiles = nb.detect_large(find, np.zeros((480, 1040, 3), np.uint8), FIELD, max_overlap=0)
    assert all(limits == {"max_overlap": 0} for limits in asked) and len(asked) == 2
    assert not (ops.box_iou(tiles["boxes"], tiles["boxes"]).fill_diagonal_(0) > 0).any()


def save(folder, name, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / name, **options)


SQUARES = [(100, 60, 90), (300, 250, 80), (480, 90, 100)]


@pytest.fixture
def awkward(tmp_path):
    """Some thirty files as people have them: {name: cells in it, None if it cannot be read}."""
    folder = tmp_path / "Мои снимки (1)"
    folder.mkdir()
    base = picture(640, 480, SQUARES)
    rgb = Image.fromarray(base)
    names = {}

    def add(name, image, cells=3, **options):
        save(folder, name, image, **options)
        names[name] = cells

    add("plain.jpg", rgb, quality=95)
    add("UPPER.JPG", rgb, quality=95)
    add("two words.jpeg", rgb, quality=95)
    add("мазок 7.png", rgb)
    add("bitmap.bmp", rgb)
    add("tiff.tif", rgb)
    add("compressed.tiff", rgb, compression="tiff_lzw")
    add("grey.png", rgb.convert("L"))
    add("one bit.png", rgb.convert("1", dither=Image.Dither.NONE))
    add("palette.png", rgb.quantize(8))
    add("cmyk.jpg", rgb.convert("CMYK"), quality=95)
    add("grey 16 bit.png", Image.fromarray(base[..., 0].astype(np.uint16) * 257))
    add("grey 16 bit.tif", Image.fromarray(base[..., 0].astype(np.uint16) * 257))
    for name in ("colour 16 bit.png", "colour 16 bit.tif"):
        cv2.imwrite(
            str(tmp_path / f"deep{name[-4:]}"), base.astype(np.uint16) * 257
        )  # OpenCV opens no such folder
        (tmp_path / f"deep{name[-4:]}").rename(folder / name)
        names[name] = 3
    add("progressive.jpg", rgb, quality=95, progressive=True)
    add("quotes'and#.png", rgb)
    transparent = rgb.convert("RGBA")
    alpha = np.where(base[..., 0] < 100, 255, 0).astype(np.uint8)  # only the squares are opaque
    transparent.putalpha(Image.fromarray(alpha))
    add("transparent.png", transparent)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("turned.jpg", rgb.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)
    add("blank.png", picture(640, 480, []), 0)
    add("sixteen.png", picture(16, 16, []), 0)
    add("one pixel.png", picture(1, 1, []), 0)
    add("line.png", picture(900, 1, []), 0)
    add("large.png", picture(1500, 1100, [(100, 100, 90), (630, 470, 90), (1400, 1000, 90)]))
    add("long.png", picture(3000, 60, []), 0)
    add("frames.tif", rgb, save_all=True, append_images=[rgb])
    whole = (folder / "plain.jpg").read_bytes()
    for name, content in {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.png": b"no picture at all",
        "zeros.tif": bytes(1000),
        "head.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    }.items():
        (folder / name).write_bytes(content)
        names[name] = None
    (folder / "notes.txt").write_text("not a picture, and not named like one")
    (folder / "folder.jpg").mkdir()
    return folder, names


def table(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_awkward_files(nb, detector, awkward, tmp_path):
    folder, names = awkward
    results = tmp_path / "results"
    summary, counts, broken = nb.search_folder(folder, results, "unused.pth", as_xml=True)
    assert {name for name, _ in broken} == {name for name, cells in names.items() if cells is None}
    assert all(name in reason and str(tmp_path) not in reason for name, reason in broken)
    rows = {row["image"]: row for row in table(results / "counts.csv") if row["RBC"]}
    assert int(rows.pop(f"SUM of {len(rows) - 1} images")["RBC"]) == sum(
        c or 0 for c in names.values()
    )
    assert {name: int(row["RBC"]) for name, row in rows.items()} == {
        n: c for n, c in names.items() if c is not None
    }
    assert len(counts) == len(rows)
    detections = table(results / "detections.csv")
    assert len(detections) == sum(cells or 0 for cells in names.values())
    for row in detections:
        if row["image"] == "plain.jpg":
            box = torch.tensor([[float(row[k]) for k in ("xmin", "ymin", "xmax", "ymax")]])
            truth = torch.tensor([[x, y, x + s, y + s] for x, y, s in SQUARES], dtype=torch.float32)
            assert row["class"] == "RBC" and 0.5 < float(row["score"]) <= 1
            assert ops.box_iou(box, truth).max() > 0.9
    pictures = {path for path in results.iterdir() if path.suffix == ".jpg"}
    assert len(pictures) == len(rows)
    for path in pictures:
        with Image.open(path) as image:
            image.load()
    tree = ElementTree.parse(results / "мазок 7.xml")
    assert len(tree.findall("object")) == 3 and tree.findtext("size/width") == "640"


def test_the_xml_reads_back_as_an_annotation(nb, detector, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", "a.png", picture(640, 480, SQUARES))
    nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth", as_xml=True)
    boxes, labels = nb.parse_voc_annotation(tmp_path / "out" / "a.xml", ["RBC", "WBC", "Platelets"])
    truth = torch.tensor([[x, y, x + s, y + s] for x, y, s in SQUARES], dtype=torch.float32)
    assert labels.tolist() == [1, 1, 1]
    assert ops.box_iou(truth, boxes).max(1).values.min() > 0.9


def test_every_depth_is_seen_as_it_is(nb, tmp_path):
    base = picture(64, 48, [(10, 5, 20)])
    grey, white = base[..., 0], base[..., 0].max()
    whole = {"deep.tif": grey.astype(np.uint16) * 257, "twelve.tif": grey.astype(np.uint16) * 16}
    whole |= {"float.tif": grey.astype(np.float32) / 255, "float 255.tif": grey.astype(np.float32)}
    for name, values in whole.items():
        save(tmp_path, name, Image.fromarray(values))
    for name in ("colour.png", "colour.tif"):  # 12 bits in 16
        cv2.imwrite(str(tmp_path / name), base.astype(np.uint16) * 16)
    for name in [*whole, "colour.png", "colour.tif"]:
        image, remark = nb.read_any_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.shape == base.shape and not remark
        assert np.abs(image.astype(int) - base).max() <= 2, name
    assert white == 230


def test_turned_pictures_and_pages(nb, tmp_path):
    base = picture(64, 48, [(10, 5, 20)])
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path, "turned.png", Image.fromarray(base[::-1, ::-1].copy()), exif=exif)
    assert np.array_equal(nb.read_any_image(tmp_path / "turned.png")[0], base)
    exif[0x0112] = 6
    save(
        tmp_path,
        "quarter.jpg",
        Image.fromarray(base).rotate(90, expand=True),
        exif=exif,
        quality=95,
    )
    assert nb.read_any_image(tmp_path / "quarter.jpg")[0].shape == base.shape
    save(
        tmp_path,
        "pages.tif",
        Image.fromarray(base),
        save_all=True,
        append_images=[Image.fromarray(base)] * 2,
    )
    image, remark = nb.read_any_image(tmp_path / "pages.tif")
    assert np.array_equal(image, base) and remark == "first of 3 pages"


def results_of(nb, folder, results):
    """Names of the pictures in counts.csv."""
    nb.search_folder(folder, results, "unused.pth")
    return [
        row["image"]
        for row in table(Path(results) / "counts.csv")
        if not row["image"].startswith("SUM")
    ]


def test_a_second_search_does_not_search_its_own_pictures(nb, detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("a.png", "b.png"):
        save(Path("in"), name, picture(640, 480, SQUARES))
    for results in ("in", tmp_path / "in", "in/results", tmp_path / "in" / "results"):
        for _ in range(2):
            assert results_of(nb, "in", results) == ["a.png", "b.png"]


def test_names_that_differ_in_their_ending_alone_keep_their_results(nb, detector, tmp_path):
    (tmp_path / "in").mkdir()
    images = {"a.jpg": 3, "a.JPG": 2, "a.png": 1, "b.png": 0, "a_jpg.png": 1}
    for name, cells in images.items():
        save(tmp_path / "in", name, picture(640, 480, SQUARES[:cells]))
    nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth", as_xml=True)
    pictures = {path.name.casefold() for path in (tmp_path / "out").glob("*_cells.jpg")}
    assert len(pictures) == len(images) and "b_cells.jpg" in pictures
    counted = sorted(
        len(ElementTree.parse(path).findall("object")) for path in (tmp_path / "out").glob("*.xml")
    )
    assert counted == sorted(images.values())


def test_the_detector_goes_to_the_device_that_is_there(nb, detector, monkeypatch):
    asked = []
    monkeypatch.setattr(nb, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(
        nb, "load_detector", lambda path, device="cpu": asked.append(device) or (detector, NAMES)
    )
    nb.CellCounter("unused.pth")
    assert asked == [torch.device("meta")]


def test_forty_pictures_leave_plain_lines_and_no_widget(nb, detector, tmp_path, capsys):
    pytest.importorskip("ipywidgets")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    InteractiveShell.instance()
    (tmp_path / "in").mkdir()
    for number in range(40):
        save(tmp_path / "in", f"{number:02}.png", picture(64, 48, []))
    with capture_output() as captured:
        nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")
    assert not captured.outputs and not captured.stderr  # no widget, and no bar either
    lines = captured.stdout.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "10 of 40",
        "20 of 40",
        "30 of 40",
        "40 of 40",
    ]


def test_the_table_is_for_a_spreadsheet(nb, detector, tmp_path):
    (tmp_path / "in").mkdir()
    for number, cells in enumerate((3, 1)):
        save(tmp_path / "in", f"{number}.png", picture(640, 480, SQUARES[:cells]))
    (tmp_path / "in" / "broken.png").write_bytes(b"x")
    summary, rows, broken = nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")
    text = (tmp_path / "out" / "counts.csv").read_bytes()
    assert (
        text.startswith(b"\xef\xbb\xbfimage,RBC,RBC least,RBC most,WBC,") and b",remark\r\n" in text
    )
    first, second, failed, total = table(tmp_path / "out" / "counts.csv")
    assert (first["RBC"], second["RBC"], total["RBC"]) == ("3", "1", "4")
    assert int(first["RBC least"]) <= 3 <= int(first["RBC most"])
    assert (
        failed["image"] == "broken.png" and failed["remark"] == "not readable" and not failed["RBC"]
    )
    assert total["image"] == "SUM of 2 images"
    assert "2 images counted" in summary[0] and "1 files not readable" in summary[0]
    assert summary[1].startswith("RBC: 4 cells (95% interval ") and "2.0 an image" in summary[1]
    assert len(rows) == 2 and len(broken) == 1


def test_without_a_measured_calibration_there_is_no_interval(nb, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "load_checkpoint", lambda *a, **k: {"class_names": NAMES})
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", "a.png", picture(640, 480, SQUARES))
    summary, rows, _ = nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")
    assert rows == [["a.png", 3, "", "", 0, "", "", 0, "", "", ""]] and "no interval" in summary[1]


@pytest.fixture
def measured(monkeypatch):
    """The stand-in's cells have a usual size: 80 pixels on a picture of 640x480."""
    monkeypatch.setitem(COUNTING, "usual", {"label": 1, "size": 80.0, "image": [640, 480]})
    return COUNTING["usual"]


def rows_of_squares(side, width, height, step):
    places = [(x, y) for x in range(5, width - side, step) for y in range(5, height - side, step)]
    return picture(width, height, [(x, y, side) for x, y in places]), len(places)


@pytest.mark.parametrize("scale", [0.5, 0.71, 1, 1.41, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_the_size_of_the_cells_is_found(nb, find, measured, scale, whole):
    """A picture of one field, and one of many: the field found is the one in which cells are as
    large as usual.
    """
    width, height = (
        (round(640 * scale), round(480 * scale))
        if whole
        else (round(1500 * scale), round(1200 * scale))
    )
    image, cells = rows_of_squares(round(80 * scale), width, height, round(110 * scale))
    field = nb.find_field(find, image, measured)
    assert 0.9 < field[0] / (640 * scale) < 1.1
    assert field[0] / field[1] == pytest.approx(4 / 3, abs=0.02)
    assert len(nb.detect_large(find, image, field)["labels"]) == cells


def test_a_picture_without_cells_fits_no_size_and_says_so(nb, detector, measured, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", "blank.png", picture(640, 480, []))
    save(tmp_path / "in", "cells.png", rows_of_squares(160, 1281, 960, 220)[0])
    summary, rows, _ = nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")
    assert rows[0][-1].startswith("no size of cells fits") and rows[1][-1] == ""
    assert "1 of them with a remark" in summary[0]


def test_a_picture_of_other_cells_is_read_at_its_own_size(nb, detector, measured, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        save(tmp_path / "in", f"{number}.png", rows_of_squares(80, 1280, 960, 110)[0])
    save(tmp_path / "in", "near.png", rows_of_squares(160, 1280, 960, 200)[0])
    counts = {
        row[0]: row for row in nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")[1]
    }
    assert counts["0.png"][1] == 88 and counts["0.png"][-1] == ""
    assert counts["near.png"][1] == 24 and counts["near.png"][-1].startswith(
        "cells of another size"
    )


def test_nothing_to_search_is_said(nb, detector, tmp_path):
    with pytest.raises(nb.StudyError, match="no folder"):
        nb.search_folder(tmp_path / "absent", tmp_path / "out", "unused.pth")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("x")
    with pytest.raises(nb.StudyError, match="no picture"):
        nb.search_folder(tmp_path / "in", tmp_path / "out", "unused.pth")
    assert not (tmp_path / "out").exists()


def test_without_a_detector_it_says_so(nb, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", "a.png", picture(64, 64, []))
    with pytest.raises(nb.CheckpointError, match=r"absent\.pth"):
        nb.search_folder(tmp_path / "in", tmp_path / "out", tmp_path / "absent.pth")


def test_an_int8_copy_counts_only_where_it_is_of_the_same_weights_good_and_faster(
    nb, tmp_path, monkeypatch
):
    model = nb.SSD300(4).eval()
    content = {"class_names": NAMES, "model": model.state_dict()}
    notes = {}

    class Session:
        def get_modelmeta(self):
            return type("Meta", (), {"custom_metadata_map": notes})

    monkeypatch.setattr(nb, "CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setattr(nb, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(nb, "onnx_session", lambda path: Session())
    monkeypatch.setattr(nb, "load_detector", lambda *a: (model, NAMES))
    monkeypatch.setattr(nb, "detection_precision", lambda device: torch.float32)

    def chosen(**changed):
        mark = nb.fingerprint(content["model"])
        notes.update({"weights": mark, "lost_map_50": "0.001", "faster": "True", **changed})
        return nb.fastest_detector("unused.pth", content)[1]

    assert chosen() == "torch in float32"  # there is no file
    (tmp_path / "ssd300_int8.onnx").write_bytes(b"")
    assert chosen() == "ONNX Runtime in int8"
    assert chosen(faster="False") == "torch in float32"
    assert chosen(weights="of an earlier training") == "torch in float32"
    assert chosen(lost_map_50="0.003") == "torch in float32"
    monkeypatch.setattr(nb, "onnx_session", lambda path: 1 / 0)
    assert chosen() == "torch in float32"  # a damaged file
