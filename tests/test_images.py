"""Your own images (section 16): any size and format, tiles that meet, broken files listed, tables of what was found."""

import csv
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import ops


class FindsDarkSquares(torch.nn.Module):
    """Stands in for the detector: answers with the box of every dark square in the picture, as class 1, surely."""

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


@pytest.fixture
def detector(nb, monkeypatch):
    """The stand-in, also for search_folder; the file named as the checkpoint is never read."""
    model = FindsDarkSquares(nb)
    content = {"counting": {"thresholds": [0.5, 0.5, 0.5]}}
    monkeypatch.setattr(nb, "load_detector", lambda *a, **k: (model, ["RBC", "WBC", "Platelets"]))
    monkeypatch.setattr(nb, "load_checkpoint", lambda *a, **k: content)
    return model


def picture(width, height, squares):
    """A light picture (height, width, 3) with dark squares (x, y, side)."""
    image = np.full((height, width, 3), 230, dtype=np.uint8)
    for x, y, side in squares:
        image[y : y + side, x : x + side] = 40
    return image


@pytest.mark.parametrize("length", [1, 100, 640, 960, 961, 1300, 2000, 8000])
@pytest.mark.parametrize("tile", [480, 640])
def test_tiles_cover_a_side_and_overlap(nb, length, tile):
    starts = nb.tile_starts(length, tile)
    if len(starts) == 1:
        assert starts == [0] and length <= 1.5 * tile
        return
    assert starts[0] == 0 and starts[-1] == length - tile
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert min(gaps) > 0 and max(gaps) <= tile - nb.TILE_OVERLAP + 1


@pytest.mark.parametrize("size", [(640, 480), (1500, 1100), (2100, 400), (300, 1600)])
def test_each_cell_of_a_large_image_is_found_once_and_in_place(nb, detector, size):
    g = np.random.default_rng(3)
    squares = []
    for x in range(10, size[0] - 110, 150):
        for y in range(10, size[1] - 110, 150):
            squares.append((x + int(g.integers(0, 20)), y + int(g.integers(0, 20)), int(g.integers(50, 100))))
    squares[0] = (0, 0, 80)  # at the border of the picture, where nothing may be dropped
    found = nb.detect_large(detector, picture(*size, squares))
    truth = torch.tensor([[x, y, x + s, y + s] for x, y, s in squares], dtype=torch.float32)
    assert len(found["boxes"]) == len(truth)
    best = ops.box_iou(truth, found["boxes"]).max(1)
    assert best.values.min() > 0.85
    assert len(set(best.indices.tolist())) == len(truth)
    assert (found["scores"].diff() <= 1e-6).all()


def save(folder, name, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / name, **options)


SQUARES = [(100, 60, 90), (300, 250, 80), (480, 90, 100)]


@pytest.fixture
def awkward(tmp_path):
    """Some thirty files as people have them: {name: cells in it, or None for what cannot be read}."""
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
        cv2.imwrite(str(tmp_path / f"deep{name[-4:]}"), base.astype(np.uint16) * 257)  # OpenCV opens no such folder
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
    counts, broken = nb.search_folder(folder, results, "unused.pth", as_xml=True)
    assert {name for name, _ in broken} == {name for name, cells in names.items() if cells is None}
    assert all(name in reason and str(tmp_path) not in reason for name, reason in broken)
    rows = {row["image"]: row for row in table(results / "counts.csv")}
    assert {name: int(row["RBC"]) for name, row in rows.items()} == {n: c for n, c in names.items() if c is not None}
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


def test_colours_of_sixteen_bits_and_turned_pictures(nb, tmp_path):
    base = picture(64, 48, [(10, 5, 20)])
    save(tmp_path, "deep.tif", Image.fromarray(base[..., 0].astype(np.uint16) * 257))
    assert np.abs(nb.read_any_image(tmp_path / "deep.tif").astype(int) - base).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path, "turned.png", Image.fromarray(base[::-1, ::-1].copy()), exif=exif)
    assert np.array_equal(nb.read_any_image(tmp_path / "turned.png"), base)


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


def test_the_interval_of_a_count(nb):
    """Ten detections with a chance of 0.5 and a sure one: 6 expected, 1.96 times sqrt(10 / 4) each side."""
    calibration = {"edges": [0.01, 0.5, 0.9], "share right": [[0.0, 0.5, 1.0]]}
    found = {"labels": torch.ones(12, dtype=torch.int64), "scores": torch.tensor([0.95] + [0.6] * 10 + [0.02])}
    expected, low, high = nb.count_interval(found, 1, calibration)
    assert expected == pytest.approx(6)
    assert (high - expected, expected - low) == pytest.approx((1.96 * 2.5**0.5,) * 2)
    assert nb.count_interval(found, 2, {"edges": [0.01], "share right": [[1.0], [1.0]]})[0] == 0
