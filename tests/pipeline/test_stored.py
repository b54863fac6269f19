"""Cases of the store, as networks take them."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from autoseg import pipeline
from autoseg.data.load import LoadedCase, load_case
from autoseg.pipeline.stored import open_preprocessed, prepare_stored
from autoseg.pipeline.workspace import Workspace
from autoseg.preprocessing.occupied import crop_occupied, find_occupied


def test_a_validated_case_is_looked_at_where_a_predicted_one_is(tiny_dataset: Path, tmp_path: Path) -> None:
    """Brains are cut out of their scans: the corners of the box around them are zero, for validation too."""
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    for file in data.glob("imagesTr/*.nii.gz"):
        image = nib.load(file)
        voxels = np.asarray(image.dataobj).copy()
        voxels[:12, :12] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), file)
    plan = pipeline.plan(data, tmp_path / "work", n_folds=2)
    workspace = Workspace(root=tmp_path / "work")
    case = workspace.read_dataset().cases[0]
    loaded = load_case(case, n_channels=1, labels=plan.labels)
    assert isinstance(loaded, LoadedCase)
    stored = open_preprocessed(workspace, plan, plan.recommended, case.id)
    expected = crop_occupied(find_occupied(loaded.image), stored.record)
    assert 0 < np.count_nonzero(~expected) < expected.size / 2
    np.testing.assert_array_equal(prepare_stored(stored).occupied, expected)
