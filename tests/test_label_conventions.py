"""Labels of every kind, from the files to the scores, through the command line.

The images are so easy that a network learns them in seconds where it is told what they show, and so made that a wrong
handling cannot: each test says which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import CliRunner

import autoseg
from autoseg.cli import app
from autoseg.core.errors import DatasetError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (10, 24, 24)  # (z, y, x)
N_TRAIN, N_TEST = 8, 3
STEPS = "120"
FOREGROUND = (1.0, 2.0, 3.0)

Draw = Callable[[np.random.Generator], tuple[NDArray, NDArray]]
"""An image and its label map, both `SHAPE`."""


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def draw_ball(centre: NDArray, radius: float) -> NDArray[np.bool_]:
    """Flattened, as slices are twice as far apart as voxels in a slice."""
    z, y, x = np.indices(SHAPE)
    return np.sqrt((2 * (z - centre[0])) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) <= radius


def draw_nested(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A ball in a ball in a ball, each brighter than the one around it; the image and 0 to 3."""
    centre = np.array([SHAPE[0] / 2, *rng.uniform(9, 15, 2)])
    label = sum(draw_ball(centre, radius).astype(int) for radius in (8.0, 6.0, 3.5))
    image = np.array([0.0, *FOREGROUND])[label] + 0.15 * rng.standard_normal(SHAPE)
    return image, np.asarray(label)


def draw_pair(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A bright ball (1) and a dark one (2) on either side."""
    label = np.zeros(SHAPE, int)
    for value, x in enumerate(rng.permutation([6.0, 17.0]), start=1):
        label[draw_ball(np.array([SHAPE[0] / 2, rng.uniform(9, 15), x]), 5.0)] = value
    return np.array([0.0, 2.0, -2.0])[label] + 0.2 * rng.standard_normal(SHAPE), label


def save(path: Path, volume: NDArray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return str(path)


def load(path: Path) -> NDArray:
    return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)


def dice(a: NDArray, b: NDArray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def fit(dataset: Path, folder: Path, *, steps: str = STEPS) -> Path:
    """Plans, trains one fold without augmentation, and segments the images for testing; the label maps."""
    run("plan", dataset, "-w", folder / "work", "--configurations", "3d_fullres")
    train = ["--iterations", steps, "--augment", "none", "--device", "cpu", "--batch-size", "2"]
    run("train", "--fold", 0, "-w", folder / "work", *train)
    run("predict", folder / "test", folder / "out", "-w", folder / "work", "--device", "cpu")
    return folder / "out"


def write_nnunet(
    folder: Path, draw: Any, labels: Mapping[str, Any], values: NDArray, **more: Any
) -> dict[str, NDArray]:
    """A dataset in nnU-Net's layout, whose label maps have `values` instead of 0, 1, ...; the test cases' labels."""
    rng = np.random.default_rng(0)
    for index in range(N_TRAIN):
        image, label = draw(rng)
        save(folder / "data" / "imagesTr" / f"c{index}_0000.nii.gz", image.astype(np.float32))
        save(folder / "data" / "labelsTr" / f"c{index}.nii.gz", values[label].astype(np.uint8))
    content = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", **more}
    (folder / "data" / "dataset.json").write_text(json.dumps(content))
    return write_tests(folder, draw, values)


def write_tests(folder: Path, draw: Draw, values: NDArray) -> dict[str, NDArray]:
    rng = np.random.default_rng(1)
    wanted = {}
    for index in range(N_TEST):
        image, label = draw(rng)
        save(folder / "test" / f"t{index}_0000.nii.gz", image.astype(np.float32))
        wanted[f"t{index}"] = values[label]
        save(folder / "wanted" / f"t{index}.nii.gz", values[label].astype(np.uint8))
    return wanted


def test_regions_overlap_and_are_written_as_values_with_gaps(tmp_path: Path) -> None:
    """Taken for exclusive classes, the whole would be a ring; 117 must come back as 117."""
    labels: dict[str, Any] = {"background": 0, "whole": [5, 20, 117], "core": [20, 117], "enhancing": 117}
    wanted = write_nnunet(tmp_path, draw_nested, labels, np.array([0, 5, 20, 117]), regions_class_order=[5, 20, 117])
    out = fit(tmp_path / "data", tmp_path)
    weights = load_file(next((tmp_path / "work" / "models").rglob("weights.safetensors")))
    heads = [array for name, array in weights.items() if name.startswith("heads.") and name.endswith("weight")]
    assert {len(head) for head in heads} == {3}, "one output for each region, none for the background"
    for case, reference in wanted.items():
        predicted = load(out / f"{case}.nii.gz")
        assert set(np.unique(predicted)) <= {0, 5, 20, 117}
        for name in ("whole", "core", "enhancing"):
            values = np.atleast_1d(labels[name])
            assert dice(np.isin(predicted, values), np.isin(reference, values)) > 0.85, name
    table = run("evaluate", out, tmp_path / "wanted")
    assert all(name in table for name in ("whole", "core", "enhancing"))
    scores = json.loads((out / "evaluation.json").read_text())
    assert [label["label"] for label in scores["labels"]] == ["whole", "core", "enhancing"]
    record = json.loads((out / "prediction.json").read_text())
    volumes = record["cases"]["t0"]["volumes_ml"]
    assert volumes["whole"] > volumes["core"] > volumes["enhancing"] > 0


def test_what_nobody_annotated_is_not_learned_as_background(tmp_path: Path) -> None:
    """Two of ten slices are annotated. Taken for background, the others would make nearly everything background."""

    def draw_sparse(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
        image, label = draw_nested(rng)
        kept = rng.choice(SHAPE[0], 2, replace=False)
        hidden = np.full(SHAPE, 4)
        hidden[kept] = label[kept]
        return image, hidden

    labels = {"background": 0, "outer": 1, "middle": 2, "inner": 3, "ignore": 4}
    write_nnunet(tmp_path, draw_sparse, labels, np.arange(5))
    wanted = write_tests(tmp_path, draw_nested, np.arange(4))
    out = fit(tmp_path / "data", tmp_path)
    for case, reference in wanted.items():
        predicted = load(out / f"{case}.nii.gz")
        assert predicted.max() <= 3, "the value to ignore is never written"
        found = [dice(predicted == value, reference == value) for value in (1, 2, 3)]
        assert min(found) > 0.7, found
    scores = json.loads(next((tmp_path / "work" / "models").rglob("evaluation.json")).read_text())
    assert scores["settings"]["ignore"] == 4
    first = scores["cases"][0]["labels"][0]
    assert first["n_reference"] < 2 * SHAPE[1] * SHAPE[2], "only what is annotated is scored"


def test_a_structure_that_was_not_annotated_in_a_case_is_not_learned_as_background(tmp_path: Path) -> None:
    """Each case has one of two structures annotated. Taken for background, each would be one in every other case."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(N_TRAIN):
        image, label = draw_pair(rng)
        known = 1 + index % 2
        files = {
            "image": save(tmp_path / "raw" / f"c{index}.nii.gz", image.astype(np.float32)),
            "label": save(
                tmp_path / "raw" / f"c{index}_seg.nii.gz", np.where(label == known, label, 0).astype(np.uint8)
            ),
        }
        cases.append({"id": f"c{index}", "annotated": [("bright", "dark")[known - 1]], **files})
    manifest = {"channels": ["MR"], "labels": {"background": 0, "bright": 1, "dark": 2}, "cases": cases}
    (tmp_path / "cases.json").write_text(json.dumps(manifest))
    wanted = write_tests(tmp_path, draw_pair, np.arange(3))
    out = fit(tmp_path / "cases.json", tmp_path)
    for case, reference in wanted.items():
        predicted = load(out / f"{case}.nii.gz")
        assert dice(predicted == 1, reference == 1) > 0.85
        assert dice(predicted == 2, reference == 2) > 0.85
    scores = json.loads(next((tmp_path / "work" / "models").rglob("evaluation.json")).read_text())
    assert all("not annotated" in [label["status"] for label in case["labels"]] for case in scores["cases"])


def test_a_case_must_be_annotated_as_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, label = draw_pair(rng)
    files = {
        "image": save(tmp_path / "c.nii.gz", image.astype(np.float32)),
        "label": save(tmp_path / "c_seg.nii.gz", label.astype(np.uint8)),
    }
    for annotated, message in ((["bright"], "dark"), (["brigth"], "brigth")):
        manifest = {
            "channels": ["MR"],
            "labels": {"bright": 1, "dark": 2},
            "cases": [{"annotated": annotated, **files}],
        }
        (tmp_path / "cases.json").write_text(json.dumps(manifest))
        with pytest.raises(DatasetError, match=message):
            autoseg.plan(tmp_path / "cases.json", tmp_path / "work")


def test_structures_with_a_file_each_may_overlap(tmp_path: Path) -> None:
    """The left and the right half of a ball share its middle: in one label map of two values, one would be cut."""
    rng = np.random.default_rng(0)
    rows = ["case,image,label_left,label_right"]
    x = np.indices(SHAPE)[2]

    def split(image: NDArray, ball: NDArray) -> tuple[NDArray, NDArray]:
        """The shared middle is brightest."""
        centre = int(x[ball].mean())
        return ball & (x <= centre + 2), ball & (x >= centre - 2)

    def draw(rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
        _, label = draw_nested(rng)
        left, right = split(label, label > 0)
        image = 1.0 * left - 1.0 * right + 2.0 * (left & right) + 0.15 * rng.standard_normal(SHAPE)
        return image, left, right

    for index in range(N_TRAIN):
        image, left, right = draw(rng)
        folder = tmp_path / "raw" / f"c{index}"
        save(folder / "image.nii.gz", image.astype(np.float32))
        save(folder / "l.nii.gz", left.astype(np.uint8))
        save(folder / "r.nii.gz", 255 * right.astype(np.uint8))
        rows.append(f"c{index},raw/c{index}/image.nii.gz,raw/c{index}/l.nii.gz,raw/c{index}/r.nii.gz")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    rng, wanted = np.random.default_rng(1), {}
    for index in range(N_TEST):
        image, left, right = draw(rng)
        save(tmp_path / "test" / f"t{index}_0000.nii.gz", image.astype(np.float32))
        wanted[f"t{index}"] = {"left": left, "right": right}
    out = fit(tmp_path / "cases.csv", tmp_path)
    for case, structures in wanted.items():
        found = {name: load(out / "structures" / case / f"{name}.nii.gz") > 0 for name in structures}
        assert all(dice(found[name], mask) > 0.85 for name, mask in structures.items())
        shared = structures["left"] & structures["right"]
        assert dice(found["left"] & found["right"], shared) > 0.7
