#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "onnxruntime>=1.17",
#     "opencv-python-headless>=4.8",
#     "numpy>=1.26",
#     "pillow>=11",
#     "tifffile>=2023.7.10",
#     "tqdm>=4.65",
# ]
# ///
"""Count the cells on pictures of blood smears.

    python count_cells.py my_smears               # results in my_smears_cells
    python count_cells.py a.jpg more --nested --voc --output results

Results: counts.csv (cells of each class on each picture, with the ends of their 95%
intervals and a remark; the last line is the sum), detections.csv (every counted cell,
and whether it touches the border), annotated/ (the pictures with their boxes) and
report.html. A run that was stopped goes on where it was when the same
command is given again.

As a library:

    from count_cells import CellCounter, read_picture

    counter = CellCounter("ssd300_int8.onnx")
    image, remark = read_picture("smear.jpg")
    print(counter.count(image).counts["RBC"])

The model is a file that ssd_bccd_detection.ipynb exports: network and everything
that counting needs, in one. checkpoints/ssd300_int8.onnx of the repository knows red
cells, white cells and platelets.

Exit codes: 0 every picture was counted; 1 a fault of this program; 2 the command is
wrong; 3 some pictures could not be counted, the others are; 4 no picture was counted;
5 the model cannot be used; 6 the results cannot be written; 130 stopped by Ctrl-C,
143 by a signal.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import glob
import hashlib
import html
import io
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
import xml.etree.ElementTree as ElementTree
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

try:
    import cv2
    import numpy as np
    import tifffile
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
    from tqdm import tqdm
except ImportError as fault:
    if __name__ != "__main__":
        raise
    packages = "onnxruntime opencv-python-headless numpy pillow tifffile tqdm"
    sys.exit(f"{fault}. This program needs: pip install {packages}")

VERSION = "1.1"
FORMAT_VERSION = 2  # of the metadata in the model's file
METADATA_KEY = "count_cells"
PROGRAM_FOLDER = Path(__file__).resolve().parent
MODEL_NAMES = ("ssd300_int8.onnx", "ssd300.onnx")  # looked for in this order

MAX_PIXELS = 500_000_000  # larger pictures are refused: 20,000 x 20,000 has 400 million
MOST_SAMPLES = 32  # values a pixel of a TIFF: colours, other channels, layers
LARGE_PIXELS = 40_000_000  # pictures from here on are counted one at a time
LARGEST_FIELD = 6000  # pixels; of a larger picture smaller and smaller fields are tried
SMALLEST_FIELD = 60  # pixels; below it there is nothing to see in a field
SCALE_PICTURES = 3  # so many pictures of a size decide the scale of the others
CUT_MARGIN = 0.04  # a box that ends so near to a tile's inner border may be a part
BORDER_MARGIN = 0.005  # of a field: a box so near to the picture's border touches it
HARDLY_A_CELL = 0.1  # score below which a detection yields to all others
LEAST_VARIANCE = 0.01  # of a count: where all is sure, its deviation is 0.1 and not 0

EXIT_COUNTED = 0
EXIT_SOME_FAILED = 3
EXIT_NONE_COUNTED = 4
EXIT_MODEL = 5
EXIT_OUTPUT = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class CountError(Exception):
    """A fault that the user can mend; the message says how, in one sentence."""

    exit_code = 2


class ModelError(CountError):
    """The model's file cannot be used."""

    exit_code = EXIT_MODEL


class OutputError(CountError):
    """The results cannot be written."""

    exit_code = EXIT_OUTPUT


class UnusableNameError(OutputError):
    """A file system refuses the name of one result; others can be written."""


class PictureError(CountError):
    """A file that cannot be read as a picture."""


# --------------------------------------------------------------------------------------
# Reading pictures: any format and depth -> (height, width, 3) uint8 RGB, upright
# --------------------------------------------------------------------------------------

ORIENTATION_TAG = 0x0112  # of EXIF: 1 upright, to 8
FULL_SCALES = (255, 1023, 4095, 16383, 65535)  # white of 8, 10, 12, 14 and 16 bits

PLAIN_COLOURS = (0, 1, 2)  # of a TIFF: grey from white, grey from black, RGB
TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # the last two: BigTIFF
SIGNATURES = TIFF_SIGNATURES + (  # how files begin that are pictures whatever their ending
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"\x00\x00\x00\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)
PICTURE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .jfi .png .apng .bmp .dib .gif .tif .tiff .btf .tf8 "
    ".webp .jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .pcx .tga .icb .vda "
    ".vst .ico .avif .avifs .mpo .sgi .rgb .rgba .bw .psd .dds .qoi .im .xbm .xpm "
    ".fits .fit .icns .msp .ras .cur .blp".split()
)
HOW_TO_CONVERT = {
    "HEIC": "save it as JPEG: on the phone choose the camera format 'most compatible', "
    "or convert it with ImageMagick: magick PICTURE.heic PICTURE.jpg",
    "a whole slide": "export the region of interest as TIFF or PNG, for example with "
    "QuPath (File > Export images) or: vips openslideload SLIDE PICTURE.tif",
    "a microscope's own format": "export it as TIFF in the microscope's program, or "
    "with ImageJ and Bio-Formats (File > Import > Bio-Formats, then Save as TIFF)",
    "a camera's raw data": "export it as TIFF or JPEG in the camera's program",
    "a medical image": "export it as PNG or TIFF in the program that shows it",
    "a document": "export its picture as PNG or TIFF",
    "a film": "save single pictures of it as PNG",
    "JPEG XL": "convert it to PNG or JPEG, for example: djxl PICTURE.jxl PICTURE.png",
}
FORMATS_TO_CONVERT = {
    "HEIC": ".heic .heif .hif .heics .heifs",
    "a whole slide": ".svs .ndpi .mrxs .vms .vmu .scn .bif .svslide .vsi .ndpis .isyntax",
    "a microscope's own format": ".czi .lif .nd2 .oib .oif .lsm .zvi .ims .dv .stk",
    "a camera's raw data": ".cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .pef .srw",
    "a medical image": ".dcm .dicom .nii",
    "a document": ".pdf .eps .ps .svg .emf .wmf .doc .docx .ppt .pptx",
    "a film": ".mp4 .avi .mov .mkv .wmv .mpg .mpeg",
    "JPEG XL": ".jxl",
}
FORMAT_OF_ENDING = {
    ending: name for name, endings in FORMATS_TO_CONVERT.items() for ending in endings.split()
}


def needs_conversion(name):
    """What to do with a file whose format is not read here, as a sentence, or None."""
    kind = FORMAT_OF_ENDING.get(Path(name).suffix.lower())
    if kind is None:
        return None
    return f"{kind} is not read here: {HOW_TO_CONVERT[kind]}"


def looks_like_a_picture(path):
    """Whether a file is a picture by its ending or, with another ending, by its start."""
    ending = path.suffix.lower()
    if ending in PICTURE_ENDINGS:
        return True
    try:
        start = file_start(path)
    except OSError:
        return False
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return is_webp or start.startswith(SIGNATURES)


def scale_for(bright):
    """The smallest full scale that holds a value, the value itself beyond 16 bits."""
    for scale in FULL_SCALES:
        if bright <= scale:
            return scale
    return bright


def white_from_zero(values):
    """Values (H, W, ...) of a picture whose white is zero, with black as zero.

    Cells, which are the darkest, may cover little of it: all but one of a thousand values
    decide which full scale is black.
    """
    if values.dtype.kind != "u":
        return values.max() - values
    step = max(1, round(math.sqrt(values.size / 2_000_000)))
    darkest = float(np.percentile(values[::step, ::step], 99.9))
    black = np.array(scale_for(darkest)).astype(values.dtype)
    return black - np.minimum(values, black)


def full_scale(values):
    """The value that is white in an array of more than eight bits a pixel.

    The 99th percentile decides, so that hot pixels and burnt-in scale bars do not. If
    the exposure used little of the range, white is a little above that percentile.
    """
    step = max(1, round(math.sqrt(values.size / 2_000_000)))
    sample = values[::step, ::step]
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 1.0
    bright = float(np.percentile(sample, 99))
    white = scale_for(bright)
    if values.dtype.kind == "f" and bright <= 1:
        white = 1
    if bright < 0.6 * white:
        white = bright / 0.85
    return max(white, 1e-6)


def to_eight_bits(values):
    """Values (H, W) or (H, W, 3) of any type -> uint8 of the same shape."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    factor = 255 / full_scale(values)
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # in strips: a large picture stays small
        strip = values[start : start + 256].astype(np.float32)
        strip = np.nan_to_num(strip, nan=0, posinf=0, neginf=0)
        scaled = np.clip(np.rint(strip * factor), 0, 255)
        result[start : start + 256] = scaled.astype(np.uint8)
    return result


def check_size(width, height):
    """Raise PictureError for a picture of more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise PictureError("it has no pixels")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{width} x {height} pixels are more than {MAX_PIXELS // 10**6} million: cut "
            "it into parts, for example: magick PICTURE.tif -crop 10000x10000 +repage "
            "part_%d.tif"
        )


@contextlib.contextmanager
def without_pillows_limit():
    """Let Pillow open large pictures: `check_size` sets the limit here."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def orientation_of(image):
    """The EXIF orientation of a Pillow image, 1 to 8; 1 where EXIF is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF fails in many ways and costs no picture
        return 1
    return value if value in range(1, 9) else 1


def number_of_pages(image):
    """Pages or frames of a Pillow image; 1 where their directory is damaged.

    The others of an MPO, a phone's JPEG, are previews or other views of the first; the
    layers of a PSD are in its picture.
    """
    if image.format in ("MPO", "PSD"):
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a file that was cut off: its first page may be whole
        return 1


def is_deep_colour(image):
    """Whether a Pillow image has 16 bits a colour, of which Pillow would keep eight."""
    raw_mode = str(getattr(image, "tile", ""))
    return image.mode in ("RGB", "RGBA", "LA") and ";16" in raw_mode


def upright(pixels, orientation):
    """Pixels (H, W, ...) as EXIF's orientation says they are to be seen; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def rgb_pixels(image):
    """A Pillow image as (H, W, 3) uint8; on white where it is transparent.

    Strip by strip: of a large picture only one copy is made.
    """
    width, height = image.size
    transparent = image.has_transparency_data
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 512):
        bottom = min(top + 512, height)
        strip = image.crop((0, top, width, bottom))
        if transparent:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        pixels[top:bottom] = np.asarray(strip.convert("RGB"))
    return pixels


def file_bytes(source):
    """The bytes (n,) uint8 of a file or of bytes, an array that may be changed."""
    if isinstance(source, bytes):
        return np.frombuffer(bytearray(source), np.uint8)
    return np.fromfile(source, np.uint8)


def read_pages_with_opencv(source, tiff, pages):
    """Pages of a TIFF, not turned: (H, W), (H, W, 3) or, of several pages, (H, W, pages).

    OpenCV reads the page that the file's head names, and turns it as its orientation
    says: in a copy of the bytes both are written anew.
    """
    data = file_bytes(source)
    values = []
    for page in pages:
        if page.parent is not tiff:
            raise PictureError("its channels are compressed files: save them uncompressed")
        page = page.aspage()
        if tiff.is_bigtiff:
            overwrite(data, 8, tiff.byteorder + "Q", page.offset)
        else:
            overwrite(data, 4, tiff.byteorder + "I", page.offset)
        if ORIENTATION_TAG in page.tags:
            orientation = page.tags[ORIENTATION_TAG]
            overwrite(data, orientation.valueoffset, tiff.byteorder + "H", 1)
        values.append(decode_with_opencv(data))
    return stacked(values)


def overwrite(data, place, kind, number):
    """Write a number into bytes (n,) uint8; kind: a format of `struct`."""
    content = struct.pack(kind, number)
    data[place : place + len(content)] = np.frombuffer(content, np.uint8)


def stacked(values):
    """One array as it is, several channels (H, W) as (H, W, channels)."""
    if len(values) == 1:
        return values[0]
    return np.stack(values, axis=-1)


def decode_with_opencv(data):
    """What OpenCV reads from the bytes (n,) uint8 of a file, in RGB."""
    values = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if values is None:
        raise PictureError("its compression is not known here: save it uncompressed")
    if values.ndim == 3 and values.shape[2] >= 3:
        colours = values[..., 2::-1]
        if values.shape[2] == 4:
            return on_white(colours, values[..., 3])
        return colours
    return values


def on_white(colours, alpha):
    """Colours (H, W, 3) of any depth, on white where alpha (H, W) is small; uint8."""
    share = alpha.astype(np.float32)[..., None] / np.iinfo(alpha.dtype).max
    eight_bits = to_eight_bits(colours).astype(np.float32)
    return np.rint(eight_bits * share + 255 * (1 - share)).astype(np.uint8)


def read_with_pillow(source):
    """What Pillow reads: (picture (H, W, 3) uint8 RGB, upright; number of pages)."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with without_pillows_limit(), Image.open(file) as image:
        check_size(*image.size)
        pages = number_of_pages(image)
        deep = is_deep_colour(image)
        image.load()
        orientation = orientation_of(image)
        if deep:
            pixels = as_rgb(decode_with_opencv(file_bytes(source)))
        elif image.mode[0] in "IF":
            pixels = as_rgb(np.asarray(image))
        else:
            pixels = rgb_pixels(image)
    return upright(pixels, orientation), pages


def as_rgb(values):
    """Values of any depth, (H, W) or (H, W, 3 or more), as (H, W, 3) uint8."""
    pixels = to_eight_bits(values)
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., :3]


def needs_tifffile(page):
    """Whether Pillow would misread a page of a TIFF: deep colours, separate planes."""
    separate = page.planarconfig == 2 and page.samplesperpixel > 1
    bits = page.bitspersample
    bits = max(bits) if isinstance(bits, tuple) else bits
    return separate or bits > 8


def has_channel_pages(tiff):
    """Whether the pages of a TIFF are red, green and blue, as OME and ImageJ write them."""
    try:
        series = tiff.series[0]
        if "C" not in series.axes or "S" in series.axes or len(series.pages) < 3:
            return False
        return series.shape[series.axes.index("C")] in (3, 4)
    except Exception:  # damaged descriptions: the first page is read by itself
        return False


def first_plane(tiff):
    """The pages of a TIFF's first plane, and how many planes or pages there are.

    One page, or the three or four that are its channels; other depths and times are
    left out unread.
    """
    if not has_channel_pages(tiff):
        return [tiff.pages.first], len(tiff.pages)
    series = tiff.series[0]
    place = series.axes.index("C")
    channels = series.shape[place]
    page_axes = len(series.keyframe.shape)
    outer = series.shape[:-page_axes]
    if place >= len(outer) or math.prod(outer) != len(series.pages):
        return [tiff.pages.first], len(tiff.pages)
    step = math.prod(outer[place + 1 :])
    pages = [series.pages[channel * step] for channel in range(channels)]
    if None in pages:
        raise PictureError("a file with one of its channels is missing")
    return pages, math.prod(outer) // channels


def check_that_it_is_whole(page):
    """Raise PictureError if the pixels of a page lie beyond the end of the file."""
    size = page.parent.filehandle.size
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + count > size:
            raise PictureError("the file was cut off")


def channels_last(values, axes):
    """One plane of a page's array, (H, W) or (H, W, samples).

    axes: tifffile's letters, one for each dimension; S samples, Y, X.
    """
    axes = list(axes)
    for letter in list(axes):
        if letter in ("Y", "X", "S"):
            continue
        place = axes.index(letter)
        values = values.take(0, axis=place)
        axes.pop(place)
    if "S" in axes:
        values = np.moveaxis(values, axes.index("S"), -1)
    return values


def read_with_tifffile(source, tiff):
    """A TIFF of deep colours or separate planes: (picture uint8 RGB, pages)."""
    plane, pages = first_plane(tiff)
    page = plane[0].keyframe  # it describes the others too
    check_size(page.imagewidth, page.imagelength)
    for part in plane:
        check_that_it_is_whole(part)
    samples = page.samplesperpixel * page.imagedepth
    if samples > MOST_SAMPLES:
        raise PictureError(f"it has {samples} values a pixel: save it as RGB")
    if page.photometric not in PLAIN_COLOURS:
        raise PictureError("its colours are neither grey nor RGB: save it as RGB")
    try:
        values = stacked([channels_last(part.asarray(), page.axes) for part in plane])
    except (KeyError, ValueError) as fault:
        if "imagecodecs" not in str(fault):
            raise
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            raise PictureError(
                "its colour planes are compressed in a way that is not read here: save "
                "it uncompressed"
            ) from None
        values = read_pages_with_opencv(source, tiff, plane)
    if page.photometric == 0:  # white is zero
        values = white_from_zero(values)
    if values.ndim == 3 and values.shape[2] == 4:
        has_alpha = bool(page.extrasamples) and int(page.extrasamples[0]) != 0
        if has_alpha and values.dtype.kind == "u":
            values = on_white(values[..., :3], values[..., 3])
    if values.ndim == 3 and values.shape[2] == 2:
        values = values[..., 0]
    orientation = page.tags.valueof(ORIENTATION_TAG, 1)
    return upright(as_rgb(values), orientation), pages


def read_tiff(source):
    """A TIFF by tifffile where Pillow would misread it, else by Pillow."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        tiff = tifffile.TiffFile(file)
    except (tifffile.TiffFileError, ValueError, TypeError, KeyError):
        return read_with_pillow(source)
    with tiff:
        if len(tiff.pages) == 0:
            raise PictureError("it has no page")
        if needs_tifffile(tiff.pages.first) or has_channel_pages(tiff):
            return read_with_tifffile(source, tiff)
    return read_with_pillow(source)


def file_start(source):
    """The first bytes of a file or of bytes."""
    if isinstance(source, bytes):
        return source[:16]
    with open(source, "rb") as file:
        return file.read(16)


def in_a_few_words(fault, source):
    """The reason of an error without the file's path, at most 120 characters."""
    reason = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    if not isinstance(source, bytes):
        reason = reason.replace(repr(str(source)), "it").replace(str(source), "it")
    reason = " ".join(reason.split())
    return reason[:120]


def fault_in_words(fault, source):
    """An unforeseen fault's name and reason."""
    return f"{type(fault).__name__}: {in_a_few_words(fault, source)}"


def read_picture(source):
    """A picture of any format and depth, upright.

    source: a path, or the bytes of a file. Returns (image (H, W, 3) uint8 RGB, a remark
    about pages that were left out or ""). Raises PictureError with the reason.
    """
    reason = None if isinstance(source, bytes) else needs_conversion(source)
    if reason:
        raise PictureError(reason)
    try:
        start = file_start(source)
        if len(start) == 0:
            raise PictureError("the file is empty")
        is_heic = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"hevc")
        if is_heic:
            raise PictureError(needs_conversion("picture.heic"))
        if start.startswith(TIFF_SIGNATURES):
            image, pages = read_tiff(source)
        else:
            image, pages = read_with_pillow(source)
    except PictureError:
        raise
    except MemoryError:
        raise PictureError("there is not enough memory for it: cut it into parts") from None
    except UnidentifiedImageError:
        raise PictureError("it is no picture, or a damaged one") from None
    except Exception as fault:  # decoders fail in every way; no file may end a run
        if "truncated" in str(fault).lower():
            raise PictureError("the file was cut off") from None
        raise PictureError(in_a_few_words(fault, source)) from None
    remark = f"first of {pages} pages" if pages > 1 else ""
    return image, remark


def picture_size(path):
    """The upright (width, height) of a picture by its header alone, or None.

    Of a TIFF that Pillow does not open, as it lies in the file.
    """
    try:
        with without_pillows_limit(), Image.open(path) as image:
            width, height = image.size
            orientation = orientation_of(image)
            if image.format == "TIFF":  # Pillow has turned its size
                orientation = 1
    except Exception:  # whoever reads the picture says what is wrong
        return tiff_size(path)
    if orientation >= 5:
        return height, width
    return width, height


def tiff_size(path):
    """(width, height) of the first page of a TIFF that Pillow does not open, or None."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return page.imagewidth, page.imagelength
    except Exception:
        return None


# --------------------------------------------------------------------------------------
# The detector: one field in, boxes out
# --------------------------------------------------------------------------------------
# Cells are a dictionary: boxes (n, 4) float32 xyxy in pixels, labels (n,) int64 from 1,
# scores (n,) float32, best first.


def take(cells, rows):
    """Some of the cells, by indices or a mask."""
    return {name: values[rows] for name, values in cells.items()}


def box_areas(boxes):
    """(n, 4) xyxy -> (n,)."""
    widths = boxes[:, 2] - boxes[:, 0]
    heights = boxes[:, 3] - boxes[:, 1]
    return widths * heights


def intersections(a, b):
    """Area that every pair of boxes shares: (n, 4), (m, 4) xyxy -> (n, m)."""
    left = np.maximum(a[:, None, 0], b[None, :, 0])
    top = np.maximum(a[:, None, 1], b[None, :, 1])
    right = np.minimum(a[:, None, 2], b[None, :, 2])
    bottom = np.minimum(a[:, None, 3], b[None, :, 3])
    return np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)


def overlaps(a, b):
    """Intersection over union of every pair: (n, 4), (m, 4) xyxy -> (n, m)."""
    shared = intersections(a, b)
    covered = box_areas(a)[:, None] + box_areas(b)[None, :] - shared
    return shared / np.maximum(covered, 1e-9)


def suppress(boxes, max_overlap):
    """Greedy non-maximum suppression of boxes (n, 4) in falling order of merit.

    Returns the indices (k,) of the boxes that stay: each is dropped that overlaps an
    earlier one that stayed by more than `max_overlap`.
    """
    too_close = overlaps(boxes, boxes) > max_overlap
    alive = np.ones(len(boxes), bool)
    kept = []
    for row in range(len(boxes)):
        if alive[row]:
            kept.append(row)
            alive &= ~too_close[row]
    return np.array(kept, dtype=np.int64)


def vote(kept, boxes, scores, vote_overlap):
    """Box voting: each kept box (k, 4) becomes the mean, by scores (n,), of all boxes
    (n, 4) that overlap it by `vote_overlap` or more. Returns (k, 4).
    """
    near = overlaps(kept, boxes) >= vote_overlap
    weights = (near * scores).astype(np.float32)
    totals = weights.sum(1, keepdims=True)
    means = weights @ boxes / np.maximum(totals, 1e-9)
    return np.where(totals > 0, means, kept).astype(np.float32)


def select_cells(boxes, probabilities, settings):
    """The cells of one field.

    boxes: (P, 4) xyxy in shares of the field; probabilities: (P, 1 + C), background
    first; settings: the model's metadata. Boxes stay in shares.
    """
    found = []
    for label in range(1, probabilities.shape[1]):
        scores = probabilities[:, label]
        candidates = np.flatnonzero(scores > settings["min_score"])
        order = np.argsort(-scores[candidates], kind="stable")
        best = candidates[order[: settings["max_candidates"]]]
        candidate_boxes = boxes[best]
        candidate_scores = scores[best]
        stays = suppress(candidate_boxes, settings["count_overlap"])
        kept = candidate_boxes[stays]
        if settings["vote_overlap"] < 1:
            kept = vote(kept, candidate_boxes, candidate_scores, settings["vote_overlap"])
        labels = np.full(len(stays), label, dtype=np.int64)
        found.append({"boxes": kept, "labels": labels, "scores": candidate_scores[stays]})
    cells = concatenate(found)
    order = np.argsort(-cells["scores"], kind="stable")
    return take(cells, order[: settings["top_k"]])


def concatenate(parts):
    """Several dictionaries of cells as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def squeeze(image, size):
    """A picture (H, W, 3) uint8 -> (size, size, 3), averaging where it shrinks."""
    shrinks = image.shape[0] >= size and image.shape[1] >= size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=method)


REQUIRED_SETTINGS = (
    "weights",
    "precision",
    "class_names",
    "class_colours",
    "image_size",
    "min_score",
    "count_overlap",
    "vote_overlap",
    "top_k",
    "max_candidates",
    "show_score",
    "counting",
    "usual",
    "pictures",
    "data_note",
)


def check_settings(text, name):
    """The model's metadata from its JSON text. Raises ModelError."""
    again = "export it again with the notebook of this version"
    if not text:
        raise ModelError(f"{name} has no metadata of count_cells: {again}.")
    try:
        settings = json.loads(text)
        version = settings["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"The metadata of {name} are damaged: {again}.") from None
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{name} has metadata of format {version}, this program reads format "
            f"{FORMAT_VERSION}: {again}, or take the program that came with it."
        )
    missing = [key for key in REQUIRED_SETTINGS if key not in settings]
    if missing:
        raise ModelError(f"The metadata of {name} lack {', '.join(missing)}: {again}.")
    return settings


def open_session(path, threads):
    """An ONNX Runtime session on the CPU. Raises ModelError."""
    path = Path(path)
    if not os.path.isfile(path):
        raise ModelError(f"There is no model {path}: name one with --model.")
    try:
        import onnxruntime  # here: only workers need it, and its import takes memory
    except ImportError as fault:
        reason = in_a_few_words(fault, path)
        raise ModelError(
            f"onnxruntime cannot be imported ({reason}): pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as fault:
        reason = in_a_few_words(fault, path)
        raise ModelError(f"{path.name} is damaged or no ONNX model ({reason}).") from None
    outputs = {output.name for output in session.get_outputs()}
    if not {"boxes", "cells"} <= outputs:
        raise ModelError(f"{path.name} is no detector of this project: it has no boxes.")
    return session


class Detector:
    """An exported SSD300 with its metadata: finds the cells of one field at a time."""

    def __init__(self, path, threads=1):
        self.path = Path(path)
        self.session = open_session(path, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.settings = check_settings(metadata.get(METADATA_KEY), self.path.name)

    def find(self, image):
        """The cells of a field (H, W, 3) uint8 RGB, boxes in its pixels."""
        size = self.settings["image_size"]
        frame = squeeze(image, size).transpose(2, 0, 1)[None].astype(np.float32)
        boxes, probabilities = self.session.run(["boxes", "cells"], {"images": frame})
        cells = select_cells(boxes[0], probabilities[0], self.settings)
        height, width = image.shape[:2]
        sides = np.array([width, height, width, height], np.float32)
        cells["boxes"] = cells["boxes"] * sides
        return cells


# --------------------------------------------------------------------------------------
# Pictures of any size: fields that overlap
# --------------------------------------------------------------------------------------


def tile_starts(length, tile, overlap):
    """Where tiles begin along a side so that they share `overlap` or more.

    A side of up to 1.1 tiles needs one.
    """
    count = 1
    if length > 1.1 * tile:
        count = math.ceil((length - overlap) / (tile - overlap))
    starts = np.linspace(0, max(length - tile, 0), count)
    return starts.round().astype(int).tolist()


def tiles_along(length, tile, overlap):
    """The (start, size) of the tiles along a side of a picture."""
    starts = tile_starts(length, tile, overlap)
    size = tile
    if len(starts) == 1:  # it covers the side, and most of a field
        size = max(length, round(0.75 * tile))
    return [(start, size) for start in starts]


def cut_tiles(width, height, field):
    """The tiles [(x, y, width, height)] of a field's size that cover a picture."""
    overlap = min(field) // 2
    columns = tiles_along(width, field[0], overlap)
    rows = tiles_along(height, field[1], overlap)
    tiles = []
    for y, tile_height in rows:
        for x, tile_width in columns:
            tiles.append((x, y, tile_width, tile_height))
    return tiles


def pad_picture(image, width, height):
    """A picture continued to the right and below, in its usual colour, to a size."""
    below = max(0, height - image.shape[0])
    right = max(0, width - image.shape[1])
    if not (below or right):
        return image
    colour = np.median(image[::4, ::4], (0, 1)).tolist()
    image = np.ascontiguousarray(image)
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=colour)


def find_in_tile(find, image, tile, width, height):
    """The cells of one tile, in the picture's pixels, and which may be parts of cells.

    tile: (x, y, width, height); width, height: the picture's. A box at an inner border
    of the tile may be a part. Boxes that lie whole along an inner border are dropped.
    """
    x, y, tile_width, tile_height = tile
    cells = find(image[y : y + tile_height, x : x + tile_width])
    left, top, right, bottom = cells["boxes"].T
    near_x = CUT_MARGIN * tile_width
    near_y = CUT_MARGIN * tile_height
    margins = np.array([near_x, near_y, near_x, near_y], np.float32)
    is_inner = np.array([x > 0, y > 0, x + tile_width < width, y + tile_height < height])
    # of each box its nearer and its farther side from each border of the tile, (n, 4)
    nearer = np.stack([left, top, tile_width - right, tile_height - bottom], axis=1)
    farther = np.stack([right, bottom, tile_width - left, tile_height - top], axis=1)
    may_be_part = (is_inner & (nearer < margins)).any(1)
    is_strip = (is_inner & (farther < margins)).any(1)

    corner = np.array([x, y, x, y], np.float32)
    limit = np.array([width, height, width, height], np.float32)
    cells["boxes"] = np.minimum(cells["boxes"] + corner, limit)
    cells["cut"] = may_be_part
    return take(cells, ~is_strip)


def merit_order(cells, cut):
    """Indices of the cells by merit: whole ones by score, then parts by area, and last
    those that are hardly cells, by score.
    """
    rank = np.where(cut, 1, 0)
    rank[cells["scores"] < HARDLY_A_CELL] = 2
    merit = np.where(rank == 1, box_areas(cells["boxes"]), cells["scores"])
    return np.lexsort((-merit, rank)).tolist()


class BoxGrid:
    """Boxes of one picture by where they lie, so that only near ones are compared.

    The picture is divided into squares; a box stands in every square that it covers.
    """

    def __init__(self, boxes, labels):
        self.boxes = boxes
        self.labels = labels
        sides = boxes[:, 2:] - boxes[:, :2]
        side = max(8.0, float(np.median(sides))) if len(boxes) else 8.0
        self.corners = np.floor(boxes / side).astype(int).tolist()
        self.members = collections.defaultdict(list)

    def squares(self, row):
        """The keys of the squares that a box covers, one set for each class."""
        left, top, right, bottom = self.corners[row]
        label = int(self.labels[row])
        for x in range(left, right + 1):
            for y in range(top, bottom + 1):
                yield label, x, y

    def add(self, row):
        """Put a box into its squares."""
        for square in self.squares(row):
            self.members[square].append(row)

    def near(self, row):
        """Boxes of the same class in the squares of a box: indices (k,), without order."""
        found = set()
        for square in self.squares(row):
            found.update(self.members.get(square, ()))
        return np.array(sorted(found), dtype=np.int64)


def suppress_near(boxes, labels, order, max_overlap):
    """`suppress` within each class, for any number of boxes, in the order of merit."""
    grid = BoxGrid(boxes, labels)
    kept = []
    for row in order:
        rivals = grid.near(row)
        overlap = overlaps(boxes[row : row + 1], boxes[rivals])[0]
        if not (overlap > max_overlap).any():
            kept.append(row)
            grid.add(row)
    return kept


def join_parts(cells, cut, max_overlap):
    """One list of cells from those of overlapping tiles; cut (n,) marks what may be parts.

    A part of a cell that is there as a whole goes; parts of a cell that no tile holds
    whole become one box.
    """
    boxes = cells["boxes"]
    labels = cells["labels"]
    scores = cells["scores"]
    areas = box_areas(boxes)
    parts = BoxGrid(boxes, labels)
    for row in np.flatnonzero(cut).tolist():
        parts.add(row)
    earlier = BoxGrid(boxes, labels)
    joined = boxes.copy()
    kept = []
    for row in suppress_near(boxes, labels, merit_order(cells, cut), max_overlap):
        box = boxes[row : row + 1]
        is_known = False
        if cut[row]:
            shared = intersections(box, boxes[earlier.near(row)])[0]
            is_known = bool((shared > areas[row] / 2).any())
            if not is_known:
                mates = parts.near(row)
                mates = mates[overlaps(box, boxes[mates])[0] > max_overlap]
                mates = mates[scores[mates] >= scores[row] / 2]
                together = np.append(mates, row)
                joined[row, :2] = boxes[together, :2].min(0)
                joined[row, 2:] = boxes[together, 2:].max(0)
        earlier.add(row)
        if not is_known:
            kept.append(row)
    kept = np.array(kept, dtype=np.int64)
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return {"boxes": joined[kept], "labels": labels[kept], "scores": scores[kept]}


def turned_against(width, height, field):
    """Whether one of picture and field stands and the other lies."""
    return (height - width) * (field[1] - field[0]) < 0


def find_in_picture(find, image, field, max_overlap):
    """What `find` sees on a picture (H, W, 3), field by field.

    field: (width, height) in pixels. A picture that stands where the field lies is
    turned, and its boxes are turned back.
    """
    height, width = image.shape[:2]
    if not turned_against(width, height, field):
        return find_in_tiles(find, image, field, max_overlap)
    cells = find_in_tiles(find, np.rot90(image), field, max_overlap)
    left, top, right, bottom = cells["boxes"].T
    boxes = np.stack([width - bottom, left, width - top, right], axis=1)
    cells["boxes"] = boxes
    return cells


def find_in_tiles(find, image, field, max_overlap):
    """`find_in_picture` for a picture that lies as the field does."""
    height, width = image.shape[:2]
    tiles = cut_tiles(width, height, field)
    x, y, tile_width, tile_height = tiles[-1]
    image = pad_picture(image, x + tile_width, y + tile_height)
    parts = [find_in_tile(find, image, tile, width, height) for tile in tiles]
    cells = concatenate(parts)
    cut = cells.pop("cut")
    if len(tiles) == 1:
        return cells
    return join_parts(cells, cut, max_overlap)


# --------------------------------------------------------------------------------------
# The scale of a picture: the field in which cells look as large as on the usual image
# --------------------------------------------------------------------------------------


def whole_field(width, height, usual):
    """The field [width, height], of the usual image's shape, that holds the picture."""
    usual_width, usual_height = usual["image_size"]
    scale = max(
        min(width, height) / min(usual_width, usual_height),
        max(width, height) / max(usual_width, usual_height),
    )
    return [max(8, round(usual_width * scale)), max(8, round(usual_height * scale))]


def relative_sizes(cells, field, settings):
    """Sizes of the sure cells of the commonest class, by the one expected: (n,)."""
    usual = settings["usual"]
    sure = (cells["labels"] == usual["label"]) & (cells["scores"] >= settings["show_score"])
    sides = np.sqrt(box_areas(cells["boxes"][sure]))
    expected = usual["cell_size"] * field[0] / usual["image_size"][0]
    return sides / expected


def most_tiles(width, height):
    """The most fields that a picture may be read in: what its counting may cost."""
    return min(6000, 60 + width * height // 6000)


def cut_middle(image, width, height):
    """The middle of a picture, at most so many pixels wide and high."""
    y = max(0, image.shape[0] - height) // 2
    x = max(0, image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]


def try_field(detector, image, field):
    """(median relative size of the well-sized cells, their number a field) in a field.

    (None, 0) with fewer than three.
    """
    settings = detector.settings
    middle = cut_middle(image, max(field), max(field))
    overlap = settings["count_overlap"]
    cells = find_in_picture(detector.find, middle, field, overlap)
    sizes = relative_sizes(cells, field, settings)
    fitting = sizes[(sizes > 0.7) & (sizes < 1.4)]
    if len(fitting) < 3:
        return None, 0
    fields = max(middle.shape[0] * middle.shape[1] / (field[0] * field[1]), 1)
    return float(np.median(fitting)), len(fitting) / fields


# Fields are tried from 1.5 ** 2 of the whole picture to 1.5 ** -15 of it.
STEPS = (0, -1, -2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)


def find_field(detector, image):
    """The field [width, height] in which a picture's cells are as large as usual, or None.

    First the whole picture is read as one field; if its cells do not come out as large
    as usual, larger and smaller fields are tried on its middle.
    """
    height, width = image.shape[:2]
    usual = detector.settings["usual"]
    whole = whole_field(width, height, usual)
    if not usual["cell_size"]:
        return whole
    is_large = max(whole) > LARGEST_FIELD
    best_field = None
    most_cells = 0
    for step in STEPS:
        if step > 6 and best_field is not None and not is_large:
            break
        field = [round(side * 1.5**-step) for side in whole]
        if max(field) > LARGEST_FIELD:  # of a huge picture nothing is that large
            continue
        size, cells = try_field(detector, image, field)
        if cells > most_cells:
            most_cells = cells
            best_field = [side * size for side in field]
        at_once = step == 0 and cells >= 8 and 0.87 < size < 1.15
        if at_once or min(field) < SMALLEST_FIELD:
            break
    if best_field is None:
        return None
    field = [max(8, round(side)) for side in best_field]
    if is_large:  # it is read in thousands of fields: once more, nearer
        size, _ = try_field(detector, image, field)
        field = [max(8, round(side * (size or 1))) for side in field]
    if len(cut_tiles(width, height, field)) > most_tiles(width, height):
        return None
    return field


# --------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Count:
    """Cells of one class: the number, and the ends of its 95% interval or None."""

    number: int
    least: int | None = None
    most: int | None = None


@dataclasses.dataclass
class CountedPicture:
    """What `CellCounter.count` finds on a picture.

    boxes: (n, 4) float32 xyxy in pixels of the cells that count; classes: their n class
    names; scores: (n,) float32; counts: {class name: Count}; remark: why to look at the
    counts again, or ""; field: the [width, height] in pixels that was seen at a time;
    touches_border: (n,) bool; own_field: the field that this picture itself suggests, or
    None.
    """

    boxes: np.ndarray
    classes: list
    scores: np.ndarray
    counts: dict
    remark: str
    field: list
    touches_border: np.ndarray
    own_field: list | None


def is_measured(counting, label):
    """Whether the counts of a class were measured: it had cells to measure them by."""
    if not counting:
        return False
    factor = counting["cells_per_detection"][label - 1]  # None, where there was no cell
    spread = counting["spread"][label - 1]
    return bool(factor) and bool(spread)


def count_class(scores, label, settings):
    """The Count of a class from the scores (n,) of its detections.

    Each score stands for a chance to be right, as measured on validation images; the sum
    is the number to expect. A class that could not be measured counts the scores from
    `show_score` on and has no interval.
    """
    counting = settings["counting"]
    if not is_measured(counting, label):
        return Count(int((scores >= settings["show_score"]).sum()))
    bands = np.searchsorted(counting["score_edges"], scores, side="right") - 1
    shares = np.array(counting["share_right"][label - 1])
    chances = shares[bands[bands >= 0]]
    expected = float(chances.sum() * counting["cells_per_detection"][label - 1])
    independent = math.sqrt(LEAST_VARIANCE + float((chances * (1 - chances)).sum()))
    reach = 1.96 * counting["spread"][label - 1] * independent
    number = min(round(expected), len(scores))
    least = max(0, min(round(expected - reach), number))
    most = round(expected + reach)
    return Count(number, least, most)


def count_cells(cells, settings):
    """The cells that count, the best of each class, and {class name: Count}."""
    kept = []
    counts = {}
    for label, name in enumerate(settings["class_names"], 1):
        rows = np.flatnonzero(cells["labels"] == label)
        counts[name] = count_class(cells["scores"][rows], label, settings)
        kept.append(rows[: counts[name].number])
    return take(cells, np.concatenate(kept)), counts


def picture_statistics(image, size):
    """Brightness, colour and sharpness of a field (H, W, 3) uint8 RGB, as the network sees
    it: the median grey; the mean distance of the largest from the smallest colour; the
    mean of the Laplacian by the spread of the greys.
    """
    pixels = squeeze(image, size)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    red, green, blue = cv2.split(pixels)
    largest = cv2.max(cv2.max(red, green), blue)
    smallest = cv2.min(cv2.min(red, green), blue)
    edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
    return {
        "brightness": float(np.median(grey)),
        "colour": float((largest - smallest).mean()),
        "sharpness": float(edges.mean() / max(grey.std(), 1)),
    }


def unlike_remarks(image, field, settings):
    """What sets a picture apart from those the detector was measured on: [words].

    settings["pictures"]: the lowest and highest of each statistic on those.
    """
    measured = settings["pictures"]
    if not measured:
        return []
    height, width = image.shape[:2]
    if turned_against(width, height, field):
        image = np.rot90(image)
    middle = cut_middle(image, *field)
    values = picture_statistics(middle, settings["image_size"])
    remarks = []
    darkest, brightest = measured["brightness"]
    if values["brightness"] < 0.75 * darkest:
        remarks.append("darker")
    if values["brightness"] > brightest + 0.7 * (255 - brightest):
        remarks.append("brighter")
    if values["colour"] < 0.4 * measured["colour"][0]:
        remarks.append("less colourful")
    if values["colour"] > 2.5 * measured["colour"][1]:
        remarks.append("more colourful")
    if values["sharpness"] < 0.75 * measured["sharpness"][0]:
        remarks.append("less sharp")
    if values["sharpness"] > 2.5 * measured["sharpness"][1]:
        remarks.append("grainier")
    return remarks


def is_noise(image, settings):
    """Whether a picture is so grainy that a search for cells is idle: as a whole, and in
    its middle, since a large smear looks grainy as a whole.
    """
    if not settings["pictures"]:
        return False
    limit = 6 * settings["pictures"]["sharpness"][1]
    side = 2 * settings["image_size"]
    for part in (cut_middle(image, side, side), image):
        if picture_statistics(part, settings["image_size"])["sharpness"] <= limit:
            return False
    return True


class CellCounter:
    """Counts the cells on pictures, each by itself.

    model: path of an exported ONNX file; threads: of the network. Raises ModelError. Can
    be pickled: the model is opened again where it arrives. Called with a batch of files
    it is what `map_batches` of Ray Data wants, see `__call__`.
    """

    def __init__(self, model, threads=1):
        self.model = str(model)
        self.threads = threads
        self.detector = Detector(model, threads)
        self.settings = self.detector.settings

    def __reduce__(self):
        return CellCounter, (self.model, self.threads)

    def count(self, image, field=None):
        """Count the cells of a picture (H, W, 3) uint8 RGB. Returns a CountedPicture.

        field: the [width, height] in pixels that shows as much as the usual image of the
        training data; by default it is found on the picture, which takes a second pass.
        A given field in which the cells do not come out as large as usual is replaced by
        the one found on the picture; the result's `field` and `remark` say so.
        """
        image = checked_image(image)
        height, width = image.shape[:2]
        own_field = None
        remarks = []
        was_given = field is not None
        if not was_given:
            if not is_noise(image, self.settings):
                own_field = find_field(self.detector, image)
            field = own_field
        if field is None:
            field = whole_field(width, height, self.settings["usual"])
            remarks.append("no cells of a usual size: do not trust the counts")
        cells = self.find(image, field)
        if was_given:
            other_field = self.other_scale(image, cells, field)
            if other_field:
                field = other_field
                cells = self.find(image, field)
                remarks = ["cells of another size than on the other pictures"]
        unlike = unlike_remarks(image, field, self.settings)
        if unlike:
            words = " and ".join(unlike)
            remarks.append(f"{words} than the pictures that the counts were measured on")
        return self.result(cells, width, height, field, own_field, remarks)

    def find(self, image, field):
        """All detections of a picture, read in fields of a size."""
        overlap = self.settings["count_overlap"]
        return find_in_picture(self.detector.find, image, field, overlap)

    def other_scale(self, image, cells, field):
        """The picture's own field, if its cells are not as large as the given field says."""
        if not self.settings["usual"]["cell_size"]:
            return None
        sizes = relative_sizes(cells, field, self.settings)
        if len(sizes) < 5:
            return None
        if 0.7 < np.median(sizes) < 1.4:
            return None
        if is_noise(image, self.settings):
            return None
        return find_field(self.detector, image)

    def result(self, cells, width, height, field, own_field, remarks):
        """The CountedPicture of a picture's detections."""
        counted, counts = count_cells(cells, self.settings)
        names = self.settings["class_names"]
        boxes = counted["boxes"]
        margin = max(1.0, BORDER_MARGIN * max(field))
        touches_border = (boxes[:, :2] <= margin).any(1)
        touches_border |= boxes[:, 2] >= width - margin
        touches_border |= boxes[:, 3] >= height - margin
        return CountedPicture(
            boxes=boxes,
            classes=[names[label - 1] for label in counted["labels"]],
            scores=counted["scores"],
            counts=counts,
            remark="; ".join(remarks),
            field=list(field),
            touches_border=touches_border,
            own_field=own_field,
        )

    def __call__(self, batch):
        """Count a batch of files, as `ray.data.Dataset.map_batches` gives it.

        batch: {"path": (n,) names, "bytes": (n,) contents of files}, the columns of
        `ray.data.read_binary_files(..., include_paths=True)`. Returns the columns of
        counts.csv; a file that cannot be read has no counts and the reason as its remark.
        """
        rows = []
        for path, content in zip(batch["path"], batch["bytes"], strict=True):
            rows.append(self.count_file(str(path), bytes(content)))
        columns = {}
        for name in count_columns(self.settings["class_names"]):
            values = [row.get(name) for row in rows]
            is_text = name in ("image", "remark")
            columns[name] = np.array(values, dtype=object if is_text else np.float64)
        return columns

    def count_file(self, name, content):
        """One row of counts.csv for a file's name and content, as a dictionary."""
        reason = needs_conversion(name)
        if reason:
            return {"image": name, "remark": f"not readable: {reason}"}
        try:
            image, pages = read_picture(content)
            counted = self.count(image)
        except PictureError as fault:
            return {"image": name, "remark": f"not readable: {fault}"}
        except Exception as fault:  # unforeseen: this file fails, the batch counts
            return {"image": name, "remark": f"failed: {fault_in_words(fault, content)}"}
        row = {"image": name, "remark": join_remarks(pages, counted.remark)}
        row.update(count_values(counted.counts))
        return row


def checked_image(image):
    """The image if it is (H, W, 3) uint8, grey ones as RGB. Raises CountError."""
    image = np.asarray(image)
    if image.ndim == 2 and image.dtype == np.uint8:
        image = np.repeat(image[..., None], 3, axis=2)
    fits = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not fits or image.size == 0:
        raise CountError(
            f"An image must be (height, width, 3) uint8 RGB, this one is {image.shape} "
            f"{image.dtype}: read_picture gives such images."
        )
    return image


def join_remarks(*remarks):
    """The remarks that say something, in one line."""
    return "; ".join(remark for remark in remarks if remark)


def count_columns(class_names):
    """The columns of counts.csv."""
    columns = ["image"]
    for name in class_names:
        columns += [name, f"{name} least", f"{name} most"]
    return [*columns, "remark"]


def count_values(counts):
    """{class name: Count} as columns of counts.csv."""
    values = {}
    for name, count in counts.items():
        values[name] = count.number
        values[f"{name} least"] = count.least
        values[f"{name} most"] = count.most
    return values


# --------------------------------------------------------------------------------------
# Which files are to be counted
# --------------------------------------------------------------------------------------

JOURNAL_NAME = "journal.jsonl"
ANNOTATED_FOLDER = "annotated"
VOC_FOLDER = "voc"


@dataclasses.dataclass
class Found:
    """What the inputs hold: pictures {name: path}; not_counted {name: reason} of pictures
    that cannot be read here; others: names of files that are no pictures; closed: names
    of folders inside that were not entered; nested: whether folders are entered.
    """

    pictures: dict
    not_counted: dict
    others: list
    closed: list
    nested: bool


def shown_name(name):
    """A name that any file can hold: bytes that are no UTF-8 are written as \\xf1."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_of_folder(folder, nested, output, closed):
    """The files of a folder, in no order; folders that are not entered go to `closed`.

    Results are left out: the output folder inside, and annotated/ and voc/ beside a journal.
    """
    files = []

    def note_unreadable(fault):
        if fault.filename == str(folder):
            raise CountError(f"{shown_name(folder)} cannot be read: {fault.strerror}.")
        closed.append(Path(fault.filename))

    for parent, folders, names in os.walk(folder, onerror=note_unreadable):
        folders[:] = [name for name in folders if os.path.abspath(Path(parent, name)) != output]
        if JOURNAL_NAME in names:
            ours = {ANNOTATED_FOLDER, VOC_FOLDER}
            folders[:] = [name for name in folders if name not in ours]
            results = {JOURNAL_NAME, "counts.csv", "detections.csv", "report.html"}
            names = [name for name in names if name not in results]
        files += [Path(parent, name) for name in names]
        if not nested:
            closed += [Path(parent, name) for name in folders]
            break
        linked = [name for name in folders if os.path.islink(Path(parent, name))]
        closed += [Path(parent, name) for name in linked]
    return files


def common_folder(inputs):
    """The folder that names are relative to: the only input, or what inputs share."""
    folders = [path if os.path.isdir(path) else path.parent for path in inputs]
    folders = [os.path.abspath(folder) for folder in folders]
    try:
        return os.path.commonpath(folders)
    except ValueError:  # on several drives
        return None


def find_pictures(inputs, nested, output):
    """Sort the files of the inputs (paths of files and folders). Returns Found.

    An output folder inside them is left out, unless it is one of the inputs.
    """
    base = common_folder(inputs)
    output = os.path.abspath(output)
    found = Found({}, {}, [], [], nested)
    closed = []
    files = {}  # path: whether it was named by itself
    for path in inputs:
        if os.path.isdir(path):
            for file in files_of_folder(path, nested, output, closed):
                files.setdefault(os.path.abspath(file), False)
        else:
            files[os.path.abspath(path)] = True
    for path, asked_for in sorted(files.items()):
        name = os.path.relpath(path, base) if base else path
        name = name.replace(os.sep, "/")
        sort_file(found, name, Path(path), asked_for)
    found.pictures = dict(sorted(found.pictures.items()))
    given = [os.path.abspath(path) for path in inputs]
    closed = [path for path in closed if os.path.abspath(path) not in given]
    found.closed = sorted(shown_name(path.name) for path in closed)
    return found


def sort_file(found, name, path, asked_for):
    """Put one file where it belongs in `found`; asked_for: it was named by itself."""
    reason = needs_conversion(path.name)
    is_hidden = path.name.startswith(".")
    if is_hidden and not asked_for:
        found.others.append(shown_name(name))
    elif not os.path.isfile(path):
        if os.path.exists(path) or path.suffix.lower() not in PICTURE_ENDINGS:
            found.others.append(shown_name(name))
        elif os.path.islink(path):
            found.not_counted[name] = "a link to a file that is not there"
        else:
            found.not_counted[name] = "its folder gives no permission to open it"
    elif reason:
        found.not_counted[name] = reason
    elif asked_for or looks_like_a_picture(path):
        found.pictures[name] = path
    else:
        found.others.append(shown_name(name))


def default_output(inputs):
    """Where results go by default: my_smears_cells beside my_smears.

    Raises CountError where that lies in a folder of pictures.
    """
    first = Path(os.path.abspath(inputs[0]))
    folder = first if os.path.isdir(first) else first.parent
    if not folder.name:
        raise CountError("Name a folder for the results with --output.")
    output = folder.with_name(f"{folder.name}_cells")
    for path in inputs:
        if os.path.isdir(path) and str(output).startswith(os.path.abspath(path) + os.sep):
            raise CountError(
                f"The results would lie in the folder of pictures {shown_name(path)}: name "
                "another folder with --output."
            )
    return output


# --------------------------------------------------------------------------------------
# What is written for one picture
# --------------------------------------------------------------------------------------


# What file systems answer to a name with signs that they do not know, or to a long one.
UNUSABLE_NAME = (errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOENT)


@contextlib.contextmanager
def whole_file(path, mode="wb", **text):
    """A file to write, which takes the place of `path` when it is complete.

    Raises OutputError: UnusableNameError where only the name is at fault.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    except OSError as fault:
        if fault.errno in UNUSABLE_NAME:
            raise UnusableNameError(
                f"{shown_name(path)} cannot be written: {fault.strerror}. Name another folder "
                "with --output."
            ) from fault
        raise OutputError(
            f"{shown_name(path)} cannot be written: {fault.strerror or fault}. If another "
            "program has it open, close it; then give the same command again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_whole(path, content):
    """Write bytes to a file, whole or not at all. Raises as `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def result_path(output, folder, name, ending):
    """Where a picture's result goes: annotated/day2/a.jpg_cells.jpg for day2/a.jpg."""
    parts = [name_anywhere(part) for part in name.strip("/").split("/")]
    parts[-1] += ending
    return Path(output, folder, *parts)


def name_anywhere(name):
    """A file's name in signs and a length that every file system takes.

    A name that had to be changed ends in a digest of itself: two stay two.
    """
    plain = re.sub(r'[<>:"|?*\\\x00-\x1f]', "_", name).rstrip(". ")
    is_long = len(os.fsencode(plain)) > 200  # file systems take 255 bytes
    if plain == name and not is_long:
        return name
    if is_long:
        plain = plain[:40]
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    return f"{plain}~{digest}"


def annotated_path(output, name):
    """Where the annotated picture of a name goes."""
    return result_path(output, ANNOTATED_FOLDER, name, "_cells.jpg")


def voc_path(output, name):
    """Where the Pascal VOC file of a name goes."""
    return result_path(output, VOC_FOLDER, name, ".xml")


def draw_cells(image, counted, settings, longest=2000):
    """The picture with its boxes and a line of counts below, as a Pillow image.

    At most `longest` pixels a side.
    """
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    band = max(18, width // 26)
    thickness = max(2, width // 400)
    canvas = Image.new("RGB", (width, height + band), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    pen = ImageDraw.Draw(canvas)
    colours = colours_by_class(settings)
    for box, name in zip(counted.boxes * scale, counted.classes, strict=True):
        pen.rectangle(box.tolist(), outline=colours[name], width=thickness)
    font = ImageFont.load_default(band * 0.62)
    x = band * 0.3
    for name, count in counted.counts.items():
        middle = height + band / 2
        side = band * 0.24
        corners = (x, middle - side, x + 2 * side, middle + side)
        pen.rectangle(corners, fill=colours[name])
        x += 2 * side + band * 0.2
        text = f"{count.number} {name}"
        if not can_write(font, name):  # the colour says which class it is
            text = str(count.number)
        pen.text((x, middle), text, fill="black", font=font, anchor="lm")
        x += pen.textlength(text, font=font) + band * 0.6
    return canvas


def can_write(font, text):
    """Whether a Pillow font has all signs of a text: it draws others as one and the same."""
    unknown = bytes(font.getmask("\uffff"))
    for letter in text:
        if bytes(font.getmask(letter)) == unknown:
            return False
    return True


def colours_by_class(settings):
    """{class name: colour}; colours begin anew where there are more classes."""
    colours = settings["class_colours"]
    names = settings["class_names"]
    return {name: colours[place % len(colours)] for place, name in enumerate(names)}


def as_jpeg(image, quality=90):
    """A Pillow image as the bytes of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def clean_for_xml(text):
    """A text with "?" for each control character: XML allows few of them."""
    return "".join(letter if letter >= " " else "?" for letter in text)


def voc_xml(name, width, height, cells):
    """Rows of cells [class, score, xmin, ymin, xmax, ymax, touches] as Pascal VOC, bytes."""
    root = ElementTree.Element("annotation")

    def add(parent, tag, text=None):
        child = ElementTree.SubElement(parent, tag)
        child.text = None if text is None else str(text)
        return child

    add(root, "filename", clean_for_xml(shown_name(name.split("/")[-1])))
    size = add(root, "size")
    add(size, "width", width)
    add(size, "height", height)
    add(size, "depth", 3)
    for class_name, _score, xmin, ymin, xmax, ymax, touches in cells:
        item = add(root, "object")
        add(item, "name", class_name)
        add(item, "pose", "Unspecified")
        add(item, "truncated", touches)
        add(item, "difficult", 0)
        box = add(item, "bndbox")
        add(box, "xmin", round(xmin))
        add(box, "ymin", round(ymin))
        add(box, "xmax", round(xmax))
        add(box, "ymax", round(ymax))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


# --------------------------------------------------------------------------------------
# Workers: processes that count one picture at a time
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """One picture to count.

    stamp: [bytes, time of change in ns] of its file, by which the journal knows it again.
    field: the [width, height] that others decided, or None: it finds its own. threads:
    of the network; more than one for a large picture, which is counted alone.
    """

    name: str
    path: str
    stamp: list
    field: list | None = None
    threads: int = 1


@dataclasses.dataclass
class Options:
    """What a worker must know: the model's path, the output folder, whether VOC is asked
    for.
    """

    model: str
    output: str
    voc: bool


worker_counters = {}  # {threads: CellCounter}, in each worker
worker_options = None


def start_worker(options):
    """Run once in each worker, before its first picture."""
    global worker_options
    worker_options = options
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")  # of decoders: what matters is raised
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this worker when its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def counter_of_worker(threads=1):
    """This worker's CellCounter, opened at its first use."""
    if threads not in worker_counters:
        worker_counters[threads] = CellCounter(worker_options.model, threads)
    return worker_counters[threads]


def describe_model():
    """The model's metadata. Raises ModelError."""
    return counter_of_worker().settings


def seconds_a_field(model):
    """Seconds that a model takes for a field with one thread, the better of two."""
    detector = Detector(model)
    field = np.full((480, 640, 3), 200, np.uint8)
    detector.find(field)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        detector.find(field)
        times.append(time.perf_counter() - started)
    return min(times)


def count_task(task):
    """Count one picture and write its results. Returns a record, a plain dictionary.

    Its "state" is counted, unreadable or failed. Raises OutputError or ModelError, which
    concern every picture.
    """
    record = {"name": task.name, "stamp": task.stamp, "given_field": task.field}
    try:
        image, pages = read_picture(task.path)
        counter = counter_of_worker(task.threads)
        counted = counter.count(image, task.field)
        record.update(picture_record(image, counted, pages))
        write_results(task.name, image, counted, record, counter.settings)
        record["state"] = "counted"
    except PictureError as fault:
        record.update(state="unreadable", reason=str(fault))
    except UnusableNameError as fault:
        why = fault.__cause__.strerror
        reason = f"its results cannot be written under its name ({why}): rename it"
        record.update(state="failed", reason=reason)
    except (OutputError, ModelError):
        raise
    except Exception as fault:  # unforeseen: this picture fails, the others count
        record.update(state="failed", reason=fault_in_words(fault, task.path))
    return record


def picture_record(image, counted, pages):
    """What the tables need of a counted picture, as plain values."""
    cells = []
    columns = (counted.classes, counted.scores, counted.boxes, counted.touches_border)
    for name, score, box, touches in zip(*columns, strict=True):
        corners = [round(float(side), 1) for side in box]
        cells.append([name, round(float(score), 4), *corners, int(touches)])
    counts = {}
    for name, count in counted.counts.items():
        counts[name] = [count.number, count.least, count.most]
    return {
        "width": image.shape[1],
        "height": image.shape[0],
        "own_field": counted.own_field,
        "counts": counts,
        "cells": cells,
        "remark": join_remarks(pages, counted.remark),
    }


def write_results(name, image, counted, record, settings):
    """Write the annotated picture and, if asked for, the Pascal VOC file."""
    options = worker_options
    drawn = draw_cells(image, counted, settings)
    save_whole(annotated_path(options.output, name), as_jpeg(drawn))
    if options.voc:
        content = voc_xml(name, record["width"], record["height"], record["cells"])
        save_whole(voc_path(options.output, name), content)


SHORT_WAIT = 0.5  # seconds: on Windows Ctrl-C is heard only between two waits
MOST_WORKERS = 61 if os.name == "nt" else None  # Windows waits for no more processes


def result_of(future):
    """What a worker returns or raises, waited for in short waits."""
    while not future.done():
        concurrent.futures.wait([future], SHORT_WAIT)
    return future.result()


def number_of_workers(asked, pictures):
    """So many processes as are asked for or as there are cores, none of them idle."""
    count = min(asked or cores(), pictures)
    if MOST_WORKERS:
        count = min(count, MOST_WORKERS)
    return count


class Workers:
    """Processes that run `count_task`; a picture that kills one is found and named."""

    def __init__(self, count, options):
        self.count = count
        self.options = options
        self.pool = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *fault):
        self.stop()

    def start(self):
        """Start the processes, anew on every system: nothing of this one is copied."""
        self.pool = concurrent.futures.ProcessPoolExecutor(
            self.count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(self.options,),
        )

    def stop(self):
        """End the processes at once."""
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)

    def describe_model(self):
        """The model's metadata, as a worker reads them. Raises ModelError."""
        try:
            return result_of(self.pool.submit(describe_model))
        except BrokenProcessPool:
            raise ModelError(
                f"{Path(self.options.model).name} cannot be opened: a worker ended when it "
                "tried; is there enough memory?"
            ) from None

    def run(self, tasks, at_once=None):
        """Yield the record of each task as it is done; `at_once` tasks are under way."""
        waiting = collections.deque(tasks)
        at_once = at_once or 2 * self.count  # one ready for each worker
        running = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.popleft()
                running[self.submit(task)] = task
            done, _ = concurrent.futures.wait(
                running, SHORT_WAIT, return_when=concurrent.futures.FIRST_COMPLETED
            )
            suspects = []
            for future in done:
                task = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects.append(task)
                else:
                    yield future.result()
            if suspects:
                suspects += running.values()
                running = {}
                yield from self.run_suspects(suspects)

    def submit(self, task):
        """Hand a task to the processes, to new ones where they have died."""
        try:
            return self.pool.submit(count_task, task)
        except BrokenProcessPool:
            self.stop()
            self.start()
            return self.pool.submit(count_task, task)

    def run_suspects(self, tasks):
        """One by one the tasks of which one has killed a worker."""
        for task in tasks:
            self.stop()
            self.start()
            try:
                yield result_of(self.pool.submit(count_task, task))
            except BrokenProcessPool:
                yield {
                    "name": task.name,
                    "stamp": task.stamp,
                    "given_field": task.field,
                    "state": "failed",
                    "reason": "it ended the process that read it: damaged, or too large "
                    "for the memory",
                }


# --------------------------------------------------------------------------------------
# The journal: what is done is never done again
# --------------------------------------------------------------------------------------


JOURNAL_MARK = b'{"journal": "count_cells"'  # so the first line begins


class Journal:
    """Records of pictures, one JSON text a line, written as they come.

    The first line says with which model and options. A line counts for a picture whose
    file has not changed, counted at the same scale. Only the places of the lines are kept
    in memory.
    """

    def __init__(self, output, header, fresh=False):
        self.path = Path(output, JOURNAL_NAME)
        self.header = header
        self.places = {}
        self.latest = {}  # {name: place of the last record of this picture}
        self.reason_to_start_anew = ""
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the run)
            lock_file(self.file)
            self.read(fresh)
        except OSError as fault:
            raise OutputError(
                f"Results cannot be written to {shown_name(output)}: {fault.strerror or fault}."
            ) from None

    def read(self, fresh):
        """Read what an earlier run left, and forget it where it does not fit."""
        self.file.seek(0)
        first = self.file.readline()
        earlier = parse_line(first)
        if not (first.startswith(JOURNAL_MARK) or JOURNAL_MARK.startswith(first)):
            raise OutputError(
                f"{shown_name(self.path.parent)} holds a {JOURNAL_NAME} of another program: "
                "name another folder with --output."
            )
        if not first:
            self.append(self.header)
        elif fresh:
            self.reason_to_start_anew = "as --fresh asks"
            self.start_anew()
        elif earlier != self.header:
            self.reason_to_start_anew = difference(earlier, self.header)
            self.start_anew()
        else:
            self.read_records()

    def read_records(self):
        """Note where the records lie; a last line that was cut off goes."""
        while True:
            place = self.file.tell()
            record = parse_line(self.file.readline())
            if record is None:
                break
            self.note(record, place)
        self.file.truncate(place)
        self.file.seek(0, os.SEEK_END)

    def start_anew(self):
        """Forget all records and remove the files that belong to them."""
        output = self.path.parent
        for name in ("counts.csv", "detections.csv", "report.html"):
            Path(output, name).unlink(missing_ok=True)
        self.file.seek(0)
        self.file.readline()
        while True:
            record = parse_line(self.file.readline())
            if record is None:
                break
            for path_of in (annotated_path, voc_path):
                path = path_of(output, record["name"])
                if os.path.lexists(path):
                    path.unlink()
        self.file.truncate(0)
        self.append(self.header)

    def append(self, content):
        """Write one line to the end. Raises OutputError."""
        try:
            self.file.seek(0, os.SEEK_END)
            place = self.file.tell()
            self.file.write(json.dumps(content).encode() + b"\n")
            self.file.flush()
        except OSError as fault:
            raise OutputError(
                f"The journal cannot be written: {fault.strerror or fault}. Make room, then "
                "give the same command again."
            ) from None
        return place

    def add(self, record):
        """Write the record of a picture."""
        self.note(record, self.append(record))

    def note(self, record, place):
        """Note where the record of a picture lies."""
        self.places[record_key(record)] = place
        self.latest[record["name"]] = place

    def forget_older(self, task):
        """Forget the record of a task if the picture was counted otherwise since.

        Its drawing shows that other count. Returns whether there was such a record.
        """
        key = task_key(task)
        if self.places.get(key) == self.latest.get(task.name):
            return False
        del self.places[key]
        return True

    def get(self, task):
        """The last record of a picture, counted at the scale of the task, or None."""
        place = self.places.get(task_key(task))
        if place is None:
            return None
        self.file.seek(place)
        return parse_line(self.file.readline())

    def done(self, task, voc):
        """The record of a task that need not be done again, or None.

        A picture that was not counted is tried again: the fault may have passed.
        """
        record = self.get(task)
        if record is None or record["state"] != "counted":
            return None
        if record["stamp"] != task.stamp:
            return None
        output = self.path.parent
        if not os.path.isfile(annotated_path(output, task.name)):
            return None
        if voc and not os.path.isfile(voc_path(output, task.name)):
            return None
        return record

    def close(self):
        """Close the file, and let others write to it."""
        with contextlib.suppress(OSError):  # a full disk, of which `append` has told
            self.file.close()


def model_of_journal(output):
    """The digest of the model that counted what lies in a folder, or None."""
    try:
        with open(Path(output, JOURNAL_NAME), "rb") as file:
            header = parse_line(file.readline())
    except OSError:
        return None
    return header.get("model") if header else None


def task_key(task):
    """What a picture's records are found by: its name and the scale that was given."""
    return task.name, tuple(task.field or ())


def record_key(record):
    """The `task_key` of the task that a record answers."""
    return record["name"], tuple(record["given_field"] or ())


def parse_line(line):
    """The dictionary of a line of the journal; None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def difference(earlier, header):
    """In words, why an earlier run's results cannot be gone on with."""
    if not earlier:
        return "the journal there is damaged"
    if earlier.get("model") != header["model"]:
        return "the results there are of another model"
    if earlier.get("version") != header["version"]:
        return "the results there are of another version of this program"
    return "the results there are of other options"


def lock_file(file):
    """Keep a second run away from the same results. Raises OutputError if it is there."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**40)  # beyond the content, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OutputError(
            f"Another run is writing to {shown_name(Path(file.name).parent)}: wait until it "
            "has ended, or name another folder with --output."
        ) from None
    except OSError:  # a file system without locks
        pass


# --------------------------------------------------------------------------------------
# A run: scales first, then everything, in the order of names
# --------------------------------------------------------------------------------------


class Run:
    """Counts pictures and keeps what is known of them in a journal."""

    def __init__(self, pictures, journal, workers, own_scale, voc):
        self.journal = journal
        self.workers = workers
        self.own_scale = own_scale
        self.voc = voc
        self.tasks = {}
        self.sizes = {}
        for name, path in pictures.items():
            self.tasks[name] = make_task(name, path)
            self.sizes[name] = picture_size(path)
        self.undone = set(self.tasks)
        self.reused = set()  # names of pictures that an earlier run has counted
        self.progress = tqdm(
            total=len(self.tasks), unit="picture", desc="counting", disable=None, leave=False
        )

    def count(self):
        """Count every picture; records go to the journal."""
        with self.progress:
            if self.own_scale:
                self.count_tasks(list(self.tasks.values()))
            else:
                fields = self.decide_fields()
                self.count_tasks(self.followers(fields))
            self.count_tasks(self.forget_drawn_otherwise())

    def forget_drawn_otherwise(self):
        """Forget the records that the drawings do not show. Returns their tasks."""
        tasks = []
        for task in self.tasks.values():
            if self.journal.forget_older(task):
                tasks.append(task)
        return tasks

    def records(self):
        """The record of each picture, in the order of names."""
        for task in self.tasks.values():
            yield self.journal.get(task)

    def groups(self):
        """Names of the pictures of each size, in the order of names: [[name]].

        Pictures of unknown size, which can hardly be read, are by themselves.
        """
        groups = {}
        for name, size in self.sizes.items():
            key = size if size is not None else name
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def decide_fields(self):
        """The scale of each group of pictures, as a median: {name: field or None}.

        The first three pictures of a size, in the order of names, that can be read find
        their own; the others of this size get the median of those.
        """
        groups = self.groups()
        tried = [0] * len(groups)  # pictures of each group that were asked
        readable = [0] * len(groups)
        while True:
            asked = {}
            for place, names in enumerate(groups):
                needed = SCALE_PICTURES - readable[place]
                for name in names[tried[place] : tried[place] + needed]:
                    asked[name] = place
                    tried[place] += 1
            if not asked:
                break
            self.count_tasks([self.tasks[name] for name in asked])
            for name, place in asked.items():
                record = self.journal.get(self.tasks[name])
                if record["state"] == "counted":
                    readable[place] += 1
        fields = {}
        for place, names in enumerate(groups):
            field = self.median_field(names[: tried[place]])
            for name in names[tried[place] :]:
                fields[name] = field
            for name in names[: tried[place]]:
                if field and self.found_no_field(name):
                    fields[name] = field
        return fields

    def found_no_field(self, name):
        """Whether a picture was counted and none of its scales fitted."""
        record = self.journal.get(self.tasks[name])
        return record["state"] == "counted" and not record["own_field"]

    def median_field(self, names):
        """The median of the fields that these pictures found, or None."""
        records = [self.journal.get(self.tasks[name]) for name in names]
        fields = [record["own_field"] for record in records if record.get("own_field")]
        if not fields:
            return None
        return [round(side) for side in np.median(fields, axis=0)]

    def followers(self, fields):
        """The tasks of pictures whose scale others decided."""
        for name, field in fields.items():
            self.tasks[name].field = field
        return [self.tasks[name] for name in fields]

    def count_tasks(self, tasks):
        """Count what the journal does not hold; large pictures last, one at a time."""
        small = []
        large = []
        for task in tasks:
            if self.journal.done(task, self.voc):
                if task.name in self.undone:
                    self.reused.add(task.name)
                self.note_done(task.name)
            elif self.pixels(task.name) >= LARGE_PIXELS:
                large.append(dataclasses.replace(task, threads=cores()))
            else:
                small.append(task)
        for record in self.workers.run(small):
            self.keep(record)
        for record in self.workers.run(large, at_once=1):
            self.keep(record)

    def pixels(self, name):
        """Pixels of a picture by its header, 0 where they are not known."""
        width, height = self.sizes[name] or (0, 0)
        return width * height

    def keep(self, record):
        """Write a record to the journal."""
        self.journal.add(record)
        self.reused.discard(record["name"])
        self.note_done(record["name"])

    def note_done(self, name):
        """Move the progress bar at the first result of a picture."""
        if name in self.undone:
            self.undone.remove(name)
            self.progress.update()


def make_task(name, path):
    """The Task of a picture, with its file's stamp."""
    try:
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
    except OSError:  # it has gone since: reading it says so
        stamp = [0, 0]
    return Task(name, str(path), stamp)


# --------------------------------------------------------------------------------------
# Tables and summary
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Line:
    """What the report needs of a picture: its name as it is shown; state; counts [[number,
    least, most]] in the order of classes; remark or reason; its name as it is.
    """

    name: str
    state: str
    counts: list
    remark: str
    raw_name: str = ""


class Totals:
    """Sums over all counted pictures, by class."""

    def __init__(self, settings):
        class_names = settings["class_names"]
        self.class_names = class_names
        self.fitted_to = (settings["counting"] or {}).get("images")  # pictures, or None
        self.pictures = 0
        self.cells = [0] * len(class_names)
        self.below = [0.0] * len(class_names)  # squared distances to the ends
        self.above = [0.0] * len(class_names)
        self.measured = [True] * len(class_names)

    def add(self, counts):
        """Add a picture's counts [[number, least, most]]."""
        self.pictures += 1
        for place, (number, least, most) in enumerate(counts):
            self.cells[place] += number
            if least is None:
                self.measured[place] = False
            else:
                self.below[place] += (number - least) ** 2
                self.above[place] += (most - number) ** 2

    def interval(self, place):
        """(least, most) of a class's sum, (None, None) without measurement.

        Errors of single pictures partly cancel, so their squares add up. An error of the
        calibration does not: it was fitted to n pictures, so it is 1 / n of the square of
        one picture's error, and all pictures of this run share it.
        """
        if not self.measured[place] or self.pictures == 0:
            return None, None
        number = self.cells[place]
        shared = 1 + (self.pictures - 1) / self.fitted_to
        least = max(0, round(number - math.sqrt(self.below[place] * shared)))
        most = round(number + math.sqrt(self.above[place] * shared))
        return least, most

    def row(self):
        """The last row of counts.csv."""
        values = {"image": f"SUM of {self.pictures} images"}
        for place, name in enumerate(self.class_names):
            least, most = self.interval(place)
            values[name] = self.cells[place]
            values[f"{name} least"] = least
            values[f"{name} most"] = most
        return values

    def how_sure(self, place):
        """The 95% interval of a class's total, in words."""
        least, most = self.interval(place)
        if least is None:
            return "no interval: this class was not measured in validation"
        return f"95% interval {least:,} to {most:,}"

    def an_image(self, place):
        """How many cells of a class an image has, in words."""
        return f"{self.cells[place] / self.pictures:.1f} an image"

    def sentences(self):
        """One line of the summary for each class."""
        lines = []
        for place, name in enumerate(self.class_names):
            cells = f"{name}: {self.cells[place]:,} cells"
            lines.append(f"{cells} ({self.how_sure(place)}), {self.an_image(place)}")
        return lines


DETECTION_COLUMNS = (
    "image",
    "class",
    "score",
    "xmin",
    "ymin",
    "xmax",
    "ymax",
    "touches_border",
)


def whole_table(path):
    """`whole_file` for a table, with the mark by which spreadsheets know UTF-8."""
    return whole_file(path, "w", encoding="utf-8-sig", newline="")


def write_tables(output, records, not_counted, settings):
    """Write counts.csv and detections.csv from records in the order of names.

    A spreadsheet takes a name that begins with = + - or @ for a formula: such a name is
    led by an apostrophe in both tables. Returns (lines of the report [Line], Totals).
    """
    class_names = settings["class_names"]
    totals = Totals(settings)
    lines = []
    with (
        whole_table(output / "counts.csv") as counts_file,
        whole_table(output / "detections.csv") as detections_file,
    ):
        counts_table = csv.DictWriter(counts_file, count_columns(class_names))
        detections_table = csv.writer(detections_file)
        counts_table.writeheader()
        detections_table.writerow(DETECTION_COLUMNS)
        for record in records:
            line = write_record(counts_table, detections_table, record, class_names)
            lines.append(line)
            if line.state == "counted":
                totals.add(line.counts)
        for name, reason in sorted(not_counted.items()):
            line = Line(shown_name(name), "unreadable", [], reason)
            lines.append(line)
            remark = f"not readable: {reason}"
            counts_table.writerow({"image": no_formula(line.name), "remark": remark})
        counts_table.writerow(totals.row())
    return lines, totals


def no_formula(name):
    """A name as it stands in a table: no formula of a spreadsheet."""
    if name.startswith(("=", "+", "-", "@")):
        return f"'{name}"
    return name


def write_record(counts_table, detections_table, record, class_names):
    """Write one picture's rows to both tables. Returns its Line."""
    name = shown_name(record["name"])
    name_in_table = no_formula(name)
    if record["state"] != "counted":
        words = {"unreadable": "not readable", "failed": "failed"}[record["state"]]
        remark = f"{words}: {record['reason']}"
        counts_table.writerow({"image": name_in_table, "remark": remark})
        return Line(name, record["state"], [], record["reason"])
    counts = {}
    for class_name, numbers in record["counts"].items():
        counts[class_name] = Count(*numbers)
    row = {"image": name_in_table, "remark": record["remark"]}
    row.update(count_values(counts))
    counts_table.writerow(row)
    for cell in record["cells"]:
        detections_table.writerow([name_in_table, *cell])
    in_order = [record["counts"][class_name] for class_name in class_names]
    return Line(name, "counted", in_order, record["remark"], record["name"])


def some_of(names, most=10):
    """A list of names for a sentence, cut after some."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def left_out(found):
    """Which files and folders were left out: [line]."""
    text = []
    if found.others:
        text.append(f"No pictures, left out: {some_of(found.others)}")
    if found.closed:
        why = " (links, or without permission)" if found.nested else " without --nested"
        text.append(f"Folders inside, left out{why}: {some_of(found.closed)}")
    return text


def near_path(path):
    """A path as seen from the working folder, if it lies in it."""
    with contextlib.suppress(ValueError):
        return Path(path).relative_to(os.getcwd())
    return path


def summary_lines(lines, totals, found, output):
    """What the screen says last."""
    failed = [line for line in lines if line.state != "counted"]
    remarked = [line for line in lines if line.state == "counted" and line.remark]
    text = []
    if failed:
        text.append(f"Not counted, {len(failed)}:")
        text += [f"   {line.name}: {line.remark}" for line in failed[:20]]
        if len(failed) > 20:
            text.append(f"   and {len(failed) - 20} more: see counts.csv")
    text += left_out(found)
    text.append(
        f"{totals.pictures} images counted, {len(remarked)} of them with a remark; "
        f"{len(failed)} files not counted"
    )
    if totals.pictures:
        text += totals.sentences()
    text.append(f"Results: {shown_name(near_path(output / 'report.html'))}")
    return text


# --------------------------------------------------------------------------------------
# report.html: one page that needs nothing else
# --------------------------------------------------------------------------------------

EMBEDDED_PICTURES = 200
THUMBNAIL_SIDE = 260
PAGE_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6775; --line: #dfe4ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 78ch; }
a { color: #0b5cad; }
.cards { display: grid; gap: 16px; margin-top: 24px;
  grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); }
.card, .panel { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 16px 18px; border-top: 4px solid var(--colour, #5b6775); }
.card b { display: block; font-size: 30px; line-height: 1.2; }
.card span { display: block; color: var(--soft); }
.panel { padding: 16px 18px; overflow-x: auto; }
.histograms { display: grid; gap: 16px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: #5b6775; }
.pictures { display: grid; gap: 16px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
figure { margin: 0; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; overflow: hidden; }
figure a { display: flex; align-items: center; justify-content: center;
  background: #eceff3; aspect-ratio: 4 / 3; }
figure img { width: 100%; height: 100%; object-fit: contain; display: block; }
figcaption { padding: 10px 12px; font-size: 13px; overflow-wrap: anywhere; }
figcaption b { display: block; font-size: 14px; }
.remark { color: #9a3b00; margin-top: 4px; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td:first-child { min-width: 15em; }
td.number, th.number { text-align: right; white-space: nowrap; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
"""


def doubt(line):
    """How much a picture should be looked at again: remarks first, then wide intervals."""
    width = 0
    for _number, least, most in line.counts:
        if least is not None:
            width += most - least
    return (not line.remark, -width, line.name)


def link_to(output, path):
    """A relative link to a result file, for names with any signs."""
    relative = os.path.relpath(path, output).replace(os.sep, "/")
    return urllib.parse.quote(os.fsencode(relative))


def thumbnail(path):
    """A small copy of an annotated picture as a data address, or None if it is gone."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            image.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            content = as_jpeg(image, quality=70)
    except OSError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def with_interval(number, least, most):
    """A count in words: 23 (20 to 26)."""
    if least is None:
        return f"{number:,}"
    return f"{number:,} ({least:,} to {most:,})"


def card(title, number, lines, colour):
    """One total, as HTML."""
    spans = "".join(f"<span>{html.escape(line)}</span>" for line in lines)
    return (
        f'<div class="card" style="--colour: {html.escape(colour)}">'
        f"<span>{html.escape(title)}</span><b>{number:,}</b>{spans}</div>"
    )


def total_cards(totals, settings):
    """The totals of all classes, as HTML."""
    colours = colours_by_class(settings)
    cards = []
    for place, name in enumerate(totals.class_names):
        lines = [totals.how_sure(place), totals.an_image(place)]
        cards.append(card(name, totals.cells[place], lines, colours[name]))
    return "".join(cards)


def histogram_edges(highest, most_bars=20):
    """Whole numbers where the bars of a histogram begin, and the last one's end."""
    for width in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000):
        if highest / width < most_bars:
            break
    return list(range(0, highest + width + 1, width))


def histogram(numbers, name, colour):
    """How many images have how many cells of a class, as HTML with an SVG picture."""
    edges = histogram_edges(max(numbers))
    heights = np.histogram(numbers, [*edges[:-1], math.inf])[0].tolist()
    width, height, left, bottom = 420, 190, 34, 34
    step = (width - left - 8) / len(heights)
    tallest = max(heights)
    usable = height - bottom - 18
    parts = []
    for place, count in enumerate(heights):
        x = left + place * step
        tall = usable * count / tallest
        top = height - bottom - tall
        first = edges[place]
        last = edges[place + 1] - 1
        range_text = f"{first}" if first == last else f"{first} to {last}"
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{tall:.1f}" fill="{html.escape(colour)}"><title>{range_text} cells: '
            f"{count} images</title></rect>"
        )
    every = max(1, math.ceil(len(heights) / 8))
    for place in range(0, len(heights), every):
        x = left + (place + 0.5) * step
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 14}" text-anchor="middle">'
            f"{edges[place]}</text>"
        )
    base = height - bottom
    parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{base}" y2="{base}" stroke="#aab4c0"/>')
    parts.append(f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>')
    parts.append(f'<text x="{left - 6}" y="24" text-anchor="end">{tallest}</text>')
    middle = (left + width) / 2
    bars = "" if edges[1] == 1 else f", in steps of {edges[1]}"
    parts.append(
        f'<text x="{middle}" y="{height - 4}" text-anchor="middle">'
        f"{html.escape(name)} on an image{bars}</text>"
    )
    parts.append('<text x="2" y="10">images</text>')
    return (
        f'<div class="panel"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Histogram of {html.escape(name)} an image">{"".join(parts)}</svg></div>'
    )


def caption_of(line, class_names):
    """The text below a small picture, as HTML."""
    counts = []
    for name, (number, least, most) in zip(class_names, line.counts, strict=True):
        counts.append(f"{html.escape(name)} {with_interval(number, least, most)}")
    remark = ""
    if line.remark:
        remark = f'<span class="remark">{html.escape(line.remark)}</span>'
    return f"<b>{html.escape(line.name)}</b>{'<br>'.join(counts)}{remark}"


def small_picture(line, path, output, class_names):
    """A small picture with its counts, linked to the annotated one, as HTML."""
    address = thumbnail(path)
    link = link_to(output, path)
    alternative = html.escape(line.name, quote=True)
    image = f'<img src="{address}" alt="{alternative}" loading="lazy">' if address else ""
    caption = caption_of(line, class_names)
    return f'<figure><a href="{link}">{image}</a><figcaption>{caption}</figcaption></figure>'


def link_rows(rows, output, class_names):
    """Rows of a table of pictures that are not shown, as HTML; rows: [(Line, path)]."""
    parts = []
    for line, path in rows:
        cells = "".join(f'<td class="number">{with_interval(*count)}</td>' for count in line.counts)
        parts.append(
            f'<tr><td><a href="{link_to(output, path)}">{html.escape(line.name)}</a></td>'
            f"{cells}<td>{html.escape(line.remark)}</td></tr>"
        )
    heads = "".join(f'<th class="number">{html.escape(name)}</th>' for name in class_names)
    return f"<table><tr><th>picture</th>{heads}<th>remark</th></tr>{''.join(parts)}</table>"


def failed_table(failed):
    """The files that were not counted, as HTML."""
    rows = []
    for line in failed:
        rows.append(
            f"<tr><td>{html.escape(line.name)}</td><td>{html.escape(line.remark)}</td></tr>"
        )
    return (
        "<h2>Not counted</h2><p>These files have no counts and are in no sum.</p>"
        f'<div class="panel"><table><tr><th>file</th><th>reason</th></tr>{"".join(rows)}'
        "</table></div>"
    )


def write_report(output, lines, totals, settings):
    """Write report.html from lines [Line]: totals, histograms, the doubtful pictures first."""
    class_names = settings["class_names"]
    counted = [line for line in lines if line.state == "counted"]
    failed = [line for line in lines if line.state != "counted"]
    counted.sort(key=doubt)
    rows = []
    for line in counted:
        rows.append((line, annotated_path(output, line.raw_name)))
    remarked = sum(1 for line in counted if line.remark)
    parts = [
        "<h1>Cell counts</h1>",
        f"<p>{totals.pictures:,} images counted, {remarked:,} of them with a remark; "
        f"{len(failed):,} files not counted. Tables: "
        '<a href="counts.csv">counts.csv</a>, <a href="detections.csv">detections.csv</a>.'
        "</p>",
    ]
    if counted:
        parts.append(f'<div class="cards">{total_cards(totals, settings)}</div>')
    if failed:
        parts.append(failed_table(failed))
    if counted:
        parts.append(histograms(counted, settings))
        parts.append(
            "<h2>Pictures</h2><p>The most doubtful first: those with a remark, then those "
            "with the widest intervals. A click opens the picture with its boxes.</p>"
        )
        small = []
        for line, path in rows[:EMBEDDED_PICTURES]:
            small.append(small_picture(line, path, output, class_names))
        parts.append(f'<div class="pictures">{"".join(small)}</div>')
    if len(rows) > EMBEDDED_PICTURES:
        others = link_rows(rows[EMBEDDED_PICTURES:], output, class_names)
        parts.append(f'<h2>The other pictures</h2><div class="panel">{others}</div>')
    parts.append(f"<footer>{footer(settings)}</footer>")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Cell counts</title><style>{PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    save_whole(output / "report.html", page.encode("utf-8", "replace"))


def histograms(counted, settings):
    """A histogram for each class, as HTML."""
    colours = colours_by_class(settings)
    panels = []
    for place, name in enumerate(settings["class_names"]):
        numbers = [line.counts[place][0] for line in counted]
        panels.append(histogram(numbers, name, colours[name]))
    return (
        "<h2>Cells an image</h2><p>How many images have how many cells of a class.</p>"
        f'<div class="histograms">{"".join(panels)}</div>'
    )


def footer(settings):
    """How it was counted and what the counts are good for, as HTML."""
    counting = settings["counting"]
    measured = ""
    if counting:
        measured = (
            f" Intervals come from {counting['images']} images whose cells people had "
            "labelled: on pictures like those, about 95 of 100 intervals contain the true "
            "number. They say nothing about pictures of another kind; a remark tells where "
            "a picture is unlike them."
        )
    note = f" {settings['data_note']}" if settings["data_note"] else ""
    text = (
        f"Counted by count_cells {VERSION} with the model {settings['weights']} "
        f"({settings['precision']}). Cells that the border of a picture cuts are counted too."
        f"{measured} Not for diagnosis.{note}"
    )
    return html.escape(text)


# --------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------


def named_path(text):
    """The path of an argument; an empty one, of a variable without value, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("a name is empty: give a file or a folder")
    return Path(text)


def expanded(inputs):
    """The inputs with the files that stand for *.jpg, which Windows hands on as it is."""
    paths = []
    for path in inputs:
        matches = []
        if not os.path.exists(path):
            matches = sorted(glob.glob(str(path)))
        if matches:
            paths += [Path(match) for match in matches]
        else:
            paths.append(path)
    return paths


def parse_arguments(arguments):
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Count the cells on pictures of blood smears.",
        epilog="Exit codes: 0 all counted, 1 a fault of this program, 2 wrong command, 3 some "
        "pictures could not be counted, 4 none was, 5 the model cannot be used, 6 results "
        "cannot be written, 130 and 143 stopped.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=named_path,
        metavar="PICTURES",
        help="pictures, or folders of pictures",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=named_path,
        help="folder of the results; default: beside the (first) folder of pictures, with "
        "_cells added to its name",
    )
    parser.add_argument(
        "-m",
        "--model",
        type=named_path,
        help="an exported ONNX file; default: ssd300_int8.onnx or ssd300.onnx beside this "
        "program or in checkpoints/, of both the faster one",
    )
    parser.add_argument("--nested", action="store_true", help="also folders in folders")
    parser.add_argument("--voc", action="store_true", help="also Pascal VOC files")
    parser.add_argument("--fresh", action="store_true", help="count everything anew")
    parser.add_argument(
        "--own-scale",
        action="store_true",
        help="find the size of the cells on every picture, not on the first three of a "
        "size: slower, for pictures of different magnifications",
    )
    parser.add_argument("--workers", type=int, help="default: one for each core")
    parser.add_argument("--version", action="version", version=VERSION)
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error("--workers must be 1 or more")
    return options


def cores():
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def models_beside(folder):
    """The models that lie beside the program or in its checkpoints, int8 first."""
    found = []
    for name in MODEL_NAMES:
        for place in (folder / name, folder / "checkpoints" / name):
            if os.path.isfile(place):
                found.append(place)
                break
    return found


def speed_file():
    """Where the speeds of models on this machine are remembered.

    In the user's cache, or among the temporary files of a user without a home.
    """
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            base = tempfile.gettempdir()
    return Path(base, "count_cells", "speed.json")


def choose_model(named, folder=PROGRAM_FOLDER, earlier=None):
    """The model that is named, or the one beside the program, of two the faster one.

    earlier: the digest of the model of a run that may go on; of two it is taken, if it
    is one of them. Else two are timed once on a machine, and the result is remembered.
    Raises ModelError.
    """
    if named is not None:
        return named
    found = models_beside(folder)
    if not found:
        raise ModelError(
            f"There is no model {' or '.join(MODEL_NAMES)} beside count_cells.py or in "
            "checkpoints/: put ssd300_int8.onnx there, which lies in checkpoints/ of the "
            "repository, or name a model with --model."
        )
    if len(found) == 1:
        return found[0]
    if earlier:
        for path in found:
            if digest_of(path) == earlier:
                return path
    eight_bits, full = found
    if remembered_speed(eight_bits, full) > 1.15:
        return full
    return eight_bits


def remembered_speed(eight_bits, full):
    """Seconds of the int8 model by those of the float32 one, measured once a machine."""
    sizes = [path.stat().st_size for path in (eight_bits, full)]
    key = f"{platform.node()} {platform.processor() or platform.machine()} {sizes}"
    memory = {}
    with contextlib.suppress(OSError, ValueError):
        memory = json.loads(speed_file().read_text())
    if not isinstance(memory, dict):
        memory = {}
    if not isinstance(memory.get(key), float):
        memory[key] = measured_speed(eight_bits, full)
        with contextlib.suppress(OSError, OutputError):
            save_whole(speed_file(), json.dumps(memory).encode())
    return memory[key]


def measured_speed(eight_bits, full):
    """Seconds of the int8 model by those of the float32 one, each in a process of its own."""
    seconds = []
    for path in (eight_bits, full):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            seconds.append(result_of(pool.submit(seconds_a_field, path)))
    return seconds[0] / seconds[1]


def digest_of(path):
    """16 hex digits that tell a model's file from others."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def stop_on_signal(number, frame):
    """Let SIGTERM end a run as Ctrl-C does."""
    raise Terminated


class Terminated(BaseException):
    """The run was asked to end by a signal; as Ctrl-C it passes by `except Exception`."""


def run_command(options):
    """Count what the command names. Returns the exit code; raises CountError."""
    started = time.perf_counter()
    inputs = expanded(options.inputs)
    for path in inputs:
        if not os.path.exists(path):
            raise CountError(f"There is no file or folder {shown_name(path)}.")
    output = options.output or default_output(inputs)
    if os.path.exists(output) and not os.path.isdir(output):
        raise OutputError(f"{shown_name(output)} is no folder: name one with --output.")
    earlier = None if options.fresh else model_of_journal(output)
    model = choose_model(options.model, earlier=earlier)
    if not os.path.isfile(model):
        raise ModelError(f"There is no model {shown_name(model)}.")
    found = find_pictures(inputs, options.nested, output)
    if not found.pictures:
        print_no_pictures(found)
        return EXIT_NONE_COUNTED
    output = Path(os.path.abspath(output))
    count = number_of_workers(options.workers, len(found.pictures))
    worker_options = Options(str(model), str(output), options.voc)
    with Workers(count, worker_options) as workers:
        settings = workers.describe_model()
        header = {
            "journal": "count_cells",
            "version": VERSION,
            "model": digest_of(model),
            "options": {"own_scale": options.own_scale, "voc": options.voc},
        }
        with contextlib.closing(Journal(output, header, options.fresh)) as journal:
            remove_leftovers(output)
            if journal.reason_to_start_anew:
                print(f"Everything is counted anew: {journal.reason_to_start_anew}.")
            run = Run(found.pictures, journal, workers, options.own_scale, options.voc)
            run.count()
            lines = finish(run, found, output, settings)
    seconds = time.perf_counter() - started
    again = f", {len(run.reused)} of them in an earlier run" if run.reused else ""
    print(
        f"{len(found.pictures)} pictures in {seconds:.1f} s by {model.name} "
        f"({settings['precision']}), {count} workers{again}"
    )
    return exit_code(lines)


def remove_leftovers(output):
    """Remove files that a killed run had begun to write."""
    for folder in (ANNOTATED_FOLDER, VOC_FOLDER):
        for path in (output / folder).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def print_no_pictures(found):
    """Say that there is nothing to count, and what is there."""
    for name, reason in found.not_counted.items():
        print(f"   {shown_name(name)}: {reason}")
    for text in left_out(found):
        print(text)
    print("There is no picture to count.")


def finish(run, found, output, settings):
    """Write tables and report, and say what was counted. Returns the lines."""
    lines, totals = write_tables(output, run.records(), found.not_counted, settings)
    write_report(output, lines, totals, settings)
    for text in summary_lines(lines, totals, found, output):
        print(text)
    return lines


def exit_code(lines):
    """0 if all were counted, 3 if some were, 4 if none was."""
    counted = [line for line in lines if line.state == "counted"]
    if len(counted) == len(lines):
        return EXIT_COUNTED
    return EXIT_SOME_FAILED if counted else EXIT_NONE_COUNTED


def main(arguments=None):
    """Run the command line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    options = parse_arguments(arguments)
    with contextlib.suppress(ValueError, AttributeError):  # outside the main thread
        signal.signal(signal.SIGTERM, stop_on_signal)
    try:
        return run_command(options)
    except CountError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    except (KeyboardInterrupt, Terminated) as fault:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(fault, Terminated) else EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
