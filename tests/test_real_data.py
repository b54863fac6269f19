"""The pipeline on real scans: what it finds and decides is what a peer finds and decides on the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import autoseg
from autoseg.core.serialize import read_json
from autoseg.data.layouts import open_dataset
from autoseg.planning.fingerprint import Fingerprint


def test_hippocampus_from_files_to_the_reference_plan(shared: Path, tmp_path: Path) -> None:
    plan = autoseg.plan(shared / "data" / "Task04_Hippocampus", tmp_path, preprocess="none")
    reference = json.loads((shared / "reference" / "nnunet_plans" / "task04_hippocampus_200.json").read_text())
    expected = reference["plans"]["unet_8gb"]["configurations"]["3d_fullres"]
    found = plan.configuration("3d_fullres")
    assert list(found.patch_size) == expected["patch_size"]
    assert found.batch_size == expected["batch_size"]
    assert list(found.median_shape) == expected["median_image_size_in_voxels"]
    assert [list(stride) for stride in found.network.strides] == expected["strides"]
    assert list(plan.axis_order) == reference["plans"]["unet_8gb"]["transpose_forward"]
    fingerprint: Fingerprint = read_json(tmp_path / "fingerprint.json", Fingerprint)
    shapes = [list(case.cropped_shape) for case in fingerprint.cases]
    assert sorted(shapes) == sorted(reference["fingerprint"]["shapes_after_crop"])
    intensities = reference["fingerprint"]["foreground_intensity_properties_per_channel"]["0"]
    assert fingerprint.channels[0].median == pytest.approx(intensities["median"], rel=0.05)
    assert fingerprint.channels[0].percentile_99_5 == pytest.approx(intensities["percentile_99_5"], rel=0.05)


@pytest.mark.parametrize(("name", "n_channels", "n_labels"), [("Brain16_iso2", 2, 16), ("BrainLesion_5mm", 1, 3)])
def test_brains_are_recognised_and_planned(
    shared: Path, tmp_path: Path, name: str, n_channels: int, n_labels: int
) -> None:
    folder = shared / "data" / name
    dataset = open_dataset(folder)
    assert dataset.labels is not None
    assert (len(dataset.cases), len(dataset.channels), len(dataset.labels.names)) == (14, n_channels, n_labels)
    plan = autoseg.plan(folder, tmp_path)
    assert plan.recommended == "3d_fullres"
    for case in dataset.cases:
        stored = tmp_path / "preprocessed" / "3d_fullres" / case.id
        image, label = (np.load(stored / file, mmap_mode="r") for file in ("image.npy", "label.npy"))
        assert image.shape == (n_channels, *label.shape)
        assert abs(float(image.mean(dtype=np.float64))) < 1
        assert label.max() <= n_labels
