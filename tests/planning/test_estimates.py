"""Estimates: sizes and disk worked out by hand, and cases that deserve a look."""

from __future__ import annotations

import pytest
from fingerprints import Scan, make_channel_fingerprint, make_fingerprint

from autoseg.core.labels import LabelSpec
from autoseg.planning.choices import Choices
from autoseg.planning.estimates import estimate, find_spacing_outliers, shapes_on_grid
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan


def fingerprint_of(*scans: Scan, n_channels: int = 2) -> Fingerprint:
    return make_fingerprint(*scans, channels=(make_channel_fingerprint("MR"),) * n_channels)


def plan(fingerprint: Fingerprint, n_labels: int = 1, **choices: object) -> Plan:
    labels = LabelSpec(names=tuple(f"l{i}" for i in range(n_labels)), values=tuple(range(1, n_labels + 1)))
    return make_plan(fingerprint, labels, dataset="d", n_folds=5, choices=Choices(**choices))  # type: ignore[arg-type]


def test_sizes_and_disk_on_the_grid() -> None:
    fingerprint = fingerprint_of(((40, 64, 64), (1.0, 1.0, 1.0)), ((20, 64, 128), (2.0, 1.0, 1.0)))
    made = plan(fingerprint, spacing_mm=(1.0, 2.0, 1.0))
    assert made.axis_order == (1, 0, 2)
    full = made.configurations["3d_fullres"]
    assert shapes_on_grid(fingerprint.cases, made, full).tolist() == [[32, 40, 64], [32, 40, 128]]
    # In 2D the slices, here along y, keep their distance.
    assert shapes_on_grid(fingerprint.cases, made, made.configurations["2d"]).tolist() == [[64, 40, 64], [64, 40, 128]]
    taken = {of.configuration: of for of in estimate(fingerprint, made).configurations}["3d_fullres"]
    voxels = 32 * 40 * 64 + 32 * 40 * 128
    assert taken.disk_gib == pytest.approx((voxels * (2 * 2 + 1) + (40 * 64 * 64 + 20 * 64 * 128) / 8) / 2**30)
    assert (taken.largest_voxels, taken.largest_case, taken.median_voxels) == (32 * 40 * 128, "c1", voxels / 2)


def test_more_than_255_labels_take_two_bytes() -> None:
    fingerprint = fingerprint_of(((40, 64, 64), (1.0, 1.0, 1.0)), n_channels=1)
    few, many = (estimate(fingerprint, plan(fingerprint, n)).configurations[0].disk_gib for n in (255, 256))
    assert many == pytest.approx(few * (4 + 1 / 8) / (3 + 1 / 8))


def test_training_memory_is_within_the_plan_and_close_to_it() -> None:
    fingerprint = fingerprint_of(*[((300, 400, 400), (1.0, 1.0, 1.0))] * 20)
    for gib in (8.0, 40.0):
        for of in estimate(fingerprint, plan(fingerprint, gpu_memory_gib=gib)).configurations:
            assert 0.7 * gib < of.training_memory_gib <= 1.05 * gib


def test_a_case_whose_voxels_multiply_is_warned_of() -> None:
    usual = [((60, 100, 100), (1.0, 1.0, 1.0))] * 9
    # 100 mm at 8 mm instead of 1 mm: 8 times the voxels is still in order, 8.3 is not.
    fine = fingerprint_of(*usual, ((10, 100, 100), (8.0, 1.0, 1.0)))
    assert not [p for p in estimate(fine, plan(fine)).warnings if "multiplies" in p.kind]
    coarse = fingerprint_of(*usual, ((10, 100, 100), (8.3, 1.0, 1.0)))
    (problem,) = [p for p in estimate(coarse, plan(coarse)).warnings if "multiplies" in p.kind]
    assert problem.case == "c9"
    assert problem.found == "10 x 100 x 100 voxels that become 83 x 100 x 100, 8.3 times more"


def test_outliers_stand_apart_from_the_spread() -> None:
    alike = [((9, 9, 9), (1.0, 1.0, 1.0))] * 9
    assert find_spacing_outliers(fingerprint_of(*alike, ((9, 9, 9), (1.9, 1.0, 1.0))).cases) == []
    (problem,) = find_spacing_outliers(fingerprint_of(*alike, ((9, 9, 9), (1.0, 1.0, 0.4))).cases)
    assert problem.case == "c9"
    assert problem.found == "1 x 1 x 0.4 mm (z, y, x)"
    mixed = [((9, 9, 9), (z, 1.0, 1.0)) for z in (0.7, 0.8, 1.0, 1.25, 2.0, 2.5, 3.0, 5.0)]
    assert find_spacing_outliers(fingerprint_of(*mixed).cases) == []
    (problem,) = find_spacing_outliers(fingerprint_of(*mixed, ((9, 9, 9), (100.0, 1.0, 1.0))).cases)
    assert problem.case == "c8"
