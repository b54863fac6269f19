"""Datasets of a few small cases in every layout, in order; `malformed_datasets.py` spoils them.

A file's axes are (i, j, k) here, because what is spoilt is the file.
"""

from __future__ import annotations

import csv
import json
import locale
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

SHAPE = (16, 14, 12)
"""All different, so that a transposition shows."""

PICTURE_SHAPE = (32, 28)
SPACING_MM = (1.0, 1.0, 3.0)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
"""What ITK has as spacing alone, without origin and direction."""

LABELS = {"background": 0, "liver": 1, "lesion": 2}
N_CASES = 3


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A dataset on disk.

    Attributes:
        root: the folder.
        images: of each case, one file for each channel.
        labels: of each case.
    """

    root: Path
    images: tuple[tuple[Path, ...], ...]
    labels: tuple[Path, ...]

    def image(self, case: int = 1, channel: int = 0) -> Path:
        """A file of a case."""
        return self.images[case][channel]

    def label(self, case: int = 1) -> Path:
        """The label map of a case."""
        return self.labels[case]


def make_label(case: int, *, shape: Sequence[int] = SHAPE) -> NDArray[np.uint8]:
    """Two structures in a background, a little elsewhere in each case."""
    label = np.zeros(tuple(shape), np.uint8)
    start = 2 + case % 3
    label[(slice(start, start + 8), slice(3, 11), *(slice(2, 9) for _ in shape[2:]))] = 1
    label[(slice(start + 3, start + 6), slice(5, 8), *(slice(4, 7) for _ in shape[2:]))] = 2
    return label


def make_image(case: int, *, channel: int = 0, shape: Sequence[int] = SHAPE) -> NDArray[np.int16]:
    """Air around soft tissue as in CT, and noise that no other case and channel has."""
    rng = np.random.default_rng((case, channel))
    label = make_label(case, shape=shape)
    image = np.full(label.shape, -1000.0)
    image[1:-1, 1:-1] = 40
    image += 60.0 * label + rng.normal(0, 20, label.shape)
    return image.astype(np.int16)


def make_colours(case: int) -> NDArray[np.uint8]:
    """A grey picture (columns, rows)."""
    image = make_image(case, shape=PICTURE_SHAPE)
    return np.clip((image + 1000.0) / 6, 0, 255).astype(np.uint8)


def save_volume(path: Path, voxels: NDArray, affine: NDArray = AFFINE) -> Path:
    """Writes (i, j, k) in the format that the name says; only NIfTI takes another affine than `AFFINE`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    elif path.suffix == ".png":
        from PIL import Image

        Image.fromarray(np.ascontiguousarray(voxels.T)).save(path)
    elif path.suffix == ".tif":
        import tifffile

        tifffile.imwrite(path, np.ascontiguousarray(voxels.T), metadata={"axes": "ZYX"[-voxels.ndim :]})
    else:
        import SimpleITK

        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing(SPACING_MM)
        SimpleITK.WriteImage(image, str(path))
    return path


def read_voxels(path: Path) -> NDArray:
    """The voxels (i, j, k) of a NIfTI file."""
    return np.asanyarray(nibabel.load(path).dataobj)


def change(path: Path, how: Callable[[NDArray], NDArray]) -> None:
    """Writes a NIfTI file anew with other voxels."""
    image: Any = nibabel.load(path)
    save_volume(path, how(np.asanyarray(image.dataobj)), image.affine)


def edit_json(path: Path, **entries: Any) -> None:
    """Gives keys of a JSON file other values; None removes a key."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def case_names(n_cases: int) -> tuple[str, ...]:
    """Of a dataset in order."""
    return tuple(f"case_{case}" for case in range(n_cases))


def nnunet(
    folder: Path,
    *,
    names: Sequence[str] = case_names(N_CASES),
    channels: Sequence[str] = ("CT",),
    labels: Mapping[str, int] = LABELS,
    ending: str = ".nii.gz",
) -> Tree:
    """nnU-Net raw: `imagesTr/CASE_0000.nii.gz` and `labelsTr/CASE.nii.gz`."""
    root = folder / "dataset"
    images = tuple(
        tuple(
            save_volume(root / "imagesTr" / f"{name}_{channel:04d}{ending}", make_image(case, channel=channel))
            for channel in range(len(channels))
        )
        for case, name in enumerate(names)
    )
    found = tuple(save_volume(root / "labelsTr" / f"{name}{ending}", make_label(c)) for c, name in enumerate(names))
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": len(names),
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return Tree(root=root, images=images, labels=found)


def decathlon(folder: Path, *, names: Sequence[str] = case_names(N_CASES), channels: Sequence[str] = ("CT",)) -> Tree:
    """Medical Segmentation Decathlon: a `training` list, and all channels in one file."""
    root = folder / "dataset"
    images, labels, entries = [], [], []
    for case, name in enumerate(names):
        parts = [make_image(case, channel=channel) for channel in range(len(channels))]
        voxels = parts[0] if len(parts) == 1 else np.stack(parts, axis=-1)
        images.append((save_volume(root / "imagesTr" / f"{name}.nii.gz", voxels),))
        labels.append(save_volume(root / "labelsTr" / f"{name}.nii.gz", make_label(case)))
        entries.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    content = {
        "name": "Small",
        "modality": {str(number): name for number, name in enumerate(channels)},
        "labels": {str(value): name for name, value in LABELS.items()},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return Tree(root=root, images=tuple(images), labels=tuple(labels))


def folders(
    folder: Path,
    *,
    names: Sequence[str] = case_names(N_CASES),
    ending: str = ".nii.gz",
    label_ending: str = ".nii.gz",
    below: str = "dataset",
) -> Tree:
    """A pair of folders with the same names."""
    root = folder / below
    images = tuple((save_volume(root / "images" / f"{name}{ending}", make_image(c)),) for c, name in enumerate(names))
    labels = tuple(
        save_volume(root / "labels" / f"{name}{label_ending}", make_label(case)) for case, name in enumerate(names)
    )
    return Tree(root=root, images=images, labels=labels)


def pictures(folder: Path, *, names: Sequence[str] = case_names(N_CASES)) -> Tree:
    """A pair of folders of PNG."""
    root = folder / "dataset"
    images = tuple((save_volume(root / "images" / f"{name}.png", make_colours(c)),) for c, name in enumerate(names))
    masks = [make_label(case, shape=PICTURE_SHAPE) for case in range(len(names))]
    labels = tuple(save_volume(root / "masks" / f"{n}.png", mask) for n, mask in zip(names, masks, strict=True))
    return Tree(root=root, images=images, labels=labels)


def csv_manifest(folder: Path, *, names: Sequence[str] = case_names(N_CASES)) -> Tree:
    """`cases.csv` with the columns case, image and label, beside a pair of folders."""
    tree = folders(folder, names=names)
    write_rows(tree, rows_of(tree, names))
    return tree


def rows_of(tree: Tree, names: Sequence[str] = case_names(N_CASES)) -> list[list[str]]:
    """The rows of a manifest, without the header."""
    files = zip(names, tree.images, tree.labels, strict=True)
    return [[name, f"images/{images[0].name}", f"labels/{label.name}"] for name, images, label in files]


def write_rows(
    tree: Tree,
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = ("case", "image", "label"),
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> None:
    """Writes `cases.csv`."""
    with (tree.root / "cases.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def json_manifest(folder: Path, *, names: Sequence[str] = case_names(N_CASES)) -> Tree:
    """`dataset.json` with `channels`, `labels` and `cases`, beside a pair of folders."""
    tree = folders(folder, names=names)
    cases = [{"id": case, "image": image, "label": label} for case, image, label in rows_of(tree, names)]
    content = {"channels": ["CT"], "labels": LABELS, "cases": cases}
    (tree.root / "dataset.json").write_text(json.dumps(content))
    return tree


def brats(folder: Path, *, n_cases: int = N_CASES) -> Tree:
    """BraTS as of 2023: a folder for each case with four channels."""
    root = folder / "dataset"
    images, labels = [], []
    for case in range(n_cases):
        name = f"BraTS-GLI-{case:05d}-000"
        start = root / name / name
        kinds = enumerate(("t1c", "t1n", "t2f", "t2w"))
        images.append(
            tuple(
                save_volume(
                    start.with_name(f"{name}-{kind}.nii.gz"),
                    make_image(case, channel=channel).clip(-100) + np.int16(100),
                )
                for channel, kind in kinds
            )
        )
        label = make_label(case)
        label[label == 2] = 3
        label[4:6, 3:5, 2:4] = 2
        labels.append(save_volume(start.with_name(f"{name}-seg.nii.gz"), label))
    return Tree(root=root, images=tuple(images), labels=tuple(labels))


def dicom(folder: Path, *, names: Sequence[str] = case_names(3)) -> Tree:
    """A folder of slices for each image, and label maps as NIfTI."""
    root = folder / "dataset"
    images = tuple((save_series(root / "images" / name, make_image(c), series=c),) for c, name in enumerate(names))
    labels = tuple(save_volume(root / "labels" / f"{n}.nii.gz", make_label(case)) for case, n in enumerate(names))
    return Tree(root=root, images=images, labels=labels)


def save_series(folder: Path, voxels: NDArray[np.int16], *, series: int, prefix: str = "") -> Path:
    """Writes a CT series, one file for each slice, `000.dcm` first."""
    import SimpleITK

    folder.mkdir(parents=True, exist_ok=True)
    # GDCM leaves the process in the locale "C" when it writes.
    before = locale.setlocale(locale.LC_ALL)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(voxels.shape[2]):
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels[..., number].T))
        image.SetSpacing(SPACING_MM[:2])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.{series}.{number + 1}",
            "0008|0060": "CT",
            "0008|103e": f"axial {series}",
            "0020|000d": "1.2.3",
            "0020|000e": f"1.2.3.{series}",
            "0020|0011": str(series),
            "0020|0032": f"0\\0\\{SPACING_MM[2] * number:g}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{prefix}{number:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return folder
