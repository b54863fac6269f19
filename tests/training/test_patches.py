"""Which patches are drawn, and that they are read as they are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from augmentations import NO_AUGMENTATION
from numpy.typing import NDArray
from tiny_cases import write_tiny_case

from autoseg.core.errors import TrainingError
from autoseg.core.runtime import derive_seed, run_ahead
from autoseg.preprocessing.store import PreprocessedCase, load_into_memory, write_case, write_previous
from autoseg.training import patches
from autoseg.training.augment import AugmentConfig, apply_parameters
from autoseg.training.augment_classic import ClassicAugmentation
from autoseg.training.patches import DROP_PROBABILITY, SAMPLING, Batch, PatchSampler, is_blank, read_region

SHAPE = (10, 30, 20)


def make_case(folder: Path, label: NDArray, *, n_classes: int) -> PreprocessedCase:
    """Every voxel of the image holds its own index, so that a patch says where it is from."""
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(1, *SHAPE) / 8
    return write_tiny_case(folder, image, label, n_classes=n_classes)


@pytest.fixture
def case(tmp_path: Path) -> PreprocessedCase:
    """One small class in a corner."""
    label = np.zeros(SHAPE, np.uint8)
    label[8:, 25:28, 3] = 1
    return make_case(tmp_path / "case", label, n_classes=2)


@pytest.fixture
def liver_and_lesion(tmp_path: Path) -> list[PreprocessedCase]:
    """Class 1 in three of four cases, class 2 in one of these, class 3 in none; the last case has no class."""
    labels = np.zeros((4, *SHAPE), np.uint8)
    labels[:3, 2:6, 5:20, 5:15] = 1
    labels[2, 7:9, 22:24, 2] = 2
    return [make_case(tmp_path / name, label, n_classes=4) for name, label in zip("abcd", labels, strict=True)]


def make_sampler(case: PreprocessedCase, *, patch: tuple[int, ...], fraction: float = 0.0) -> PatchSampler:
    return PatchSampler([case], patch_size=patch, batch_size=3, foreground_fraction=fraction, seed=0)


def test_patches_lie_inside_and_reach_every_place(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(4, 8, 20))
    starts = set()
    for number in range(200):
        batch = sampler.batch(number)
        assert batch.images.shape == (3, 1, 4, 8, 20)
        for patch in batch.images[:, 0].numpy():
            z, y, x = np.unravel_index(round(float(patch[0, 0, 0]) * 8), SHAPE)
            np.testing.assert_array_equal(patch, case.image[0, z : z + 4, y : y + 8, x : x + 20])
            starts.add((int(z), int(y), int(x)))
    assert {z for z, _, _ in starts} == set(range(7))
    assert {y for _, y, _ in starts} == set(range(23))
    assert {x for _, _, x in starts} == {0}


def test_a_batch_depends_on_its_number_alone(case: PreprocessedCase) -> None:
    first, again = make_sampler(case, patch=(4, 8, 8)), make_sampler(case, patch=(4, 8, 8))
    for number in (7, 3, 7):
        assert first.batch(number).images.equal(again.batch(number).images)
    assert not first.batch(1).images.equal(first.batch(2).images)


def test_the_last_third_of_a_batch_holds_foreground(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(2, 4, 4), fraction=1 / 3)
    found = np.array([[bool(c.any()) for c in sampler.batch(number).classes] for number in range(60)])
    assert found[:, 2].all()
    assert found[:, :2].mean() < 0.3


def count_centres(
    cases: list[PreprocessedCase],
    *,
    sampling: str,
    n_batches: int = 600,
    batch_size: int = 5,
    centred_on: Sequence[int] | None = None,
) -> tuple[dict[int, float], dict[str, float]]:
    """How often each class is in the middle of a patch, and each case is drawn; the patches are one voxel each."""
    sampler = PatchSampler(
        cases,
        patch_size=(1, 1, 1),
        batch_size=batch_size,
        foreground_fraction=1,
        seed=0,
        sampling=sampling,
        centred_on=centred_on,
    )
    batches = [sampler.batch(number) for number in range(n_batches)]
    voxels = np.concatenate([batch.classes.numpy().ravel() for batch in batches])
    names = np.array([name for batch in batches for name in batch.cases])
    return (
        {class_index: float(np.mean(voxels == class_index)) for class_index in range(4)},
        {case.id: float(np.mean(names == case.id)) for case in cases},
    )


# Five standard errors of a fraction of 3000 draws.
TOLERANCE = 5 * 0.5 / 3000**0.5


def test_published_sampling_draws_cases_evenly_then_their_classes(liver_and_lesion: list[PreprocessedCase]) -> None:
    classes, cases = count_centres(liver_and_lesion, sampling="published")
    assert classes == pytest.approx({0: 1 / 4, 1: 5 / 8, 2: 1 / 8, 3: 0}, abs=TOLERANCE)
    assert cases == pytest.approx(dict.fromkeys("abcd", 1 / 4), abs=TOLERANCE)


def test_balanced_sampling_draws_classes_evenly_then_their_cases(
    liver_and_lesion: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that no case has takes nothing from the others, and a case without classes is not centred on."""
    monkeypatch.setattr(patches, "MIN_CASES_OF_CLASS", 1)
    classes, cases = count_centres(liver_and_lesion, sampling="balanced")
    assert classes == pytest.approx({0: 0, 1: 1 / 2, 2: 1 / 2, 3: 0}, abs=TOLERANCE)
    assert cases == pytest.approx({"a": 1 / 6, "b": 1 / 6, "c": 2 / 3, "d": 0}, abs=TOLERANCE)
    assert classes[0] == classes[3] == cases["d"] == 0


def test_a_class_that_a_single_case_has_is_drawn_less_often(liver_and_lesion: list[PreprocessedCase]) -> None:
    """Three cases have the liver, and one of them the lesion."""
    classes, cases = count_centres(liver_and_lesion, sampling="balanced")
    assert classes == pytest.approx({0: 0, 1: 3 / 4, 2: 1 / 4, 3: 0}, abs=TOLERANCE)
    assert cases == pytest.approx({"a": 1 / 4, "b": 1 / 4, "c": 1 / 2, "d": 0}, abs=TOLERANCE)


def test_a_class_that_few_of_many_cases_have_is_drawn_less_often(
    liver_and_lesion: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four cases three have the liver and one the lesion: the lesion has a third of what half of the cases give."""
    monkeypatch.setattr(patches, "MIN_CASES_OF_CLASS", 1)
    monkeypatch.setattr(patches, "MIN_PART_OF_CASES", 0.5)
    classes, _ = count_centres(liver_and_lesion, sampling="balanced")
    assert classes == pytest.approx({0: 0, 1: 2 / 3, 2: 1 / 3, 3: 0}, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("sampling", "expected"), [("published", {0: 1 / 4, 1: 3 / 4, 2: 0, 3: 0}), ("balanced", {0: 0, 1: 1, 2: 0, 3: 0})]
)
def test_patches_are_centred_only_on_what_is_segmented(
    sampling: str, expected: dict[int, float], liver_and_lesion: list[PreprocessedCase]
) -> None:
    """The lesion is of no region, so it is background for the network."""
    classes, _ = count_centres(liver_and_lesion, sampling=sampling, centred_on=(1,))
    assert classes == pytest.approx(expected, abs=TOLERANCE)


def test_balanced_sampling_leaves_the_rest_of_a_batch_to_any_case(liver_and_lesion: list[PreprocessedCase]) -> None:
    def sampler(sampling: str) -> PatchSampler:
        return PatchSampler(
            liver_and_lesion, patch_size=(2, 4, 4), batch_size=3, foreground_fraction=1 / 3, seed=0, sampling=sampling
        )

    balanced, again, published = sampler("balanced"), sampler("balanced"), sampler("published")
    drawn = set()
    for number in reversed(range(60)):
        batch = balanced.batch(number)
        assert batch.images.equal(again.batch(number).images)
        assert batch.images[:2].equal(published.batch(number).images[:2])
        drawn |= set(batch.cases[:2])
        assert batch.cases[2] != "d"
        assert batch.classes[2].any()
    assert drawn == set("abcd")


@pytest.mark.parametrize("sampling", SAMPLING)
def test_without_any_foreground_patches_are_of_any_place(tmp_path: Path, sampling: str) -> None:
    empty = make_case(tmp_path / "empty", np.zeros(SHAPE, np.uint8), n_classes=3)
    sampler = PatchSampler(
        [empty], patch_size=(1, 1, 1), batch_size=4, foreground_fraction=1, seed=0, sampling=sampling
    )
    places = {float(voxel) for number in range(20) for voxel in sampler.batch(number).images.ravel()}
    assert len(places) > 70


def test_unknown_sampling_is_named_with_those_that_exist(case: PreprocessedCase) -> None:
    with pytest.raises(TrainingError, match=r"'best'.*published, balanced"):
        PatchSampler([case], patch_size=(4, 4), batch_size=1, foreground_fraction=0, seed=0, sampling="best")


def test_published_draws_are_these(liver_and_lesion: list[PreprocessedCase]) -> None:
    """The rule written down once more, so that a training that was begun earlier goes on with the same patches."""
    patch = (3, 6, 4)
    sampler = PatchSampler(liver_and_lesion, patch_size=patch, batch_size=7, foreground_fraction=1 / 3, seed=8)
    for number in range(20):
        batch = sampler.batch(number)
        for sample in range(7):
            rng = np.random.default_rng(derive_seed("patches", 8, number, sample))
            case = liver_and_lesion[rng.integers(4)]
            room = np.subtract(SHAPE, patch)
            if sample >= 5 and case.classes:
                positions = case.foreground(case.classes[rng.integers(len(case.classes))])
                start = np.clip(positions[rng.integers(len(positions))] - np.array(patch) // 2, 0, room)
            else:
                start = np.array([rng.integers(r + 1) for r in room])
            z, y, x = (slice(s, s + p) for s, p in zip(start, patch, strict=True))
            assert batch.cases[sample] == case.id
            np.testing.assert_array_equal(batch.images[sample, 0].numpy(), case.image[0, z, y, x])


@pytest.mark.parametrize(
    ("batch_size", "fraction", "n_fewest", "n_most", "n_mean"),
    [
        (1, 1 / 3, 0, 1, 1 / 3),
        (2, 0.1, 0, 1, 0.2),
        (3, 0.1, 0, 1, 0.3),
        # Rounded as published, always the same number, also where the fraction is then not met.
        (2, 1 / 3, 1, 1, 1),
        (4, 1 / 3, 1, 1, 1),
        (5, 1 / 3, 2, 2, 2),
        (12, 1 / 3, 4, 4, 4),
        (1, 0.8, 0, 1, 0.8),
        (2, 0.9, 1, 2, 1.8),
        (1, 0, 0, 0, 0),
        (1, 1, 1, 1, 1),
    ],
)
def test_how_many_of_a_batch_are_centred_on_foreground(
    case: PreprocessedCase, batch_size: int, fraction: float, n_fewest: int, n_most: int, n_mean: float
) -> None:
    """One voxel of a thousand is foreground, so a patch of one voxel is hardly ever foreground by chance."""
    (case,) = load_into_memory([case], budget_gib=1)
    n_batches = 100 if n_fewest == n_most else 1500
    sampler, again = (
        PatchSampler([case], patch_size=(1, 1, 1), batch_size=batch_size, foreground_fraction=fraction, seed=1)
        for _ in range(2)
    )
    random = PatchSampler([case], patch_size=(1, 1, 1), batch_size=batch_size, foreground_fraction=0, seed=1)
    counts = []
    for number in range(n_batches):
        batch, other = sampler.batch(number), random.batch(number)
        # Patches that are not centred do not depend on how many are.
        assert batch.images[: batch_size - n_most].equal(other.images[: batch_size - n_most])
        counts.append(int((batch.classes[batch_size - n_most :] > 0).sum()))
    assert min(counts) == n_fewest
    assert max(counts) == n_most
    assert np.mean(counts) == pytest.approx(n_mean, abs=0 if n_fewest == n_most else 5 * 0.5 / n_batches**0.5)
    for number in (90, 3, 70):
        assert sampler.batch(number).images.equal(again.batch(number).images)


@pytest.mark.parametrize("n_loaded", [0, 2, 4])
def test_patches_from_memory_are_those_from_disk(liver_and_lesion: list[PreprocessedCase], n_loaded: int) -> None:
    """Read in threads, as in training, and of cases that are partly in memory."""

    def sampler(cases: list[PreprocessedCase]) -> PatchSampler:
        config = AugmentConfig(rotation_probability=1)
        return PatchSampler(
            cases, patch_size=(4, 8, 8), batch_size=3, foreground_fraction=1 / 3, seed=0, augmentation=config
        )

    budget_gib = sum(case.memory_gib for case in liver_and_lesion[:n_loaded])
    loaded = load_into_memory(liver_and_lesion, budget_gib=budget_gib)
    assert [isinstance(case.image, np.memmap) for case in loaded] == [index >= n_loaded for index in range(4)]
    mapped = sampler(liver_and_lesion)
    numbers = range(30)
    for number, batch in zip(
        numbers, run_ahead(sampler(loaded).batch, iter(numbers), n_threads=3, depth=5), strict=True
    ):
        expected = mapped.batch(number)
        assert batch.cases == expected.cases
        assert batch.images.equal(expected.images)
        assert batch.classes.equal(expected.classes)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_case_smaller_than_the_patch_is_whole_in_it_at_any_place(fraction: float, case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(16, 30, 23), fraction=fraction)
    starts = set()
    for number in range(40):
        for patch in sampler.batch(number).images[:, 0].numpy():
            # The first voxel of the case is 0, the one after it is not.
            z, _, x = np.argwhere(patch == case.image[0, 0, 0, 1])[0] - (0, 0, 1)
            np.testing.assert_array_equal(patch[z : z + 10, :, x : x + 20], case.image[0])
            assert not np.delete(np.delete(patch, range(z, z + 10), 0), range(x, x + 20), 2).any()
            starts.add((int(z), int(x)))
    if fraction == 0:
        assert starts == {(z, x) for z in range(7) for x in range(4)}
    else:
        # Its voxels lie at the end along Z and at the beginning along X.
        assert starts == {(0, 3)}


def test_2d_patches_are_slices_along_the_first_axis(case: PreprocessedCase) -> None:
    batch = make_sampler(case, patch=(8, 20)).batch(0)
    assert batch.images.shape == (3, 1, 8, 20)
    assert batch.classes.shape == (3, 8, 20)
    for patch in batch.images[:, 0].numpy():
        z, y, x = np.unravel_index(round(float(patch[0, 0]) * 8), SHAPE)
        np.testing.assert_array_equal(patch, case.image[0, z, y : y + 8, x:])


def test_what_is_read_for_augmentation_has_the_patch_at_its_centre(case: PreprocessedCase) -> None:
    patch = (4, 8, 8)
    turning = AugmentConfig(rotation_probability=1, scaling_probability=1)
    plain = make_sampler(case, patch=patch).batch(5)
    read = PatchSampler(
        [case], patch_size=patch, batch_size=3, foreground_fraction=0, seed=0, augmentation=turning
    ).batch(5)
    assert read.augmentation is not None
    margins = [(r - p) // 2 for r, p in zip(read.images.shape[2:], patch, strict=True)]
    assert max(margins) > 0
    z, y, x = (slice(m, m + p) for m, p in zip(margins, patch, strict=True))
    assert read.images[:, :, z, y, x].equal(plain.images)


def test_read_region_outside_is_zero() -> None:
    array = np.arange(24).reshape(2, 3, 4) + 1
    assert not read_region(array, (5, 0, 0), (2, 2, 2)).any()
    region = read_region(array, (-1, 1, 3), (2, 2, 3))
    assert region[1, 0, 0] == array[0, 1, 3]
    assert region[0].sum() == 0
    assert region[:, :, 1:].sum() == 0


def test_reading_ahead_keeps_the_order_and_surfaces_errors(case: PreprocessedCase) -> None:
    sampler = make_sampler(case, patch=(4, 8, 8))
    batches = run_ahead(sampler.batch, count(), n_threads=3, depth=5)
    for number in range(10):
        assert next(batches).images.equal(sampler.batch(number).images)
    batches.close()

    def read(number: int) -> Batch:
        if number == 2:
            raise OSError("the disk is gone")
        return sampler.batch(number)

    failing = run_ahead(read, count(), n_threads=2, depth=3)
    next(failing)
    next(failing)
    with pytest.raises(OSError, match="the disk is gone"):
        next(failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead") and thread.is_alive()]


def test_blank_places_are_passed_over_where_there_are_others(tmp_path: Path) -> None:
    """The image is zero but for its last quarter, in one channel of two."""
    label = np.zeros(SHAPE, np.uint8)
    known = make_case(tmp_path / "known", label, n_classes=2)
    image = np.zeros((2, *SHAPE), np.float32)
    image[1, :, :, 15:] = np.random.default_rng(0).normal(size=(*SHAPE[:2], 5))
    for name, content in (("partly", image), ("blank", np.zeros_like(image))):
        write_case(tmp_path / name, content, label, key="k", record=known.record, n_classes=2)
    partly, blank = (PreprocessedCase(tmp_path / name) for name in ("partly", "blank"))
    seen = [patch for n in range(50) for patch in make_sampler(partly, patch=(10, 30, 4)).batch(n).images.numpy()]
    assert sum(is_blank(patch) for patch in seen) < 0.05 * len(seen)
    # Where there is nothing else, it is drawn.
    assert make_sampler(blank, patch=(10, 30, 4)).batch(0).images.abs().max() == 0


def test_patches_of_a_few_odd_voxels_are_blank_and_one_channel_of_content_is_enough() -> None:
    image = np.full((2, 10, 10, 10), -1.0)
    assert is_blank(image)
    image[1, 0, 0, :5] = 3
    assert is_blank(image)
    image[1, 0, :5] = np.arange(10)
    assert not is_blank(image)


# -- cases that are partly annotated, lack channels, or have been seen by a first stage --------------------------------


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("patch", [(3, 5, 4), (4, 40, 4), (6, 8)])
def test_patches_of_a_partly_annotated_case_are_centred_on_what_is_annotated(
    tmp_path: Path, patch: tuple[int, ...], fraction: float
) -> None:
    """But for what the borders of the case leave; a class is centred on where it is asked for."""
    label = np.full(SHAPE, 3, np.uint8)
    label[1, 2, 3], label[9, 29, 19], label[5, 10:14, 10], label[5, 14, 10] = 0, 0, 1, 2
    known = np.argwhere(label != 3)
    case = make_case(tmp_path / "partly", label, n_classes=3)
    assert sorted(map(tuple, case.annotated.tolist())) == sorted(map(tuple, known.tolist()))
    box = np.array((1, *patch)[-3:])
    room = np.array(SHAPE) - box
    low, high = np.minimum(room, 0), np.maximum(room, 0)
    allowed = {tuple(np.clip(voxel - box // 2, low, high)) for voxel in known}
    sampler = make_sampler(case, patch=patch, fraction=fraction)
    starts = set()
    for number in range(60):
        batch = sampler.batch(number)
        assert ((batch.classes != 3) & (batch.images[:, 0] != 0)).flatten(1).any(dim=1).all()
        for image in batch.images[:, 0].numpy().reshape(3, *box):
            inside = np.argwhere(image > 0)[0]
            first = np.array(np.unravel_index(round(float(image[tuple(inside)]) * 8), SHAPE))
            starts.add(tuple(int(value) for value in first - inside))
    assert starts <= allowed
    foreground = {tuple(np.clip(voxel - box // 2, low, high)) for voxel in known[1:-1]}
    assert starts == (foreground if fraction == 1 else allowed)


def test_a_case_that_nobody_has_annotated_is_drawn_from_any_place(tmp_path: Path) -> None:
    case = make_case(tmp_path / "none", np.full(SHAPE, 2, np.uint8), n_classes=2)
    assert len(case.annotated) == 0
    assert case.classes == ()
    sampler = make_sampler(case, patch=(1, 1, 1), fraction=1 / 3)
    assert len({float(voxel) for number in range(20) for voxel in sampler.batch(number).images.ravel()}) > 50


def test_what_was_looked_for_is_told_for_every_patch(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    plain = make_case(tmp_path / "plain", label, n_classes=3)
    write_case(
        tmp_path / "part", plain.image, label, key="k", record=plain.record, n_classes=3, known=(True, False, True)
    )
    part = PreprocessedCase(tmp_path / "part")
    assert make_sampler(plain, patch=(2, 2, 2)).batch(0).known is None
    sampler = PatchSampler([plain, part], patch_size=(2, 2, 2), batch_size=8, foreground_fraction=0, seed=0)
    batch = sampler.batch(0)
    assert set(batch.cases) == {"plain", "part"}
    assert batch.known is not None
    assert batch.known.dtype == torch.bool
    assert batch.known.tolist() == [[True, case == "plain", True] for case in batch.cases]


@pytest.mark.parametrize("backend", ["torch", "batchgenerators"])
def test_what_was_looked_for_changes_sides_with_the_patch(backend: str, tmp_path: Path) -> None:
    """Of a pair only the left one was annotated: where it is mirrored, it is the right one that is known."""
    label = np.zeros(SHAPE, np.uint8)
    label[:, :, 12:] = 1
    plain = make_case(tmp_path / "plain", label, n_classes=3)
    left_only = (True, True, False)
    write_case(tmp_path / "left", plain.image, label, key="k", record=plain.record, n_classes=3, known=left_only)
    config = replace(
        NO_AUGMENTATION, mirror_probability=0.5, side_axis=2, opposite=(0, 2, 1), opposite_outputs=(0, 2, 1)
    )
    sampler = PatchSampler(
        [PreprocessedCase(tmp_path / "left")],
        patch_size=SHAPE,
        batch_size=8,
        foreground_fraction=0,
        seed=0,
        augmentation=config if backend == "torch" else None,
        transform=None if backend == "torch" else ClassicAugmentation(SHAPE, config),
        samples=range(1, 8),
    )
    batch = sampler.batch(0)
    classes = batch.classes
    if batch.augmentation is not None:
        _, classes = apply_parameters(batch.images, classes, patch_size=SHAPE, parameters=batch.augmentation)
    assert batch.known is not None
    seen = [[bool((patch == index).any()) for index in range(3)] for patch in classes]
    assert batch.known.tolist() == seen
    assert [True, True, False] in seen
    assert [True, False, True] in seen


@pytest.fixture
def lacking(tmp_path: Path) -> list[PreprocessedCase]:
    """Three channels; the second case lacks the first one, the third has the last one alone."""
    rng = np.random.default_rng(0)
    known = make_case(tmp_path / "any", np.zeros(SHAPE, np.uint8), n_classes=2)
    result = []
    for name, absent in (("whole", []), ("lacks_0", [0]), ("lacks_0_1", [0, 1])):
        image = rng.normal(size=(3, *SHAPE)).astype(np.float32)
        image[absent] = 0
        write_case(tmp_path / name, image, known.label, key="k", record=known.record, n_classes=2)
        result.append(PreprocessedCase(tmp_path / name))
        assert result[-1].stored.absent == tuple(absent)
    return result


def test_dropping_channels_never_leaves_a_patch_without_any(lacking: list[PreprocessedCase]) -> None:
    def sampler() -> PatchSampler:
        return PatchSampler(
            lacking, patch_size=(2, 2, 2), batch_size=6, foreground_fraction=0, seed=0, optional_channels=(0, 1, 2)
        )

    drawn, again = sampler(), sampler()
    counts: dict[str, list[tuple[bool, ...]]] = {case.id: [] for case in lacking}
    for number in range(120):
        batch, other = drawn.batch(number), again.batch(number)
        assert batch.absent is not None
        assert other.absent is not None
        assert batch.absent.equal(other.absent)
        assert not batch.absent.all(dim=1).any()
        for case, absent in zip(batch.cases, batch.absent.tolist(), strict=True):
            counts[case].append(tuple(absent))
    assert all(absent[0] for name in ("lacks_0", "lacks_0_1") for absent in counts[name])
    assert set(counts["lacks_0_1"]) == {(True, True, False)}
    rates = np.mean(counts["whole"], axis=0)
    # A draw of all three channels drops none.
    expected = DROP_PROBABILITY - DROP_PROBABILITY**3
    np.testing.assert_allclose(rates, expected, atol=5 * 0.5 / len(counts["whole"]) ** 0.5)


def test_samples_lack_the_same_channels_whoever_reads_them(lacking: list[PreprocessedCase]) -> None:
    def sampler(samples: tuple[int, ...] | None) -> PatchSampler:
        return PatchSampler(
            lacking,
            patch_size=(2, 2, 2),
            batch_size=6,
            foreground_fraction=0,
            seed=0,
            optional_channels=(0, 1, 2),
            samples=samples,
        )

    for number in range(20):
        whole, first, second = (sampler(part).batch(number) for part in (None, (0, 1, 2, 3), (4, 5, 5)))
        assert whole.absent is not None
        assert first.absent is not None
        assert second.absent is not None
        assert torch.cat([first.absent, second.absent[:2]]).equal(whole.absent)
        assert torch.cat([first.images, second.images[:2]]).equal(whole.images)
        assert second.images[1].equal(second.images[2])


def test_a_channel_that_is_not_optional_is_never_dropped(lacking: list[PreprocessedCase]) -> None:
    sampler = PatchSampler(
        lacking[:1], patch_size=(2, 2, 2), batch_size=6, foreground_fraction=0, seed=0, optional_channels=(1,)
    )
    absent = torch.cat([batch.absent for n in range(40) if (batch := sampler.batch(n)).absent is not None])
    assert len(absent) == 240
    assert not absent[:, [0, 2]].any()
    assert absent[:, 1].float().mean() == pytest.approx(DROP_PROBABILITY, abs=5 * 0.5 / 240**0.5)
    none = PatchSampler(lacking[:1], patch_size=(2, 2, 2), batch_size=6, foreground_fraction=0, seed=0)
    assert none.batch(0).absent is None


N_LABELS = 4
"""Background, two classes, and what is ignored."""


@pytest.fixture
def second_stage(tmp_path: Path) -> PreprocessedCase:
    """Classes, some of them ignored, and blocks of them that a first stage has found."""
    rng = np.random.default_rng(0)
    known = make_case(tmp_path / "case", rng.integers(0, N_LABELS, SHAPE).astype(np.uint8), n_classes=3)
    found = rng.integers(0, 3, (5, 6, 5)).astype(np.uint8).repeat(2, 0).repeat(5, 1).repeat(4, 2)
    write_previous(tmp_path / "previous", found, key="k")
    return PreprocessedCase(tmp_path / known.id, previous=tmp_path / "previous")


def test_classes_of_both_stages_are_parted_as_they_were_joined(second_stage: PreprocessedCase) -> None:
    patch = (4, 8, 24)
    sampler = PatchSampler(
        [second_stage], patch_size=patch, batch_size=3, foreground_fraction=0, seed=0, n_labels=N_LABELS
    )
    batch = sampler.batch(0)
    images, classes = batch.part_classes(batch.images.float(), batch.classes.long())
    assert images.shape == (3, 2, *patch)
    assert images[:, :1].equal(batch.images.float())
    for image, found, wanted in zip(images[:, 0], images[:, 1], classes, strict=True):
        z, y, x = np.unravel_index(round(float(image[0, 0, 4]) * 8), SHAPE)
        start = (int(z), int(y), int(x) - 4)
        assert second_stage.previous is not None
        np.testing.assert_array_equal(found, read_region(second_stage.previous, start, patch))
        np.testing.assert_array_equal(wanted, read_region(second_stage.label, start, patch))
    alone = make_sampler(second_stage, patch=patch).batch(0)
    assert alone.part_classes(images, classes)[0] is images
    assert alone.classes.equal(classes.to(torch.uint8))


def test_both_stages_are_turned_and_mirrored_as_one_and_change_sides_together(second_stage: PreprocessedCase) -> None:
    """The same moves once for each stage by itself, with its own table of sides, give the same."""
    own, found = (0, 2, 1, 3), (0, 2, 1)
    joint = tuple(a + N_LABELS * b for b in found for a in own)
    config = AugmentConfig(rotation_probability=1, mirror_probability=1, mirror_axes=(2,), side_axis=2, opposite=joint)
    patch = (4, 8, 8)
    sampler = PatchSampler(
        [second_stage],
        patch_size=patch,
        batch_size=6,
        foreground_fraction=0,
        seed=0,
        augmentation=config,
        n_labels=N_LABELS,
    )
    batch = sampler.batch(0)
    parameters = batch.augmentation
    assert parameters is not None
    assert parameters.changes_sides.any()
    images = batch.images.float()
    moved = apply_parameters(images, batch.classes, patch_size=patch, parameters=parameters)
    parted, classes = batch.part_classes(*moved)
    of_first, of_second = batch.classes // N_LABELS, batch.classes % N_LABELS
    for result, source, opposite in ((parted[:, -1].long(), of_first, found), (classes, of_second, own)):
        alone = replace(parameters, opposite=torch.tensor(opposite))
        expected = apply_parameters(images, source, patch_size=patch, parameters=alone)[1]
        assert result.equal(expected)
        assert result.any()


def test_only_what_the_first_stage_has_found_is_perturbed(second_stage: PreprocessedCase) -> None:
    def sampler(*, perturbs: bool, samples: tuple[int, ...] | None = None) -> PatchSampler:
        return PatchSampler(
            [second_stage],
            patch_size=(6, 16, 16),
            batch_size=2,
            foreground_fraction=0,
            seed=0,
            n_labels=N_LABELS,
            perturbs=perturbs,
            samples=samples,
        )

    plain, perturbed, again = sampler(perturbs=False), sampler(perturbs=True), sampler(perturbs=True)
    n_changed = 0
    for number in range(20):
        first, second = plain.batch(number), perturbed.batch(number)
        assert second.classes.equal(again.batch(number).classes)
        assert first.images.equal(second.images)
        assert second.classes[1:].equal(sampler(perturbs=True, samples=(1,)).batch(number).classes)
        (images, classes), (other, same) = (
            batch.part_classes(batch.images, batch.classes) for batch in (first, second)
        )
        assert classes.equal(same)
        n_changed += not images[:, -1].equal(other[:, -1])
    assert 4 <= n_changed < 20
