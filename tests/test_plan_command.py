"""`autoseg plan` as a user runs it: from images or from a fingerprint, with choices, explained."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

COMMAND = Path(sys.executable).with_name("autoseg")
PLANS = Path(__file__).parents[1] / "plans"


def plan(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs `autoseg plan` in `cwd` and expects an exit code."""
    command = [str(COMMAND), "plan", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with nnU-Net's two files about a dataset of large CTs."""
    statistics = {"mean": 1, "std": 2, "min": -3, "max": 4, "median": 0.5, "percentile_00_5": -2, "percentile_99_5": 3}
    fingerprint = {
        "spacings": [[1.0, 0.8, 0.8]] * 20,
        "shapes_after_crop": [[420, 512, 512]] * 20,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": statistics},
    }
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 20}
    (tmp_path / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return tmp_path


def read_json(text: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text)
    return content


def test_a_plan_from_nnunets_fingerprint_as_json(foreign: Path) -> None:
    options = ("--fingerprint", "dataset_fingerprint.json", "--dataset-json", "dataset.json", "--json")
    done = read_json(plan(*options, "--preset", "resenc-m", cwd=foreign).stdout)
    assert done["axis_order"] == [0, 1, 2]
    assert done["recommended"] == "3d_cascade_fullres"
    assert set(done["configurations"]) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    for name, configuration in done["configurations"].items():
        n_axes = 2 if name == "2d" else 3
        assert [len(configuration[key]) for key in ("spacing_mm", "median_shape", "patch_size")] == [n_axes] * 3
        assert configuration["batch_size"] >= 2
        assert isinstance(configuration["batch_dice"], bool)
        assert configuration["previous"] == ("3d_lowres" if name == "3d_cascade_fullres" else None)
        network = configuration["network"]
        assert network["architecture"] == "resenc_unet"
        n_stages = len(network["features"])
        assert [len(network[key]) for key in ("strides", "kernel_sizes", "encoder_blocks")] == [n_stages] * 3
        assert len(network["decoder_blocks"]) == n_stages - 1
    assert sorted(file.name for file in foreign.iterdir()) == ["dataset.json", "dataset_fingerprint.json"]


def test_more_memory_and_an_explanation(foreign: Path) -> None:
    options = ("--fingerprint", "dataset_fingerprint.json", "--gpu-memory", 80)
    explained = plan(*options, "--explain", cwd=foreign).stdout
    assert "gpu_memory_gib: 80 GiB, set by user" in explained
    assert "axis_order: z is the through-plane axis because" in explained
    assert "GiB of disk for the preprocessed cases" in explained
    made = read_json(plan(*options, "--json", cwd=foreign).stdout)
    for reason in made["reasons"]:
        assert reason["text"] in explained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "resenc"), "no preset 'resenc'; did you mean 'resenc-"),
        (("--patch-size", "100,100,100"), "the nearest valid one is 96,96,96"),
        (("--batch-size", "3d_fullres=3"), "the nearest valid value is 2"),
        (("-c", "3d_full"), "did you mean '3d_fullres'?"),
        (("--measure",), "leave out DATASET and --measure|--measure needs an NVIDIA GPU"),
        (("--like", PLANS / "msd_livr.json"), "did you mean 'msd_liver.json'?"),
        (("--batch-size", "3d_lowres=99"), "3d_lowres: batch_size 99 needs about"),
        (("--dataset-json", "nothing.json"), "nothing.json: no such file"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(foreign: Path, options: tuple[object, ...], message: str) -> None:
    error = plan("--fingerprint", "dataset_fingerprint.json", *options, cwd=foreign, code=2).stderr
    assert any(part in error for part in message.split("|")), error


def test_planning_nothing_says_what_to_name(tmp_path: Path) -> None:
    assert "name the dataset" in plan(cwd=tmp_path, code=2).stderr
    assert "plan.json: no such file" in plan("--explain", cwd=tmp_path, code=2).stderr
    assert "leave out the options" in plan("--explain", "--preset", "resenc-l", cwd=tmp_path, code=2).stderr
    assert "belongs to --fingerprint" in plan("--dataset-json", "x.json", cwd=tmp_path, code=2).stderr
    assert "x.json: no such file" in plan("--fingerprint", "x.json", cwd=tmp_path, code=2).stderr


def test_nothing_of_the_users_is_overwritten(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    before = (data / "dataset.json").read_text()
    assert "name another work folder with -w" in plan(data, "-w", data, cwd=tmp_path, code=2).stderr
    assert (data / "dataset.json").read_text() == before


def test_a_resolution_beyond_the_memory_is_refused_with_its_numbers(tiny_dataset: Path, tmp_path: Path) -> None:
    error = plan(tiny_dataset, "--spacing", "0.005", "-c", "3d_fullres", cwd=tmp_path, code=2).stderr
    assert "resampling multiplies the voxels" in error
    assert "more than may be used here; plan with a coarser --spacing" in error


def test_an_earlier_look_that_was_interrupted_is_not_trusted(tiny_dataset: Path, tmp_path: Path) -> None:
    work = tmp_path / "autoseg-work"
    plan(tiny_dataset, "--no-preprocess", cwd=tmp_path)
    whole = read_json((work / "fingerprint.json").read_text())
    (work / "fingerprint.json").write_text(json.dumps({**whole, "cases": whole["cases"][1:]}))
    again = plan(tiny_dataset, "--no-preprocess", cwd=tmp_path).stderr
    assert "no file has changed" not in again
    assert read_json((work / "fingerprint.json").read_text()) == whole
    (work / "dataset.json").write_text("{")
    plan(tiny_dataset, "--no-preprocess", cwd=tmp_path)
    assert len(read_json((work / "dataset.json").read_text())["cases"]) == len(whole["cases"])


def test_measuring_needs_a_gpu_and_says_so_first(tiny_dataset: Path, tmp_path: Path) -> None:
    error = plan(tiny_dataset, "--measure", "--device", "cpu", cwd=tmp_path, code=2).stderr
    assert "--measure needs an NVIDIA GPU, found the device 'cpu'" in error
    assert not (tmp_path / "autoseg-work").exists()


def test_what_is_set_is_kept_and_only_what_it_changes_is_done_again(tiny_dataset: Path, tmp_path: Path) -> None:
    first = plan(tiny_dataset, cwd=tmp_path).stderr
    assert "preprocessed 6 cases for 3d_fullres" in first
    page = (tmp_path / "autoseg-work" / "report" / "plan.html").read_text()
    assert "spacing is the median of each axis" in page

    again = plan(tiny_dataset, "--batch-size", "3d_fullres=3", cwd=tmp_path).stderr
    assert "no file has changed since the last time" in again
    assert "the plan has changed; the one before is kept" in again
    assert "preprocessed 0 cases for 3d_fullres" in again
    made = read_json((tmp_path / "autoseg-work" / "plan.json").read_text())
    assert made["configurations"]["3d_fullres"]["batch_size"] == 3
    reasons = {reason["subject"]: reason["text"] for reason in made["reasons"]}
    assert reasons["configurations.3d_fullres.batch_size"].startswith("set by user")

    coarser = plan(tiny_dataset, "--spacing", "14,7,7", "-c", "all", cwd=tmp_path).stderr
    assert "preprocessed 6 cases for 2d" in coarser
    assert "preprocessed 6 cases for 3d_fullres" in coarser
    assert "7 x 7 mm" in plan("--explain", cwd=tmp_path).stdout

    # The work folder's own fingerprint plans the same without the images.
    files = ("--fingerprint", "autoseg-work/fingerprint.json", "--spacing", "14,7,7", "--json")
    without = read_json(plan(*files, cwd=tmp_path).stdout)
    with_images = read_json(plan("--json", cwd=tmp_path).stdout)
    assert without["configurations"] == with_images["configurations"]
    assert without["reasons"] == with_images["reasons"]


def test_another_case_of_an_mr_dataset_leaves_the_others_as_they_are(tiny_dataset: Path, tmp_path: Path) -> None:
    """CT is scaled by the statistics of all cases, MR by each image's own."""
    for channel, n_made in (("MR", 1), ("CT", 6)):
        dataset, held_out = tmp_path / channel, tmp_path / f"{channel}-6"
        shutil.copytree(tiny_dataset, dataset)
        content = json.loads((dataset / "dataset.json").read_text())
        content["channel_names"] = {"0": channel}
        (dataset / "dataset.json").write_text(json.dumps(content))
        held_out.mkdir()
        last = [sorted((dataset / folder).iterdir())[-1] for folder in ("imagesTr", "labelsTr")]
        for file in last:
            file.rename(held_out / file.name)
        options = (dataset, "-w", tmp_path / f"{channel}-work", "-c", "3d_fullres", "--spacing", "14,7,7")
        assert "preprocessed 5 cases" in plan(*options, cwd=tmp_path).stderr
        for file in last:
            (held_out / file.name).rename(file)
        assert f"preprocessed {n_made} cases" in plan(*options, cwd=tmp_path).stderr


def test_folds_as_the_user_asks_for_them(tiny_dataset: Path, tmp_path: Path) -> None:
    labels = sorted((tiny_dataset / "labelsTr").iterdir())
    names = [file.name.removesuffix(".nii.gz") for file in labels]
    rows = [
        f"{tiny_dataset}/imagesTr/{name}_0000.nii.gz,{file},p{number // 2},{'aab'[number // 2]}"
        for number, (name, file) in enumerate(zip(names, labels, strict=True))
    ]
    (tmp_path / "scans.csv").write_text("\n".join(["image,label,patient,site", *rows]))
    work, options = tmp_path / "autoseg-work", ("--no-preprocess", "-c", "3d_fullres", "--allow-outside")

    def read_folds() -> list[dict[str, list[str]]]:
        folds: list[dict[str, list[str]]] = read_json((work / "splits.json").read_text())["folds"]
        return folds

    def read_reasons() -> dict[str, str]:
        reasons = read_json((work / "plan.json").read_text())["reasons"]
        return {reason["subject"]: reason["text"] for reason in reasons}

    plan("scans.csv", *options, cwd=tmp_path)
    assert len(read_folds()) == 5
    assert "n_folds" not in read_reasons()

    grouped = plan("scans.csv", *options, "--groups", "column:patient", "--stratify", "site", cwd=tmp_path).stderr
    assert "no file has changed since the last time" in grouped
    assert "3 groups of 6 cases" in grouped
    assert "found 3 groups of cases for 5 folds" in grouped
    assert sorted(fold["validation"] for fold in read_folds()) == [names[:2], names[2:4], names[4:]]
    groups = [case["group"] for case in read_json((work / "dataset.json").read_text())["cases"]]
    assert groups == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert "groups by 'column:patient'; nearly as many cases of each value of 'site'" in read_reasons()["n_folds"]
    assert "groups by 'column:patient'" in html.unescape((work / "report" / "plan.html").read_text())

    # Without the option, the groups are the dataset's own again.
    (tmp_path / "held.txt").write_text("\n".join(names[:2]))
    single = plan("scans.csv", *options, "--validation", "held.txt", cwd=tmp_path)
    assert "Next: autoseg train --fold 0" in single.stdout
    assert read_folds() == [{"training": names[2:], "validation": names[:2]}]
    assert "p0" not in [case["group"] for case in read_json((work / "dataset.json").read_text())["cases"]]

    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": names[1:], "val": names[:2]}]))
    before = (work / "splits.json").read_text()
    leak = plan("scans.csv", *options, cwd=tmp_path, code=2).stderr
    assert "splits_final.json; --folds makes others" in leak
    assert f"case in training and validation of one fold (1)\n  - {names[1]}: fold 0" in leak
    assert (work / "splits.json").read_text() == before
    plan("scans.csv", *options, "--folds", 2, cwd=tmp_path)
    assert len(read_folds()) == 2

    for wrong in (("--validation", "held.txt"), ("--folds", 3)):
        assert "leave out the options that change" in plan("--explain", *wrong, cwd=tmp_path, code=2).stderr
    without = ("--fingerprint", "autoseg-work/fingerprint.json", "--groups", "(.)")
    assert "--fingerprint knows no cases" in plan(*without, cwd=tmp_path, code=2).stderr


def test_a_changed_label_map_is_looked_at_again(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    plan(data, "--no-preprocess", cwd=tmp_path)
    file = sorted((data / "labelsTr").iterdir())[0]
    label = nib.load(file)
    nib.save(nib.Nifti1Image(np.full(label.shape, 77, np.uint8), label.affine), file)
    assert "found 77" in plan(data, cwd=tmp_path, code=2).stderr


def test_the_plan_of_a_well_known_dataset_for_another(tiny_dataset: Path, tmp_path: Path) -> None:
    source = read_json((PLANS / "msd_spleen.json").read_text())["plan"]
    plan(tiny_dataset, "--like", PLANS / "msd_spleen.json", "--no-preprocess", cwd=tmp_path)
    made = read_json(plan("--json", cwd=tmp_path).stdout)
    assert made["configurations"].keys() == source["configurations"].keys()
    for name, configuration in made["configurations"].items():
        for key in ("spacing_mm", "patch_size", "network"):
            assert configuration[key] == source["configurations"][name][key]
    assert made["labels"]["names"] == ["liver", "spleen", "kidneys", "aorta", "lesion"]
    assert any(reason["text"].startswith("as in msd_spleen.json") for reason in made["reasons"])
    # One's own choices would contradict it.
    refused = plan(tiny_dataset, "--like", PLANS / "msd_spleen.json", "--spacing", "1", cwd=tmp_path, code=2)
    assert "leave out the options" in refused.stderr
