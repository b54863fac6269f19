"""Feeds damaged and made-up files to autoseg: each must be read, or refused by an `AutosegError`, and nothing else.

    python scripts/fuzz.py --minutes 10                      every target, ten minutes each
    python scripts/fuzz.py --minutes 60 --target nifti       one
    python scripts/fuzz.py --replay fuzz-crashes/plan-1a2b3c4d.json

Targets: `nifti` (headers, extensions and streams), `images` (the other formats), `plan` (a work folder's plan.json),
`zip` (one-file models), `manifest` (dataset.json and CSV), `dataset` (small folders of cases, planned in full).

Inputs are mutations of whole files, made at random from a seed. Where atheris is installed (`pip install atheris`), the
targets whose input is a file are driven by the code that they reach instead, in a process of their own; `--engine
random` leaves that out. An input that ends in any other error, takes more than `SLOW_S` or more memory than
`--memory`, is written to `--crashes` with its traceback. Prints one line of JSON per target.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import logging
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.core.errors import AutosegError

SLOW_S = 20.0
SEED = 0
NAMES = ("a", "b c", "ö心", "x\u202ey", "-rf", "a'b\"c", "<b>", "%s", "..", "a" * 120, "$(id)", "case_0000", "\udc80")
NUMBERS = (0, 1, -1, 2, 3, 255, 2**15, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, math.inf, math.nan)
VALUES: tuple[Any, ...] = (*NUMBERS, None, True, False, "", *NAMES, [], {}, [[]], {"": ""}, [1, 2, 3], "1e999", "nan")
BYTES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff")


@dataclass(frozen=True)
class Target:
    """Something to feed.

    Attributes:
        seeds: makes whole inputs, in a folder that it may use.
        mutate: makes another input of one.
        run: reads an input, in a folder of its own; raises `AutosegError` where it refuses it.
        ending: of a file with an input.
    """

    seeds: Callable[[Path], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[bytes, Path], None]
    ending: str


@dataclass
class Result:
    """What came of a target.

    Attributes:
        target: its name.
        engine: "random" or "atheris".
        seed: of the mutations.
        minutes: that it took.
        inputs: that were tried.
        accepted: of these, read to the end.
        refused: of these, refused in words.
        crashes: of these, that ended in any other way, counted once for each place in the code.
        files: these inputs.
    """

    target: str
    engine: str
    seed: int
    minutes: float = 0.0
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    files: list[str] = field(default_factory=list)


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random, *, n_first: int | None = None) -> bytes:
    """Flips, overwrites, cuts, repeats or drops parts, mostly among the first `n_first` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        n = min(len(changed), n_first) if n_first and rng.random() < 0.9 else len(changed)
        place = rng.randrange(n) if n else 0
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            value = rng.choice(BYTES)
            changed[place : place + len(value)] = value
        elif kind == 2:
            size = rng.choice((2, 4, 8))
            number = rng.choice((rng.getrandbits(8 * size), 0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1)))
            changed[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 3:
            changed[place : place + 4] = struct.pack("<f", rng.choice((0.0, 1e30, -1e30, math.nan, math.inf, -1.0)))
        elif kind == 4 and rng.random() < 0.3:
            del changed[place : place + rng.choice((1, 4, 100, len(changed)))]
        elif kind == 5 and rng.random() < 0.3:
            changed[place:place] = changed[place : place + rng.choice((1, 4, 64))]
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three places replaced, deleted, renamed, repeated or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        old = holder[key]
        kind = rng.randrange(8)
        if kind <= 2:
            holder[key] = rng.choice(VALUES)
        elif kind == 3 and isinstance(old, (int, float)):
            holder[key] = rng.choice((-old, old + 1, old * 1000, float(old), str(old), [old], old // 2))
        elif kind == 4:
            del holder[key]
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice((*NAMES, key + " ", key.upper()))] = holder.pop(key)
        elif kind == 6 and isinstance(old, list):
            holder[key] = rng.choice((old * 2, old[:-1], old[::-1], [old], old[:1] * 50))
        elif kind == 7:
            other = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[0].get(other[1]) if isinstance(other[0], dict) else old))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    todo = [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            yield one, key
            todo.append(one[key])


def mutate_json_text(data: bytes, rng: random.Random) -> bytes:
    """Mostly as JSON, at times as bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_json(value, rng), ensure_ascii=False).encode("utf-8", "backslashreplace")


def mutate_nifti(data: bytes, rng: random.Random) -> bytes:
    """The header mostly, and the stream of the compressed ones: the first byte tells which an input is."""
    if data[:1] == b"z" and rng.random() < 0.8:
        with suppress(OSError, EOFError, zlib.error):
            return b"z" + gzip.compress(mutate_bytes(gzip.decompress(data[1:]), rng, n_first=360), 1)
    return data[:1] + mutate_bytes(data[1:], rng, n_first=360)


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the file, or a member, with hashes that are right at times."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    members = _members(data)
    name = rng.choice(list(members))
    if name.endswith(".json"):
        members[name] = mutate_json_text(members[name], rng)
    else:
        members[name] = mutate_bytes(members[name], rng, n_first=400)
    if rng.random() < 0.1:
        members[rng.choice(("../evil", "/evil", "fold_9/weights.safetensors", "postprocessing.json"))] = b"{}"
    if name != "manifest.json" and rng.random() < 0.9:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            other: {"n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for other, content in members.items()
            if other != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    return _pack(members, compression=zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def _pack(members: dict[str, bytes], *, compression: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return packed.getvalue()


# -- images ------------------------------------------------------------------------------------------------------------


def nifti_seeds(folder: Path) -> list[bytes]:
    import nibabel

    seeds = []
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for shape, dtype in (((5, 4, 3), np.int16), ((4, 4), np.uint8), ((3, 3, 3, 2), np.float32)):
            image = kind(np.arange(math.prod(shape)).reshape(shape).astype(dtype), np.diag([2.0, 1.5, 3.0, 1.0]))
            if len(shape) == 3:
                image.header.set_slope_inter(2, -1)
                image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"hello" * 5))
            nibabel.save(image, folder / "a.nii")
            plain = (folder / "a.nii").read_bytes()
            seeds += [b"n" + plain, b"z" + gzip.compress(plain, 1)]
    return seeds


def run_nifti(data: bytes, folder: Path) -> None:
    path = folder / ("a.nii.gz" if data[:1] == b"z" else "a.nii")
    path.write_bytes(data[1:])
    read_all(path)


def read_all(path: Path) -> None:
    """Reads a file as an image and as a label map; one of both is refused often enough."""
    from autoseg.data.io import read_image, read_label

    refused = None
    for read in (read_image, read_label):
        try:
            array, geometry = read(path)
        except AutosegError as error:
            refused = error
        else:
            assert array.shape[-3:] == geometry.shape
            assert all(math.isfinite(spacing) and spacing > 0 for spacing in geometry.spacing_mm), geometry.spacing_mm
    if refused is not None:
        raise refused


IMAGE_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd", ".tif", ".ome.tif", ".png", ".bmp", ".gif", ".jpg", ".dcm")


def image_seeds(folder: Path) -> list[bytes]:
    """The first byte is the number of the ending."""
    import SimpleITK
    import tifffile
    from PIL import Image

    voxels, colours = np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.zeros((4, 5, 3), np.uint8)
    seeds = []
    for number, ending in enumerate(IMAGE_ENDINGS):
        path = folder / f"seed{ending}"
        variants: list[Callable[[], object]] = []
        if ending in (".nrrd", ".mha", ".nhdr", ".mhd"):
            image = SimpleITK.GetImageFromArray(voxels)
            variants = [lambda i=image, p=path, c=c: SimpleITK.WriteImage(i, str(p), c) for c in (False, True)]  # type: ignore[misc]
        elif ending.endswith(".tif"):
            options: tuple[dict[str, Any], ...] = ({}, {"compression": "zlib"}, {"photometric": "rgb"})
            variants = [
                lambda p=path, o=o: tifffile.imwrite(p, colours if "photometric" in o else voxels, **o)  # type: ignore[misc]
                for o in options[: 2 if ".ome" in ending else 3]
            ]
        elif ending == ".dcm":
            variants = [lambda p=path: SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels[:1]), str(p))]  # type: ignore[misc]
        else:
            modes = ("L",) if ending == ".jpg" else ("L", "P")
            variants = [lambda p=path, m=m: Image.fromarray(voxels[0]).convert(m).save(p) for m in modes]  # type: ignore[misc]
        for make in variants:
            make()
            seeds.append(bytes([number]) + path.read_bytes())
    return seeds


def mutate_image(data: bytes, rng: random.Random) -> bytes:
    """Headers of text are changed in words as well."""
    if IMAGE_ENDINGS[data[0] % len(IMAGE_ENDINGS)] in (".nrrd", ".nhdr", ".mha", ".mhd") and rng.random() < 0.6:
        head, mark, rest = data[1:].partition(b"\n\n")
        lines = head.split(b"\n")
        place = rng.randrange(len(lines))
        words = lines[place].split(b" ")
        value = rng.choice(
            (
                *NUMBERS,
                *NAMES,
                "LIST",
                "LOCAL",
                "../a.raw",
                "a%d.raw 1 3 1",
                "(1,0,0)",
                "none",
                "gzip",
                "1 " * 5000,
                "x" * 3000,
            )
        )
        words[rng.randrange(len(words))] = str(value).encode("utf-8", "replace")
        lines[place] = b" ".join(words)
        if rng.random() < 0.2:
            lines.append(rng.choice(lines))
        return data[:1] + b"\n".join(lines) + mark + rest
    return data[:1] + mutate_bytes(data[1:], rng, n_first=400)


def run_image(data: bytes, folder: Path) -> None:
    path = folder / f"a{IMAGE_ENDINGS[data[0] % len(IMAGE_ENDINGS)] if data else '.png'}"
    path.write_bytes(data[1:])
    read_all(path)


# -- plans and models --------------------------------------------------------------------------------------------------


def plan_seeds(folder: Path) -> list[bytes]:
    from autoseg import pipeline
    from autoseg.data.phantom import write_phantom_dataset

    dataset = folder / "dataset"
    if not dataset.exists():
        write_phantom_dataset(dataset, n_train=5, n_test=1, coarseness=2.0)
    pipeline.plan(dataset, folder / "work", preprocess="none")
    return [(folder / "work" / "plan.json").read_bytes()]


def run_plan(data: bytes, folder: Path) -> None:
    from autoseg.pipeline import Workspace
    from autoseg.reporting.text import describe_plan

    (folder / "plan.json").write_bytes(data)
    describe_plan(Workspace(root=folder).read_plan())


def model_seeds(folder: Path) -> list[bytes]:
    import torch
    from safetensors.torch import save

    from autoseg.core.serialize import encode_json, from_plain
    from autoseg.inference.archive import FORMAT, FORMAT_VERSION, training_member, weights_member
    from autoseg.networks.build import build_network
    from autoseg.planning.plan import Plan
    from autoseg.training.folds import PLAN

    content = json.loads(plan_seeds(folder)[0])
    name = content["recommended"]
    network = content["configurations"][name]["network"]
    network["features"] = [2] * len(network["features"])
    content["configurations"] = {name: content["configurations"][name]}
    plan: Plan = from_plain(Plan, content)
    torch.manual_seed(0)
    channels, classes = len(plan.normalization), plan.labels.n_outputs
    built = build_network(plan.configuration(name).network, n_channels=channels, n_outputs=classes).state_dict()
    weights = save({key: tensor.contiguous() for key, tensor in built.items()})
    record: dict[str, Any] = {"autoseg": "0", "torch": "2", "device": "cpu", "precision": "float32", "recipe": "fast"}
    record |= {"seed": 0, "batch_size": 2, "mirrored": True}
    members = {PLAN: encode_json(plan), training_member(0): json.dumps(record).encode(), weights_member(0): weights}
    listed = {key: {"n_bytes": len(one), "sha256": hashlib.sha256(one).hexdigest()} for key, one in members.items()}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "autoseg": "0",
        "dataset": plan.dataset,
        "configuration": name,
        "folds": {"0": None},
        "members": listed,
    }
    return [_pack(members | {"manifest.json": encode_json(manifest)}, compression=zipfile.ZIP_STORED)]


def run_zip(data: bytes, folder: Path) -> None:
    from autoseg.inference.model import read_model

    (folder / "a.autoseg").write_bytes(data)
    model = read_model(folder / "a.autoseg")
    model.digest()
    for fold in model.choose_folds():
        model.source.read_record(fold)
        model.read_fold(fold)
    model.source.read_postprocessing()
    assert sorted(path.name for path in folder.iterdir()) == ["a.autoseg"], "something was unpacked"


# -- datasets ----------------------------------------------------------------------------------------------------------


def manifest_seeds(folder: Path) -> list[bytes]:
    files = [{"id": f"c{i}", "image": f"i{i}.nii", "label": f"l{i}.nii"} for i in range(3)]
    manifest = {"name": "a", "channels": ["CT"], "labels": {"background": 0, "organ": 1}, "cases": files}
    training = [{"image": f"i{i}.nii", "label": f"l{i}.nii"} for i in range(3)]
    decathlon = {"name": "a", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "x"}, "training": training}
    structures = [{"id": f"c{i}", "images": [f"i{i}.nii"], "label": {"a": f"l{i}.nii"}, "group": "g"} for i in range(3)]
    regions = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    table = "case,group,image,label,age\n" + "".join(f"c{i},g{i},i{i}.nii,l{i}.nii,{i}\n" for i in range(3))
    masks = "image_CT,label_a,annotated\n" + "".join(f"i{i}.nii,l{i}.nii,a\n" for i in range(3))
    return [
        *(
            json.dumps(one).encode()
            for one in (manifest, decathlon, manifest | {"cases": structures}, manifest | {"labels": regions})
        ),
        table.encode(),
        masks.encode(),
    ]


def mutate_manifest(data: bytes, rng: random.Random) -> bytes:
    if data[:1] in (b"{", b"["):
        return mutate_json_text(data, rng)
    rows = [line.split(",") for line in data.decode("utf-8", "replace").split("\n")]
    for _ in range(rng.choice((1, 2, 3))):
        row = rng.choice(rows)
        kind = rng.randrange(5)
        if kind <= 1:
            row[rng.randrange(len(row))] = str(rng.choice((*VALUES, "i0.nii", "../i0.nii", '"', "\0", "a;b")))
        elif kind == 2:
            row.append(rng.choice(row))
        elif kind == 3 and len(row) > 1:
            row.pop()
        else:
            rows.append(list(rng.choice(rows)))
    changed = "\n".join(",".join(row) for row in rows).encode("utf-8", "replace")
    return mutate_bytes(changed, rng) if rng.random() < 0.2 else changed


def run_manifest(data: bytes, folder: Path) -> None:
    from autoseg.core.serialize import dump_json
    from autoseg.data.layouts import open_dataset

    for i in range(3):
        for name in (f"i{i}.nii", f"l{i}.nii"):
            (folder / name).write_bytes(_small_nifti())
    path = folder / ("dataset.json" if data[:1] in (b"{", b"[") else "dataset.csv")
    path.write_bytes(data)
    dump_json(open_dataset(path))


def _small_nifti() -> bytes:
    import nibabel

    if not _SMALL:
        _SMALL.append(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes())
    return _SMALL[0]


_SMALL: list[bytes] = []


def dataset_seeds(folder: Path) -> list[bytes]:
    """An input is a seed: the folder is made of it."""
    return [b"0"]


def mutate_dataset(data: bytes, rng: random.Random) -> bytes:
    return str(rng.getrandbits(40)).encode()


def run_dataset(data: bytes, folder: Path) -> None:
    from autoseg import pipeline

    make_dataset(folder / "dataset", random.Random(data))
    pipeline.plan(folder / "dataset", folder / "work", preprocess="none")


def make_dataset(folder: Path, rng: random.Random) -> None:
    """A small dataset in nnU-Net's layout in which some things are not as they should be, often none."""
    import nibabel

    numbers = np.random.default_rng(rng.getrandbits(32))
    odd = rng.choice((0.0, 0.0, 0.02, 0.1, 0.4))
    n_channels = rng.choice((1, 1, 2))
    usual = (rng.randint(6, 20), rng.randint(6, 20), rng.choice((1, 4, 9, 16)))
    usual_affine = np.diag([*(rng.uniform(0.3, 4) for _ in range(3)), 1.0])
    for inner in ("imagesTr", "labelsTr"):
        (folder / inner).mkdir(parents=True)

    def is_odd() -> bool:
        return rng.random() < odd

    def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
        # The affine into the header as it is: nibabel makes a rotation of it, and of some there is none.
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.header["sform_code"], image.header["qform_code"] = 1, 0
        image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
        nibabel.save(nibabel.Nifti1Image(array, None, image.header), path)

    for number in range(rng.choice((1, 3, 5, 7))):
        name = f"{rng.choice(NAMES[:8])}{number}" if is_odd() else f"case{number}"
        name = name.replace("/", "_")
        shape = tuple(rng.choice((1, 2, 5, 30)) for _ in range(rng.choice((2, 3, 3, 4)))) if is_odd() else usual
        affine = usual_affine.copy()
        if is_odd():
            affine[:3, :3] = numbers.normal(size=(3, 3)) * rng.choice((1, 1e-3, 1e3, 0))
        for channel in range(n_channels):
            voxels = numbers.normal(size=shape).astype(rng.choice((np.float32, np.int16, np.float64)))
            if is_odd():
                voxels = voxels * 0 + rng.choice((0, 5))
            if is_odd() and voxels.dtype.kind == "f":
                voxels.flat[0] = rng.choice((np.nan, np.inf, 1e38))
            if not is_odd():
                save(voxels, affine, folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        label = numbers.integers(0, 3, rng.choice((shape, usual)) if is_odd() else shape).astype(np.uint8)
        if is_odd():
            others: list[np.ndarray] = [label * 0, label * 127, label + 1, label / 2, label[..., None]]
            label = rng.choice(others)
        if not is_odd():
            save(label, affine, folder / "labelsTr" / f"{name}.nii.gz")
    channels = {str(channel): rng.choice(("CT", "T1", "", "心")) for channel in range(n_channels + is_odd())}
    labels: dict[str, Any] = {"background": 0, "a": 1, "b": 2}
    if is_odd():
        labels = mutate_json(labels, rng)
    content = {"channel_names": channels, "labels": labels, "file_ending": ".nii.gz", "name": rng.choice(NAMES[:8])}
    (folder / "dataset.json").write_text(json.dumps(content))


TARGETS = {
    "nifti": Target(nifti_seeds, mutate_nifti, run_nifti, "bin"),
    "images": Target(image_seeds, mutate_image, run_image, "bin"),
    "plan": Target(plan_seeds, mutate_json_text, run_plan, "json"),
    "zip": Target(model_seeds, mutate_zip, run_zip, "autoseg"),
    "manifest": Target(manifest_seeds, mutate_manifest, run_manifest, "txt"),
    "dataset": Target(dataset_seeds, mutate_dataset, run_dataset, "txt"),
}


# -- running -----------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """An input did what none may do."""


def feed(target: Target, data: bytes, folder: Path) -> bool:
    """Runs one input in an empty folder; whether it was accepted.

    Raises:
        Crash: it ended in another error than `AutosegError`, or took too long; from that error.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # For whoever finds the process dead: libraries in C can end it.
    folder.with_name("last").write_bytes(data)
    started = time.monotonic()
    try:
        target.run(data, folder)
        accepted = True
    except AutosegError as error:
        accepted = False
        if not str(error).strip():
            raise Crash("an error without a message") from error
    except Exception as error:
        raise Crash(f"{type(error).__name__}: {error}") from error
    if time.monotonic() - started > SLOW_S:
        raise Crash(f"took {time.monotonic() - started:.0f} s")
    return accepted


def place_of(crash: Crash) -> str:
    """Where it happened: two crashes at one place are one."""
    error = crash.__cause__
    frames = traceback.extract_tb(error.__traceback__) if error else []
    ours = [frame for frame in frames if "autoseg" in Path(frame.filename).parts] or frames
    return f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else str(crash)


def fuzz(
    name: str, *, seconds: float, seed: int, crashes: Path, n_most: int | None = None, tally: Path | None = None
) -> Result:
    """Random mutations of the seeds, and of mutations, until the time is up or there were `n_most`.

    What came of them so far is written to `tally` now and then.
    """
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    result = Result(target=name, engine="random", seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        seeds = target.seeds(_fresh(Path(scratch) / "seeds"))
        for one in seeds:
            feed(target, one, Path(scratch) / "input")
        pool, known, started = list(seeds), set[str](), time.monotonic()
        while time.monotonic() - started < seconds and (n_most is None or result.inputs < n_most):
            data = target.mutate(rng.choice(pool), rng)
            result.inputs += 1
            if tally is not None and result.inputs % 100 == 0:
                tally.write_text(json.dumps(asdict(result)))
            try:
                accepted = feed(target, data, Path(scratch) / "input")
            except Crash as crash:
                place = place_of(crash)
                if place not in known:
                    known.add(place)
                    result.files.append(str(keep(crash, name, data, crashes)))
                    result.crashes += 1
                continue
            result.accepted += accepted
            result.refused += not accepted
            # What is still accepted can be mutated further.
            if accepted and len(pool) < 500:
                pool.append(data)
        result.minutes = round((time.monotonic() - started) / 60, 2)
    if tally is not None:
        tally.write_text(json.dumps(asdict(result)))
    return result


def fuzz_in_child(name: str, *, seconds: float, seed: int, crashes: Path, memory_gib: float) -> Result:
    """`fuzz` in a process of its own; where a library ends that, its input is kept, and another one goes on."""
    total = Result(target=name, engine="random", seed=seed)
    started = time.monotonic()
    while (left := seconds - (time.monotonic() - started)) > 1:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "--child", name, "--seconds", str(left), "--crashes", str(crashes)]
            command += [
                "--seed",
                str(seed + len(total.files)),
                "--tally",
                f"{scratch}/tally.json",
                "--memory",
                str(memory_gib),
            ]
            environment = {**os.environ, "TMPDIR": scratch}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
            tally = Path(scratch) / "tally.json"
            if tally.exists():
                part = json.loads(tally.read_text())
                for key in ("inputs", "accepted", "refused", "crashes", "files"):
                    setattr(total, key, getattr(total, key) + part[key])
            if done.returncode >= 0:
                if done.returncode:
                    raise RuntimeError(done.stderr)
                break
            for last in Path(scratch).rglob("last"):
                crash = Crash(f"the process died of signal {-done.returncode}\n{done.stderr[-2000:]}")
                total.files.append(str(keep(crash, name, last.read_bytes(), crashes)))
                total.crashes += 1
    total.minutes = round((time.monotonic() - started) / 60, 2)
    return total


def _fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def keep(crash: Crash, name: str, data: bytes, folder: Path) -> Path:
    """Writes an input that crashed, and why beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.{TARGETS[name].ending}"
    path.write_bytes(data)
    text = "".join(traceback.format_exception(crash.__cause__ or crash))
    path.with_name(path.name + ".traceback").write_text(
        f"{crash}\n\n{text}", encoding="utf-8", errors="backslashreplace"
    )
    return path


def fuzz_by_coverage(name: str, *, seconds: float, seed: int, crashes: Path, memory_gib: float) -> Result:
    """Runs atheris in a process of its own, which ends at the first crash, and begins again."""
    result = Result(target=name, engine="atheris", seed=seed)
    known: set[str] = set()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = _fresh(Path(scratch) / "corpus")
        for number, one in enumerate(TARGETS[name].seeds(_fresh(Path(scratch) / "seeds"))):
            (corpus / str(number)).write_bytes(one)
        while (left := seconds - (time.monotonic() - started)) > 1:
            tally = Path(scratch) / "tally.json"
            options = [str(corpus), f"-max_total_time={int(left)}", f"-seed={seed + len(known) + 1}", "-max_len=20000"]
            options += [f"-rss_limit_mb={int(1024 * memory_gib) + 1024}", f"-artifact_prefix={scratch}/"]
            command = [sys.executable, __file__, "--coverage-worker", name, "--tally", str(tally), *options]
            command += ["--known", json.dumps(sorted(known)), "--crashes", str(crashes), "--memory", str(memory_gib)]
            tally.unlink(missing_ok=True)
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            counts = json.loads(tally.read_text()) if tally.exists() else {}
            result.inputs += counts.get("inputs", 0)
            result.accepted += counts.get("accepted", 0)
            result.refused += counts.get("refused", 0)
            result.files += counts.get("files", [])
            fresh = set(counts.get("places", [])) - known
            if done.returncode and not fresh:
                # A library has ended it; or libFuzzer, as more memory was taken than it allows.
                last = tally.with_name("running") / "last"
                crash = Crash(f"the process ended with {done.returncode}\n{done.stderr[-3000:]}")
                path = keep(crash, name, last.read_bytes(), crashes)
                fresh = {path.name} - known
                result.files.append(str(path))
            known |= fresh
            if not fresh:
                break
    result.crashes = len(known)
    result.minutes = round((time.monotonic() - started) / 60, 2)
    return result


def run_coverage_worker(name: str, *, tally: Path, known: set[str], crashes: Path, options: list[str]) -> None:
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["autoseg", "nibabel"]):
        import autoseg.data.io
        import autoseg.data.layouts
        import autoseg.inference.model
        import autoseg.pipeline  # noqa: F401
    target = TARGETS[name]
    counts: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "files": [], "places": []}
    folder = tally.with_name("running") / "input"
    folder.parent.mkdir(exist_ok=True)

    def one_input(data: bytes) -> None:
        counts["inputs"] += 1
        try:
            accepted = feed(target, data, folder)
            counts["accepted" if accepted else "refused"] += 1
        except Crash as crash:
            place = place_of(crash)
            if place not in known:
                known.add(place)
                counts["places"].append(place)
                counts["files"].append(str(keep(crash, name, data, crashes)))
        if counts["inputs"] % 100 == 0 or counts["places"]:
            tally.write_text(json.dumps(counts))

    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def has_atheris() -> bool:
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


@contextmanager
def limited_memory(gib: float) -> Iterator[None]:
    """What needs more ends in a MemoryError, which is a crash; where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = 0
    if Path("/proc/self/statm").exists():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gib * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--target", action="append", choices=TARGETS, help="all by default")
    parser.add_argument("--engine", choices=("auto", "random", "atheris"), default="auto")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="that an input may take")
    parser.add_argument("--replay", type=Path, nargs="+", help="run inputs that crashed again")
    parser.add_argument("--coverage-worker", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tally", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--known", type=json.loads, default=[], help=argparse.SUPPRESS)
    options, others = parser.parse_known_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if not (options.coverage_worker or options.child or options.replay):
        if others:
            parser.error(f"unknown: {' '.join(others)}")
        sys.exit(run(options))
    import torch  # before memory is limited: its libraries reserve address space

    torch.set_num_threads(1)
    with limited_memory(options.memory):
        if options.coverage_worker:
            run_coverage_worker(
                options.coverage_worker,
                tally=options.tally,
                known=set(options.known),
                crashes=options.crashes,
                options=others,
            )
            return
        if options.child:
            fuzz(
                options.child,
                seconds=options.seconds,
                seed=options.seed,
                crashes=options.crashes,
                tally=options.tally,
            )
            return
        for path in options.replay:
            target = TARGETS[path.name.partition("-")[0]]
            with tempfile.TemporaryDirectory() as scratch:
                accepted = feed(target, path.read_bytes(), Path(scratch) / "input")
                print(f"{path}: {'accepted' if accepted else 'refused'}", flush=True)


def run(options: argparse.Namespace) -> int:
    """Every target in turn; the exit status."""
    failed = False
    for name in options.target or TARGETS:
        # What a dataset is made of is a seed, which no coverage tells anything of.
        by_coverage = name != "dataset" and (
            options.engine == "atheris" or (options.engine == "auto" and has_atheris())
        )
        engine = fuzz_by_coverage if by_coverage else fuzz_in_child
        result = engine(
            name,
            seconds=60 * options.minutes,
            seed=options.seed,
            crashes=options.crashes,
            memory_gib=options.memory,
        )
        failed |= result.crashes > 0
        print(json.dumps(asdict(result)), flush=True)
    return int(failed)


if __name__ == "__main__":
    main()
