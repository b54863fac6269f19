"""Small datasets, each with something wrong, and what `autoseg check` has to say of them.

    python scripts/malformed_datasets.py FOLDER                 # the corpus
    python scripts/malformed_datasets.py FOLDER --many 100000   # one dataset of so many files instead

Each dataset has a folder of its own in FOLDER: `dataset` is what is checked, and `expected.json` says what is wrong,
the exit code, the severity and kind of the problem, words that the output has to contain, and whether `--fix` mends it.
A few look odd and are right, so that a check which refuses everything is found out too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import malformed_files
import malformed_lists
import malformed_values
import numpy as np
from malformed_entry import CORPUS, Malformed
from small_datasets import SHAPE, folders, make_image, make_label, save_volume

__all__ = ["CORPUS", "Malformed", "malformed_files", "malformed_lists", "malformed_values", "write_entry", "write_many"]

N_DISTINCT = 1000


def write_entry(folder: Path, entry: Malformed) -> Path:
    """Makes one dataset in `folder/NAME`, with `expected.json` beside it."""
    target = folder / entry.name
    target.mkdir(parents=True)
    entry.make(target)
    expected = {key: value for key, value in asdict(entry).items() if key != "make"}
    (target / "expected.json").write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n")
    return target


def write_many(folder: Path, n_files: int) -> Path:
    """A pair of folders of so many tiny files: images that all differ, label maps that are links to a few."""
    tree = folders(folder, names=("case_0",), ending=".nii", label_ending=".nii")
    image = tree.image(0).read_bytes()
    start = len(image) - 2 * int(np.prod(SHAPE))
    labels = [save_volume(folder / "labels" / f"{case}.nii", make_label(case)) for case in range(3)]
    rng = np.random.default_rng(0)
    for path in (tree.image(0), tree.label(0)):
        path.unlink()
    for case in range(n_files // 2):
        voxels = make_image(case % N_DISTINCT) if case < N_DISTINCT else rng.integers(-1000, 200, SHAPE, np.int16)
        (tree.root / "images" / f"case_{case:06d}.nii").write_bytes(image[:start] + voxels.tobytes(order="F"))
        # A file can have some tens of thousands of links.
        source, target = labels[case % 3], tree.root / "labels" / f"case_{case:06d}.nii"
        if case < 3 * 20_000:
            os.link(source, target)
        else:
            shutil.copy(source, target)
    return tree.root


def main() -> None:
    """Writes the corpus, or one large dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--many", type=int, metavar="N", help="one dataset of N tiny files instead")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(CORPUS), help="of the corpus")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder}: is not empty; name another folder")
    if options.many:
        print(write_many(options.folder, options.many))
        return
    for name in options.only or CORPUS:
        write_entry(options.folder, CORPUS[name])
    print(f"{len(options.only or CORPUS)} datasets in {options.folder}")


if __name__ == "__main__":
    # nibabel is quiet about what is written here on purpose.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    main()
