"""The installed command line, as a user runs it: real processes, real files."""

from __future__ import annotations

import csv
import html
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

LABELS = ("liver", "spleen", "kidneys", "aorta", "lesion")
COMMAND = Path(sys.executable).with_name("autoseg")


def autoseg(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command in `cwd` and expects an exit code."""
    command = [str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a user has planned and trained two folds, a few steps each."""
    folder = tmp_path_factory.mktemp("user")
    autoseg("plan", tiny_dataset, cwd=folder)
    autoseg("train", "--fold", "0,1", "--iterations", 4, "--device", "cpu", cwd=folder)
    return folder


HELP = """
import atexit, sys
from autoseg.cli import main
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
sys.argv = ["autoseg", "--help"]
main()
"""


def test_help_does_without_what_takes_long_to_load() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert "predict" in done.stdout
    loaded = set(done.stderr.split())
    assert "autoseg.cli" in loaded
    assert not loaded & {"numpy", "torch", "monai", "scipy", "SimpleITK", "nibabel", "matplotlib"}


def test_plan_writes_a_readable_work_folder(trained: Path) -> None:
    work = trained / "autoseg-work"
    plan = json.loads((work / "plan.json").read_text())
    assert plan["recommended"] == "3d_fullres"
    assert set(plan["configurations"]) == {"2d", "3d_fullres"}
    assert plan["normalization"][0]["scheme"] == "ct"
    assert any("spacing" in reason["text"] for reason in plan["reasons"])
    assert len(json.loads((work / "splits.json").read_text())["folds"]) == 5
    for case in json.loads((work / "dataset.json").read_text())["cases"]:
        image = np.load(work / "preprocessed" / "3d_fullres" / case["id"] / "image.npy", mmap_mode="r")
        assert image.dtype == np.float16
    assert not [file for file in work.rglob("*") if file.suffix in {".pkl", ".pt", ".pth", ".npz"}]


def test_training_leaves_weights_log_curves_and_whole_volume_scores(trained: Path) -> None:
    for fold in (0, 1):
        folder = trained / "autoseg-work" / "models" / "3d_fullres" / f"fold_{fold}"
        assert (folder / "weights.safetensors").exists()
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["iteration"] == 4
        scores = json.loads((folder / "validation" / "evaluation.json").read_text())
        assert {label["label"] for label in scores["labels"]} == set(LABELS)
        for case in scores["cases"]:
            assert (folder / "validation" / f"{case['case']}.nii.gz").exists()


def test_predict_and_evaluate(trained: Path, tiny_dataset: Path) -> None:
    images = sorted((tiny_dataset / "imagesTs").iterdir())
    autoseg("predict", tiny_dataset / "imagesTs", "out", "--device", "cpu", cwd=trained)
    for file in images:
        source, result = nib.load(file), nib.load(trained / "out" / file.name.replace("_0000", ""))
        assert result.shape == source.shape
        np.testing.assert_array_equal(result.affine, source.affine)
        assert set(np.unique(result.dataobj)) <= set(range(6))
    record = json.loads((trained / "out" / "prediction.json").read_text())
    assert record["folds"] == [0, 1]
    table = autoseg("evaluate", "out", tiny_dataset / "labelsTs", cwd=trained).stdout
    assert all(label in table for label in LABELS)
    scores = json.loads((trained / "out" / "evaluation.json").read_text())
    assert len(scores["cases"]) == len(images)
    for case in scores["cases"]:
        reference = np.asarray(nib.load(tiny_dataset / "labelsTs" / f"{case['case']}.nii.gz").dataobj)
        predicted = np.asarray(nib.load(trained / "out" / f"{case['case']}.nii.gz").dataobj)
        for score in case["labels"]:
            a, b = (np.isin(label, score["values"]) for label in (predicted, reference))
            expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else None
            assert score["dice"] == (pytest.approx(expected) if expected is not None else None)


def test_pages_are_written_and_what_is_missing_for_a_selection_is_named(trained: Path, tiny_dataset: Path) -> None:
    images = tiny_dataset / "imagesTs"
    autoseg("predict", images, "seen", "--device", "cpu", "--speed", "fast", cwd=trained)
    assert "results.html" in autoseg("report", cwd=trained).stdout
    page = html.unescape((trained / "autoseg-work" / "report" / "results.html").read_text())
    assert "run 'autoseg train -c 3d_fullres --fold 2,3,4'" in page
    (trained / "seen" / "report").mkdir()
    (trained / "seen" / "report" / "thesis.txt").write_text("of the user")
    assert "autoseg_report.html" in autoseg("report", "--predictions", ".", cwd=trained / "seen").stdout
    page = (trained / "seen" / "autoseg_report.html").read_text()
    assert "not there any more" not in page
    assert (trained / "seen" / "report" / "thesis.txt").exists()
    assert all(file.name.removesuffix("_0000.nii.gz") in page for file in images.iterdir())
    # Pictures in base64 may have any four letters, but no colon.
    assert "://" not in page.replace("http://www.w3.org", "")
    error = autoseg("select", cwd=trained, code=2).stderr
    assert "no configuration is trained on all folds" in error
    assert "run 'autoseg train -c 3d_fullres --fold 2,3,4'" in error
    error = autoseg("report", "--predictions", images, cwd=trained, code=2).stderr
    assert "found no prediction.json" in error


def test_a_perfect_prediction_scores_one(tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset / "labelsTs", tmp_path / "perfect")
    autoseg("evaluate", "perfect", tiny_dataset / "labelsTs", cwd=tmp_path)
    scores = json.loads((tmp_path / "perfect" / "evaluation.json").read_text())
    assert scores["mean_dice"] == 1.0


def test_one_fold_and_a_copied_model_predict_too(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "autoseg-work" / "models" / "3d_fullres", tmp_path / "my model")
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    arguments = ("--folds", "1", "--device", "cpu", "--no-mirroring")
    autoseg("predict", image, tmp_path / "a", *arguments, cwd=trained)
    autoseg("predict", image, tmp_path / "b", "-w", tmp_path / "my model", *arguments, cwd=tmp_path)
    name = image.name.replace("_0000", "")
    first, second = (np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in "ab")
    np.testing.assert_array_equal(first, second)


def test_one_file_predicts_as_its_work_folder_does(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    """On another machine there is nothing but the file; nothing on this one is named in it."""
    output = autoseg("export", tmp_path / "phantom.autoseg", "--folds", "0,1", cwd=trained).stdout
    assert f"autoseg predict IN OUT --model {tmp_path / 'phantom.autoseg'}" in output
    content = (tmp_path / "phantom.autoseg").read_bytes()
    cases = json.loads((trained / "autoseg-work" / "dataset.json").read_text())["cases"]
    assert len(cases) == 6
    for private in (str(trained), str(tiny_dataset), *(case["id"] for case in cases)):
        assert private.encode() not in content
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    options = ("--folds", "0,1", "--device", "cpu")
    autoseg("predict", image, tmp_path / "a", "-w", trained / "autoseg-work", *options, cwd=tmp_path)
    (tmp_path / "other machine").mkdir()
    (tmp_path / "phantom.autoseg").rename(tmp_path / "other machine" / "model.autoseg")
    autoseg("predict", image, tmp_path / "b", "--model", "model.autoseg", *options, cwd=tmp_path / "other machine")
    name = image.name.replace("_0000", "")
    first, second = (np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in "ab")
    np.testing.assert_array_equal(first, second)
    digests = {json.loads((tmp_path / folder / "prediction.json").read_text())["model"] for folder in "ab"}
    assert len(digests) == 1


def test_a_fold_that_is_not_trained_to_its_end_predicts_with_a_warning(
    trained: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """A run of four steps whose last word is its checkpoint."""
    model = Path(shutil.copytree(trained / "autoseg-work" / "models" / "3d_fullres", tmp_path / "model"))
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    options = ("--folds", "1", "--device", "cpu")
    autoseg("predict", image, tmp_path / "a", "--model", model, *options, cwd=tmp_path)
    (model / "fold_1" / "weights.safetensors").unlink()
    done = autoseg("predict", image, tmp_path / "b", "--model", model, *options, cwd=tmp_path)
    assert "its last checkpoint is used: fold 1 at step 4" in done.stderr
    name = image.name.replace("_0000", "")
    first, second = (np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in "ab")
    np.testing.assert_array_equal(first, second)


def test_models_that_cannot_be_used_are_named(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    images = tiny_dataset / "imagesTs"
    work = trained / "autoseg-work"
    autoseg("export", tmp_path / "m.autoseg", cwd=trained)
    content = (tmp_path / "m.autoseg").read_bytes()
    (tmp_path / "cut.autoseg").write_bytes(content[: len(content) // 2])

    def refused(*options: object) -> str:
        return autoseg("predict", images, tmp_path / "out", *options, cwd=tmp_path, code=2).stderr

    assert "is damaged or cut off" in refused("--model", tmp_path / "cut.autoseg")
    assert "is not an autoseg model" in refused("--model", next(images.iterdir()))
    assert "expected the folder of a trained configuration" in refused("--model", tmp_path / "nowhere.autoseg")
    assert "name it with -w" in refused("--model", work)
    assert "leave one of them out" in refused("--model", tmp_path / "m.autoseg", "-w", work)
    assert "is a model of 3d_fullres, expected one of 2d" in refused("--model", tmp_path / "m.autoseg", "-c", "2d")
    assert not (tmp_path / "out").exists()
    assert "ends in .autoseg" in autoseg("export", tmp_path / "m.zip", cwd=trained, code=2).stderr


def test_planning_again_reuses_what_is_there(trained: Path, tiny_dataset: Path) -> None:
    stored = trained / "autoseg-work" / "preprocessed" / "3d_fullres"
    before = {file: file.stat().st_mtime_ns for file in stored.rglob("*.npy")}
    output = autoseg("plan", tiny_dataset, cwd=trained).stderr
    assert "preprocessed 0 cases" in output
    assert before == {file: file.stat().st_mtime_ns for file in stored.rglob("*.npy")}


def test_a_changed_file_is_preprocessed_again(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    autoseg("plan", data, cwd=tmp_path)
    os.utime(sorted((data / "labelsTr").iterdir())[0], (0, 0))
    assert "preprocessed 1 cases" in autoseg("plan", data, cwd=tmp_path).stderr


def test_2d_trains_and_predicts_volumes(trained: Path, tiny_dataset: Path) -> None:
    options = ("-c", "2d", "--device", "cpu")
    autoseg("train", "--fold", "2", "--iterations", 2, *options, cwd=trained)
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    autoseg("predict", image, "out2d", *options, cwd=trained)
    result = nib.load(trained / "out2d" / image.name.replace("_0000", ""))
    assert result.shape == nib.load(image).shape


# -- datasets as they come ---------------------------------------------------------------------------------------------


def as_decathlon(source: Path, target: Path) -> Path:
    shutil.copytree(source / "labelsTr", target / "labelsTr")
    (target / "imagesTr").mkdir()
    entries = []
    for label in sorted((target / "labelsTr").iterdir()):
        shutil.copy(source / "imagesTr" / label.name.replace(".nii", "_0000.nii"), target / "imagesTr" / label.name)
        entries.append({"image": f"./imagesTr/{label.name}", "label": f"./labelsTr/{label.name}"})
    labels = {"0": "background"} | {str(i + 1): name for i, name in enumerate(LABELS)}
    content = {"name": "Abdomen", "modality": {"0": "CT"}, "labels": labels, "training": entries}
    (target / "dataset.json").write_text(json.dumps(content))
    return target


def as_folders(source: Path, target: Path) -> Path:
    as_decathlon(source, target)
    (target / "dataset.json").unlink()
    (target / "imagesTr").rename(target / "images")
    (target / "labelsTr").rename(target / "labels")
    return target


def as_csv(source: Path, target: Path) -> Path:
    target.mkdir()
    # Paths must not lead out of the manifest's folder, links may.
    (target / "scans").symlink_to(source)
    with (target / "cases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image_CT", "label"])
        for label in sorted((source / "labelsTr").iterdir()):
            image = label.name.replace(".nii", "_0000.nii")
            writer.writerow([label.name.split(".")[0], f"scans/imagesTr/{image}", f"scans/labelsTr/{label.name}"])
    return target / "cases.csv"


@pytest.mark.parametrize("layout", [as_decathlon, as_folders, as_csv])
def test_every_layout_gives_the_same_grid(
    trained: Path, tiny_dataset: Path, tmp_path: Path, layout: Callable[[Path, Path], Path]
) -> None:
    dataset = layout(tiny_dataset, tmp_path / "data")
    autoseg("plan", dataset, "--no-preprocess", cwd=tmp_path)
    plans = [json.loads((folder / "autoseg-work" / "plan.json").read_text()) for folder in (trained, tmp_path)]
    assert plans[0]["configurations"] == plans[1]["configurations"]


# -- bad input: one error, exit code 2, nothing written ----------------------------------------------------------------


@pytest.fixture
def data(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data"))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], *, shift_mm: float = 0.0) -> None:
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += shift_mm
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), affine), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def set_voxel(value: float, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed: np.ndarray = array.astype(dtype)
        changed[3, 4, 5] = value
        return changed

    return change


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "unreadable image": ("imagesTr/{}_0000.nii.gz", truncate, "cannot be read"),
    "missing image": ("imagesTr/{}_0000.nii.gz", Path.unlink, "label map without image"),
    "missing label map": ("labelsTr/{}.nii.gz", Path.unlink, "image without label map"),
    "other shape": ("labelsTr/{}.nii.gz", lambda file: rewrite(file, lambda a: a[:-1]), "shape"),
    "other affine": ("labelsTr/{}.nii.gz", lambda file: rewrite(file, lambda a: a, shift_mm=3), "affine"),
    "unknown label": ("labelsTr/{}.nii.gz", lambda file: rewrite(file, set_voxel(9, np.uint8)), "9 (1 voxels)"),
    "fractional label": (
        "labelsTr/{}.nii.gz",
        lambda file: rewrite(file, set_voxel(1.5, np.float32)),
        "expected whole numbers",
    ),
    "NaN": ("imagesTr/{}_0000.nii.gz", lambda file: rewrite(file, set_voxel(np.nan, np.float32)), "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_are_all_listed_in_one_error(data: Path, tmp_path: Path, name: str) -> None:
    template, damage, expected = BAD[name]
    broken = ["phantom_001", "phantom_004"]
    for case in broken:
        damage(data / template.format(case))
    message = autoseg("plan", data, cwd=tmp_path, code=2).stderr
    assert expected in message
    assert all(case in message for case in broken)
    assert "What to do:" in message
    assert "phantom_002" not in message
    kept = {file.name for file in (tmp_path / "autoseg-work").glob("[!.]*")}
    assert kept <= {"check.json"}, "what was found, where scans were read, and nothing else"


def test_one_case_only(data: Path, tmp_path: Path) -> None:
    for file in [*(data / "imagesTr").iterdir(), *(data / "labelsTr").iterdir()]:
        if "phantom_000" not in file.name:
            file.unlink()
    done = autoseg("plan", data, cwd=tmp_path)
    assert "one patient only" in done.stderr
    assert "autoseg train --fold 0" in done.stdout
    autoseg("train", "--iterations", 2, "--device", "cpu", cwd=tmp_path)


@pytest.mark.parametrize("content", [[], ["a.txt"]])
def test_unknown_layout_says_what_is_known(tmp_path: Path, content: list[str]) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("x")
    message = autoseg("plan", folder, cwd=tmp_path, code=2).stderr
    assert "imagesTr/CASE_0000.nii.gz" in message
    assert not (tmp_path / "autoseg-work").exists()


def test_commands_out_of_order_say_what_to_run_first(tiny_dataset: Path, tmp_path: Path) -> None:
    assert "autoseg plan" in autoseg("train", cwd=tmp_path, code=2).stderr
    assert "autoseg plan" in autoseg("predict", tiny_dataset / "imagesTs", "out", cwd=tmp_path, code=2).stderr
    autoseg("plan", tiny_dataset, "--no-preprocess", cwd=tmp_path)
    assert "autoseg train" in autoseg("predict", tiny_dataset / "imagesTs", "out", cwd=tmp_path, code=2).stderr
    assert "0 to 4" in autoseg("train", "--fold", "7", cwd=tmp_path, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_another_dataset_in_the_same_work_folder_is_refused(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    other = as_decathlon(tiny_dataset, tmp_path / "other")
    assert "-w" in autoseg("plan", other, cwd=trained, code=2).stderr


def test_a_work_folder_that_cannot_be_written_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = autoseg("plan", tiny_dataset, "-w", tmp_path / "file" / "work", cwd=tmp_path, code=2).stderr
    assert "Not a directory" in message
    assert str(tmp_path / "file") in message


def test_label_maps_never_go_into_the_folder_of_the_images(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(tiny_dataset / "imagesTs", tmp_path / "images"))
    before = {file.name: file.read_bytes() for file in images.iterdir()}
    assert "name another" in autoseg("predict", images, images, cwd=trained, code=2).stderr
    assert before == {file.name: file.read_bytes() for file in images.iterdir()}


def test_weights_are_not_put_under_another_plan(trained: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trained / "autoseg-work", tmp_path / "work"))
    plan = json.loads((work / "plan.json").read_text())
    plan["normalization"][0]["mean"] += 1
    (work / "plan.json").write_text(json.dumps(plan))
    message = autoseg("train", "--fold", "0", "--iterations", 4, "-w", work, cwd=tmp_path, code=2).stderr
    assert "another plan" in message


def test_an_unreadable_image_does_not_stop_the_others(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(tiny_dataset / "imagesTs", tmp_path / "images"))
    first, second = sorted(images.iterdir())
    truncate(first)
    message = autoseg("predict", images, tmp_path / "out", "--device", "cpu", cwd=trained, code=2).stderr
    assert "1 of 2 images" in message
    assert first.name in message
    assert (tmp_path / "out" / second.name.replace("_0000", "")).exists()


# -- interruption ------------------------------------------------------------------------------------------------------


OPTIONS = ("--fold", "0", "--iterations", "40", "--device", "cpu", "--no-validate")


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a training that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    autoseg("plan", tiny_dataset, cwd=folder)
    autoseg("train", *OPTIONS, cwd=folder)
    return (folder / "autoseg-work" / "models" / "3d_fullres" / "fold_0" / "weights.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_training_that_was_ended_goes_on(
    number: int, code: int, uninterrupted: bytes, tiny_dataset: Path, tmp_path: Path
) -> None:
    autoseg("plan", tiny_dataset, cwd=tmp_path)
    process = subprocess.Popen([COMMAND, "train", *OPTIONS], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        # By then the first epoch is on the disk.
        if "epoch 2" in line:
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    assert process.returncode == code
    fold = tmp_path / "autoseg-work" / "models" / "3d_fullres" / "fold_0"
    assert not (fold / "weights.safetensors").exists()
    assert "resuming" in autoseg("train", *OPTIONS, cwd=tmp_path).stderr
    assert (fold / "weights.safetensors").read_bytes() == uninterrupted
