"""What the tests of count_cells.py share: pictures of dark squares, and a small ONNX model that
finds them.
"""

import csv
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import count_cells

NAMES = ["RBC", "WBC", "Platelets"]
SQUARES = [(100, 60, 90), (300, 250, 80), (480, 90, 100)]
COUNTING = {  # sure detections are right
    "score_edges": [0.01, 0.5],
    "share_right": [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]],
    "cells_per_detection": [1.0, 1.0, 1.0],
    "spread": [1.0, 1.0, 1.0],
    "labels": "complete",
    "images": 57,
}


def settings(**changes):
    """The metadata of a model, with some of them changed."""
    values = {
        "format_version": 2,
        "weights": "0123456789abcdef",
        "precision": "float32",
        "class_names": NAMES,
        "class_colours": ["#d55e00", "#0072b2", "#009e73"],
        "image_size": 300,
        "min_score": 0.01,
        "max_overlap": 0.45,
        "count_overlap": 0.25,
        "vote_overlap": 0.6,
        "top_k": 200,
        "max_candidates": 400,
        "show_score": 0.5,
        "counting": COUNTING,
        "usual": {"label": 1, "cell_size": 80.0, "image_size": [640, 480]},
        "pictures": {},
        "data_note": "",
    }
    values.update(changes)
    return values


class GraphBuilder:
    """Writes an ONNX graph node by node."""

    def __init__(self):
        self.nodes = []
        self.constants = []

    def constant(self, name, values, dtype=np.float32):
        array = np.asarray(values, dtype=dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def largest_ahead(self, values, axis):
        """The largest value from each pixel on, along an axis of (N, 1, 300, 300): in two steps,
        of 18 pixels and of 17 times 18.
        """
        for kernel, dilation in ((18, 1), (17, 18)):
            shape = [1, 1]
            dilations = [1, 1]
            pads = [0] * 8
            shape[axis - 2] = kernel
            dilations[axis - 2] = dilation
            pads[4 + axis] = (kernel - 1) * dilation
            output = f"{values}_{kernel}"
            widths = self.constant(f"{output}_pads", pads, np.int64)
            lowest = self.constant(f"{output}_lowest", -2000)
            padded = self.node("Pad", [values, widths, lowest], f"{output}_padded")
            options = {"kernel_shape": shape, "dilations": dilations}
            values = self.node("MaxPool", [padded], output, **options)
        return values


def square_finder_graph():
    """A graph images (N, 3, 300, 300) -> boxes, cells: each dark square is a cell of class 1.

    A pixel that is dark, with light to its left and above it, is the corner of a square; the next
    light pixels to its right and below end it.
    """
    graph = GraphBuilder()
    one = graph.constant("one", 1)
    zero = graph.constant("zero", 0)
    size = graph.constant("size", 300)
    far = graph.constant("far", 1000)
    least = graph.constant("least", 3)  # pixels: what is smaller is the blurred rim of a square
    grey = graph.node("ReduceMean", ["images"], "grey", axes=[1], keepdims=1)
    is_dark = graph.node("Less", [grey, graph.constant("limit", 110)], "is_dark")
    dark = graph.node("Cast", [is_dark], "dark", to=TensorProto.FLOAT)
    nothing = graph.node("Mul", [dark, zero], "nothing")
    beyond = graph.node("Mul", [dark, far], "beyond")
    ramp = np.arange(300, dtype=np.float32)
    corner = dark
    sides = {}
    for name, axis in (("x", 3), ("y", 2)):
        shape = [1, 1, 1, 1]
        shape[axis] = 300
        place = graph.constant(f"place_{name}", ramp.reshape(shape))
        low = graph.node("Add", [nothing, place], f"low_{name}")
        light = graph.node("Add", [beyond, place], f"light_{name}")
        negative = graph.node("Neg", [light], f"negative_{name}")
        pooled = graph.largest_ahead(negative, axis)
        next_light = graph.node("Neg", [pooled], f"next_{name}")
        high = graph.node("Min", [next_light, size], f"high_{name}")
        sides[name] = (low, high)
        length = graph.node("Sub", [high, low], f"length_{name}")
        is_long = graph.node("Greater", [length, least], f"is_long_{name}")
        long = graph.node("Cast", [is_long], f"long_{name}", to=TensorProto.FLOAT)
        corner = graph.node("Mul", [corner, long], f"long_corner_{name}")
        before = [0] * 8
        before[axis] = 1
        widths = graph.constant(f"widths_{name}", before, np.int64)
        moved = graph.node("Pad", [dark, widths, zero], f"moved_{name}")
        start = graph.constant(f"start_{name}", [0, 0], np.int64)
        end = graph.constant(f"end_{name}", [300, 300], np.int64)
        axes = graph.constant(f"axes_{name}", [2, 3], np.int64)
        previous = graph.node("Slice", [moved, start, end, axes], f"previous_{name}")
        light_before = graph.node("Sub", [one, previous], f"before_{name}")
        corner = graph.node("Mul", [corner, light_before], f"corner_{name}")
    corners = [sides["x"][0], sides["y"][0], sides["x"][1], sides["y"][1]]
    pixels = graph.node("Concat", corners, "pixels", axis=1)
    shares = graph.node("Div", [pixels, size], "shares")
    score = graph.node("Mul", [corner, graph.constant("sure", 0.95)], "score")
    background = graph.node("Sub", [one, score], "background")
    classes = graph.node("Concat", [background, score, nothing, nothing], "classes", axis=1)
    rows = graph.constant("rows", [0, 4, 90000], np.int64)
    for values, name in ((shares, "boxes"), (classes, "cells")):
        flat = graph.node("Reshape", [values, rows], f"flat_{name}")
        graph.node("Transpose", [flat], name, perm=[0, 2, 1])
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 300, 300])
    outputs = []
    for name in ("boxes", "cells"):
        shape = ["N", 90000, 4]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return helper.make_graph(graph.nodes, "squares", [images], outputs, graph.constants)


def save_square_finder(path, metadata=None):
    """Write the model with its metadata; returns the path."""
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(square_finder_graph(), opset_imports=[opset], ir_version=9)
    text = json.dumps(settings() if metadata is None else metadata)
    helper.set_model_props(model, {"count_cells": text})
    onnx.save(model, path)
    return path


def picture(width, height, squares=()):
    """A light picture (height, width, 3) with dark squares (x, y, side)."""
    image = np.full((height, width, 3), 230, dtype=np.uint8)
    for x, y, side in squares:
        image[y : y + side, x : x + side] = 40
    return image


def boxes_of(squares):
    """Squares as boxes (n, 4) xyxy."""
    return np.array([[x, y, x + side, y + side] for x, y, side in squares], np.float32)


def rows_of_squares(side, width, height, step):
    """A picture full of squares of one size, and their number."""
    places = []
    for x in range(5, width - side, step):
        for y in range(5, height - side, step):
            places.append((x, y, side))
    return picture(width, height, places), len(places)


def each_found_once(cells, truth, least=0.85):
    """Every true box has a detection of its own, and there is no other."""
    overlap = count_cells.overlaps(truth, cells["boxes"])
    best = overlap.argmax(1)
    one_each = len(cells["boxes"]) == len(truth) == len(set(best.tolist()))
    return one_each and overlap.max(1).min() > least


def table(path):
    """The rows of a CSV file as dictionaries."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


class WorkersHere:
    """Stands in for count_cells.Workers: counts in this process, one picture after another."""

    def __init__(self, count, options):
        self.options = options

    def __enter__(self):
        count_cells.worker_options = self.options
        count_cells.worker_counters = {}
        return self

    def __exit__(self, *fault):
        pass

    def describe_model(self):
        return count_cells.describe_model()

    def run(self, tasks, at_once=None):
        for task in tasks:
            yield count_cells.count_task(task)
