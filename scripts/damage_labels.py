"""Copies a dataset and damages some of its labels, to see whether the report finds them.

    python scripts/damage_labels.py DATASET TARGET [--cases 10] [--seed 0]

DATASET has the layout of the Medical Segmentation Decathlon (`dataset.json`, `imagesTr`, `labelsTr`). Images are
linked. The damages take turns: all labels shifted, eroded, two of them swapped, half of the foreground erased.
TARGET/damaged.json says which case has which.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

N_EROSIONS = 2
SHIFT_FRACTION = 0.25


def shift(label: NDArray, rng: np.random.Generator) -> NDArray:
    """By a quarter of the foreground's extent along an axis; what leaves the volume is lost."""
    axis = int(rng.integers(label.ndim))
    occupied = np.flatnonzero((label > 0).any(axis=tuple(other for other in range(label.ndim) if other != axis)))
    distance = max(2, round(SHIFT_FRACTION * (occupied[-1] - occupied[0] + 1)))
    offsets = [0] * label.ndim
    offsets[axis] = distance * int(rng.choice((-1, 1)))
    return ndimage.shift(label, offsets, order=0)


def erode(label: NDArray, rng: np.random.Generator) -> NDArray:
    """The outer voxels of the foreground become background."""
    del rng
    return np.where(ndimage.binary_erosion(label > 0, iterations=N_EROSIONS), label, 0)


def swap(label: NDArray, rng: np.random.Generator) -> NDArray:
    """Two labels change places."""
    first, second = rng.permutation(np.unique(label[label > 0]))[:2]
    return np.select([label == first, label == second], [second, first], label)


def erase_half(label: NDArray, rng: np.random.Generator) -> NDArray:
    """One half of the foreground's extent along its longest axis becomes background."""
    box = ndimage.find_objects((label > 0).astype(np.uint8))[0]
    axis = int(np.argmax([part.stop - part.start for part in box]))
    middle = (box[axis].start + box[axis].stop) // 2
    half = [slice(None)] * label.ndim
    half[axis] = slice(None, middle) if rng.random() < 0.5 else slice(middle, None)
    result = label.copy()
    result[tuple(half)] = 0
    return result


DAMAGES: dict[str, Callable[[NDArray, np.random.Generator], NDArray]] = {
    "shifted": shift,
    "eroded": erode,
    "swapped": swap,
    "half erased": erase_half,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    source, target = arguments.dataset.resolve(), arguments.target
    (target / "labelsTr").mkdir(parents=True)
    (target / "imagesTr").symlink_to(source / "imagesTr")
    shutil.copy(source / "dataset.json", target)
    files = sorted(file for file in (source / "labelsTr").iterdir() if not file.name.startswith("."))
    chosen = sorted(rng.choice(len(files), arguments.cases, replace=False).tolist())
    damaged = {}
    for index, file in enumerate(files):
        if index not in chosen:
            (target / "labelsTr" / file.name).symlink_to(file)
            continue
        kind = list(DAMAGES)[chosen.index(index) % len(DAMAGES)]
        image = nibabel.load(file)
        label = np.asarray(image.dataobj).astype(np.uint8)
        changed = DAMAGES[kind](label, rng).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(changed, image.affine), target / "labelsTr" / file.name)
        damaged[file.name.removesuffix(".nii.gz")] = kind
    (target / "damaged.json").write_text(json.dumps(damaged, indent=2) + "\n")
    print(f"{len(damaged)} of {len(files)} cases damaged, see {target / 'damaged.json'}")


if __name__ == "__main__":
    main()
