"""The plan of one dataset for another that is like it, or not."""

from __future__ import annotations

import dataclasses

import pytest
from fingerprints import make_channel_fingerprint, make_fingerprint

from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec
from autoseg.planning.checks import check_plan
from autoseg.planning.choices import Choices
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.transfer import transfer_plan

Triple = tuple[float, float, float]


def fingerprint_of(shape: tuple[int, int, int], spacing_mm: Triple, *, channel: str = "CT") -> Fingerprint:
    """Ten equal cases."""
    return make_fingerprint(*[(shape, spacing_mm)] * 10, channels=(make_channel_fingerprint(channel),))


def make_labels(n_labels: int = 1) -> LabelSpec:
    return LabelSpec(names=tuple(f"l{i}" for i in range(n_labels)), values=tuple(range(1, n_labels + 1)))


def make_source(shape: tuple[int, int, int], spacing_mm: Triple, **choices: object) -> Plan:
    made = fingerprint_of(shape, spacing_mm)
    return make_plan(made, make_labels(), dataset="source", n_folds=5, choices=Choices(**choices))  # type: ignore[arg-type]


def transfer(source: Plan, fingerprint: Fingerprint, n_labels: int = 1) -> Plan:
    made = transfer_plan(source, fingerprint, make_labels(n_labels), dataset="own", n_folds=3, name="source.json")
    check_plan(made)
    subjects = [reason.subject for reason in made.reasons]
    assert len(subjects) == len(set(subjects))
    return made


def reason(of: Plan, subject: str) -> str:
    (text,) = [reason.text for reason in of.reasons if reason.subject == subject]
    return text


def test_grid_patch_and_network_are_taken_and_sizes_and_intensities_are_ones_own() -> None:
    source = make_source((100, 256, 256), (2.0, 1.0, 1.0))
    source = dataclasses.replace(source, optional_channels=source.channels)
    made = transfer(source, fingerprint_of((50, 400, 300), (5.0, 0.5, 0.5), channel="T1"))
    assert (made.dataset, made.n_folds, made.channels, made.optional_channels) == ("own", 3, ("T1",), ())
    assert made.normalization[0].scheme == "zscore"
    for name, configuration in made.configurations.items():
        known = source.configurations[name]
        assert configuration.spacing_mm == known.spacing_mm
        assert configuration.patch_size == known.patch_size
        assert configuration.network == known.network
    assert made.configurations["3d_fullres"].median_shape == (125.0, 200.0, 150.0)
    assert made.configurations["2d"].median_shape == (200.0, 150.0)
    assert made.provenance["like"] == "source.json"


def test_thick_slices_stay_through_plane_whatever_the_other_plan_has() -> None:
    source = make_source((20, 300, 300), (5.0, 1.0, 1.0))
    made = transfer(source, fingerprint_of((300, 320, 25), (0.8, 0.8, 5.0)))
    assert made.axis_order == (2, 0, 1)
    assert made.configurations["3d_fullres"].median_shape == (25.0, 240.0, 256.0)
    assert reason(made, "axis_order").startswith("not as in source.json: x is the through-plane axis")
    # Nearly isotropic scans have no such axis of their own.
    assert transfer(source, fingerprint_of((300, 320, 250), (0.8, 0.8, 0.9))).axis_order == (0, 1, 2)


def test_single_slices_get_2d_alone() -> None:
    source = make_source((100, 256, 256), (1.0, 1.0, 1.0))
    slices = fingerprint_of((1, 256, 256), (1.0, 1.0, 1.0))
    made = transfer(source, slices)
    assert set(made.configurations) == {"2d"}
    assert made.recommended == "2d"
    assert "single slice" in reason(made, "configurations.3d_fullres")
    only_3d = make_source((100, 256, 256), (1.0, 1.0, 1.0), configurations=("3d_fullres",))
    with pytest.raises(PlanError, match="3D configurations only"):
        transfer(only_3d, slices)


def test_more_classes_take_memory_from_the_batch() -> None:
    # Of cases so large that only the memory limits the batch.
    source = make_source((400, 512, 512), (1.0, 1.0, 1.0))
    batch_size = source.configurations["2d"].batch_size
    made = transfer(source, fingerprint_of((400, 512, 512), (1.0, 1.0, 1.0)), n_labels=100)
    assert 1 <= made.configurations["2d"].batch_size < batch_size
    assert "with 101 outputs no more than" in reason(made, "configurations.2d.batch_size")
    with pytest.raises(PlanError, match="does not fit 8 GiB with the 5001 outputs"):
        transfer(source, fingerprint_of((400, 512, 512), (1.0, 1.0, 1.0)), n_labels=5000)


def test_a_patch_that_is_mostly_padding_is_said(caplog: pytest.LogCaptureFixture) -> None:
    source = make_source((200, 256, 256), (1.0, 1.0, 1.0))
    made = transfer(source, fingerprint_of((30, 40, 40), (1.0, 1.0, 1.0)))
    assert "padding" in reason(made, "configurations.3d_fullres.patch_size")
    assert "padding" in caplog.text
    assert made.recommended == "3d_fullres"
