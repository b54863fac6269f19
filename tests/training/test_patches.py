"""Which patches are drawn, and that they are read as they are."""

from __future__ import annotations

import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from autoseg.core.geometry import Box, Geometry
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.store import PreprocessedCase, write_case
from autoseg.training.augment import AugmentConfig
from autoseg.training.patches import Batch, PatchSampler, read_ahead, read_region

SHAPE = (10, 30, 20)


@pytest.fixture
def case(tmp_path: Path) -> PreprocessedCase:
    """Every voxel holds its own index, so that a patch says where it is from; one small class in a corner."""
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(1, *SHAPE) / 8
    label = np.zeros(SHAPE, np.uint8)
    label[8:, 25:28, 3] = 1
    record = CaseRecord(
        geometry=Geometry(
            shape=SHAPE, spacing_mm=(1, 1, 1), affine=((1.0, 0, 0, 0),) * 4, file_axcodes=("R", "A", "S")
        ),
        crop=Box(start=(0, 0, 0), stop=SHAPE),
        axis_order=(0, 1, 2),
        shape=SHAPE,
        spacing_mm=(1, 1, 1),
        nearest_axis=None,
    )
    write_case(tmp_path / "case", image, label, key="k", record=record, n_classes=2)
    return PreprocessedCase(tmp_path / "case")


def make_sampler(case: PreprocessedCase, *, patch: tuple[int, ...], fraction: float = 0.0) -> PatchSampler:
    return PatchSampler([case], patch_size=patch, batch_size=3, foreground_fraction=fraction, seed=0)


def test_patches_lie_inside_and_reach_every_place(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(4, 8, 20))
    starts = set()
    for number in range(200):
        batch = sampler.batch(number)
        assert batch.images.shape == (3, 1, 4, 8, 20)
        for patch in batch.images[:, 0].numpy():
            z, y, x = np.unravel_index(round(float(patch[0, 0, 0]) * 8), SHAPE)
            np.testing.assert_array_equal(patch, case.image[0, z : z + 4, y : y + 8, x : x + 20])
            starts.add((int(z), int(y), int(x)))
    assert {z for z, _, _ in starts} == set(range(7))
    assert {y for _, y, _ in starts} == set(range(23))
    assert {x for _, _, x in starts} == {0}


def test_a_batch_depends_on_its_number_alone(case: PreprocessedCase) -> None:
    first, again = make_sampler(case, patch=(4, 8, 8)), make_sampler(case, patch=(4, 8, 8))
    for number in (7, 3, 7):
        assert first.batch(number).images.equal(again.batch(number).images)
    assert not first.batch(1).images.equal(first.batch(2).images)


def test_the_last_third_of_a_batch_holds_foreground(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(2, 4, 4), fraction=1 / 3)
    found = np.array([[bool(c.any()) for c in sampler.batch(number).classes] for number in range(60)])
    assert found[:, 2].all()
    assert found[:, :2].mean() < 0.3


def test_a_case_smaller_than_the_patch_is_centred_and_padded(case: PreprocessedCase) -> None:
    patch = make_sampler(case, patch=(16, 30, 24)).batch(0).images[0, 0].numpy()
    np.testing.assert_array_equal(patch[3:13, :, 2:22], case.image[0])
    outside = patch.copy()
    outside[3:13, :, 2:22] = 0
    assert not outside.any()


def test_2d_patches_are_slices_along_the_first_axis(case: PreprocessedCase) -> None:
    batch = make_sampler(case, patch=(8, 8)).batch(0)
    assert batch.images.shape == (3, 1, 8, 8)
    assert batch.classes.shape == (3, 8, 8)
    patch = batch.images[0, 0].numpy()
    z, y, x = np.unravel_index(round(float(patch[0, 0]) * 8), SHAPE)
    np.testing.assert_array_equal(patch, case.image[0, z, y : y + 8, x : x + 8])


def test_what_is_read_for_augmentation_has_the_patch_at_its_centre(case: PreprocessedCase) -> None:
    patch = (4, 8, 8)
    turning = AugmentConfig(rotation_probability=1, scaling_probability=1)
    plain = make_sampler(case, patch=patch).batch(5)
    read = PatchSampler(
        [case], patch_size=patch, batch_size=3, foreground_fraction=0, seed=0, augmentation=turning
    ).batch(5)
    assert read.augmentation is not None
    margins = [(r - p) // 2 for r, p in zip(read.images.shape[2:], patch, strict=True)]
    assert max(margins) > 0
    z, y, x = (slice(m, m + p) for m, p in zip(margins, patch, strict=True))
    assert read.images[:, :, z, y, x].equal(plain.images)


def test_read_region_outside_is_zero() -> None:
    array = np.arange(24).reshape(2, 3, 4) + 1
    assert not read_region(array, (5, 0, 0), (2, 2, 2)).any()
    region = read_region(array, (-1, 1, 3), (2, 2, 3))
    assert region[1, 0, 0] == array[0, 1, 3]
    assert region[0].sum() == 0
    assert region[:, :, 1:].sum() == 0


def test_reading_ahead_keeps_the_order_and_surfaces_errors(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(4, 8, 8))
    batches = read_ahead(sampler.batch, count(), n_threads=3, depth=5)
    for number in range(10):
        assert next(batches).images.equal(sampler.batch(number).images)
    batches.close()

    def read(number: int) -> Batch:
        if number == 2:
            raise OSError("the disk is gone")
        return sampler.batch(number)

    failing = read_ahead(read, count(), n_threads=2, depth=3)
    next(failing)
    next(failing)
    with pytest.raises(OSError, match="the disk is gone"):
        next(failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("patches") and thread.is_alive()]
