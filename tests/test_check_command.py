"""`autoseg check`: what a user sees, what is kept, and what --fix mends."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from autoseg.cli import app

SHAPE = (10, 12, 14)


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output; an exception is one, not an exit code."""
    done = CliRunner().invoke(app, ["-q", *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.stdout


def save(path: Path, voxels: np.ndarray, *, shift_mm: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def make_dataset(root: Path, *, n_cases: int = 5, inside: float = 1, dtype: type = np.uint8) -> Path:
    """A binary task in nnU-Net's layout, whose masks have the value `inside`."""
    for number in range(n_cases):
        rng = np.random.default_rng(number)
        mask: np.ndarray = np.zeros(SHAPE, dtype)
        mask[3:7, 4:8, 5 : 8 + number] = inside
        image = (mask > 0) * 100 + rng.normal(size=SHAPE)
        save(root / "imagesTr" / f"c{number}_0000.nii.gz", image.astype(np.float32))
        save(root / "labelsTr" / f"c{number}.nii.gz", mask)
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def read_problems(work: Path) -> list[dict[str, Any]]:
    problems: list[dict[str, Any]] = json.loads((work / "check.json").read_text())["problems"]
    return problems


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_dataset_in_order_and_the_plan_that_reads_nothing_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    assert run("check", dataset, "-w", work) == (0, "d: 5 cases, nothing wrong\n")
    caplog.set_level("INFO")
    assert run("plan", dataset, "-w", work, "--no-preprocess")[0] == 0
    assert "no file has changed since the last time" in caplog.text


def test_one_table_of_errors_and_warnings_and_json_beside_it(tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    shutil.copy(dataset / "imagesTr/c0_0000.nii.gz", dataset / "imagesTr/c1_0000.nii.gz")
    save(dataset / "labelsTr/c2.nii.gz", np.full(SHAPE, 3, np.uint8))
    save(dataset / "labelsTr/c3.nii.gz", np.zeros(SHAPE, np.uint8))
    code, shown = run("check", dataset, "-w", work)
    assert code == 2
    assert shown.startswith("d: 5 cases, 1 error, 2 warnings\n")
    assert "found 3 (1680 voxels), expected only 0, 1" in shown
    assert shown.count("What to do: ") == 3
    found = [(problem["severity"], problem["kind"], problem["case"]) for problem in read_problems(work)]
    assert found == [
        ("error", "label value that is not in the list of labels", "c2"),
        ("warning", "label map without any structure", "c3"),
        ("warning", "the same image under two names", "c1"),
    ]
    assert json.loads(run("check", dataset, "-w", work, "--json")[1])["problems"] == read_problems(work)
    assert not (work / "dataset.json").exists(), "of a dataset with errors there is no index"


@pytest.mark.parametrize(("inside", "dtype"), [(255, np.uint8), (0.9995, np.float32), (65535, np.uint16)])
def test_fix_mends_masks_in_memory_and_leaves_the_files(inside: float, dtype: type, tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d", inside=inside, dtype=dtype), tmp_path / "work"
    before = digests(dataset)
    assert run("check", dataset, "-w", work)[0] == 2
    code, shown = run("check", dataset, "-w", work, "--fix")
    assert (code, shown.splitlines()[0]) == (0, "d: 5 cases, 5 notes")
    assert run("plan", dataset, "-w", work, "--fix")[0] == 0
    assert digests(dataset) == before
    stored = next((work / "preprocessed").rglob("c0/label.npy"))
    assert np.count_nonzero(np.load(stored) == 1) == 4 * 4 * 3
    mends = [case["mend"] for case in json.loads((work / "dataset.json").read_text())["cases"]]
    assert mends == [{"rounded": inside < 1, "values": {} if inside < 1 else {str(inside): 1}}] * 5


def test_a_header_that_is_a_little_off_is_noted_and_one_that_is_far_off_is_refused(tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    mask = np.asarray(nib.load(dataset / "labelsTr/c0.nii.gz").dataobj)
    save(dataset / "labelsTr/c0.nii.gz", mask, shift_mm=0.05)
    assert run("check", dataset, "-w", work)[0] == 0
    (note,) = read_problems(work)
    assert (note["severity"], note["kind"]) == ("note", "header of the label map a little off")
    save(dataset / "labelsTr/c0.nii.gz", mask, shift_mm=0.5)
    code, shown = run("check", dataset, "-w", work, "--fix")
    assert code == 2
    assert "a corner 0.50 voxels from" in shown


def test_images_to_test_on_are_compared_with_those_to_train_on(tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    for folder in ("d/imagesTs", "elsewhere"):
        (tmp_path / folder).mkdir()
        shutil.copy(dataset / "imagesTr/c4_0000.nii.gz", tmp_path / folder / "x_0000.nii.gz")
    for options in ((), ("--test-images", tmp_path / "elsewhere")):
        code, shown = run("check", dataset, "-w", work, *options)
        assert code == 0
        assert "found the voxels of case c4" in shown


def test_images_to_test_on_are_looked_at_again_when_they_have_changed(tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    leak = dataset / "imagesTs" / "x_0000.nii.gz"
    leak.parent.mkdir()
    leak.with_name("gone_0000.nii.gz").symlink_to(tmp_path / "nowhere")
    for leaks in (False, True, False):
        if leaks:
            shutil.copy(dataset / "imagesTr/c4_0000.nii.gz", leak)
        else:
            leak.unlink(missing_ok=True)
        assert ("found the voxels of case c4" in run("check", dataset, "-w", work)[1]) == leaks


def test_errors_of_the_index_are_a_table_too_and_what_is_no_dataset_is_one_error(tmp_path: Path) -> None:
    dataset, work = make_dataset(tmp_path / "d"), tmp_path / "work"
    (dataset / "labelsTr/c1.nii.gz").unlink()
    code, shown = run("check", dataset, "-w", work)
    assert code == 2
    assert "image without label map" in shown
    (tmp_path / "empty").mkdir()
    code, shown = run("check", tmp_path / "empty", "-w", work)
    assert code == 2
    assert "the layout is not known" in shown


def test_a_work_folder_of_another_dataset_is_left_as_it_is(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert run("check", make_dataset(tmp_path / "first"), "-w", work)[0] == 0
    before = digests(work)
    assert run("check", make_dataset(tmp_path / "second"), "-w", work) == (0, "second: 5 cases, nothing wrong\n")
    assert digests(work) == before
    next((tmp_path / "second/labelsTr").iterdir()).unlink()
    assert run("check", tmp_path / "second", "-w", work)[0] == 2
    assert digests(work) == before


def test_the_dataset_itself_never_becomes_a_work_folder(tmp_path: Path) -> None:
    """Neither while a label map is missing, nor when it has been put back."""
    dataset = make_dataset(tmp_path / "d")
    before = digests(dataset)
    label = dataset / "labelsTr/c1.nii.gz"
    content = label.read_bytes()
    label.unlink()
    assert run("check", dataset, "-w", dataset)[0] == 2
    label.write_bytes(content)
    assert run("check", dataset, "-w", dataset)[0] == 0
    assert digests(dataset) == before
