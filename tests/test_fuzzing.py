"""Whatever a file holds, it is read or refused in words: made-up datasets, plans and manifests, and damaged files.

`scripts/fuzz.py` does the same for as long as one likes; its targets are what is fed here.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import fuzz
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The same examples in every run, so that what fails here fails for everybody.
quick = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


def feed(target: str, data: bytes, folder: Path) -> bool:
    """Whether it was accepted; fails where it was neither that nor refused by an `AutosegError`."""
    return bool(fuzz.feed(fuzz.TARGETS[target], data, folder / "input"))


# -- strategies --------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 5),
    st.floats(allow_nan=True, allow_infinity=True),
    names,
    st.sampled_from(["", "0", "nan", "1e999", "i0.nii", "../i0.nii", "/etc/passwd", "."]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed_json(draw: st.DrawFn, whole: Any) -> Any:
    """A value with up to four places replaced, deleted, or renamed."""
    changed = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 4))):
        places = list(fuzz._places(changed))
        if not places:
            return draw(values)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "rename"]))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "delete":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(names)] = holder.pop(key)
    return changed


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """JSON manifests whose cases are much alike, and not always right."""
    files = st.sampled_from(["i0.nii", "i1.nii", "i2.nii", "l0.nii", "l1.nii", "missing.nii", "../a.nii", ""])
    label = st.one_of(files, st.none(), st.dictionaries(names, files, max_size=3))
    case = st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(names, scalars),
            "group": scalars,
            "image": files,
            "images": st.lists(st.one_of(files, st.none()), max_size=3),
            "label": label,
            "annotated": st.one_of(st.none(), st.lists(names, max_size=2), scalars),
            "age": scalars,
        },
    )
    whole = {
        "name": draw(st.one_of(names, scalars)),
        "channels": draw(st.one_of(st.lists(names, max_size=3), st.just(["CT"]), values)),
        "labels": draw(st.one_of(st.dictionaries(names, st.integers(0, 4), max_size=4), values)),
        "cases": draw(st.one_of(st.lists(case, max_size=4), values)),
    }
    return json.dumps(whole).encode()


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """CSV manifests: columns of known and other names, and cells of anything."""
    known = st.sampled_from(
        ["case", "group", "image", "image_CT", "image_", "label", "label_a", "label_b", "annotated"]
    )
    columns = draw(st.lists(st.one_of(known, known, names), min_size=1, max_size=6))
    cell = st.one_of(st.sampled_from(["i0.nii", "l0.nii", "i1.nii", "", "a;b", '"', "\0", "\r"]), names)
    rows = draw(st.lists(st.lists(cell, max_size=7), max_size=4))
    return "\n".join(",".join(row) for row in [columns, *rows]).encode("utf-8", "replace")


@st.composite
def datasets(draw: st.DrawFn, folder: Path) -> Path:
    """A small dataset in nnU-Net's layout: names, shapes, types, affines and values of any kind."""
    root = folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    for inner in ("imagesTr", "labelsTr"):
        (root / inner).mkdir(parents=True)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    axes = st.integers(1, 18)
    usual = draw(st.tuples(axes, axes, axes))
    spacing = draw(st.tuples(*[st.floats(0.01, 50)] * 3))
    n_channels = draw(st.integers(1, 2))
    for case in draw(st.lists(names.filter(lambda name: len(name.encode()) < 60), min_size=1, max_size=4, unique=True)):
        shape = draw(st.one_of(st.just(usual), st.just(usual), st.lists(axes, min_size=2, max_size=4).map(tuple)))
        affine = np.diag([*(np.array(spacing) * draw(st.sampled_from([1, 1, -1, 1.0001, 1.3]))), 1.0])
        for channel in range(n_channels):
            kind = draw(st.sampled_from([np.float32, np.int16, np.uint8, np.float64]))
            voxels = (100 * rng.random(shape) * draw(st.sampled_from([1, 1, 1, 0, 1e30]))).astype(
                kind, casting="unsafe"
            )
            if draw(st.integers(0, 9)) == 0 and voxels.dtype.kind == "f":
                voxels.flat[0] = draw(st.sampled_from([np.nan, np.inf]))
            nibabel.save(nibabel.Nifti1Image(voxels, affine), root / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        label = rng.integers(0, draw(st.integers(1, 4)), shape).astype(draw(st.sampled_from([np.uint8, np.float32])))
        label *= draw(st.sampled_from([1, 1, 1, 0, 127]))
        nibabel.save(nibabel.Nifti1Image(label, affine), root / "labelsTr" / f"{case}.nii.gz")
    labels = draw(st.one_of(st.just({"background": 0, "a": 1, "b": 2}), st.dictionaries(names, st.integers(0, 5))))
    channels = {str(channel): draw(st.one_of(st.just("CT"), names)) for channel in range(n_channels)}
    content = {"channel_names": channels, "labels": labels, "file_ending": ".nii.gz", "name": draw(names)}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A NIfTI file of which up to five parts of the header are something else, plain or compressed."""
    kind = draw(st.sampled_from([nibabel.Nifti1Image, nibabel.Nifti2Image]))
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    voxels = np.zeros(shape, draw(st.sampled_from([np.uint8, np.int16, np.float32, np.float64])))
    data = bytearray(kind(voxels, np.eye(4)).to_bytes())
    number = st.one_of(
        st.integers(0, 2**64 - 1).map(lambda value: value.to_bytes(8, "little")),
        st.integers(-40000, 40000).map(lambda value: value.to_bytes(4, "little", signed=True)),
        st.floats(width=32).map(lambda value: np.float32(value).tobytes()),
        st.floats().map(lambda value: np.float64(value).tobytes()),
    )
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, 359)) & ~draw(st.sampled_from([0, 1, 3]))
        part = draw(number)
        data[place : place + len(part)] = part
    return b"z" + gzip.compress(bytes(data), 1) if draw(st.booleans()) else b"n" + bytes(data)


# -- what is fed -------------------------------------------------------------------------------------------------------


@quick(max_examples=400)
@given(data=headers())
def test_nifti_headers(data: bytes, tmp_path: Path) -> None:
    feed("nifti", data, tmp_path)


@quick(max_examples=250)
@given(data=manifests())
def test_json_manifests(data: bytes, tmp_path: Path) -> None:
    feed("manifest", data, tmp_path)


@quick(max_examples=250)
@given(data=tables())
def test_tables(data: bytes, tmp_path: Path) -> None:
    feed("manifest", data, tmp_path)


@quick(max_examples=300)
@given(draw=st.data())
def test_plans(draw: st.DataObject, tiny_work: Path, tmp_path: Path) -> None:
    whole = json.loads((tiny_work / "plan.json").read_text())
    feed("plan", json.dumps(draw.draw(changed_json(whole))).encode(), tmp_path)


@quick(max_examples=60)
@given(draw=st.data())
def test_datasets(draw: st.DataObject, tmp_path: Path) -> None:
    """From the folder to the plan."""
    from autoseg import pipeline
    from autoseg.core.errors import AutosegError

    folder = draw.draw(datasets(tmp_path / "made"))
    with contextlib.suppress(AutosegError):
        pipeline.plan(folder, tmp_path / "made" / "work", preprocess="none")


@pytest.mark.parametrize(
    ("target", "n_inputs"),
    [("nifti", 500), ("images", 150), ("plan", 500), ("zip", 60), ("manifest", 800), ("dataset", 8)],
)
def test_random_mutations(target: str, n_inputs: int, tmp_path: Path) -> None:
    """What the script does by itself, with inputs that are the same in every run."""
    result = fuzz.fuzz(target, seconds=500, seed=1, crashes=tmp_path / "crashes", n_most=n_inputs)
    shown = "\n".join(file.read_text() for file in sorted((tmp_path / "crashes").glob("*.traceback")))
    assert result.crashes == 0, shown
    assert result.inputs == n_inputs
    assert result.accepted
    assert result.refused or target == "dataset"


def test_a_crash_is_noticed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above can fail."""

    def stumble(data: bytes, folder: Path) -> None:
        if len(data) % 2:
            raise IndexError("of an odd length")

    made = fuzz.Target(lambda _: [b"even"], lambda _, rng: b"x" * rng.randrange(9), stumble, "txt")
    monkeypatch.setitem(fuzz.TARGETS, "made", made)
    result = fuzz.fuzz("made", seconds=9, seed=0, crashes=tmp_path, n_most=50)
    assert result.crashes == len(result.files) == 1
    (kept,) = map(Path, result.files)
    assert len(kept.read_bytes()) % 2
    assert "IndexError: of an odd length" in kept.with_name(kept.name + ".traceback").read_text()
    assert result.accepted + result.refused < 50


def test_mutations_are_the_same_for_the_same_seed() -> None:
    data = json.dumps({"a": [1, {"b": 2.5}], "c": "text"}).encode()
    for mutate in (fuzz.mutate_json_text, fuzz.mutate_manifest):
        first, second = ([mutate(data, rng) for _ in range(50)] for rng in (random.Random(3), random.Random(3)))
        assert first == second
        assert len(set(first)) > 25
