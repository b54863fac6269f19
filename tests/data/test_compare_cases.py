"""What stands out among cases, and what must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autoseg.core.labels import LabelSpec
from autoseg.data.compare import CaseLook, compare_cases, find_leaks, find_test_folder, look_at_case
from autoseg.data.dataset import Case

SHAPE = (6, 8, 10)
LABELS = LabelSpec(names=("organ",), values=(1,))


def make_look(
    name: str, *, seed: int = 0, scale: float = 1.0, offset: float = 0.0, shape: tuple[int, ...] = SHAPE
) -> CaseLook:
    """A CT-like case: air around a body of 0 +- 100."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 100, size=(1, *shape))
    image[..., :2] = -1000
    label = np.zeros(shape, np.uint8)
    label[..., 3:5] = 1
    case = Case(id=name, group=name, images=(Path(f"{name}.nii.gz"),), label=Path(f"{name}_seg.nii.gz"))
    return look_at_case(case, (image * scale + offset).astype(np.float32), label, frozenset({0, 1}))


def kinds(looks: list[CaseLook], labels: LabelSpec = LABELS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in compare_cases(looks, channels=("CT",), labels=labels):
        assert problem.severity == "warning"
        found.setdefault(problem.kind, []).append(problem.case)
    return found


def test_cases_that_are_like_each_other_are_in_order() -> None:
    assert not kinds([make_look(name, seed=seed) for seed, name in enumerate("abcdef")])
    assert not kinds([])


@pytest.mark.parametrize("changed", [{"scale": 0.001}, {"scale": 0.1}, {"scale": 10.0}, {"offset": 1024.0}])
def test_an_image_in_another_unit(changed: dict[str, Any]) -> None:
    looks = [make_look(name, seed=seed) for seed, name in enumerate("abcdef")]
    assert kinds([*looks, make_look("odd", seed=9, **changed)]) == {"intensities in another unit": ["odd"]}


def test_where_many_differ_no_unit_is_the_usual_one() -> None:
    looks = [make_look(name, seed=seed, scale=(1.0, 1.0, 30.0)[seed % 3]) for seed, name in enumerate("abcdefghi")]
    assert not kinds(looks)


def test_the_same_voxels_under_two_names_whatever_the_label_maps_say() -> None:
    looks = [make_look("a", seed=1), make_look("b", seed=2), make_look("c", seed=1)]
    (problem,) = compare_cases(looks, channels=("CT",), labels=LABELS)
    assert (problem.kind, problem.case) == ("the same image under two names", "c")
    assert problem.found == "the voxels of case a, with equal label maps"
    assert "--groups" in problem.advice


def test_empty_images_are_no_duplicates() -> None:
    looks = [make_look(name, scale=0.0, seed=0) for name in "ab"]
    assert looks[0].digests == ("",)
    assert not kinds(looks)


def test_a_slice_among_volumes_but_not_slices_among_slices() -> None:
    volumes = [make_look(name, seed=seed) for seed, name in enumerate("abc")]
    slices = [make_look(name, seed=seed, shape=(1, 30, 20)) for seed, name in enumerate("defg")]
    assert kinds([*volumes, slices[0]]) == {"a single slice among volumes": ["d"]}
    assert not kinds(slices)


def test_a_label_that_no_case_has() -> None:
    labels = LabelSpec(names=("organ", "lesion"), values=(1, 7))
    (problem,) = compare_cases([make_look("a")], channels=("CT",), labels=labels)
    assert problem.kind == "label that no case has"
    assert "'lesion' (7)" in problem.found


def test_names_that_some_file_systems_cannot_tell_apart() -> None:
    looks = [make_look(name, seed=seed) for seed, name in enumerate(("Anna", "anna", "Jos\u00e9", "Jose\u0301", "b"))]
    found = kinds(looks)["names that some file systems cannot tell apart"]
    assert found == ["Anna", "anna", "Jos\u00e9", "Jose\u0301"]


def test_an_image_to_test_on_that_was_trained_on_is_found_in_any_orientation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(5, 6, 7)).astype(np.float32)
    folder = tmp_path / "imagesTs"
    folder.mkdir()
    image = nib.Nifti1Image(volume, np.eye(4))
    nib.save(image.as_reoriented([[0, -1], [2, 1], [1, 1]]), folder / "copy_0000.nii.gz")
    nib.save(nib.Nifti1Image(rng.normal(size=(5, 6, 7)), np.eye(4)), folder / "other_0000.nii.gz")
    nib.save(nib.Nifti1Image(rng.normal(size=(5, 5, 5)), np.eye(4)), folder / "smaller_0000.nii.gz")
    (folder / "broken_0000.nii.gz").write_bytes(b"nothing")
    case = Case(id="a", group="a", images=(tmp_path / "a.nii.gz",), label=tmp_path / "b.nii.gz")
    look = look_at_case(case, volume.T[None], np.zeros((7, 6, 5), np.uint8), frozenset({0}))
    assert find_test_folder(tmp_path) == folder
    broken, leak = find_leaks([look], folder, n_threads=2)
    assert leak.kind == "image both to train on and to test on"
    assert (leak.case, leak.file) == ("a", str(folder / "copy_0000.nii.gz"))
    assert broken.kind == "image to test on cannot be used"
