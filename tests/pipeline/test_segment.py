"""Segmenting folders of images: what is written, what is left alone, and what is said when something is wrong."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import autoseg
from autoseg.core.errors import FormatError, PredictionError
from autoseg.data.io import read_image, read_label
from autoseg.data.load import load_image
from autoseg.inference.predictor import Predictor
from autoseg.pipeline import segment, segment_run
from autoseg.training.config import Budget, TrainConfig


@pytest.fixture(scope="module")
def model(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds that have been trained for a moment."""
    work = tmp_path_factory.mktemp("segment") / "work"
    autoseg.plan(tiny_dataset, work)
    config = TrainConfig(budget=Budget(iterations=6))
    autoseg.train(work, folds=[0, 1], config=config, device="cpu", validate=False)
    return work / "models" / "3d_fullres"


@pytest.fixture
def images(tiny_dataset: Path) -> list[Path]:
    return sorted((tiny_dataset / "imagesTs").iterdir())


def read_manifest(folder: Path, name: str = "prediction.json") -> dict:
    content: dict = json.loads((folder / name).read_text())
    return content


def broken_for(name: str) -> Callable[..., object]:
    """`load_image`, which cannot read one case."""

    def load(files: Sequence[Path | None], **options: object) -> object:
        if any(file is not None and file.name.startswith(name.removesuffix(".nii.gz")) for file in files):
            raise FormatError(f"{name}: cannot be read now")
        return load_image(files, **options)  # type: ignore[arg-type]

    return load


def test_the_manifest_says_what_was_run_with_what_on_what(
    model: Path, tiny_dataset: Path, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = autoseg.predict(tiny_dataset / "imagesTs", tmp_path, model=model, device="cpu")
    manifest = read_manifest(tmp_path)
    assert manifest["model"] == Predictor(model, device="cpu").digest
    assert manifest["folds"] == [0, 1]
    assert (manifest["device"], manifest["step_fraction"]) == ("cpu", 0.5)
    assert 0.05 < manifest["peak_memory_gib"] < 24
    assert list(manifest["cases"]) == [file.name.removesuffix(".nii.gz") for file in files]
    for file, image in zip(files, images, strict=True):
        known = manifest["cases"][file.name.removesuffix(".nii.gz")]
        assert known["status"] == "done"
        voxel_ml = np.prod(nib.load(image).header.get_zooms()) / 1000
        counts = np.bincount(np.asarray(nib.load(file).dataobj).ravel(), minlength=6)
        expected = dict(zip(("liver", "spleen", "kidneys", "aorta", "lesion"), counts[1:] * voxel_ml, strict=True))
        assert known["volumes_ml"] == pytest.approx(expected, abs=1e-2)
    lines = [record.getMessage() for record in caplog.records if " of 2): " in record.getMessage()]
    assert len(lines) == 2
    assert "left" in lines[0]


def test_a_list_of_images_and_parts_of_it(model: Path, images: list[Path], tmp_path: Path) -> None:
    whole = autoseg.predict(images, tmp_path / "whole", model=model, device="cpu")
    assert len(whole) == 2
    for number in (1, 2):
        (file,) = autoseg.predict(images, tmp_path / "parts", model=model, device="cpu", part=(number, 2))
        assert file.name == whole[number - 1].name
        assert file.read_bytes() == whole[number - 1].read_bytes()
        assert len(read_manifest(tmp_path / "parts", f"prediction.part-{number}-of-2.json")["cases"]) == 1
    assert not (tmp_path / "parts" / "prediction.json").exists()
    with pytest.raises(PredictionError, match="found the part 3/2, expected for instance 1/8"):
        autoseg.predict(images, tmp_path / "parts", model=model, device="cpu", part=(3, 2))


def test_one_part_tells_of_an_incomplete_image_and_the_others_are_done(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("first_CT.nii.gz", "first_bones.nii.gz", "second_CT.nii.gz"):
        shutil.copy(images[0], folder / name)
    nib.save(nib.load(images[0]), folder / "first_CT.nii")
    failed = []
    for number in (1, 2):
        try:
            autoseg.predict(folder, tmp_path / "out", model=model, device="cpu", part=(number, 2))
        except PredictionError as error:
            failed.append(str(error))
    (text,) = failed
    assert "1 of 1 images could not be segmented" in text
    (made,) = (tmp_path / "out").glob("*.nii.gz")
    assert made.name == "second.nii.gz"


def test_label_maps_of_parts_are_scored_by_what_their_records_say(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    for number in (1, 2):
        autoseg.predict(images, tmp_path / "parts", model=model, device="cpu", part=(number, 2))
        record = tmp_path / "parts" / f"prediction.part-{number}-of-2.json"
        content = json.loads(record.read_text())
        content["labels"]["ignore"] = 7
        record.write_text(json.dumps(content))
    whole = autoseg.predict(images, tmp_path / "whole", model=model, device="cpu")
    for file in whole:
        reference = nib.load(file)
        values = np.asarray(reference.dataobj).copy()
        values[0] = 7
        nib.save(nib.Nifti1Image(values, reference.affine), file)
    scores = autoseg.evaluate(tmp_path / "parts", tmp_path / "whole")
    assert set(scores.label_dice) == {"liver", "spleen", "kidneys", "aorta", "lesion"}
    assert scores.settings.ignore == 7
    assert scores.model == read_manifest(tmp_path / "parts", "prediction.part-1-of-2.json")["model"]


def test_what_was_made_last_counts_where_a_folder_has_records_of_several_runs(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    for number in (1, 2):
        autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[0], part=(number, 2))
        record = tmp_path / f"prediction.part-{number}-of-2.json"
        content = json.loads(record.read_text())
        content["started"] = "2020-01-01T00:00:00+00:00"
        record.write_text(json.dumps(content))
    whole = autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[1])
    content = [file.read_bytes() for file in whole]
    whole[0].unlink()
    autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[1], overwrite=False)
    assert [file.read_bytes() for file in whole] == content
    with pytest.raises(PredictionError, match=r"with other folds.*--overwrite"):
        autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[0], overwrite=False)


def test_runs_with_another_request_do_not_count_however_their_clocks_went(
    model: Path, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    autoseg.predict(images, tmp_path, model=model, device="cpu")
    content = read_manifest(tmp_path)
    content["started"] = "2999-01-01T00:00:00+00:00"
    (tmp_path / "prediction.json").write_text(json.dumps(content))
    # The sidecar of a TIFF that is called so.
    (tmp_path / "prediction_001.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    caplog.set_level(logging.INFO)
    for _ in range(2):
        caplog.clear()
        autoseg.predict(images, tmp_path, model=model, device="cpu", overwrite=False, request="job 7", part=(1, 2))
    assert "1 of 1 images have a label map already" in caplog.text


def test_an_older_label_map_beside_which_a_run_has_failed_is_not_scored(
    model: Path, images: list[Path], tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[1])
    monkeypatch.setattr(segment_run, "load_image", broken_for(whole[0].name))
    with pytest.raises(PredictionError, match="cannot be read now"):
        autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[0])
    scores = autoseg.evaluate(tmp_path, tiny_dataset / "labelsTs")
    assert [case.case for case in scores.cases] == [whole[1].name.removesuffix(".nii.gz")]
    assert scores.not_scored == (whole[0].name.removesuffix(".nii.gz"),)


def test_continuing_segments_again_what_failed_over_an_older_label_map(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = autoseg.predict(images, tmp_path, model=model, device="cpu")
    content = whole[0].read_bytes()
    whole[0].write_bytes(whole[1].read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(segment_run, "load_image", broken_for(whole[0].name))
        with pytest.raises(PredictionError, match="cannot be read now"):
            autoseg.predict(images, tmp_path, model=model, device="cpu")
    autoseg.predict(images, tmp_path, model=model, device="cpu", overwrite=False)
    assert whole[0].read_bytes() == content


def test_label_maps_of_a_run_before_do_not_count_as_those_of_one_that_was_stopped(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[1])
    expected = autoseg.predict(images, tmp_path / "other", model=model, device="cpu", folds=[0])
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "segment", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[0])
    files = autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[0], overwrite=False)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in expected]
    # Neither do those that no record tells of any more.
    autoseg.predict(images[0], tmp_path, model=model, device="cpu", folds=[1])
    files = autoseg.predict(images, tmp_path, model=model, device="cpu", folds=[1], overwrite=False)
    assert files[1].read_bytes() != expected[1].read_bytes()


def raise_interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_label_maps_that_no_prediction_has_made_are_not_replaced(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    reference = tmp_path / images[1].name.replace("_0000", "")
    reference.write_bytes(b"drawn by hand")
    with pytest.raises(PredictionError, match=rf"{reference.name}: is there already.*another folder"):
        autoseg.predict(images, tmp_path, model=model, device="cpu", part=(1, 2))
    assert [file.name for file in tmp_path.iterdir()] == [reference.name]
    assert reference.read_bytes() == b"drawn by hand"


def test_continuing_makes_what_is_missing_and_leaves_the_rest(model: Path, images: list[Path], tmp_path: Path) -> None:
    whole = autoseg.predict(images, tmp_path, model=model, device="cpu")
    content = [file.read_bytes() for file in whole]
    whole[0].unlink()
    kept = whole[1].stat().st_mtime_ns
    assert autoseg.predict(images, tmp_path, model=model, device="cpu", overwrite=False) == whole
    assert [file.read_bytes() for file in whole] == content
    assert whole[1].stat().st_mtime_ns == kept
    assert [known["status"] for known in read_manifest(tmp_path)["cases"].values()] == ["done", "done"]
    with pytest.raises(PredictionError, match=r"another model or with other folds.*--overwrite"):
        autoseg.predict(images, tmp_path, model=model, device="cpu", overwrite=False, folds=[1])
    autoseg.predict(images, tmp_path, model=model, device="cpu")
    assert whole[1].stat().st_mtime_ns > kept


def test_an_interrupted_run_leaves_whole_files_and_is_continued(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = autoseg.predict(images, tmp_path / "whole", model=model, device="cpu")
    segmented = Predictor.segment
    n_calls = 0

    def interrupted(self: Predictor, *arguments: object, **options: object) -> object:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyboardInterrupt
        return segmented(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        autoseg.predict(images, tmp_path / "parts", model=model, device="cpu")
    assert [file.name for file in (tmp_path / "parts").glob("*.nii.gz")] == [expected[0].name]
    assert list(read_manifest(tmp_path / "parts")["cases"]) == [expected[0].name.removesuffix(".nii.gz")]
    files = autoseg.predict(images, tmp_path / "parts", model=model, device="cpu", overwrite=False)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in expected]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "writing"))]


def test_one_bad_image_does_not_stop_the_others(model: Path, images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in images:
        shutil.copy(file, folder / file.name.replace("_0000", ""))
    (folder / "a_broken.nii.gz").write_bytes(images[0].read_bytes()[:2000])
    source = nib.load(images[0])
    series = np.stack([np.asarray(source.dataobj)] * 3, axis=-1)
    nib.save(nib.Nifti1Image(series, source.affine), folder / "b_series.nii.gz")
    with pytest.raises(PredictionError) as caught:
        autoseg.predict(folder, tmp_path / "out", model=model, device="cpu")
    text = str(caught.value)
    assert "2 of 4 images could not be segmented; the others are done" in text
    assert "a_broken" in text
    assert "b_series.nii.gz: found 3 channels, expected 1" in text
    cases = read_manifest(tmp_path / "out")["cases"]
    assert {case: known["status"] for case, known in cases.items()} == {
        "a_broken": "failed",
        "b_series": "failed",
        images[0].name.replace("_0000.nii.gz", ""): "done",
        images[1].name.replace("_0000.nii.gz", ""): "done",
    }
    assert "a_broken" in cases["a_broken"]["error"]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_an_image_unlike_the_training_is_warned_about(
    model: Path, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, _ = read_image(images[0])
    affine = nib.load(images[0]).affine
    scaled = ((image[0].T + 1000) / 4000).astype(np.float32)
    nib.save(nib.Nifti1Image(scaled, affine), tmp_path / "scaled.nii.gz")
    (file,) = autoseg.predict(tmp_path / "scaled.nii.gz", tmp_path / "out", model=model, device="cpu")
    assert "scaled: CT goes from" in caplog.text
    assert file.exists()
    assert "Hounsfield" in read_manifest(tmp_path / "out")["cases"]["scaled"]["warnings"][0]


def test_an_image_that_is_too_large_for_the_memory_is_refused_in_words(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(PredictionError, match=r"(?s)needs about .* MiB of memory, more than the 1 MiB .*--max-ram"):
        autoseg.predict(images[0], tmp_path, model=model, device="cpu", max_ram_gib=0.0005)


def test_an_image_that_becomes_too_large_is_refused_before_it_is_resampled(
    model: Path, images: list[Path], tmp_path: Path
) -> None:
    image = nib.load(images[0])
    # Metres in place of millimetres: a million times the voxels on the network's grid in each slice.
    affine = image.affine @ np.diag([1000.0, 1000.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), tmp_path / "wrong.nii.gz")
    shutil.copy(images[1], tmp_path / "right.nii.gz")
    with pytest.raises(PredictionError, match=r"(?s)1 of 2 images.*wrong.*needs about .* GiB of memory, .*--max-ram"):
        autoseg.predict(tmp_path, tmp_path / "out", model=model, device="cpu", max_ram_gib=2)
    assert (tmp_path / "out" / "right.nii.gz").is_file()


def test_probabilities_and_uncertainty_lie_on_the_image(model: Path, images: list[Path], tmp_path: Path) -> None:
    (plain,) = autoseg.predict(images[0], tmp_path / "plain", model=model, device="cpu")
    (file,) = autoseg.predict(
        images[0], tmp_path / "all", model=model, device="cpu", save_probabilities=True, save_uncertainty=True
    )
    label, source = read_label(file)[0], nib.load(images[0])
    # In half precision or apart, the means of the folds may round differently.
    assert (label != read_label(plain)[0]).mean() < 1e-3
    case = file.name.removesuffix(".nii.gz")
    names = ["1_liver", "2_spleen", "3_kidneys", "4_aorta", "5_lesion"]
    folder = tmp_path / "all" / "probabilities" / case
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.nii.gz" for name in names]
    maps = []
    for name in names:
        loaded = nib.load(folder / f"{name}.nii.gz")
        assert loaded.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(loaded.affine, source.affine)
        values = loaded.get_fdata()
        assert values.min() >= 0
        assert values.max() <= 1
        maps.append(read_image(folder / f"{name}.nii.gz")[0][0])
    background = 1 - np.sum(maps, axis=0)
    decided = np.stack([background, *maps]).argmax(axis=0)
    assert (decided != label).mean() < 0.02, "they differ where two probabilities are alike to a 255th"
    entropy, disagreement = (
        nib.load(tmp_path / "all" / "uncertainty" / case / f"{name}.nii.gz") for name in ("entropy", "disagreement")
    )
    for loaded in (entropy, disagreement):
        np.testing.assert_array_equal(loaded.affine, source.affine)
        assert 0 < loaded.get_fdata().max() <= 1.001
    assert set(np.round(np.unique(disagreement.get_fdata()), 2)) <= {0.0, 0.5, 1.0}
    assert not [path.name for path in (tmp_path / "all").iterdir() if path.name.startswith(".")]


def test_an_older_label_map_does_not_stand_for_one_that_could_not_be_written(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (older,) = autoseg.predict(images[0], tmp_path, model=model, device="cpu")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment_run.SegmentationRun, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        autoseg.predict(images[0], tmp_path, model=model, device="cpu")
    assert older.exists()
    known = read_manifest(tmp_path)["cases"][older.name.removesuffix(".nii.gz")]
    assert known["status"] == "failed"
    assert "could not be written" in known["error"]


def test_faster_leaves_more_out(model: Path, images: list[Path], tmp_path: Path) -> None:
    for name, speed in segment.SPEEDS.items():
        autoseg.predict(images[0], tmp_path / name, model=model, device="cpu", speed=name)
        manifest = read_manifest(tmp_path / name)
        assert manifest["step_fraction"] == speed.step_fraction
        assert len(manifest["folds"]) == (speed.n_folds or 2)
    with pytest.raises(PredictionError, match="speed 'warp' is unknown; known are best, balanced, fast"):
        autoseg.predict(images[0], tmp_path / "warp", model=model, device="cpu", speed="warp")


def test_the_images_are_not_written_over(model: Path, images: list[Path]) -> None:
    with pytest.raises(PredictionError, match="is the folder of the images"):
        autoseg.predict(images[0], images[0].parent, model=model, device="cpu")


def test_no_more_than_three_images_are_in_memory(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is read, one is segmented, one is written; however slow the disk is, the others wait."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        shutil.copy(images[number % 2], folder / f"case_{number}.nii.gz")
    alive, most = set(), 0
    changed = threading.Condition()
    opened, written = segment_run.SegmentationRun._open, segment_run.SegmentationRun._write

    def open_and_count(self: object, item: tuple) -> object:
        nonlocal most
        with changed:
            alive.add(item[0])
            most = max(most, len(alive))
            changed.notify_all()
        return opened(self, item)  # type: ignore[arg-type]

    def write_and_count(self: object, image: segment_run.OpenedImage, segmentation: object) -> None:
        with changed:
            assert changed.wait_for(lambda: most >= 2, timeout=10), "nothing is read meanwhile"
            changed.wait_for(lambda: most > 4, timeout=0.2)
        written(self, image, segmentation)  # type: ignore[arg-type]
        with changed:
            alive.remove(image.case)

    monkeypatch.setattr(segment_run.SegmentationRun, "_open", open_and_count)
    monkeypatch.setattr(segment_run.SegmentationRun, "_write", write_and_count)
    assert len(autoseg.predict(folder, tmp_path / "out", model=model, device="cpu")) == 8
    assert most <= 4
