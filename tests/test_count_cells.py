"""The lab's tool as a library: tiles, the scale of cells, counts, remarks."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from lab import (
    COUNTING,
    NAMES,
    SQUARES,
    boxes_of,
    each_found_once,
    picture,
    rows_of_squares,
    save_square_finder,
    settings,
)
from PIL import Image

import count_cells
from count_cells import CellCounter

FIELD = [640, 480]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_square_finder(tmp_path_factory.mktemp("model") / "squares.onnx")


@pytest.fixture(scope="module")
def counter(model):
    return CellCounter(model)


def find(counter, image, field=FIELD):
    return count_cells.find_in_picture(counter.detector.find, image, field, 0.25)


@pytest.mark.parametrize("length", [1, 100, 640, 703, 705, 960, 1300, 2000, 8000])
@pytest.mark.parametrize("tile", [480, 640])
def test_tiles_cover_a_side_and_overlap(length, tile):
    starts = count_cells.tile_starts(length, tile, 240)
    if len(starts) == 1:
        assert starts == [0] and length <= 1.1 * tile
        return
    assert starts[0] == 0 and starts[-1] == length - tile
    gaps = np.diff(starts)
    assert gaps.min() > 0 and gaps.max() <= tile - 240 + 1


@pytest.mark.parametrize(
    "size", [(640, 480), (800, 600), (960, 480), (1500, 1100), (2100, 400), (480, 640), (300, 1600)]
)
def test_each_cell_of_a_picture_is_found_once_and_in_place(counter, size):
    g = np.random.default_rng(3)
    squares = []
    for x in range(10, size[0] - 110, 150):
        for y in range(10, size[1] - 110, 150):
            shift_x, shift_y = g.integers(0, 20, 2)
            squares.append((x + int(shift_x), y + int(shift_y), int(g.integers(50, 100))))
    squares[0] = (0, 0, 80)  # at the border of the picture, where nothing may be dropped
    cells = find(counter, picture(size[0], size[1], squares))
    assert each_found_once(cells, boxes_of(squares))
    assert (np.diff(cells["scores"]) <= 1e-6).all()


def test_a_picture_of_one_and_a_half_fields_is_read_in_tiles():
    """960x720 squeezed whole showed cells two thirds as large as they are known, and half of them
    were lost.
    """
    tiles = count_cells.cut_tiles(960, 720, FIELD)
    assert [tile[2:] for tile in tiles] == [(640, 480)] * 4
    assert count_cells.cut_tiles(700, 480, FIELD) == [(0, 0, 700, 480)]
    assert count_cells.cut_tiles(200, 100, FIELD) == [(0, 0, 480, 360)]  # not blown up


def test_an_upright_picture_is_turned_and_its_boxes_are_turned_back(counter):
    squares = [(20, 30, 60), (300, 500, 90)]
    shapes = []

    def watch(image):
        shapes.append(image.shape[:2])
        return counter.detector.find(image)

    image = picture(480, 640, squares)
    cells = count_cells.find_in_picture(watch, image, FIELD, 0.25)
    assert shapes == [(480, 640)] and each_found_once(cells, boxes_of(squares))


@pytest.mark.parametrize("side, x", [(260, 390), (330, 350), (100, 560)])
def test_a_cell_that_every_tile_cuts_survives(counter, side, x):
    """Tiles of a 1040x480 picture end at 640 and begin at 400: a cell of 260 pixels between is
    whole in neither.
    """
    squares = [(x, 80, side), (100, 300, 80)]
    assert each_found_once(find(counter, picture(1040, 480, squares)), boxes_of(squares), 0.9)


def test_a_cell_that_two_tiles_hold_whole_is_found_once(counter):
    """The tiles of a 1040x480 picture share its middle; no box touches their borders."""
    squares = [(480, 200, 80)]
    assert each_found_once(find(counter, picture(1040, 480, squares)), boxes_of(squares))


def test_a_part_a_few_pixels_from_the_border_is_not_counted_again():
    """A cell of 90 pixels, and a part of it that a tile saw and that ends four pixels before the
    tile does.
    """
    cells = {
        "boxes": np.array([[600, 100, 690, 190], [600, 100, 636, 190]], np.float32),
        "labels": np.ones(2, np.int64),
        "scores": np.array([0.8, 0.9], np.float32),
    }
    joined = count_cells.join_parts(cells, np.array([False, True]), 0.25)
    assert joined["boxes"].tolist() == [[600, 100, 690, 190]]

    def find_four_off(frame):
        box = np.array([[320, 240, 636, 336]], np.float32)
        return {"boxes": box, "labels": np.ones(1, np.int64), "scores": np.ones(1, np.float32)}

    image = picture(1040, 480)
    marked = []
    for tile in count_cells.cut_tiles(1040, 480, FIELD):
        cells = count_cells.find_in_tile(find_four_off, image, tile, 1040, 480)
        marked.append(cells["cut"].tolist())
    assert marked == [[True], [False]]  # at an inner border, and at the picture's


def test_thousands_of_boxes_are_compared_with_near_ones_alone():
    g = np.random.default_rng(0)
    corners = g.uniform(0, 3000, (2000, 2))
    boxes = np.concatenate([corners, corners + g.uniform(20, 150, (2000, 2))], 1).astype(np.float32)
    labels = g.integers(1, 3, 2000)
    order = g.permutation(2000)
    kept = count_cells.suppress_near(boxes, labels, order.tolist(), 0.25)
    expected = []
    for label in (1, 2):
        mine = order[labels[order] == label]
        expected += mine[count_cells.suppress(boxes[mine], 0.25)].tolist()
    assert sorted(kept) == sorted(expected) and 100 < len(kept) < 2000


@pytest.mark.parametrize("scale", [0.6, 1.41])
@pytest.mark.parametrize("size", [(640, 480), (1500, 1200)])
def test_the_size_of_the_cells_is_found(counter, scale, size):
    """The field found is the one in which cells are as large as usual."""
    width, height = (round(side * scale) for side in size)
    image, number = rows_of_squares(round(80 * scale), width, height, round(110 * scale))
    field = count_cells.find_field(counter.detector, image)
    assert 0.9 < field[0] / (640 * scale) < 1.1
    assert field[0] / field[1] == pytest.approx(4 / 3, abs=0.02)
    assert len(find(counter, image, field)["labels"]) == number


def test_the_scale_of_a_large_picture_is_searched_to_the_end(monkeypatch):
    """In fields three times too large three specks of the right size ended the search: of 29,000
    cells on 20,000 x 20,000 pixels 6,000 were counted.
    """
    detector = SimpleNamespace(settings=settings())
    tried = []

    def some_fit(detector, image, field):
        tried.append(field[0])
        if 500 < field[0] < 800:
            return 640 / field[0], 20
        return (0.8, 2.25) if field[0] < 2500 else (None, 0)

    monkeypatch.setattr(count_cells, "try_field", some_fit)
    image = np.broadcast_to(np.uint8(200), (20000, 20000, 3))
    field = count_cells.find_field(detector, image)
    assert field == [640, 480] and max(tried) <= 6000


def test_a_picture_without_cells_fits_no_size_and_says_so(counter):
    counted = counter.count(picture(640, 480))
    assert counted.counts["RBC"].number == 0
    assert counted.remark == "no cells of a usual size: do not trust the counts"


def test_a_count_depends_on_nothing_but_the_picture(counter):
    small = rows_of_squares(80, 640, 480, 110)[0]
    near = rows_of_squares(160, 640, 480, 200)[0]
    alone = counter.count(small)
    counter.count(near)
    again = counter.count(small)
    assert again.counts == alone.counts and np.array_equal(again.boxes, alone.boxes)
    assert alone.counts["RBC"].number == rows_of_squares(80, 640, 480, 110)[1]
    assert alone.classes[0] == "RBC" and alone.remark == ""


def test_cells_of_another_size_than_the_given_field_are_found_all_the_same(counter):
    image, number = rows_of_squares(160, 1280, 960, 200)
    counted = counter.count(image, field=[640, 480])
    assert counted.counts["RBC"].number == number
    assert counted.remark.startswith("cells of another size")


def test_boxes_at_the_border_are_marked(counter):
    squares = [(0, 100, 80), (200, 200, 80), (560, 300, 80), (300, 400, 80)]
    counted = counter.count(picture(640, 480, squares), field=FIELD)
    marks = {}
    for box, touches in zip(counted.boxes, counted.touches_border, strict=True):
        marks[round(float(box[0]), -2)] = bool(touches)
    assert marks == {0: True, 200: False, 600: True, 300: True}


def test_a_counter_can_be_pickled(counter):
    copy = pickle.loads(pickle.dumps(counter))
    image = picture(640, 480, SQUARES)
    assert copy.count(image).counts == counter.count(image).counts


def test_a_batch_of_files_is_counted_as_ray_data_gives_it(counter, tmp_path):
    Image.fromarray(picture(640, 480, SQUARES)).save(tmp_path / "a.png")
    contents = [(tmp_path / "a.png").read_bytes(), b"no picture"]
    batch = {"path": np.array(["a.png", "b.png"]), "bytes": np.array(contents, dtype=object)}
    columns = counter(batch)
    assert list(columns) == count_cells.count_columns(NAMES)
    assert columns["RBC"][0] == 3 and np.isnan(columns["RBC"][1])
    assert columns["remark"][0] == "" and columns["remark"][1].startswith("not readable")


def test_a_file_that_fails_unforeseen_does_not_end_the_batch(model, tmp_path, monkeypatch):
    Image.fromarray(picture(640, 480, SQUARES)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    counter = CellCounter(model)
    results = [RuntimeError("nobody foresaw this"), counter.count(picture(640, 480, SQUARES))]

    def fail_once(image):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(counter, "count", fail_once)
    names = np.array(["a.png", "b.png", "c.nef"])
    columns = counter({"path": names, "bytes": np.array([content] * 3, dtype=object)})
    assert columns["remark"][0] == "failed: RuntimeError: nobody foresaw this"
    assert columns["RBC"][1] == 3 and columns["remark"][1] == ""
    assert columns["remark"][2].startswith("not readable: a camera's raw data")


def test_scales_are_searched_for_once_where_none_fits(model, monkeypatch):
    counter = CellCounter(model)
    searches = []
    monkeypatch.setattr(count_cells, "find_field", lambda *given: searches.append(given))
    image = rows_of_squares(80, 640, 480, 110)[0]
    assert "no cells of a usual size" in counter.count(image).remark and len(searches) == 1


def test_names_that_the_font_cannot_write_are_left_out_of_a_drawing(counter, monkeypatch):
    """They came out as boxes: the number and the colour say it."""
    texts = []
    write = count_cells.ImageDraw.ImageDraw.text

    def watch(pen, place, text, **options):
        texts.append(text)
        write(pen, place, text, **options)

    monkeypatch.setattr(count_cells.ImageDraw.ImageDraw, "text", watch)
    image = picture(640, 480, SQUARES)
    counted = counter.count(image)
    names = ["RBC", "\u8840", "\u044d\u0440"]
    counted.counts = dict(zip(names, counted.counts.values(), strict=True))
    values = settings(class_names=names)
    counted.classes = ["RBC"] * 3
    count_cells.draw_cells(image, counted, values)
    assert texts == ["3 RBC", "0", "0"]


def test_what_is_no_image_is_refused_in_a_sentence(counter):
    for image in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(count_cells.CountError, match="uint8 RGB"):
            counter.count(image)
    assert counter.count(np.zeros((8, 8), np.uint8)).counts["RBC"].number == 1  # a grey one


def test_the_number_and_the_interval_of_a_count():
    """Ten detections with a chance of 0.5 and a sure one: 6 expected, 1.96 spreads each side."""
    counting = {
        "score_edges": [0.01, 0.5, 0.9],
        "share_right": [[0.0, 0.5, 1.0]],
        "cells_per_detection": [1.0],
        "spread": [1.5],
    }
    scores = np.array([0.95] + [0.6] * 10 + [0.02])
    reach = 1.96 * 1.5 * (0.01 + 2.5) ** 0.5
    count = count_cells.count_class(scores, 1, settings(counting=counting))
    assert count == count_cells.Count(6, round(6 - reach), round(6 + reach))
    counting["cells_per_detection"] = [1.5]  # of three cells two are found
    assert count_cells.count_class(scores, 1, settings(counting=counting)).number == 9
    assert count_cells.count_class(np.empty(0), 1, settings(counting=counting)).number == 0


@pytest.mark.parametrize(
    "counting",
    [
        None,
        {**COUNTING, "spread": [1.0, 0.0, 1.0], "cells_per_detection": [1.0, 0.0, 1.0]},
        {**COUNTING, "spread": [1.0, 0.0, 1.0]},
        {**COUNTING, "spread": [1.0, None, 1.0], "cells_per_detection": [1.0, None, 1.0]},
    ],
)
def test_a_class_that_was_not_measured_counts_by_the_plain_threshold(counting):
    """It counted 0 (0 to 0) for ever where validation had no object of it."""
    scores = np.array([0.9, 0.6, 0.5, 0.4])
    count = count_cells.count_class(scores, 2, settings(counting=counting))
    assert count == count_cells.Count(3, None, None)


MEASURED = {"brightness": [174, 199], "colour": [15.8, 23.1], "sharpness": [0.11, 0.2]}


def smear():
    """A drawn picture with the brightness, colour and sharpness of a smear (480, 640, 3)."""
    g = np.random.default_rng(0)
    image = np.full((480, 640, 3), (190, 180, 195), np.uint8)
    for x, y in g.integers(0, 400, (40, 2)):
        image[y : y + 60, x : x + 60] = (180, 140, 150)
    values = image + g.normal(0, 2, image.shape)
    return np.clip(values, 0, 255).astype(np.uint8)


def blurred(image):
    return count_cells.cv2.GaussianBlur(image, (0, 0), 12)


def grey(image):
    return np.repeat(image.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)


def noisy(image):
    return np.random.default_rng(1).integers(0, 256, image.shape).astype(np.uint8)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda image: image, []),
        (lambda image: image // 2, ["darker"]),
        (lambda image: np.clip(image.astype(int) * 1.5, 0, 255).astype(np.uint8), ["brighter"]),
        (blurred, ["less sharp"]),
        (grey, ["less colourful"]),
        (noisy, ["grainier"]),
        (np.zeros_like, ["darker", "less colourful", "less sharp"]),
        (lambda image: np.full_like(image, 255), ["brighter", "less colourful", "less sharp"]),
    ],
)
def test_a_picture_unlike_those_of_the_measurement_says_so(change, words):
    statistics = count_cells.picture_statistics(smear(), 300)
    measured = {name: [0.9 * value, 1.1 * value] for name, value in statistics.items()}
    values = settings(pictures=measured)
    assert count_cells.unlike_remarks(change(smear()), FIELD, values) == words


def test_noise_is_read_once_and_not_searched_for_scales(model, monkeypatch):
    values = settings(pictures=MEASURED)
    noise = noisy(np.zeros((1500, 2000, 3), np.uint8))
    assert count_cells.is_noise(noise, values)
    assert not count_cells.is_noise(smear(), values)
    mosaic = np.tile(smear(), (8, 8, 1))  # grainy as a whole, not in its middle
    assert not count_cells.is_noise(mosaic, values)
    calls = []
    counter = CellCounter(model)
    counter.settings = counter.detector.settings = values
    find_one = counter.detector.find
    monkeypatch.setattr(counter.detector, "find", lambda image: calls.append(1) or find_one(image))
    counted = counter.count(noise)
    assert len(calls) == 1 and "no cells of a usual size" in counted.remark


def test_what_a_picture_may_cost_has_a_bound(counter):
    """Specks of a few pixels would need thousands of fields."""
    assert count_cells.most_tiles(640, 480) == 111
    assert count_cells.most_tiles(20000, 20000) == 6000
    specks = rows_of_squares(5, 640, 480, 9)[0]
    assert count_cells.find_field(counter.detector, specks) is None


def test_a_picture_of_more_than_the_bound_is_refused_with_what_to_do():
    with pytest.raises(count_cells.PictureError, match="30000 x 30000 .* cut it into parts"):
        count_cells.check_size(30000, 30000)
    count_cells.check_size(20000, 20000)
