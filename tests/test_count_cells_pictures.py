"""Pictures as people have them: every format, depth and orientation is seen as it is, and what
cannot be read is named with the reason.
"""

import io
import struct

import cv2
import numpy as np
import pytest
import tifffile
from lab import SQUARES, picture
from PIL import Image

import count_cells
from count_cells import PictureError, read_picture

BASE = picture(64, 48, [(10, 5, 20)])
DEEP = BASE.astype(np.uint16)


def save(path, values, **options):
    Image.fromarray(values).save(path, **options)
    return path


def agrees(path, expected=BASE, most=3):
    """Whether a file is read as these pixels, without a remark."""
    image, remark = read_picture(path)
    assert image.dtype == np.uint8 and image.shape == expected.shape and remark == ""
    return np.abs(image.astype(int) - expected).max() <= most


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.jpg", {"quality": 95}),
        ("a.jpe", {"quality": 95}),
        ("a.jfif", {"quality": 95}),
        ("progressive.jpg", {"quality": 95, "progressive": True}),
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.webp", {"lossless": True}),
        ("a.jp2", {}),
        ("a.gif", {}),
        ("a.ppm", {}),
        ("a.tga", {}),
        ("a.tif", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("deflate.tif", {"compression": "tiff_deflate"}),
    ],
)
def test_what_pillow_reads_is_read(tmp_path, name, options):
    path = tmp_path / name
    image_format = "JPEG" if path.suffix in (".jpe", ".jfif") else None
    save(path, BASE, format=image_format, **options)
    assert agrees(path, most=12 if path.suffix in (".jpg", ".jpe", ".jfif") else 3)
    assert count_cells.picture_size(path) == (64, 48)
    assert count_cells.looks_like_a_picture(path)
    assert np.array_equal(read_picture(path.read_bytes())[0], read_picture(path)[0])


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "F"])
def test_grey_palette_and_other_modes(tmp_path, mode):
    image = Image.fromarray(BASE)
    if mode == "P":
        image = image.quantize(8)
    elif mode == "1":
        image = image.convert("1", dither=Image.Dither.NONE)
    elif mode == "I;16":
        image = Image.fromarray(DEEP[..., 0] * 257)
    elif mode == "F":
        image = Image.fromarray(BASE[..., 0].astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    assert agrees(tmp_path / "a.tif", most=60 if mode == "1" else 3)


def test_transparent_parts_are_white(tmp_path):
    image = Image.fromarray(np.zeros_like(BASE)).convert("RGBA")
    alpha = np.where(BASE[..., 0] < 100, 215, 25).astype(np.uint8)
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    assert agrees(tmp_path / "a.png")
    deep = np.dstack([np.zeros_like(DEEP), alpha.astype(np.uint16) * 257])
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    assert agrees(tmp_path / "deep.png")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("way", ["grey", "planes", "contiguous", "lzw", "deflate planes", "png"])
def test_every_depth_is_seen_as_it_is(tmp_path, bits, way):
    values = (DEEP * ((2**bits - 1) / 255)).round().astype(np.uint16)
    path = tmp_path / ("a.png" if way == "png" else "a.tif")
    planes = np.moveaxis(values, -1, 0)
    if way == "grey":
        tifffile.imwrite(path, values[..., 0])
    elif way == "planes":
        tifffile.imwrite(path, planes, planarconfig="separate", photometric="rgb")
    elif way == "deflate planes":
        options = {"compression": "zlib", "planarconfig": "separate", "photometric": "rgb"}
        tifffile.imwrite(path, planes, **options)
    elif way == "contiguous":
        tifffile.imwrite(path, values, photometric="rgb")
    else:
        cv2.imwrite(str(path), values[..., ::-1])  # OpenCV packs TIFF by LZW
    for _ in range(3):  # the planes were read otherwise each time
        assert agrees(path)


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_numbers_of_any_type(tmp_path, kind):
    tifffile.imwrite(tmp_path / "a.tif", (BASE * 100.0).astype(kind), photometric="rgb")
    image = read_picture(tmp_path / "a.tif")[0].astype(int)
    assert image[0, 0, 0] - image[10, 15, 0] > 150  # light stays light, dark stays dark


@pytest.mark.parametrize("pixels", [1, 20])
def test_hot_pixels_and_a_scale_bar_do_not_darken_a_picture(tmp_path, pixels):
    """One pixel of 65535 in 12-bit data made a picture black: 23 red cells became 0."""
    values = DEEP * 16
    values[0, :pixels] = 65535
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    image = read_picture(tmp_path / "a.tif")[0]
    assert np.abs(image[1:].astype(int) - BASE[1:]).max() <= 3


@pytest.mark.parametrize("share", [0.5, 0.33, 0.1])
def test_a_short_exposure_is_brought_to_light(tmp_path, share):
    values = (DEEP * 257 * share).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    assert 200 <= np.median(read_picture(tmp_path / "a.tif")[0]) <= 250


def test_floats_with_holes(tmp_path):
    values = BASE.astype(np.float32) / 255
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    image = read_picture(tmp_path / "a.tif")[0]
    assert np.abs(image[1:].astype(int) - BASE[1:]).max() <= 3


def test_white_may_be_zero(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", 65535 - DEEP[..., 0] * 257, photometric="miniswhite")
    image = read_picture(tmp_path / "a.tif")[0]
    assert image[0, 0, 0] > 200 and image[10, 15, 0] < 60


def test_white_may_be_zero_in_twelve_bits_of_sixteen(tmp_path):
    """Its black was taken for 65535: all came out between 240 and 255."""
    tifffile.imwrite(tmp_path / "a.tif", 4095 - DEEP[..., 0] * 16, photometric="miniswhite")
    assert agrees(tmp_path / "a.tif")


def test_colours_that_are_no_rgb_are_refused_in_a_sentence(tmp_path):
    inks = np.zeros((48, 64, 4), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", inks, photometric="separated")
    with pytest.raises(PictureError, match="neither grey nor RGB"):
        read_picture(tmp_path / "a.tif")


def test_pages_and_channels(tmp_path):
    pages = np.stack([DEEP[..., 0] * 257] * 4)
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    image, remark = read_picture(tmp_path / "pages.tif")
    assert image.shape == BASE.shape and remark == "first of 4 pages"
    eight = [Image.fromarray(BASE)] * 2
    eight[0].save(tmp_path / "eight.tif", save_all=True, append_images=eight)
    image, remark = read_picture(tmp_path / "eight.tif")
    assert np.array_equal(image, BASE) and remark == "first of 3 pages"
    planes = np.moveaxis(DEEP * 257, -1, 0)
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, metadata={"axes": "CYX"})
    image = read_picture(tmp_path / "a.ome.tif")[0]
    assert np.abs(image.astype(int) - BASE).max() <= 3


def photoshop_file(pixels, layers):
    """The bytes of a PSD of these pixels (H, W, 3), with empty layers."""
    height, width = pixels.shape[:2]
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3)
    layer = struct.pack(">4iH", 0, 0, 0, 0, 0) + b"8BIMnorm" + struct.pack(">4BI", 255, 0, 0, 0, 0)
    content = struct.pack(">h", layers) + layer * layers
    info = struct.pack(">I", len(content)) + content
    planes = np.moveaxis(pixels, -1, 0).tobytes()
    return head + struct.pack(">III", 0, 0, len(info)) + info + struct.pack(">H", 0) + planes


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layered_picture_is_read_as_it_looks(tmp_path, layers):
    (tmp_path / "a.psd").write_bytes(photoshop_file(BASE, layers))
    assert Image.open(tmp_path / "a.psd").n_frames == layers
    assert agrees(tmp_path / "a.psd")


COLOURS = np.stack([DEEP[..., 0], DEEP[..., 0] // 2, 255 - DEEP[..., 0]]) * 257  # (3, 48, 64)


@pytest.mark.parametrize("compression", ["tiff_lzw", None])
def test_packed_channels_are_red_green_and_blue(tmp_path, compression):
    """OpenCV, which unpacks LZW, gave the red one as a grey picture."""
    frames = [Image.fromarray(channel) for channel in COLOURS]
    options = {"save_all": True, "append_images": frames[1:], "compression": compression}
    note = "ImageJ=1.53\nimages=3\nchannels=3\nhyperstack=true\nmode=composite\n"
    frames[0].save(tmp_path / "a.tif", tiffinfo={270: note}, **options)
    assert agrees(tmp_path / "a.tif", np.moveaxis(COLOURS // 257, 0, -1))


def test_of_a_stack_the_first_plane_alone_is_read(tmp_path, monkeypatch):
    """All depths and times were read, as much as the file holds."""
    stack = np.stack([COLOURS] + [COLOURS[::-1]] * 4).reshape(5, 1, 3, 48, 64)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "TZCYX"})
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", None)
    image, remark = read_picture(path)
    assert np.abs(image - np.moveaxis(COLOURS // 257, 0, -1).astype(int)).max() <= 3
    assert remark == "first of 5 pages"
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((48, 64, 100), np.uint16), planarconfig=1)
    with pytest.raises(PictureError, match="100 values a pixel: save it as RGB"):
        read_picture(tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_packed_deep_tiff_is_turned_once(tmp_path, orientation):
    """OpenCV turned it, and then the program did."""
    backwards = {6: 8, 8: 6}.get(orientation, orientation)
    turned = count_cells.upright(DEEP[..., 0] * 257, backwards)
    options = {"compression": "tiff_lzw", "tiffinfo": {0x0112: orientation}}
    save(tmp_path / "a.tif", np.ascontiguousarray(turned), **options)
    assert agrees(tmp_path / "a.tif")


def test_the_preview_in_a_phones_jpeg_is_no_page(tmp_path):
    preview = Image.fromarray(BASE[::4, ::4])
    image = Image.fromarray(BASE)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview], quality=95)
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "MPO" and saved.n_frames == 2
    assert agrees(tmp_path / "a.jpg", most=12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_turns_a_picture(tmp_path, orientation, name):
    backwards = {6: 8, 8: 6}.get(orientation, orientation)
    turned = count_cells.upright(BASE, backwards)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / name, np.ascontiguousarray(turned), exif=exif)
    assert agrees(tmp_path / name, most=60)
    assert count_cells.picture_size(tmp_path / name) == (64, 48)


def exif_of_wrong_types():
    """EXIF with orientation 6, and a resolution, a date and a maker's note that are no such."""
    entries = [(0x0112, 3, 1, 6), (0x011A, 2, 4, 0x78787878), (0x0132, 5, 9, 0xFFFFFF)]
    content = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        content += struct.pack("<HHII", tag, kind, count, value)
    return content + bytes(4)


def test_exif_fields_of_the_wrong_type_are_ignored(tmp_path):
    turned = np.ascontiguousarray(count_cells.upright(BASE, 8))
    save(tmp_path / "a.jpg", turned, exif=exif_of_wrong_types(), quality=95)
    assert agrees(tmp_path / "a.jpg", most=12)
    save(tmp_path / "b.jpg", BASE, exif=b"Exif\x00\x00nonsense" * 3, quality=95)
    assert agrees(tmp_path / "b.jpg", most=12)


def a_tiff_of_pages():
    buffer = io.BytesIO()
    first = Image.fromarray(BASE)
    first.save(buffer, "TIFF", save_all=True, append_images=[first, first])
    return buffer.getvalue()


def test_a_file_that_was_cut_off_is_named_or_gives_its_first_page(tmp_path):
    """A TIFF of three pages cut at 60% ended the run with a TypeError."""
    whole = a_tiff_of_pages()
    for share in range(1, 20):
        path = tmp_path / "cut.tif"
        path.write_bytes(whole[: len(whole) * share // 20])
        try:
            assert np.array_equal(read_picture(path)[0], BASE)
        except PictureError as fault:
            assert str(tmp_path) not in str(fault)
    tifffile.imwrite(tmp_path / "deep.tif", DEEP, photometric="rgb")
    content = (tmp_path / "deep.tif").read_bytes()
    (tmp_path / "deep.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match="cut off"):
        read_picture(tmp_path / "deep.tif")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"no picture at all, but a text", "no picture"),
        (bytes(1000), "no picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no picture"),
        (b"\xff\xd8\xff" + bytes(200), "no picture"),
        (b"II*\x00" + bytes(200), "no page|no picture"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(100), "HEIC .* save it as JPEG"),
    ],
)
def test_what_is_no_picture_is_named_with_the_reason(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(PictureError, match=words):
        read_picture(tmp_path / "a.jpg")
    with pytest.raises(PictureError):
        read_picture(content)


def test_damaged_files_never_fail_otherwise(tmp_path):
    g = np.random.default_rng(5)
    files = [a_tiff_of_pages()]
    for image_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(BASE).save(buffer, image_format)
        files.append(buffer.getvalue())
    for whole in files:
        for _ in range(15):
            content = bytearray(whole)
            for place in g.integers(0, len(content), 8):
                content[place] = int(g.integers(0, 256))
            try:
                image = read_picture(bytes(content))[0]
                assert image.ndim == 3 and image.shape[2] == 3
            except PictureError:
                pass


def test_formats_that_must_be_converted_say_how():
    for name in ("a.heic", "a.SVS", "a.czi", "a.nef", "a.dcm", "a.pdf", "a.jxl"):
        assert "is not read here: " in count_cells.needs_conversion(name)
    assert count_cells.needs_conversion("a.jpg") is None


def test_the_library_refuses_the_formats_that_the_command_refuses(tmp_path):
    tifffile.imwrite(tmp_path / "a.svs", BASE, photometric="rgb")
    with pytest.raises(PictureError, match="a whole slide is not read here"):
        read_picture(tmp_path / "a.svs")


def test_a_signal_is_no_fault_of_a_picture(tmp_path, monkeypatch):
    """`except Exception` took it for a damaged file, and the run went on."""

    def stop(path):
        count_cells.stop_on_signal(15, None)

    monkeypatch.setattr(count_cells.Image, "open", stop)
    with pytest.raises(count_cells.Terminated):
        count_cells.picture_size(tmp_path / "a.png")


def test_a_large_picture_is_read_with_one_copy_and_its_size_is_bounded(tmp_path, monkeypatch):
    large = picture(3000, 2000, SQUARES)
    save(tmp_path / "a.png", large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own bound does not count
    assert np.array_equal(read_picture(tmp_path / "a.png")[0], large)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(count_cells, "MAX_PIXELS", 5_000_000)
    with pytest.raises(PictureError, match="3000 x 2000 pixels are more than 5 million: cut it"):
        read_picture(tmp_path / "a.png")
