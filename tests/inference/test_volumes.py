"""Volumes made row by row are those made at once, whichever axis the rows follow and wherever they are cut."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_specs import OVERLAPPING
from torch import Tensor

from autoseg.core.geometry import Box, Geometry, permute3
from autoseg.inference.restore import interpolated_argmax
from autoseg.inference.volumes import (
    LabelMap,
    SoftMaps,
    change_along,
    in_step,
    mean_probability,
    ready_rows,
    to_scan,
)
from autoseg.networks.outputs import Outputs
from autoseg.preprocessing.preprocess import CaseRecord, place_in_scan
from autoseg.preprocessing.resample import resample_logits

SHAPES = ((7, 9, 8), (13, 6, 8), (5, 17, 30))
"""Of the network's grid, and of the scan in the network's axes: finer, and coarser along one axis."""


def make_record(
    shape: tuple[int, int, int], cropped: tuple[int, int, int], *, nearest_axis: int | None = None
) -> CaseRecord:
    """With swapped axes, and a margin around the crop."""
    axis_order = (2, 0, 1)
    canonical = tuple(cropped[axis_order.index(axis)] for axis in range(3))
    whole = (canonical[0] + 3, canonical[1] + 1, canonical[2] + 2)
    affine = tuple(tuple(row) for row in np.eye(4).tolist())
    return CaseRecord(
        geometry=Geometry(shape=whole, spacing_mm=(1.0, 1.0, 1.0), affine=affine, file_axcodes=("R", "A", "S")),
        crop=Box(start=(1, 0, 2), stop=(1 + canonical[0], canonical[1], 2 + canonical[2])),
        axis_order=axis_order,
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        nearest_axis=nearest_axis,
    )


def sweep(logits: Tensor, *, axis: int, cuts: list[int]) -> Iterator[tuple[slice, Tensor]]:
    """Rows of logits (K, Z, Y, X) along an axis, cut at some of them."""
    swept = logits.movedim(1 + axis, 1)
    n_rows = swept.shape[1]
    edges = sorted({0, n_rows, *(cut for cut in cuts if 0 < cut < n_rows)})
    for start, stop in itertools.pairwise(edges):
        yield slice(start, stop), swept[:, start:stop]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    cropped=st.sampled_from([*SHAPES, (40, 11, 16), (3, 5, 4), (1, 9, 8)]),
    axis=st.integers(0, 2),
    nearest_axis=st.sampled_from([None, 0, 1, 2]),
    cuts=st.lists(st.integers(1, 17), max_size=5),
    seed=st.integers(0, 100),
)
def test_rows_as_they_come_make_the_label_map_that_is_made_at_once(
    shape: tuple[int, int, int],
    cropped: tuple[int, int, int],
    axis: int,
    nearest_axis: int | None,
    cuts: list[int],
    seed: int,
) -> None:
    logits = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    record = make_record(shape, cropped, nearest_axis=nearest_axis)
    labels = LabelMap(record, axis=axis, outputs=Outputs(3))
    change, expected_row = change_along(record, axis), 0
    for rows, part, first_row in ready_rows(sweep(logits, axis=axis, cuts=cuts), change):
        assert rows.start == expected_row
        expected_row = rows.stop
        labels.add(rows, part, first_row)
    assert expected_row == change.target[0]
    at_once = interpolated_argmax(logits, cropped, nearest_axis=nearest_axis)
    # The order in which axes are interpolated differs, so ties may fall either way; random logits have none.
    differing = labels.whole() != place_in_scan(at_once, record)
    assert differing.mean() < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_probabilities_and_uncertainty(tmp_path: Path, axis: int, in_a_file: bool) -> None:
    shape, cropped = SHAPES[0], SHAPES[2]
    generator = torch.Generator().manual_seed(0)
    networks = 3 * torch.randn(2, 3, *shape, generator=generator)
    record = make_record(shape, cropped)
    soft = SoftMaps(
        record,
        axis=axis,
        outputs=Outputs(3),
        probabilities=True,
        uncertainty=True,
        scratch=tmp_path if in_a_file else None,
    )
    change = change_along(record, axis)
    for rows, part, first_row in ready_rows(sweep(networks.flatten(0, 1), axis=axis, cuts=[2, 3, 5]), change):
        for scan_rows, values in to_scan(part, change, rows, first_row=first_row, n_networks=2):
            soft.add(scan_rows, [values])
    full = torch.cat([part for _, part in resample_logits(networks.flatten(0, 1), cropped, nearest_axis=None)], dim=1)
    of_networks = full.unflatten(0, (2, 3)).double()
    mean = of_networks.mean(dim=0)
    probability = mean.softmax(dim=0).numpy()
    inside = record.crop.slices
    for index in range(3):
        whole = soft.probability(index)
        expected = permute_back(probability[index], record)
        np.testing.assert_allclose(whole[inside] / 255, expected, atol=0.51 / 255)
        outside = np.ones(whole.shape, bool)
        outside[inside] = False
        assert (whole[outside] == (255 if index == 0 else 0)).all()
    entropy = -(probability * np.log(probability)).sum(axis=0) / np.log(3)
    np.testing.assert_allclose(soft.entropy()[inside] / 255, permute_back(entropy, record), atol=0.51 / 255)
    others = (of_networks.argmax(dim=1) != mean.argmax(dim=0)).double().mean(dim=0).numpy()
    assert set(np.unique(others)) == {0.0, 0.5, 1.0} or set(np.unique(others)) == {0.0, 0.5}
    wrong = np.abs(soft.disagreement()[inside] / 255 - permute_back(others, record)) > 0.01
    assert wrong.mean() < 1e-3
    assert (tmp_path / "probabilities.npy").exists() == in_a_file


def test_a_disk_without_room_for_the_probabilities_is_told_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"No space left.*probabilities\.npy"):
        SoftMaps(
            make_record(*SHAPES[:2]),
            axis=0,
            outputs=Outputs(3),
            probabilities=True,
            uncertainty=False,
            scratch=tmp_path,
        )


def permute_back(cropped: np.ndarray, record: CaseRecord) -> np.ndarray:
    """From the network's axes to the scan's."""
    assert permute3(record.crop.shape, record.axis_order) == cropped.shape
    return cropped.transpose(np.argsort(record.axis_order))


@given(cuts=st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=3))
def test_streams_that_part_rows_differently_are_brought_in_step(cuts: list[list[int]]) -> None:
    volumes = [torch.arange(9 * 2 * 3).reshape(1, 9, 2, 3) + 1000 * index for index in range(len(cuts))]
    streams = [sweep(volume, axis=0, cuts=of_stream) for volume, of_stream in zip(volumes, cuts, strict=True)]
    collected: list[list[Tensor]] = [[] for _ in cuts]
    expected_row = 0
    for rows, parts in in_step(streams):
        assert rows.start == expected_row
        expected_row = rows.stop
        for of_stream, part in zip(collected, parts, strict=True):
            assert part.shape[1] == rows.stop - rows.start
            of_stream.append(part)
    assert expected_row == 9
    for volume, of_stream in zip(volumes, collected, strict=True):
        assert torch.equal(torch.cat(of_stream, dim=1), volume)


def test_networks_average_logits_and_configurations_probabilities() -> None:
    first, second = (torch.randn(n, 3, 1, 2, 2, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    expected = (first.mean(dim=0).softmax(dim=0) + second.mean(dim=0).softmax(dim=0)) / 2
    torch.testing.assert_close(mean_probability([first, second], Outputs(3)), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_soft_maps_of_regions_are_sigmoids_and_zero_outside_the_crop(axis: int) -> None:
    """No channel is the background: outside the crop nothing is of any region, for sure."""
    outputs = Outputs.of(OVERLAPPING)
    shape, cropped = SHAPES[0], SHAPES[2]
    networks = 3 * torch.randn(2, outputs.n, *shape, generator=torch.Generator().manual_seed(0))
    record = make_record(shape, cropped)
    soft = SoftMaps(record, axis=axis, outputs=outputs, probabilities=True, uncertainty=True)
    labels = LabelMap(record, axis=axis, outputs=outputs)
    change = change_along(record, axis)
    for rows, part, first_row in ready_rows(sweep(networks.flatten(0, 1), axis=axis, cuts=[2, 3, 5]), change):
        labels.add(rows, part.unflatten(0, (2, -1)).mean(dim=0), first_row)
        for scan_rows, values in to_scan(part, change, rows, first_row=first_row, n_networks=2):
            soft.add(scan_rows, [values])
    full = torch.cat([part for _, part in resample_logits(networks.flatten(0, 1), cropped, nearest_axis=None)], dim=1)
    of_networks = full.unflatten(0, (2, outputs.n)).double()
    mean = of_networks.mean(dim=0)
    probability = mean.sigmoid()
    inside = record.crop.slices
    outside = np.ones(record.geometry.shape, bool)
    outside[inside] = False
    for index in range(outputs.n):
        whole = soft.probability(index)
        np.testing.assert_allclose(
            whole[inside] / 255, permute_back(probability[index].numpy(), record), atol=0.51 / 255
        )
        assert not whole[outside].any()
    entropy = -(probability * probability.log2() + (1 - probability) * (1 - probability).log2()).mean(dim=0)
    np.testing.assert_allclose(soft.entropy()[inside] / 255, permute_back(entropy.numpy(), record), atol=0.51 / 255)
    assert not soft.entropy()[outside].any()
    is_sure = (of_networks.abs() > 1e-4).all(dim=0).all(dim=0) & (mean.abs() > 1e-4).all(dim=0)
    pattern = (mean > 0).long()
    decided = torch.from_numpy(OVERLAPPING.class_of_regions().astype(np.int64))[pattern[0] + 2 * pattern[1]]
    known = permute_back(is_sure.numpy(), record)
    np.testing.assert_array_equal(labels.whole()[inside][known], permute_back(decided.numpy(), record)[known])
    assert not labels.whole()[outside].any()
    votes = (of_networks > 0).long()
    differ = ((votes[:, 0] + 2 * votes[:, 1]) != (pattern[0] + 2 * pattern[1])).double().mean(dim=0)
    found = soft.disagreement()[inside] / 255
    np.testing.assert_allclose(found[known], permute_back(differ.numpy(), record)[known], atol=0.51 / 255)


def test_configurations_average_probabilities_of_regions_and_networks_their_logits() -> None:
    outputs = Outputs.of(OVERLAPPING)
    groups = [torch.randn(n, 2, 3, 4, 5, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]
    expected = (groups[0][0].sigmoid() + groups[1].mean(dim=0).sigmoid()) / 2
    torch.testing.assert_close(mean_probability(groups, outputs), expected)
