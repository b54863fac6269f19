"""The generated data: what the demo and many tests stand on."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from autoseg.core.errors import DatasetError
from autoseg.data.phantom import LABELS, draw_grid, make_phantom, write_phantom_dataset

SHAPE, SPACING_MM = (26, 66, 74), (5.0, 3.0, 3.0)
ORGANS = ("liver", "spleen", "kidneys", "aorta")


def measure_volumes_ml(label: np.ndarray, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    return {name: float((label == value).sum() * np.prod(spacing_mm) / 1000) for name, value in LABELS.items()}


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_phantom(rng=np.random.default_rng(seed), shape=SHAPE, spacing_mm=SPACING_MM) for seed in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("raw"), n_train=6, n_test=2, seed=3, coarseness=2.0)


def test_equal_generators_make_equal_phantoms(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    image, label = make_phantom(rng=np.random.default_rng(0), shape=SHAPE, spacing_mm=SPACING_MM)
    assert image.shape == label.shape == SHAPE
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(image, cases[0][0])
    np.testing.assert_array_equal(label, cases[0][1])
    assert (cases[0][1] != cases[1][1]).any()


def test_every_case_has_its_organs_and_most_have_a_lesion(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    present = [set(np.unique(label)) for _, label in cases]
    assert all(values >= {0, 1, 2, 3, 4} for values in present)
    assert len(cases) / 2 < sum(LABELS["lesion"] in values for values in present)


def test_volumes_are_those_of_a_small_patient(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    limits_ml = {"liver": (150, 900), "spleen": (15, 200), "kidneys": (25, 150), "aorta": (8, 60), "lesion": (0, 15)}
    for _, label in cases:
        volumes = measure_volumes_ml(label, SPACING_MM)
        for name, (least, most) in limits_ml.items():
            assert least <= volumes[name] <= most, name


@pytest.mark.parametrize("seed", [0, 5])
def test_volumes_do_not_depend_on_the_voxels(seed: int, cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    fine_mm = (2.5, 1.5, 1.5)
    _, fine = make_phantom(rng=np.random.default_rng(seed), shape=(52, 132, 148), spacing_mm=fine_mm)
    volumes, fine_volumes = measure_volumes_ml(cases[seed][1], SPACING_MM), measure_volumes_ml(fine, fine_mm)
    for name in ORGANS:
        assert volumes[name] == pytest.approx(fine_volumes[name], rel=0.1), name


def test_organs_lie_where_they_belong(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for _, label in cases:
        z, y, x = ({name: np.nonzero(label == LABELS[name])[axis].mean() for name in ORGANS} for axis in range(3))
        assert x["liver"] > x["aorta"] > x["spleen"]
        assert y["liver"] > y["aorta"]
        assert z["liver"] > z["kidneys"]


def test_lesions_lie_in_the_liver(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Nearly all voxels beside a lesion are liver; a thin slice of liver may end within one voxel."""
    n_beside, n_liver = 0, 0
    for _, label in cases:
        lesion = label == LABELS["lesion"]
        beside = label[ndimage.binary_dilation(lesion) & ~lesion]
        n_beside += beside.size
        n_liver += int((beside == LABELS["liver"]).sum())
    assert n_beside > 100
    assert n_liver > 0.97 * n_beside


def test_intensities_look_like_ct_and_overlap(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    means = np.array([[image[label == LABELS[name]].mean() for name in ORGANS] for image, label in cases])
    assert means.min() > 40
    assert means.max() < 200
    assert means.min(0).max() < means.max(0).min(), "no organ may be told from the others by its intensity alone"
    for image, _ in cases:
        assert np.percentile(image, 5) == pytest.approx(-1000, abs=60)
        assert image.max() > 300, "bone"
        assert -130 < np.median(image[(image > -300) & (image < 0)]) < -60, "fat"


def test_thresholds_do_not_find_an_organ(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for name in ORGANS:
        dice = []
        for image, label in cases:
            organ = label == LABELS[name]
            low, high = np.percentile(image[organ], (5, 95))
            found = (image >= low) & (image <= high)
            dice.append(2 * (found & organ).sum() / (found.sum() + organ.sum()))
        assert np.mean(dice) < 0.7, name


def test_image_and_label_share_their_borders(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    image, label = cases[0]
    organ = label == LABELS["aorta"]
    inside = image[organ].mean()
    for axis in (1, 2):
        for step in (-2, 2):
            assert image[np.roll(organ, step, axis)].mean() < inside - 5


def test_a_tiny_grid_works() -> None:
    image, label = make_phantom(rng=np.random.default_rng(0), shape=(1, 1, 4), spacing_mm=(5.0, 3.0, 3.0))
    assert image.shape == label.shape == (1, 1, 4)
    assert np.isfinite(image).all()


def test_grids_are_anisotropic_and_vary() -> None:
    grids = [draw_grid(np.random.default_rng(seed)) for seed in range(20)]
    assert len({shape for shape, _ in grids}) > 10
    assert len({spacing for _, spacing in grids}) == 20
    for shape, spacing in grids:
        assert 4 <= spacing[0] <= 6
        assert 2.6 <= spacing[1] == spacing[2] <= 3.4
        assert np.multiply(shape, spacing) == pytest.approx((130, 196, 219), abs=12)


def test_dataset_has_the_layout_of_nnunet(folder: Path) -> None:
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    train, test = [f"phantom_{i:03d}" for i in range(6)], [f"phantom_test_{i:03d}" for i in range(2)]
    for part, names in (("Tr", train), ("Ts", test)):
        assert sorted(p.name for p in (folder / f"images{part}").iterdir()) == [f"{n}_0000.nii.gz" for n in names]
        assert sorted(p.name for p in (folder / f"labels{part}").iterdir()) == [f"{n}.nii.gz" for n in names]
    assert len(list(folder.iterdir())) == 5


def test_files_say_where_the_patient_lies(folder: Path) -> None:
    axcodes, shapes = set(), set()
    for path in sorted(folder.glob("labelsT?/*")):
        label = nib.load(path)
        image = nib.load(
            path.parent.parent / path.parent.name.replace("labels", "images") / f"{path.name[:-7]}_0000.nii.gz"
        )
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        axcodes.add("".join(nib.aff2axcodes(image.affine)))
        shapes.add(image.shape)
        assert image.shape[2] < image.shape[1] < image.shape[0]
        assert image.header.get_zooms()[2] > image.header.get_zooms()[0]
        array = np.asanyarray(label.dataobj)
        liver, spleen = (
            apply_affine(image.affine, np.argwhere(array == LABELS[name])).mean(0) for name in ("liver", "spleen")
        )
        assert liver[0] > spleen[0], "in world coordinates x grows to the right, where the liver is"
    assert axcodes == {"RAS", "LPS"}
    assert len(shapes) > 1


def test_written_cases_depend_on_seed_and_number_only(folder: Path, tmp_path: Path) -> None:
    again = write_phantom_dataset(tmp_path / "again", n_train=2, n_test=1, seed=3, coarseness=2.0)
    other = write_phantom_dataset(tmp_path / "other", n_train=1, n_test=1, seed=4, coarseness=2.0)
    for path in again.glob("*/*"):
        assert path.read_bytes() == (folder / path.relative_to(again)).read_bytes()
    first, test = "imagesTr/phantom_000_0000.nii.gz", "imagesTs/phantom_test_000_0000.nii.gz"
    assert (again / first).read_bytes() not in ((other / first).read_bytes(), (again / test).read_bytes())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="holds something already"):
        write_phantom_dataset(tmp_path, n_train=1, n_test=0, coarseness=4.0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
