"""The coarser grid for trainings that have time for small patches only."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
from fingerprints import make_channel_fingerprint

from autoseg.core.labels import LabelSpec
from autoseg.planning.checks import check_plan
from autoseg.planning.choices import Choices
from autoseg.planning.configurations import (
    MIN_QUICK_COMPONENT_VOXELS,
    MIN_QUICK_VOXELS,
    QUICK_COVERAGE,
    largest_voxel_ml,
    plan_quick,
    shown_part,
)
from autoseg.planning.fingerprint import CaseFingerprint, Fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.transfer import transfer_plan

LABELS = LabelSpec(names=("organ", "lesion"), values=(1, 2))


def fingerprint_of(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], *, lesions_ml: tuple[float, ...] = (50.0, 0.0)
) -> Fingerprint:
    """A CT case for each volume of the lesion, which some lack."""
    cases = tuple(
        CaseFingerprint(
            case=f"case_{index}",
            shape=shape,
            spacing_mm=spacing_mm,
            cropped_shape=shape,
            label_volumes_ml=(1000.0, lesion_ml),
        )
        for index, lesion_ml in enumerate(lesions_ml)
    )
    return Fingerprint(cases=cases, channels=(make_channel_fingerprint(),), median_cropped_fraction=1.0)


def coverage(patch_size: tuple[int, ...], shape: tuple[float, ...]) -> float:
    return prod(min(1.0, edge / size) for edge, size in zip(patch_size, shape, strict=True))


def plan_of(fingerprint: Fingerprint) -> Plan:
    return make_plan(fingerprint, LABELS, dataset="test", n_folds=5)


ABDOMEN = fingerprint_of((200, 512, 512), (3.0, 0.8, 0.8))
PATCH = (32, 64, 64)


def test_a_small_patch_shows_enough_of_a_case_on_the_quick_grid() -> None:
    plan = plan_of(ABDOMEN)
    full = plan.configuration("3d_fullres")
    assert coverage(PATCH, full.median_shape) < 0.003
    planned = plan_quick(plan, full, patch_size=PATCH, fingerprint=ABDOMEN)
    assert planned is not None
    quick, reasons = planned
    assert quick.name == "3d_quick"
    assert QUICK_COVERAGE <= coverage(PATCH, quick.median_shape) < 1.2 * QUICK_COVERAGE
    # The same scans: as many millimetres, fine axes coarsened first.
    for size, edge_mm, of_quick, quick_mm in zip(
        full.median_shape, full.spacing_mm, quick.median_shape, quick.spacing_mm, strict=True
    ):
        assert of_quick * quick_mm == pytest.approx(size * edge_mm, rel=0.02)
        assert quick_mm >= edge_mm
    assert max(quick.spacing_mm) == pytest.approx(min(quick.spacing_mm))
    (text,) = [reason.text for reason in reasons if reason.subject == "configurations.3d_quick.spacing_mm"]
    assert "32 x 64 x 64" in text
    assert "0.2%" in text
    check_plan(dataclasses.replace(plan, configurations={**plan.configurations, quick.name: quick}).signed())


def test_the_smallest_structure_keeps_voxels() -> None:
    tiny = fingerprint_of((200, 512, 512), (3.0, 0.8, 0.8), lesions_ml=(1.0, 0.9, 0.0, 1.5))
    plan = plan_of(tiny)
    planned = plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=tiny)
    assert planned is not None
    voxel_ml = prod(planned[0].spacing_mm) / 1000
    assert 0.9 < 1.0 / voxel_ml / MIN_QUICK_VOXELS < 1.2
    too_small = fingerprint_of((200, 512, 512), (3.0, 0.8, 0.8), lesions_ml=(0.1, 0.1))
    plan = plan_of(too_small)
    assert plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=too_small) is None


def test_each_of_many_lesions_keeps_voxels() -> None:
    def spacing_with(component_ml: float) -> tuple[float, ...]:
        cases = (dataclasses.replace(case, component_volumes_ml=(1000.0, component_ml)) for case in ABDOMEN.cases)
        many = dataclasses.replace(ABDOMEN, cases=tuple(cases))
        plan = plan_of(many)
        planned = plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=many)
        assert planned is not None
        return planned[0].spacing_mm

    assert prod(spacing_with(50.0)) > prod(spacing_with(0.5))
    assert 0.9 < 500 / prod(spacing_with(0.5)) / MIN_QUICK_COMPONENT_VOXELS < 1.2


def test_there_is_none_where_a_patch_shows_enough() -> None:
    small = fingerprint_of((60, 120, 120), (1.0, 1.0, 1.0))
    plan = plan_of(small)
    assert plan_quick(plan, plan.configuration("3d_fullres"), patch_size=(32, 64, 64), fingerprint=small) is None


def test_slices_get_coarser_too() -> None:
    slices = fingerprint_of((1, 2000, 2000), (1.0, 0.1, 0.1))
    plan = plan_of(slices)
    planned = plan_quick(plan, plan.configuration("2d"), patch_size=(256, 256), fingerprint=slices)
    assert planned is not None
    assert planned[0].name == "2d_quick"
    assert planned[0].spacing_mm[0] == planned[0].spacing_mm[1] > 0.15
    # As much of each edge as of a volume, not as much of the pixels.
    assert coverage((256, 256), planned[0].median_shape) == pytest.approx(QUICK_COVERAGE ** (2 / 3), rel=0.1)


def test_a_patch_shows_as_much_of_each_edge_in_slices_as_in_volumes() -> None:
    assert shown_part((30, 30, 30), (100.0, 100.0, 100.0)) == pytest.approx(0.027)
    assert shown_part((30, 30), (100.0, 100.0)) == pytest.approx(0.027)
    assert shown_part((200, 50, 50), (100.0, 100.0, 100.0)) == pytest.approx(0.25), "padding shows nothing"


def test_batches_of_slices_are_small_against_all_slices_not_against_all_volumes() -> None:
    volumes = fingerprint_of((100, 2000, 2000), (5.0, 0.1, 0.1))
    plan = plan_of(volumes)
    planned = plan_quick(plan, plan.configuration("2d"), patch_size=(256, 256), fingerprint=volumes)
    assert planned is not None
    assert planned[0].batch_size > 2


def test_a_label_of_few_cases_does_not_decide_the_grid_of_all() -> None:
    def spacing_with(n_tiny: int) -> tuple[float, ...]:
        cases = fingerprint_of((200, 512, 512), (3.0, 0.8, 0.8), lesions_ml=(0.5,) * n_tiny + (0.0,) * (100 - n_tiny))
        plan = plan_of(cases)
        planned = plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=cases)
        assert planned is not None
        return planned[0].spacing_mm

    assert spacing_with(0) == spacing_with(4) > spacing_with(5)
    only = fingerprint_of((200, 512, 512), (3.0, 0.8, 0.8), lesions_ml=(0.5,) * 4 + (0.0,) * 96)
    cases = (dataclasses.replace(case, label_volumes_ml=case.label_volumes_ml[1:]) for case in only.cases)
    assert largest_voxel_ml(dataclasses.replace(only, cases=tuple(cases))) == pytest.approx(0.005), (
        "there are no others"
    )


def test_without_labels_in_the_fingerprint_only_the_patch_counts() -> None:
    nothing = dataclasses.replace(
        ABDOMEN, cases=tuple(dataclasses.replace(case, label_volumes_ml=()) for case in ABDOMEN.cases)
    )
    plan = plan_of(ABDOMEN)
    full = plan.configuration("3d_fullres")
    with_labels, without = (plan_quick(plan, full, patch_size=PATCH, fingerprint=known) for known in (ABDOMEN, nothing))
    assert with_labels == without


def test_the_smallest_structure_keeps_voxels_in_slices_too() -> None:
    shape, spacing_mm = (1, 2000, 2000), (1.0, 0.1, 0.1)
    # 100 voxels of 0.144 mm.
    vessels = fingerprint_of(shape, spacing_mm, lesions_ml=(0.00207, 0.00207))
    plan = plan_of(vessels)
    full = plan.configuration("2d")
    planned = plan_quick(plan, full, patch_size=(256, 256), fingerprint=vessels)
    assert planned is not None
    assert 0.135 < planned[0].spacing_mm[0] <= 0.144
    thicker = dataclasses.replace(
        vessels, cases=tuple(dataclasses.replace(case, spacing_mm=(2.0, 0.1, 0.1)) for case in vessels.cases)
    )
    assert plan_quick(plan, full, patch_size=(256, 256), fingerprint=thicker) is None


def test_a_batch_size_that_the_user_has_set_is_kept() -> None:
    plan = make_plan(ABDOMEN, LABELS, dataset="test", n_folds=5, choices=Choices(batch_size=1))
    planned = plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=ABDOMEN)
    assert planned is not None
    assert planned[0].batch_size == 1
    (text,) = [reason.text for reason in planned[1] if reason.subject == "configurations.3d_quick.batch_size"]
    assert text == "set by user for 3d_fullres: 1"


def test_another_dataset_with_the_same_plan_does_not_have_it() -> None:
    plan = plan_of(ABDOMEN)
    planned = plan_quick(plan, plan.configuration("3d_fullres"), patch_size=PATCH, fingerprint=ABDOMEN)
    assert planned is not None
    with_quick = dataclasses.replace(plan, configurations={**plan.configurations, "3d_quick": planned[0]}).signed()
    like = transfer_plan(with_quick, ABDOMEN, LABELS, dataset="other", n_folds=5, name="test")
    assert set(like.configurations) == set(plan.configurations)
