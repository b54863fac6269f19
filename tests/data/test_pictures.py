"""PNG, BMP, GIF, JPEG and TIFF: which way up, colours, palettes, spacing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from autoseg.core.errors import FormatError
from autoseg.data.io import read_geometry, read_image, read_label, read_raw, write_volume

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
STACK = np.random.default_rng(1).integers(0, 250, (5, 3, 4)).astype(np.uint8)


def turned(pixels: np.ndarray) -> np.ndarray:
    """From rows and columns to canonical y and x."""
    return pixels[..., ::-1, ::-1]


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    picture = Image.fromarray(pixels)
    assert mode in (None, picture.mode)
    picture.save(path, **options)  # type: ignore[arg-type]
    return path


def save_palette(path: Path, numbers: np.ndarray, colours: list[tuple[int, int, int]], **options: object) -> Path:
    picture = Image.fromarray(numbers).convert("L")
    picture.putpalette([value for colour in colours for value in colour])
    assert picture.mode == "P"
    picture.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("ending", [".png", ".bmp", ".gif", ".tif"])
def test_first_row_is_the_front_and_first_column_the_right(ending: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{ending}", GREY, "L")
    image, geometry = read_image(path)
    assert geometry.file_axcodes == ("L", "P", "S")
    assert geometry.spacing_mm == (1.0, 1.0, 1.0)
    assert geometry.file_shape == (4, 3, 1)
    assert np.array_equal(image, turned(GREY)[None, None])
    # The same picture as ITK stores it.
    sitk.WriteImage(sitk.GetImageFromArray(GREY), str(tmp_path / "a.mha"))
    expected, other = read_image(tmp_path / "a.mha")
    assert np.array_equal(image, expected)
    assert geometry == other
    write_volume(tmp_path / f"b{ending}", image[0].astype(np.uint8), geometry, like=path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"b{ending}")), GREY)


def test_sixteen_bit_png(tmp_path: Path) -> None:
    pixels = GREY.astype(np.uint16) * 200 + 7
    path = save(tmp_path / "a.png", pixels)
    assert np.array_equal(read_image(path)[0], turned(pixels)[None, None])
    label, geometry = read_label(path)
    write_volume(tmp_path / "b.png", label, geometry, like=path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), pixels)


def test_sixteen_bit_colours_are_refused(tmp_path: Path) -> None:
    """Pillow would take the upper eight bits without a word."""
    data = bytearray(save(tmp_path / "a.png", np.zeros((3, 4, 3), np.uint8)).read_bytes())
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(3 * (1 + 4 * 6)))
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (head, body, b"IEND")
    )
    (tmp_path / "a.png").write_bytes(bytes(data[:8]) + b"".join(chunks))
    with pytest.raises(FormatError, match=r"a\.png: found 16 bits per colour, expected 8"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_colours_are_channels(ending: str, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3)).astype(np.uint8)
    path = save(tmp_path / f"a{ending}", colours, "RGB")
    assert read_raw(path).n_channels == 3
    image, _ = read_image(path)
    assert np.array_equal(image[:, 0], turned(np.moveaxis(colours, -1, 0)))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_transparency(ending: str, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 4)).astype(np.uint8)
    colours[..., 3] = 77
    path = save(tmp_path / f"a{ending}", colours, "RGBA")
    image, _ = read_image(path)
    assert np.array_equal(image[:, 0], turned(np.moveaxis(colours[..., :3], -1, 0)))
    colours[1, 2, 3] = 78
    path = save(tmp_path / f"a{ending}", colours, "RGBA")
    assert read_raw(path).n_channels == 3
    with pytest.raises(FormatError, match=rf"a\{ending}: found transparency between 77 and 78, expected none"):
        read_image(path)


PALETTE = [(0, 0, 0), (255, 0, 0), (0, 200, 0), (9, 9, 250)]
NUMBERS = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".gif", ".tif"])
def test_numbers_of_a_palette_are_labels_and_its_colours_are_images(ending: str, tmp_path: Path) -> None:
    path = save_palette(tmp_path / f"a{ending}", NUMBERS, PALETTE, optimize=False)
    assert np.array_equal(read_label(path)[0], turned(NUMBERS)[None])
    image, _ = read_image(path)
    assert image.shape == (3, 1, 2, 3)
    assert np.array_equal(image[:, 0], turned(np.moveaxis(np.array(PALETTE)[NUMBERS], -1, 0)))


@pytest.mark.parametrize(
    ("ending", "label_is_grey"), [(".png", False), (".tif", False), (".gif", True), (".bmp", True)]
)
def test_grey_palettes(ending: str, label_is_grey: bool, tmp_path: Path) -> None:
    """GIF and BMP have no other way to store grey."""
    greys = np.array([0, 50, 7, 255], np.uint8)
    path = save_palette(tmp_path / f"a{ending}", NUMBERS, [(value,) * 3 for value in greys.tolist()], optimize=False)
    assert np.array_equal(read_image(path)[0], turned(greys[NUMBERS])[None, None])
    expected = greys[NUMBERS] if label_is_grey else NUMBERS
    assert np.array_equal(read_label(path)[0], turned(expected)[None])


def test_gif_that_pillow_made_smaller(tmp_path: Path) -> None:
    """Its palette holds only the greys that occur: number 1 stands for 2."""
    pixels = np.array([[0, 2], [2, 0]], np.uint8)
    path = save(tmp_path / "a.gif", pixels)
    assert np.array_equal(read_label(path)[0], turned(pixels)[None])


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_one_bit(ending: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{ending}", GREY > 100, "1")
    assert np.array_equal(read_label(path)[0], turned(GREY > 100)[None])
    assert np.array_equal(read_image(path)[0], turned(GREY > 100)[None, None])


MASKS = {
    "grey": ([(0, 0, 0), (1, 1, 1), (7, 7, 7)], [0, 1, 7]),
    "red only": ([(0, 0, 0), (3, 0, 0), (5, 0, 0)], [0, 3, 5]),
    "one colour": ([(0, 0, 0), (255, 200, 10), (255, 200, 10)], [0, 255, 255]),
}


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_saved_in_colour(mask: str, ending: str, tmp_path: Path) -> None:
    colours, values = MASKS[mask]
    numbers = NUMBERS % 3
    path = save(tmp_path / f"a{ending}", np.array(colours, np.uint8)[numbers])
    assert np.array_equal(read_label(path)[0], turned(np.array(values)[numbers])[None])


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_several_colours_are_no_labels(ending: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{ending}", np.array(PALETTE, np.uint8)[NUMBERS])
    expected = (
        r"found 4 colours such as \(0, 0, 0\), \(0, 200, 0\), .*, expected one number per pixel; convert each colour"
    )
    with pytest.raises(FormatError, match=rf"a\{ending}: {expected}"):
        read_label(path)


def test_jpeg(tmp_path: Path) -> None:
    blob = np.zeros((24, 24), np.uint8)
    blob[8:16, 8:16] = 255
    flat = save(tmp_path / "flat.jpg", blob, quality=95)
    assert np.array_equal(read_label(flat)[0], turned(blob)[None])  # whole blocks of 8 x 8 stay as they are
    assert read_image(flat)[0].shape == (1, 1, 24, 24)
    blurred = save(tmp_path / "a.jpeg", np.roll(blob, 3, axis=(0, 1)), quality=75)
    with pytest.raises(FormatError, match=r"a\.jpeg: found \d+ values such as 0, 1, .* at most 2 in a JPEG.*as PNG"):
        read_label(blurred)
    assert read_raw(save(tmp_path / "b.jpg", np.stack([blob] * 3, -1))).n_channels == 3


def test_pictures_that_move_or_are_printed(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY + number) for number in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(FormatError, match=r"a\.gif: found 3 frames, expected one picture"):
        read_image(tmp_path / "a.gif")
    Image.new("CMYK", (4, 3)).save(tmp_path / "a.jpg")
    with pytest.raises(FormatError, match=r"a\.jpg: found pixels of the kind CMYK, expected grey or RGB"):
        read_image(tmp_path / "a.jpg")


def test_pictures_too_large_to_be_meant(tmp_path: Path) -> None:
    data = bytearray(save(tmp_path / "a.bmp", GREY).read_bytes())
    data[18:26] = (50000).to_bytes(4, "little") * 2
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.bmp: .* exceeds limit"):
        read_image(tmp_path / "a.bmp")


# TIFF


def write_tiff(path: Path, voxels: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, voxels, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"compression": "zlib"}, {"bigtiff": True}, {"ome": True}])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_pages_are_slices(dtype: type, options: dict, tmp_path: Path) -> None:
    if options.get("ome"):
        options = {**options, "metadata": {"axes": "ZYX"}}
    path = write_tiff(tmp_path / "a.tif", STACK.astype(dtype), photometric="minisblack", **options)
    image, geometry = read_image(path)
    assert np.array_equal(image, turned(STACK)[None])
    assert geometry.shape == STACK.shape
    assert geometry.spacing_mm == (1.0, 1.0, 1.0)
    assert np.array_equal(read_label(path)[0], turned(STACK))
    write_volume(tmp_path / "b.tif", turned(STACK), geometry, like=path)
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), STACK)


@pytest.mark.parametrize("shape", [(5, 4, 3), (3, 5, 4), (1, 5, 3), (2, 3, 4)])
def test_written_volumes_are_not_taken_for_colours(shape: tuple[int, ...], tmp_path: Path) -> None:
    voxels = np.random.default_rng(2).integers(0, 9, shape).astype(np.uint8)
    geometry = read_geometry(write_tiff(tmp_path / "a.tif", voxels, photometric="minisblack", metadata=None))
    assert geometry.shape == shape
    write_volume(tmp_path / "b.tif", voxels, geometry)
    assert np.array_equal(read_label(tmp_path / "b.tif")[0], voxels)
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        assert len(tiff.pages) == shape[0]


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1.0), ("um", 1e-3), ("micron", 1e-3), ("\\u00B5m", 1e-3), ("cm", 10.0), ("nm", 1e-6)]
)
def test_spacing_of_imagej(unit: str, factor: float, tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / "a.tif",
        STACK,
        imagej=True,
        resolution=(1 / 0.7, 1 / 1.3),
        metadata={"spacing": 4.1, "unit": unit, "axes": "ZYX"},
    )
    assert read_geometry(path).spacing_mm == pytest.approx((4.1 * factor, 1.3 * factor, 0.7 * factor), abs=1e-7)
    assert np.array_equal(read_image(path)[0], turned(STACK)[None])


def test_a_distance_of_one_that_imagej_leaves_out_is_of_the_unit(tmp_path: Path) -> None:
    metadata = {"unit": "micron", "axes": "ZYX"}
    path = write_tiff(tmp_path / "a.tif", STACK, imagej=True, resolution=(2, 2), metadata=metadata)
    assert read_geometry(path).spacing_mm == pytest.approx((1e-3, 5e-4, 5e-4), abs=1e-9)
    picture = write_tiff(tmp_path / "b.tif", GREY, imagej=True, resolution=(2, 2), metadata={"unit": "micron"})
    assert read_geometry(picture).spacing_mm == pytest.approx((1.0, 5e-4, 5e-4), abs=1e-9)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("µm", 1e-3), ("cm", 10.0)])
def test_spacing_of_ome(unit: str, factor: float, tmp_path: Path) -> None:
    metadata: dict[str, object] = {"axes": "ZYX"}
    for axis, length in {"X": 0.7, "Y": 1.3, "Z": 4.1}.items():
        metadata |= {f"PhysicalSize{axis}": length, f"PhysicalSize{axis}Unit": unit}
    path = write_tiff(tmp_path / "a.ome.tif", STACK, metadata=metadata, photometric="minisblack")
    geometry = read_geometry(path)
    assert geometry.spacing_mm == pytest.approx((4.1 * factor, 1.3 * factor, 0.7 * factor), abs=1e-9)
    write_volume(tmp_path / "b.tif", turned(STACK), geometry, like=path)
    assert read_geometry(tmp_path / "b.tif") == geometry


def test_resolution_counts_in_centimetres_alone(tmp_path: Path) -> None:
    """Dots per inch are about paper."""
    path = write_tiff(tmp_path / "a.tif", GREY, resolution=(20, 40), resolutionunit="CENTIMETER")
    assert read_geometry(path).spacing_mm == (1.0, 0.25, 0.5)
    path = write_tiff(tmp_path / "a.tif", GREY, resolution=(72, 72), resolutionunit="INCH")
    assert read_geometry(path).spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["case.tif", "case_0000.tiff", "case.ome.tif", "case_0001.TIF"])
def test_spacing_in_a_file_beside(name: str, tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / name,
        STACK,
        resolution=(20, 40),
        resolutionunit="CENTIMETER",
        photometric="minisblack",
        metadata={"axes": "ZYX"},
    )
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [4.1, 1.3, 0.7]}))
    geometry = read_geometry(path)
    assert geometry.spacing_mm == (4.1, 1.3, 0.7)
    write_volume(tmp_path / "out" / "b.tif", turned(STACK), geometry, like=path)
    assert read_geometry(tmp_path / "out" / "b.tif") == geometry
    (tmp_path / "case.json").write_text(json.dumps({"shapes": []}))
    assert read_geometry(path).spacing_mm == ((1.0, 1.0, 1.0) if ".ome" in name else (1.0, 0.25, 0.5))


@pytest.mark.parametrize("spacing", [[1, 1], [1, 1, 0], [1, 1, "1"], None, [1, 1, -2]])
def test_spacing_beside_that_is_none(spacing: object, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", GREY)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": spacing}))
    with pytest.raises(FormatError, match=r"a\.json: found the spacing .*, expected three lengths in mm \[z, y, x\]"):
        read_geometry(path)


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}])
@pytest.mark.parametrize("axes", ["ZCYX", "TZYX"])
def test_channels_and_time_points(axes: str, options: dict, tmp_path: Path) -> None:
    voxels = np.random.default_rng(3).integers(0, 9, (2, 5, 3, 4)).astype(np.uint8)
    stored = voxels if axes == "TZYX" else voxels.swapaxes(0, 1)
    path = write_tiff(tmp_path / "a.tif", stored, metadata={"axes": axes}, photometric="minisblack", **options)
    assert read_raw(path).n_channels == 2
    assert np.array_equal(read_image(path)[0], turned(voxels))
    with pytest.raises(FormatError, match=r"a\.tif: found 2 volumes in a label map, expected 1"):
        read_label(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "group4", "packbits"])
def test_compressions_that_tifffile_leaves_to_others(compression: str, tmp_path: Path) -> None:
    pixels = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((16, 16), np.uint8))
    picture = Image.fromarray(pixels if compression != "group4" else pixels > 0)
    pages = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    picture.save(tmp_path / "a.tif", compression=compression, save_all=True, append_images=pages[1:])
    expected = np.stack([np.asarray(page) for page in pages])
    label, _ = read_label(tmp_path / "a.tif")
    assert np.array_equal(label, turned(expected))


def test_zero_is_white(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", 255 - GREY, photometric="miniswhite")
    assert np.array_equal(read_image(path)[0], turned(GREY)[None, None])
    label, _ = read_label(path)
    assert np.array_equal(label, turned(255 - GREY)[None]), "a label is the number that is stored, however it is shown"


def test_pages_of_several_sizes_and_axes_that_are_not_known(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(GREY, metadata=None)
        writer.write(GREY[:2], metadata=None)
    with pytest.raises(FormatError, match=r"a\.tif: found 2 images of different size or kind \(\(3, 4\), \(2, 4\)\)"):
        read_image(tmp_path / "a.tif")
    path = write_tiff(tmp_path / "b.tif", np.zeros((2, 5, 3, 4), np.uint8), photometric="minisblack")
    with pytest.raises(FormatError, match=r"b\.tif: found the axes QQYX of \(2, 5, 3, 4\), expected rows and columns"):
        read_image(path)
    path = write_tiff(tmp_path / "c.tif", GREY.astype(np.complex64))
    with pytest.raises(FormatError, match=r"c\.tif: found voxels of type complex64, expected numbers"):
        read_image(path)


def test_every_cut_of_a_stack_is_noticed(tmp_path: Path) -> None:
    """Wherever a file ends, no slice and no spacing is lost without a word."""
    path = tmp_path / "a.tif"
    stream = io.BytesIO()
    tifffile.imwrite(stream, STACK, photometric="minisblack", metadata=None, compression="zlib")
    write_volume(tmp_path / "b.tif", turned(STACK), read_geometry(write_tiff(path, STACK, photometric="minisblack")))
    for data in (stream.getvalue(), (tmp_path / "b.tif").read_bytes()):
        for length in range(0, len(data) - 1, 7):
            path.write_bytes(data[:length])
            with pytest.raises(FormatError, match=f"^{path}: "):
                read_image(path)
