"""Generated data that looks like abdominal CT: for the demo and for tests, which need real files and a known answer.

Liver, spleen, kidneys and aorta overlap in intensity with each other and with structures that carry no label (vena
cava, stomach, bowel, pancreas, heart), so a threshold does not find them; place and shape do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError
from autoseg.core.geometry import make_geometry
from autoseg.core.serialize import atomic_path, write_json
from autoseg.data.anatomy import Anatomy, FloatArray, draw_anatomy
from autoseg.data.io import write_volume

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "aorta": 4, "lesion": 5}
AIR_HU = -1000.0


class _Canvas:
    """An image and its label map, painted structure by structure; what comes later lies on top."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.image = np.full(shape, AIR_HU, np.float32)
        self.label = np.zeros(shape, np.uint8)

    def paint(self, level: FloatArray, hu: float | FloatArray, label: int = 0) -> None:
        """Paints where `level` (Z, Y, X) is below zero, `hu` in the image and `label` in the label map.

        A voxel that the surface cuts is mixed in the image: the level changes across one voxel by the sum of its
        steps along the axes, so the share that lies inside follows from the level at the centre.
        """
        change = np.full_like(level, 1e-3)
        for axis in range(3):
            if level.shape[axis] > 1:
                change += np.abs(np.gradient(level, axis=axis))
        share = np.clip(0.5 - level / change, 0, 1)
        self.image += share * (hu - self.image)
        self.label[level < 0] = label


def _paint_frame(canvas: _Canvas, anatomy: Anatomy, points: FloatArray, texture: FloatArray) -> None:
    """Fat, muscle, ribs, lungs, heart and spine."""
    blobs, body, cavity = anatomy.blobs, anatomy.body(points), anatomy.cavity(points)
    canvas.paint(body, blobs["body"].hu + 0.5 * texture)
    wall = body + np.float32(anatomy.fat_mm)
    canvas.paint(wall, 58 + texture)
    # Ribs fall towards the front and end before the midline; below the chest there are none.
    z, y, x = points
    place = (z + 0.7 * y) / 26 + anatomy.rib_phase
    gap = np.abs(place - np.floor(place) - 0.5) * 26 - 4.5
    middle = np.abs(wall + anatomy.muscle_mm / 2) - 3
    ends = np.maximum(-12 - z - 0.3 * y, y - 25 - 0.5 * z)
    canvas.paint(np.maximum(np.maximum(gap, middle), np.maximum(ends, 14 - np.abs(x))), 330 + texture)
    canvas.paint(cavity, -100 + texture)

    centre = blobs["mediastinum"].level(points)
    above = np.maximum(-np.minimum(blobs["right dome"].level(points), blobs["left dome"].level(points)), cavity)
    canvas.paint(above, 25 + texture)
    canvas.paint(np.maximum(above + 2, -centre), -850 + 3 * texture)
    canvas.paint(np.maximum(blobs["heart"].level(points), above), blobs["heart"].hu + texture)

    for name in ("right back", "left back", "right psoas", "left psoas", "arch"):
        canvas.paint(blobs[name].level(points), blobs[name].hu + texture)
    canvas.paint(blobs["canal"].level(points), blobs["canal"].hu)
    # Vertebrae: a hard shell, softer inside, with a disc every 28 mm.
    bone, height = blobs["vertebra"].level(points), z / 28 + anatomy.rib_phase
    disc = np.abs(height - np.floor(height) - 0.5) * 28 - 3
    canvas.paint(bone, blobs["vertebra"].hu + 150 + texture)
    canvas.paint(bone + 3, blobs["vertebra"].hu + 2 * texture)
    canvas.paint(np.maximum(bone, disc), 90 + texture)


def _paint_organs(canvas: _Canvas, anatomy: Anatomy, points: FloatArray, texture: FloatArray) -> None:
    """What lies in the abdomen; only here are labels given."""
    blobs, limits = anatomy.blobs, anatomy.below_diaphragm(points)

    def paint(name: str, level: FloatArray, label: str = "background") -> None:
        canvas.paint(level, blobs[name].hu + texture, LABELS[label])

    for loop in anatomy.bowel:
        level = np.maximum(loop.level(points), limits)
        canvas.paint(level, 45 + texture)
        canvas.paint(level + 2, loop.hu + texture)
    stomach = np.maximum(blobs["stomach"].level(points), limits)
    canvas.paint(stomach, 65 + texture)
    canvas.paint(stomach + 3, blobs["stomach"].hu + texture)
    canvas.paint(np.maximum(stomach + 3, 34 - points[1]), -900.0)
    paint("pancreas", np.maximum(blobs["pancreas"].level(points), limits))
    paint("vena cava", blobs["vena cava"].level(points))

    liver = anatomy.liver(points, limits)
    paint("right lobe", liver, "liver")
    canvas.paint(np.maximum(blobs["portal vein"].level(points), liver + 3), blobs["portal vein"].hu, LABELS["liver"])
    if anatomy.lesion is not None:
        lesion = np.maximum(anatomy.lesion.level(points), liver)
        canvas.paint(lesion, anatomy.lesion.hu + texture, LABELS["lesion"])
    gallbladder = np.maximum(blobs["gallbladder"].level(points), limits)
    if anatomy.lesion is not None:
        gallbladder = np.maximum(gallbladder, 3 - anatomy.lesion.level(points))
    paint("gallbladder", gallbladder)

    kidneys = anatomy.kidneys(points, limits)
    paint("left kidney", kidneys, "kidneys")
    canvas.paint(kidneys + 5, 0.75 * blobs["left kidney"].hu + texture, LABELS["kidneys"])
    hollow = np.maximum(4 - blobs["left kidney"].level(points), limits)
    paint("spleen", np.maximum(blobs["spleen"].level(points), hollow), "spleen")
    paint("aorta", blobs["aorta"].level(points), "aorta")


def make_phantom(
    *, rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One patient, lying about the middle of the volume.

    The patient is drawn before the grid is looked at: equal generators give the same anatomy on every grid, but for
    the noise. About 130 x 200 x 220 mm are needed to see all of it.

    Args:
        rng: the source of all randomness.
        shape: (Z, Y, X).
        spacing_mm: (z, y, x).

    Returns:
        The image (Z, Y, X), float32, in Hounsfield units, and its label map (Z, Y, X), uint8, with the values of
        `LABELS`; both in RAS+ orientation.
    """
    from scipy.ndimage import gaussian_filter

    anatomy = draw_anatomy(rng)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    world = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    shift_mm = anatomy.shift_mm.reshape(3, 1, 1, 1)
    points = (np.tensordot(anatomy.turn.T, world - shift_mm, 1) / anatomy.scale).astype(np.float32)
    points += anatomy.warp.at(points)
    texture = anatomy.texture.at(points)[0]

    canvas = _Canvas(shape)
    if anatomy.has_table:
        sag = -88 + anatomy.shift_mm[1] + world[2] ** 2 / 900
        canvas.paint(np.maximum(np.abs(world[1] - sag) - 2.5, np.abs(world[2]) - 85), -250.0)
    _paint_frame(canvas, anatomy, points, texture)
    _paint_organs(canvas, anatomy, points, texture)

    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0, 0.6, 0.6))
    image = canvas.image + noise * np.float32(anatomy.noise_hu / max(noise.std(), 1e-3))
    return np.clip(image, -1024, 3071), canvas.label


def draw_grid(
    rng: np.random.Generator, *, coarseness: float = 1.0
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape and spacing of a scan, different from one to the next as in a clinic.

    Args:
        rng: the source of all randomness.
        coarseness: factor on the size of a voxel. At 1 a case has about 26 x 64 x 72 voxels; at 2 an eighth of that.

    Returns:
        The shape (Z, Y, X) and the spacing in mm (z, y, x).
    """
    field_mm = rng.uniform((124, 188, 212), (136, 204, 226))
    in_plane = rng.uniform(2.6, 3.4)
    spacing = np.round(np.array([rng.uniform(4, 6), in_plane, in_plane]) * coarseness, 3)
    z, y, x = (int(n) for n in np.maximum(np.round(field_mm / spacing), 1))
    return (z, y, x), (float(spacing[0]), float(spacing[1]), float(spacing[2]))


def write_phantom_dataset(
    folder: Path, *, n_train: int = 24, n_test: int = 6, seed: int = 0, coarseness: float = 1.0
) -> Path:
    """Writes a dataset in nnU-Net's raw layout: `dataset.json`, `imagesTr`, `labelsTr`, `imagesTs`, `labelsTs`.

    A case depends on the seed and its own number only, so a smaller dataset is the beginning of a larger one.

    Args:
        folder: where to; it must be absent or empty. It appears when all is written.
        n_train: cases to train on.
        n_test: cases to test on.
        seed: of all randomness.
        coarseness: factor on the size of a voxel; more than 1 makes small volumes for tests.

    Returns:
        The folder, as an absolute path.

    Raises:
        DatasetError: the folder holds something.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder}: holds something already; name a new folder for the phantom dataset, or empty it")
    with atomic_path(folder) as temporary:
        for part, n_cases in (("Tr", n_train), ("Ts", n_test)):
            (temporary / f"images{part}").mkdir(parents=True)
            (temporary / f"labels{part}").mkdir()
            for index in range(n_cases):
                _write_case(temporary, part, index, np.random.default_rng([seed, part == "Ts", index]), coarseness)
        description = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": n_train,
            "file_ending": ".nii.gz",
        }
        write_json(temporary / "dataset.json", description)
    return folder


def _write_case(folder: Path, part: str, index: int, rng: np.random.Generator, coarseness: float) -> None:
    shape, spacing_mm = draw_grid(rng, coarseness=coarseness)
    origin_mm = rng.uniform(-250, 250, 3)
    as_lps = bool(rng.random() < 0.7)
    image, label = make_phantom(rng=rng, shape=shape, spacing_mm=spacing_mm)

    # Scanners write both RAS and LPS; whoever reads must look at the affine to know left from right.
    signs = np.array([-1, -1, 1] if as_lps else [1, 1, 1])
    spacing_xyz, shape_xyz = np.array(spacing_mm[::-1]), np.array(shape[::-1])
    affine = np.diag([*(signs * spacing_xyz), 1.0])
    affine[:3, 3] = origin_mm + np.where(signs < 0, (shape_xyz - 1) * spacing_xyz, 0)
    geometry = make_geometry(shape_xyz.tolist(), affine, header_spacing_mm=spacing_xyz.tolist())
    case = f"phantom_{'test_' if part == 'Ts' else ''}{index:03d}"
    write_volume(folder / f"images{part}" / f"{case}_0000.nii.gz", np.round(image).astype(np.int16), geometry)
    write_volume(folder / f"labels{part}" / f"{case}.nii.gz", label, geometry)
