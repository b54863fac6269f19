"""What runs on a GPU gives what the CPU gives, and interrupted training goes on. Needs no image files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from autoseg.core.errors import TrainingError
from autoseg.core.geometry import Box, Geometry
from autoseg.core.labels import LabelSpec
from autoseg.inference.sliding_window import WindowConfig, predict_logits
from autoseg.networks.build import build_network
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.store import PreprocessedCase, write_case
from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters, read_size
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.losses import dice_ce_loss
from autoseg.training.measure import measure_configuration
from autoseg.training.trainer import TrainingInterrupted, train_fold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SHAPE = (36, 50, 36)
LABELS = LabelSpec(names=("anterior", "posterior"), values=(1, 2))


def plan() -> Plan:
    cases = tuple(
        CaseFingerprint(
            case=f"case_{i}", shape=SHAPE, spacing_mm=(1, 1, 1), cropped_shape=SHAPE, label_volumes_ml=(1.0, 1.0)
        )
        for i in range(20)
    )
    channel = ChannelFingerprint(
        name="MR", mean=0, std=1, minimum=-3, maximum=3, median=0, percentile_00_5=-2, percentile_99_5=2
    )
    fingerprint = Fingerprint(cases=cases, channels=(channel,), median_cropped_fraction=1.0)
    return make_plan(fingerprint, LABELS, dataset="balls", n_folds=5)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[PreprocessedCase]:
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    affine = tuple(tuple(row) for row in np.eye(4).tolist())
    record = CaseRecord(
        geometry=Geometry(shape=SHAPE, spacing_mm=(1, 1, 1), affine=affine, file_axcodes=("R", "A", "S")),
        crop=Box(start=(0, 0, 0), stop=SHAPE),
        axis_order=(0, 1, 2),
        shape=SHAPE,
        spacing_mm=(1, 1, 1),
        nearest_axis=None,
    )
    result = []
    for index in range(6):
        distance = np.linalg.norm(grid - rng.uniform(12, 24, (3, 1, 1, 1)), axis=0)
        label = np.where(distance < 6, 1, np.where(distance < 11, 2, 0)).astype(np.uint8)
        image = (np.array([0.0, 2.0, 1.0])[label] + rng.normal(0, 0.3, SHAPE))[None].astype(np.float32)
        write_case(folder / f"case_{index}", image, label, key="k", record=record, n_classes=3)
        result.append(PreprocessedCase(folder / f"case_{index}"))
    return result


def test_training_learns_and_resumes(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    made = plan()
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] == 20

    def train() -> torch.nn.Module:
        return train_fold(
            tmp_path,
            made,
            made.configuration("3d_fullres"),
            training=cases[:4],
            validation=cases[4:],
            config=TrainConfig(budget=Budget(iterations=60, iterations_per_epoch=20)),
            device=torch.device("cuda"),
            stop=stop,
        )

    with pytest.raises(TrainingInterrupted):
        train()
    network = train()
    image = torch.from_numpy(np.asarray(cases[5].image, np.float32)).cuda()
    window = WindowConfig(patch_size=made.configuration("3d_fullres").patch_size, mirror_axes=(0, 1, 2))
    predicted = predict_logits(image, [network], n_classes=3, config=window).argmax(0).cpu().numpy()
    reference = np.asarray(cases[5].label)
    for value in (1, 2):
        a, b = predicted == value, reference == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.8


def test_sliding_window_equals_the_cpu_up_to_reduced_precision() -> None:
    configuration = plan().configuration("3d_fullres")
    torch.manual_seed(0)
    network = build_network(configuration.network, n_channels=1, n_classes=3).eval()
    window = WindowConfig(patch_size=configuration.patch_size, mirror_axes=(0, 1, 2))
    image = torch.randn(1, 60, 60, 60)
    expected = predict_logits(image, [network], n_classes=3, config=window)
    found = predict_logits(image.cuda(), [network.cuda()], n_classes=3, config=window).cpu()
    assert (found - expected).abs().mean() < 0.02 * expected.std()


def test_loss_and_resampling_equal_the_cpu() -> None:
    logits, classes = torch.randn(2, 3, 20, 20, 20), torch.randint(0, 3, (2, 20, 20, 20))
    for batch_dice in (False, True):
        expected = dice_ce_loss(logits, classes, batch_dice=batch_dice)
        assert dice_ce_loss(logits.cuda(), classes.cuda(), batch_dice=batch_dice).cpu() == pytest.approx(
            float(expected)
        )
    image = torch.randn(1, 20, 30, 40)
    expected = resample_image(image, (25, 20, 55), nearest_axis=None)
    torch.testing.assert_close(
        resample_image(image.cuda(), (25, 20, 55), nearest_axis=None).cpu(), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("patch", [(24, 32, 32), (32, 32)])
def test_augmentation_equals_the_cpu_apart_from_noise(patch: tuple[int, ...]) -> None:
    config = AugmentConfig(noise_probability=0)
    generator = torch.Generator().manual_seed(1)
    parameters = draw_parameters(n_samples=8, n_channels=2, n_axes=len(patch), config=config, generator=generator)
    size = read_size(patch, parameters)
    images, labels = torch.randn(8, 2, *size), torch.randint(0, 4, (8, *size))
    expected = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    found = apply_parameters(images.cuda(), labels.cuda(), patch_size=patch, parameters=parameters)
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=5e-3, rtol=5e-3)
    assert (found[1].cpu() == expected[1]).float().mean() > 0.999


def test_measuring_finds_peak_and_largest_batch_and_gives_all_memory_back() -> None:
    made, device = plan(), torch.device("cuda")
    configuration = made.configuration("3d_fullres")
    # Once before: libraries keep a workspace from their first use on.
    measure_configuration(made, configuration, device=device, max_search_s=10)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    measured = measure_configuration(made, configuration, device=device, max_search_s=10)
    assert torch.cuda.memory_allocated() == before[0]
    assert torch.cuda.memory_reserved() <= before[1]
    assert measured.configuration == "3d_fullres"
    assert measured.device == torch.cuda.get_device_name()
    assert before[0] / 2**30 < measured.peak_memory_gib < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert measured.step_time_s > 0
    assert measured.largest_batch_size > configuration.batch_size


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    """With 2 GiB that torch may take: it runs out of memory for real, again and again."""
    made, device = plan(), torch.device("cuda")
    configuration = made.configuration("3d_fullres")
    measure_configuration(made, configuration, device=device, max_search_s=0)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        small = dataclasses.replace(configuration, batch_size=2)
        largest = measure_configuration(made, small, device=device, max_search_s=60).largest_batch_size
        assert 2 <= largest < 128
        assert torch.cuda.memory_allocated() == before
        too_large = dataclasses.replace(configuration, batch_size=256)
        with pytest.raises(TrainingError, match=r"256 patches .* does not fit .*a batch of \d+ fits: plan again"):
            measure_configuration(made, too_large, device=device)
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
