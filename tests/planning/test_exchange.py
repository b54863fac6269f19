"""Fingerprints from files, ours and nnU-Net's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fingerprints import make_channel_fingerprint

from autoseg.core.errors import AutosegError
from autoseg.core.serialize import write_json
from autoseg.planning.exchange import read_fingerprint
from autoseg.planning.fingerprint import CaseFingerprint, Fingerprint

STATISTICS = {"mean": 1, "std": 2, "min": -3, "max": 4, "median": 0.5, "percentile_00_5": -2, "percentile_99_5": 3}


def foreign() -> dict[str, Any]:
    """A fingerprint of nnU-Net: two cases, two channels."""
    return {
        "spacings": [[3.0, 1.0, 0.9], [2, 1, 1]],
        "shapes_after_crop": [[20, 100, 110], [30, 100, 100]],
        "median_relative_size_after_cropping": 0.6,
        "foreground_intensity_properties_per_channel": {"0": STATISTICS, "1": STATISTICS},
    }


def description() -> dict[str, Any]:
    return {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "b": 2, "a": 1}, "numTraining": 2}


def write(folder: Path, fingerprint: Any, dataset: Any) -> tuple[Path, Path]:
    files = folder / "dataset_fingerprint.json", folder / "dataset.json"
    for file, content in zip(files, (fingerprint, dataset), strict=True):
        file.write_text(json.dumps(content))
    return files


def test_nnunets_fingerprint(tmp_path: Path) -> None:
    fingerprint, labels, name = read_fingerprint(*write(tmp_path, foreign(), description()))
    assert [case.cropped_shape for case in fingerprint.cases] == [(20, 100, 110), (30, 100, 100)]
    assert [case.spacing_mm for case in fingerprint.cases] == [(3.0, 1.0, 0.9), (2.0, 1.0, 1.0)]
    assert [channel.name for channel in fingerprint.channels] == ["T1", "CT"]
    assert fingerprint.channels[1].percentile_99_5 == 3.0
    assert fingerprint.channels[1].minimum == -3.0
    assert fingerprint.median_cropped_fraction == 0.6
    assert (labels.names, labels.values) == (("a", "b"), (1, 2))
    assert name == tmp_path.name


def test_our_own_fingerprint_with_any_dataset_json(tmp_path: Path) -> None:
    case = CaseFingerprint(
        case="c", shape=(9, 9, 9), spacing_mm=(1.0, 1, 1), cropped_shape=(8, 8, 8), label_volumes_ml=(1.0,)
    )
    ours = Fingerprint(cases=(case,), channels=(make_channel_fingerprint("MR"),), median_cropped_fraction=0.7)
    write_json(tmp_path / "fingerprint.json", ours)
    for labels in ({"background": 0, "x": 7}, {"0": "background", "7": "x"}, {"names": ["x"], "values": [7]}):
        (tmp_path / "dataset.json").write_text(json.dumps({"name": "mine", "labels": labels}))
        found, spec, name = read_fingerprint(tmp_path / "fingerprint.json", tmp_path / "dataset.json")
        assert (found, spec.names, spec.values, name) == (ours, ("x",), (7,), "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, d: f.pop("spacings"), "dataset_fingerprint.json: the key 'spacings' is missing"),
        (lambda f, d: f["spacings"].pop(), "1 spacings and 2 shapes"),
        (lambda f, d: f["spacings"].__setitem__(0, [1, 1]), r"spacings\[0\]: .* expected a list of 3"),
        (lambda f, d: f["shapes_after_crop"].__setitem__(0, [1.5, 1, 1]), "expected a whole number"),
        (lambda f, d: f["foreground_intensity_properties_per_channel"].pop("1"), "the dataset has 2 channels"),
        (
            lambda f, d: f["foreground_intensity_properties_per_channel"].update({"0": {"mean": 1}}),
            "channel 0 lack max",
        ),
        (lambda f, d: d.pop("channel_names"), "dataset.json: the key 'channel_names' is missing"),
        (lambda f, d: d.pop("labels"), "dataset.json: the key 'labels' is missing"),
        (lambda f, d: d.update(labels={"background": 0}), "label"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, change: Any, message: str) -> None:
    fingerprint, dataset = foreign(), description()
    change(fingerprint, dataset)
    with pytest.raises(AutosegError, match=message):
        read_fingerprint(*write(tmp_path, fingerprint, dataset))


@pytest.mark.parametrize("content", ["[]", "{", '"text"', ""])
def test_files_that_are_something_else(tmp_path: Path, content: str) -> None:
    files = write(tmp_path, foreign(), description())
    for file in files:
        before = file.read_text()
        file.write_text(content)
        with pytest.raises(AutosegError, match=file.name):
            read_fingerprint(*files)
        file.write_text(before)
    with pytest.raises(AutosegError, match="no such file"):
        read_fingerprint(tmp_path / "gone.json", files[1])
