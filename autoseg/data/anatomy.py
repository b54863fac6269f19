"""A random abdomen as closed formulas in millimetres, for the phantom.

An anatomy is a set of (super)ellipsoids and tubes, placed at random about their usual positions, in a body that is
turned, scaled and smoothly bent. A formula is below zero inside its structure. Because nothing is stored on a grid, the
same anatomy can be sampled with any voxel size.

Points are (3, ...) arrays of (z, y, x) in millimetres: z grows to superior, y to anterior, x to the patient's right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

LESION_FRACTION = 0.85

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blob:
    """A turned superellipsoid. An infinite radius makes it a cylinder.

    Attributes:
        centre_mm, radii_mm: (3,) float32, before the rotation.
        rotation: (3, 3) float32, from body axes to the blob's own axes.
        exponent: 2 is an ellipsoid; more is boxier.
        hu: intensity.
    """

    centre_mm: FloatArray
    radii_mm: FloatArray
    rotation: FloatArray
    exponent: float
    hu: float

    def level(self, points: FloatArray) -> FloatArray:
        """Below zero inside; its size never exceeds the distance to the surface in mm."""
        local = points - self.centre_mm.reshape(3, *[1] * (points.ndim - 1))
        local = np.tensordot(self.rotation, local, 1) / self.radii_mm.reshape(3, *[1] * (points.ndim - 1))
        if self.exponent == 2:
            radius = np.sqrt(np.einsum("i...,i...->...", local, local))
        else:
            radius = (np.abs(local) ** np.float32(self.exponent)).sum(0) ** np.float32(1 / self.exponent)
        return (radius - 1) * self.radii_mm.min()


@dataclass(frozen=True, kw_only=True, eq=False)
class Waves:
    """A smooth random field: a sum of sines.

    Attributes:
        vectors: (N, 3) float32, radian per mm.
        phases: (N,) float32.
        amplitudes: (N, C) float32, in the unit of the field.
    """

    vectors: FloatArray
    phases: FloatArray
    amplitudes: FloatArray

    def at(self, points: FloatArray) -> FloatArray:
        """(3, ...) points to (C, ...) values."""
        phases = self.phases.reshape(-1, *[1] * (points.ndim - 1))
        return np.tensordot(self.amplitudes.T, np.sin(np.tensordot(self.vectors, points, 1) + phases), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """One patient.

    Attributes:
        turn: (3, 3) float32 rotation of the body.
        scale: of the body.
        shift_mm: (3,) float32, of the body in the field of view.
        warp: smooth bending, 3 components in mm.
        texture: 1 component in HU.
        noise_hu: standard deviation of the noise.
        fat_mm, muscle_mm: thickness of the rim of fat and of the wall of muscle.
        rib_phase: where the ribs begin, in rib distances.
        has_table: whether the patient lies on a table.
        blobs: everything else, by name.
        bowel: loops of bowel.
        lesion: in the liver; None where there is none.
    """

    turn: FloatArray
    scale: float
    shift_mm: FloatArray
    warp: Waves
    texture: Waves
    noise_hu: float
    fat_mm: float
    muscle_mm: float
    rib_phase: float
    has_table: bool
    blobs: dict[str, Blob]
    bowel: tuple[Blob, ...]
    lesion: Blob | None

    def body(self, points: FloatArray) -> FloatArray:
        """The skin."""
        return self.blobs["body"].level(points)

    def cavity(self, points: FloatArray) -> FloatArray:
        """Inside of the wall of muscle."""
        return self.body(points) + np.float32(self.fat_mm + self.muscle_mm)

    def below_diaphragm(self, points: FloatArray) -> FloatArray:
        """The part of the cavity that belongs to the abdomen."""
        domes = np.minimum(self.blobs["right dome"].level(points), self.blobs["left dome"].level(points))
        return np.maximum(domes + 2, self.cavity(points) + 1)

    def liver(self, points: FloatArray, limits: FloatArray) -> FloatArray:
        """Two lobes grown together, hollowed by the right kidney and the bowel side; `limits` is `below_diaphragm`."""
        right, left = self.blobs["right lobe"].level(points), self.blobs["left lobe"].level(points)
        # A rounded minimum: the lobes meet without a crease. It is lower than both, by 3 mm at most.
        blend = np.maximum(12 - np.abs(right - left), 0)
        lobes = np.minimum(right, left) - blend * blend / 48
        hollow = np.minimum(self.blobs["right kidney"].level(points) - 4, self.blobs["visceral face"].level(points))
        return np.maximum(np.maximum(lobes, -hollow), limits)

    def kidneys(self, points: FloatArray, limits: FloatArray) -> FloatArray:
        """Both, each without the fat of its sinus; `limits` is `below_diaphragm`."""
        sides = [
            np.maximum(self.blobs[f"{side} kidney"].level(points), -self.blobs[f"{side} sinus"].level(points))
            for side in ("right", "left")
        ]
        return np.maximum(np.minimum(*sides), limits)


# Usual place and size of everything: centre and radii in mm as (z, y, x), turn about (z, y, x) in degrees, exponent,
# range of intensities in HU. Organs come from wide, overlapping ranges, as if some patients had been given contrast.
_INF = float("inf")
_USUAL: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float], float, tuple[float, float]]] = {
    "body": ((0, 0, 0), (_INF, 72, 98), (0, 0, 0), 2.4, (-115, -90)),
    "right dome": ((-32, 12, 38), (88, 96, 72), (0, 0, 0), 2, (0, 0)),
    "left dome": ((-32, 12, -40), (80, 96, 70), (0, 0, 0), 2, (0, 0)),
    "heart": ((78, 16, -16), (34, 32, 42), (20, 0, 15), 2, (60, 130)),
    "mediastinum": ((0, -22, 0), (_INF, 34, 24), (0, 0, 0), 2, (10, 40)),
    "vertebra": ((0, -44, 0), (_INF, 14, 18), (0, 0, 0), 2.4, (200, 320)),
    "arch": ((0, -62, 0), (_INF, 11, 13), (0, 0, 0), 2, (300, 420)),
    "canal": ((0, -61, 0), (_INF, 7, 8), (0, 0, 0), 2, (15, 40)),
    "right back": ((0, -57, 27), (_INF, 11, 19), (0, 0, 0), 2.4, (50, 70)),
    "left back": ((0, -57, -27), (_INF, 11, 19), (0, 0, 0), 2.4, (50, 70)),
    "right psoas": ((-60, -38, 27), (45, 11, 11), (0, 0, 0), 2, (50, 70)),
    "left psoas": ((-60, -38, -27), (45, 11, 11), (0, 0, 0), 2, (50, 70)),
    "stomach": ((14, 22, -40), (34, 24, 25), (25, 0, 20), 2, (15, 100)),
    "pancreas": ((-6, 2, -8), (9, 8, 36), (-20, 12, 0), 2.2, (75, 120)),
    "vena cava": ((0, -20, 15), (_INF, 8, 9), (0, 0, 0), 2, (85, 160)),
    "portal vein": ((8, 4, 26), (6, 6, 30), (25, 20, 0), 2, (120, 165)),
    "gallbladder": ((-20, 28, 36), (17, 9, 9), (0, 0, 15), 2, (0, 20)),
    "right lobe": ((8, 2, 46), (50, 52, 44), (0, 10, 0), 2.2, (80, 130)),
    "left lobe": ((20, 28, 2), (27, 25, 52), (8, 10, 0), 2, (0, 0)),
    "visceral face": ((-36, -4, -8), (52, 34, 38), (0, 20, 0), 2, (0, 0)),
    "spleen": ((16, -18, -56), (38, 34, 19), (-20, 8, 0), 2.2, (80, 140)),
    "right kidney": ((-26, -30, 46), (32, 16, 18), (20, -8, 8), 2, (95, 170)),
    "right sinus": ((-26, -24, 33), (12, 6, 9), (20, -8, 8), 2, (-60, 20)),
    "left kidney": ((-28, -30, -41), (33, 16, 18), (-20, 8, 8), 2, (95, 170)),
    "left sinus": ((-28, -24, -28), (12, 6, 9), (-20, 8, 8), 2, (-60, 20)),
    "aorta": ((0, -20, -7), (_INF, 7.5, 7.5), (0, 0, 0), 2, (90, 180)),
}
# Parts that move together: the sinus with its kidney; the wall, the spine and what lies beside it stay in place.
_FOLLOWS = {"right sinus": "right kidney", "left sinus": "left kidney", "left lobe": "right lobe"}
_STEADY = {"body", "right dome", "left dome", "mediastinum", "vertebra", "arch", "canal", "right back", "left back"}


def _draw_waves(
    rng: np.random.Generator, *, lengths_mm: tuple[float, float], n: int, n_components: int, amplitude: float
) -> Waves:
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = directions * (2 * np.pi / rng.uniform(*lengths_mm, size=(n, 1)))
    return Waves(
        vectors=vectors.astype(np.float32),
        phases=rng.uniform(0, 2 * np.pi, n).astype(np.float32),
        amplitudes=rng.normal(0, amplitude / np.sqrt(n), (n, n_components)).astype(np.float32),
    )


def _blob(
    centre_mm: NDArray, radii_mm: NDArray, turn_degrees: NDArray, *, exponent: float = 2.0, hu: float = 0.0
) -> Blob:
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("xyz", turn_degrees, degrees=True).as_matrix()
    return Blob(
        centre_mm=centre_mm.astype(np.float32),
        radii_mm=radii_mm.astype(np.float32),
        rotation=turn.T.astype(np.float32),
        exponent=exponent,
        hu=hu,
    )


def _draw_blobs(rng: np.random.Generator) -> dict[str, Blob]:
    moves: dict[str, tuple[NDArray, float]] = {}
    blobs = {}
    order = sorted(_USUAL, key=lambda name: name in _FOLLOWS)
    for name in order:
        centre, radii, turn, exponent, hu_range = _USUAL[name]
        looseness = 0.25 if name in _STEADY else 1.0
        shift, scale = rng.normal(0, 3.0, 3) * looseness, float(np.exp(rng.normal(0, 0.07) * looseness))
        if name in _FOLLOWS:
            shift, scale = moves[_FOLLOWS[name]]
        moves[name] = shift, scale
        stretch = np.exp(rng.normal(0, 0.05, 3) * looseness)
        tilt = rng.normal(0, 6.0, 3) * looseness
        if np.isinf(radii[0]):
            tilt = tilt * 0.3
        blobs[name] = _blob(
            np.add(centre, shift),
            np.multiply(radii, scale * stretch),
            np.add(turn, tilt),
            exponent=exponent,
            hu=float(rng.uniform(*hu_range)),
        )
    return blobs


def _draw_bowel(rng: np.random.Generator) -> tuple[Blob, ...]:
    loops = []
    for _ in range(12):
        centre = rng.uniform((-70, -14, -62), (-12, 44, 58))
        hu = float(rng.uniform(10, 110)) if rng.random() < 0.75 else -700.0
        loops.append(_blob(centre, rng.uniform(8, 15, 3) * (1, 1, 1.6), rng.uniform(-40, 40, 3), hu=hu))
    return tuple(loops)


def _draw_lesion(rng: np.random.Generator, anatomy: Anatomy) -> Blob | None:
    """A lesion of 14 to 30 mm that lies wholly in the liver, or none."""
    wanted, diameter = rng.random() < LESION_FRACTION, rng.uniform(14, 30)
    candidates = rng.uniform((-40, -45, -25), (55, 50, 85), (400, 3)).T.astype(np.float32)
    stretch, hu_drop = rng.uniform(0.85, 1.0, 3), rng.uniform(35, 70)
    depth = -anatomy.liver(candidates, anatomy.below_diaphragm(candidates))
    fitting = np.flatnonzero(depth > diameter / 2 + 3)
    if not wanted or not fitting.size:
        return None
    hu = anatomy.blobs["right lobe"].hu - float(hu_drop)
    return _blob(candidates[:, fitting[0]], diameter / 2 * stretch / stretch.max(), np.zeros(3), hu=hu)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One random patient."""
    from scipy.spatial.transform import Rotation

    bend = _draw_waves(rng, lengths_mm=(70, 160), n=6, n_components=3, amplitude=4.5)
    ripple = _draw_waves(rng, lengths_mm=(32, 55), n=6, n_components=3, amplitude=1.5)
    warp = Waves(
        vectors=np.concatenate([bend.vectors, ripple.vectors]),
        phases=np.concatenate([bend.phases, ripple.phases]),
        amplitudes=np.concatenate([bend.amplitudes, ripple.amplitudes]),
    )
    turn = Rotation.from_euler("xyz", rng.uniform((-8, -4, -4), (8, 4, 4)), degrees=True).as_matrix()
    anatomy = Anatomy(
        turn=turn.astype(np.float32),
        scale=float(rng.uniform(0.9, 1.07)),
        shift_mm=rng.uniform((-6, -6, -5), (6, 6, 5)).astype(np.float32),
        warp=warp,
        texture=_draw_waves(rng, lengths_mm=(12, 45), n=10, n_components=1, amplitude=9.0),
        noise_hu=float(rng.uniform(10, 18)),
        fat_mm=float(rng.uniform(5, 13)),
        muscle_mm=float(rng.uniform(8, 11)),
        rib_phase=float(rng.random()),
        has_table=bool(rng.random() < 0.7),
        blobs=_draw_blobs(rng),
        bowel=_draw_bowel(rng),
        lesion=None,
    )
    return replace(anatomy, lesion=_draw_lesion(rng, anatomy))
