"""Images unlike those in training are told in words; those like them are not remarked on."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fingerprints import make_fingerprint
from numpy.typing import NDArray

from autoseg.core.geometry import Geometry
from autoseg.core.labels import LabelSpec
from autoseg.inference.compare import find_differences
from autoseg.planning.fingerprint import ChannelFingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan

SHAPE = (40, 120, 120)
SPACING_MM = (3.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """For CTs of the liver with slices of 3 mm."""
    channel = ChannelFingerprint(
        name="CT", mean=100, std=40, minimum=-900, maximum=1200, median=100, percentile_00_5=-20, percentile_99_5=220
    )
    fingerprint = make_fingerprint(*[(SHAPE, SPACING_MM)] * 20, channels=(channel,), label_volumes_ml=(1500.0,))
    return make_plan(fingerprint, LabelSpec(names=("liver",), values=(1,)), dataset="livers", n_folds=5)


def make_image(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Air, a soft body and some bone."""
    image = np.full(shape, -1000.0, np.float32)
    image[..., shape[-1] // 4 :] = 60
    image[..., -4:] = 900
    return image[None]


def differences(
    plan: Plan,
    image: NDArray[np.float32],
    *,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    name: str = "3d_fullres",
) -> list[str]:
    affine = tuple(tuple(row) for row in np.diag([*spacing_mm[::-1], 1.0]).tolist())
    shape = (image.shape[1], image.shape[2], image.shape[3])
    geometry = Geometry(shape=shape, spacing_mm=spacing_mm, affine=affine, file_axcodes=("R", "A", "S"))
    return find_differences(image, geometry, plan, plan.configuration(name))


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_what_looks_like_the_training_is_not_remarked_on(plan: Plan, name: str) -> None:
    assert differences(plan, make_image(), name=name) == []
    assert differences(plan, make_image((90, 200, 200)), spacing_mm=(1.0, 0.6, 0.6), name=name) == []


def test_a_header_in_metres(plan: Plan) -> None:
    (text,) = differences(plan, make_image(), spacing_mm=(0.003, 0.001, 0.001))
    assert re.search(r"0\.003 x 0\.001 x 0\.001 mm.*was trained on 3 x 1 x 1 mm; is its header", text)


def test_a_coarser_grid_of_the_network_does_not_matter(plan: Plan) -> None:
    full = plan.configuration("3d_fullres")
    coarse = dataclasses.replace(full, name="3d_quick", spacing_mm=(4.0, 4.0, 4.0))
    with_coarse = dataclasses.replace(plan, configurations={**plan.configurations, "3d_quick": coarse})
    assert differences(with_coarse, make_image(), name="3d_quick") == []
    older = dataclasses.replace(with_coarse, spacing_range_mm=None)
    (text,) = differences(older, make_image(), name="3d_quick")
    assert "works at 4 x 4 x 4 mm" in text


def test_what_the_training_had_is_familiar_however_far_from_the_median(plan: Plan) -> None:
    ranged = dataclasses.replace(plan, spacing_range_mm=((0.7, 0.5, 0.5), (8.0, 1.0, 1.0)))
    assert differences(ranged, make_image(), spacing_mm=(0.6, 0.4, 0.4)) == []
    assert differences(ranged, make_image(), spacing_mm=(12.0, 1.0, 1.0)) == []
    (text,) = differences(ranged, make_image(), spacing_mm=(30.0, 1.0, 1.0))
    assert "was trained on 0.7 x 0.5 x 0.5 to 8 x 1 x 1 mm" in text


def test_the_distance_of_slices_does_not_matter_in_2d(plan: Plan) -> None:
    assert differences(plan, make_image(), spacing_mm=(20.0, 1.0, 1.0), name="2d") == []
    assert len(differences(plan, make_image(), spacing_mm=(20.0, 1.0, 1.0))) == 1
    assert len(differences(plan, make_image(), spacing_mm=(3.0, 5.0, 1.0), name="2d")) == 1


def test_a_single_slice_where_volumes_were_learned(plan: Plan) -> None:
    (text,) = differences(plan, make_image((1, 120, 120)))
    assert "trained on volumes" in text
    assert differences(plan, make_image((1, 120, 120)), name="2d") == []


@pytest.mark.parametrize(("factor", "offset"), [(1 / 2000, 0.5), (1.0, 3000.0), (1000.0, 0.0)])
def test_a_ct_that_is_not_in_hounsfield_units(plan: Plan, factor: float, offset: float) -> None:
    (text,) = differences(plan, (make_image() * factor + offset).astype(np.float32))
    assert re.search(r"CT goes from .* from -20 to 220; is it in Hounsfield units\?", text)


def test_other_channels_may_have_any_scale_but_not_one_value(plan: Plan) -> None:
    as_mr = dataclasses.replace(
        plan, normalization=(dataclasses.replace(plan.normalization[0], channel="T1", scheme="zscore"),)
    )
    assert differences(as_mr, (make_image() / 2000).astype(np.float32)) == []
    assert differences(as_mr, np.full_like(make_image(), 7)) == ["all voxels of T1 are 7"]
