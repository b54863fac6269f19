"""What is measured of a dataset, with answers worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError
from autoseg.core.geometry import make_geometry
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.load import LoadedCase
from autoseg.planning import fingerprint
from autoseg.planning.fingerprint import (
    Fingerprint,
    intensities_per_case,
    measure_case,
    summarise,
    typical_component,
)

LABELS = LabelSpec(names=("vessel", "organ"), values=(3, 117))
SHAPE = (6, 8, 10)


def load(image: NDArray, label: NDArray, *, name: str = "case") -> LoadedCase:
    spacing_xyz = (0.5, 1.0, 4.0)
    return LoadedCase(
        case=Case(id=name, group=name, images=(Path("image.nii.gz"),), label=Path("label.nii.gz")),
        image=image.astype(np.float32),
        label=label,
        values=frozenset(np.unique(label).tolist()),
        geometry=make_geometry(image.shape[:0:-1], np.diag([*spacing_xyz, 1]), header_spacing_mm=spacing_xyz),
    )


def make_case(name: str = "case", *, offset: float = 0.0) -> LoadedCase:
    """Two channels; the first is zero outside a box, the second everywhere; 12 and 4 labelled voxels."""
    image = np.zeros((2, *SHAPE))
    image[0, 1:5, 2:8, 3:7] = 1
    label = np.zeros(SHAPE, np.uint8)
    label[2, 3, 3:7] = 117
    label[3, 3:6, 3:7] = 3
    image[0][label == 3] = 10 + offset
    image[0][label == 117] = 20 + offset
    return load(image, label, name=name)


def test_geometry_of_a_case() -> None:
    measured = measure_case(make_case(), LABELS, n_intensities=5).fingerprint
    assert measured.case == "case"
    assert measured.shape == SHAPE
    assert measured.spacing_mm == (4.0, 1.0, 0.5)
    assert measured.cropped_shape == (4, 6, 4)
    # A voxel is 2 mm3.
    assert measured.label_volumes_ml == pytest.approx((12 * 0.002, 4 * 0.002))
    assert measured.component_volumes_ml == measured.label_volumes_ml


def test_specks_are_no_components() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[2:6, 2:6, 2:6] = mask[10:14, 10:14, 10:14] = mask[15:19, 2:6, 2:6] = True
    assert typical_component(mask) == 64
    mask[::9, ::9, 19] = True
    assert typical_component(mask) == 64, "nine specks are less than a tenth"
    assert typical_component(np.zeros((3, 3), bool)) == 0


def test_large_label_maps_are_looked_at_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.zeros((16, 16, 16), np.uint8)
    label[:4, :4, :4], label[8:, 8:, 8:] = 3, 3
    case = load(np.ones((1, 16, 16, 16), np.float32), label, name="case")
    exact = measure_case(case, LABELS, n_intensities=5).fingerprint.component_volumes_ml
    assert exact == pytest.approx(((4**3 + 8**3) / 2 * 0.002, 0))
    monkeypatch.setattr(fingerprint, "MAX_COMPONENT_VOXELS", 1000)
    assert measure_case(case, LABELS, n_intensities=5).fingerprint.component_volumes_ml == exact
    # Of a single slice none is left out.
    flat = load(np.ones((1, 1, 64, 64), np.float32), np.full((1, 64, 64), 3, np.uint8), name="flat")
    volumes = measure_case(flat, LABELS, n_intensities=5).fingerprint.component_volumes_ml
    assert volumes == pytest.approx((64**2 * 0.002, 0))


def test_every_foreground_voxel_is_drawn_equally_often() -> None:
    case = make_case()
    foreground = case.label > 0
    case.image[0][foreground] = np.arange(16)
    drawn = measure_case(case, LABELS, n_intensities=16_000).intensities[0]
    counts = np.bincount(drawn.astype(int), minlength=16)
    # A standard deviation is 31.
    assert counts.min() > 850
    assert counts.max() < 1150


def test_intensities_are_drawn_from_the_foreground_of_all_channels_at_once() -> None:
    case = make_case()
    case.image[1] = 2 * case.image[0] + 1
    drawn = measure_case(case, LABELS, n_intensities=4000).intensities
    assert drawn.shape == (2, 4000)
    assert set(np.unique(drawn[0])) == {10, 20}
    np.testing.assert_array_equal(drawn[1], 2 * drawn[0] + 1)
    # 12 of 16 voxels; within five standard errors.
    assert (drawn[0] == 10).mean() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 4000) ** 0.5)


def test_the_draw_depends_on_the_case_alone() -> None:
    first, again = (measure_case(make_case("a"), LABELS, n_intensities=50).intensities for _ in range(2))
    other = measure_case(make_case("b"), LABELS, n_intensities=50).intensities
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_case_counts_the_same_however_large_its_structures() -> None:
    small, large = make_case("small"), make_case("large", offset=90)
    label = large.label.copy()
    label[2:5] = 3
    image = np.full((2, *SHAPE), 100.0)
    large = dataclasses.replace(large, label=label, image=image.astype(np.float32))
    fingerprint = summarise([measure_case(case, LABELS, n_intensities=300) for case in (small, large)], ("CT", "T1"))
    first = fingerprint.channels[0]
    assert first.name == "CT"
    assert (first.minimum, first.maximum) == (10, 100)
    # The whole of the small one is 0 to 20, that of the large one 100 everywhere.
    assert (first.all_from, first.all_to) == (100, 20)
    # Half of the values are 100, the others 12.5 in the mean.
    assert first.mean == pytest.approx(56.25, abs=1)
    assert first.median in (20.0, 60.0, 100.0)
    assert fingerprint.median_cropped_fraction == pytest.approx((4 * 6 * 4 / 480 + 1) / 2)


def test_figures_equal_numpy_and_survive_json(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    measurements = []
    for index in range(4):
        image, label = rng.normal(50, 20, (2, *SHAPE)), rng.choice(np.array([0, 3, 117], np.uint8), SHAPE)
        measurements.append(measure_case(load(image, label, name=f"case{index}"), LABELS, n_intensities=500))
    fingerprint = summarise(measurements, ("CT", "T1"))
    pooled = np.concatenate([measurement.intensities for measurement in measurements], axis=1).astype(np.float64)
    for channel, values in zip(fingerprint.channels, pooled, strict=True):
        expected = (values.mean(), values.std(), values.min(), values.max(), *np.percentile(values, (50, 0.5, 99.5)))
        found = [channel.mean, channel.std, channel.minimum, channel.maximum]
        found += [channel.median, channel.percentile_00_5, channel.percentile_99_5]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    write_json(tmp_path / "fingerprint.json", fingerprint)
    assert read_json(tmp_path / "fingerprint.json", Fingerprint) == fingerprint


def test_case_without_foreground_adds_its_geometry_alone() -> None:
    empty = dataclasses.replace(make_case("empty"), label=np.zeros(SHAPE, np.uint8))
    measured = measure_case(empty, LABELS, n_intensities=10)
    assert measured.intensities.shape == (2, 0)
    assert measured.fingerprint.label_volumes_ml == (0, 0)
    fingerprint = summarise([measured, measure_case(make_case(), LABELS, n_intensities=10)], ("CT", "T1"))
    assert len(fingerprint.cases) == 2
    assert fingerprint.channels[0].minimum >= 10
    with pytest.raises(DatasetError, match="every voxel of every label map is background"):
        summarise([measured], ("CT", "T1"))


def test_image_of_zeros_is_not_cropped() -> None:
    case = make_case()
    measured = measure_case(dataclasses.replace(case, image=np.zeros_like(case.image)), LABELS, n_intensities=3)
    assert measured.fingerprint.cropped_shape == SHAPE


def test_number_of_intensities_is_bounded() -> None:
    assert intensities_per_case(1) == 2_000_000
    assert intensities_per_case(100) == 20_000
    assert intensities_per_case(10_000) == 2_000
