"""What runs on a GPU gives what the CPU gives, repeats itself, and goes on where it was interrupted.

Needs no image files, and nothing that is not needed for training and prediction.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_cases import write_balls_in_shells

from autoseg.core.errors import TrainingError, TrainingInterrupted
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import write_json
from autoseg.evaluation.metrics import count_labels, dice
from autoseg.inference.predictor import Predictor, PreparedImage
from autoseg.inference.sliding_window import WindowConfig, predict_logits
from autoseg.networks.build import build_network
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.adapt import choose_training
from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters, read_size
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.losses import deep_supervision_loss, dice_ce_loss
from autoseg.training.measure import measure_configuration
from autoseg.training.record import EpochFigures, FoldFiles, read_log
from autoseg.training.trainer import train_fold

# cuBLAS is asked once in a process whether it may be used in deterministic training: when anything first uses it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda")
CONFIGURATION = "3d_fullres"
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
    return write_balls_in_shells(tmp_path_factory.mktemp("cases"), 6, SHAPE, centres=(12, 24), radii=(6, 11))


def train(
    folder: Path,
    cases: Sequence[PreprocessedCase],
    config: TrainConfig,
    *,
    n_stages: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> torch.nn.Module:
    made = plan()
    configuration = made.configuration(CONFIGURATION)
    network = configuration.network
    network = dataclasses.replace(
        network,
        features=network.features[:n_stages],
        strides=network.strides[:n_stages],
        kernel_sizes=network.kernel_sizes[:n_stages],
        encoder_blocks=network.encoder_blocks[:n_stages],
        decoder_blocks=network.decoder_blocks[: n_stages and n_stages - 1],
    )
    trained = dataclasses.replace(configuration, network=network)
    return train_fold(
        folder,
        made,
        choose_training(made, trained, config, n_cases=4, device=DEVICE)[0],
        training=cases[:4],
        validation=cases[4:],
        config=config,
        device=DEVICE,
        stop=stop,
    )


def stop_once_after(n_steps: int) -> Callable[[], bool]:
    """True at the n-th time it is asked, which is after every step."""
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] == n_steps

    return stop


def epochs_of(folder: Path) -> list[EpochFigures]:
    return read_log(FoldFiles(folder=folder).log)


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, cases: list[PreprocessedCase]) -> Path:
    """The folder of a model whose only fold was interrupted once."""
    folder = tmp_path_factory.mktemp("models") / CONFIGURATION
    config = TrainConfig(budget=Budget(iterations=100, iterations_per_epoch=20))
    write_json(folder / "plan.json", dataclasses.replace(plan(), recommended=CONFIGURATION).signed())
    with pytest.raises(TrainingInterrupted):
        train(folder / "fold_0", cases, config, stop=stop_once_after(30))
    train(folder / "fold_0", cases, config)
    return folder


def test_training_that_was_interrupted_learns(model: Path, cases: list[PreprocessedCase]) -> None:
    epochs = epochs_of(model / "fold_0")
    assert [figures.iteration for figures in epochs] == [20, 40, 60, 80, 100]
    predictor = Predictor(model, device=str(DEVICE))
    image = torch.from_numpy(np.asarray(cases[5].image, np.float32))
    predicted, reference = (
        predictor.segment(PreparedImage(image=image, record=cases[5].record, occupied=cases[5].occupied)).label,
        np.asarray(cases[5].label),
    )
    for counts in count_labels(predicted, reference, LABELS.values):
        assert dice(counts) > 0.8


def test_deterministic_training_repeats_itself_and_resumes_bit_for_bit(
    tmp_path: Path, cases: list[PreprocessedCase]
) -> None:
    config = TrainConfig(budget=Budget(iterations=16, iterations_per_epoch=8), deterministic=True, mirror=True)
    first, second = (train(tmp_path / name, cases, config) for name in ("first", "second"))
    assert_same_weights(first, second)
    # In the middle of an epoch, and at the end of one.
    for n_steps in (5, 8):
        folder = tmp_path / f"stopped_after_{n_steps}"
        with pytest.raises(TrainingInterrupted):
            train(folder, cases, config, stop=stop_once_after(n_steps))
        assert_same_weights(train(folder, cases, config), first)
    before = [dataclasses.replace(figures, time_s=0, step_s=0, data_wait_fraction=0) for figures in epochs_of(folder)]
    for figures, known in zip(epochs_of(tmp_path / "first"), before, strict=True):
        assert dataclasses.replace(figures, time_s=0, step_s=0, data_wait_fraction=0) == known
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_seeds_give_other_weights(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    """Or else the test above could not fail."""
    config = TrainConfig(budget=Budget(iterations=2, iterations_per_epoch=2), deterministic=True)
    first = train(tmp_path / "first", cases, config)
    second = train(tmp_path / "second", cases, dataclasses.replace(config, seed=1))
    assert not all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_precision_trains_without_a_bad_step(
    precision: str, tmp_path: Path, cases: list[PreprocessedCase], caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(budget=Budget(iterations=40, iterations_per_epoch=10), precision=precision)
    with caplog.at_level(logging.INFO, logger="autoseg"):
        network = train(tmp_path, cases, config)
    text = caplog.text
    assert f", {precision} on " in text
    assert "is skipped" not in text
    epochs = epochs_of(tmp_path)
    assert all(np.isfinite([figures.train_loss, figures.validation_loss]).all() for figures in epochs)
    assert epochs[-1].train_loss < epochs[0].train_loss - 0.1
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())


def test_compiled_training_gives_the_same_or_goes_on_without(
    tmp_path: Path, cases: list[PreprocessedCase], caplog: pytest.LogCaptureFixture
) -> None:
    plain = TrainConfig(budget=Budget(iterations=10, iterations_per_epoch=10), compile=False)
    compiled = dataclasses.replace(plain, compile=True)
    # Few stages, since compiling takes a second or so for each layer.
    train(tmp_path / "plain", cases, plain, n_stages=3)
    with caplog.at_level(logging.INFO, logger="autoseg"):
        train(tmp_path / "compiled", cases, compiled, n_stages=3)
    assert "compiling the network" in caplog.text
    (expected,), (found,) = epochs_of(tmp_path / "plain"), epochs_of(tmp_path / "compiled")
    assert found.train_loss == pytest.approx(expected.train_loss, rel=0.03)
    # What it has learned is written under the names of the plain one, which goes on with it.
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "resumed", cases, compiled, n_stages=3, stop=stop_once_after(5))
    train(tmp_path / "resumed", cases, plain, n_stages=3)
    assert epochs_of(tmp_path / "resumed")[0].train_loss == pytest.approx(expected.train_loss, rel=0.03)


# -- the same as on the CPU --------------------------------------------------------------------------------------------


def test_label_maps_equal_the_cpus(model: Path, cases: list[PreprocessedCase]) -> None:
    on_gpu, on_cpu = (
        Predictor(model, device=str(DEVICE), mirroring=True),
        Predictor(model, device="cpu", mirroring=True),
    )
    equal, n_voxels = 0, 0
    for case in cases[3:]:
        image = torch.from_numpy(np.asarray(case.image, np.float32))
        prepared = PreparedImage(image=image, record=case.record, occupied=case.occupied)
        found, expected = (known.segment(prepared).label for known in (on_gpu, on_cpu))
        assert set(np.unique(expected)) == {0, *LABELS.values}
        equal += int((found == expected).sum())
        n_voxels += expected.size
    assert equal / n_voxels >= 0.999


def test_sliding_window_equals_the_cpu_up_to_reduced_precision() -> None:
    configuration = plan().configuration(CONFIGURATION)
    torch.manual_seed(0)
    network = build_network(configuration.network, n_channels=1, n_outputs=3).eval()
    window = WindowConfig(patch_size=configuration.patch_size, mirror_axes=(0, 1, 2))
    image = torch.randn(1, 60, 60, 60)
    expected = predict_logits(image, [network], n_outputs=3, config=window)
    found = predict_logits(image.to(DEVICE), [network.to(DEVICE)], n_outputs=3, config=window).cpu()
    assert (found - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_loss_and_its_gradient_equal_the_cpus(batch_dice: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 20, 28), (12, 10, 14)]
    outputs = [torch.randn(2, 3, *shape, generator=generator) for shape in shapes]
    classes = torch.randint(0, 3, (2, *shapes[0]), generator=generator)

    def compute(device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = [output.to(device).requires_grad_() for output in outputs]
        loss = deep_supervision_loss(logits, classes.to(device), batch_dice=batch_dice)
        return loss.detach().cpu(), [gradient.cpu() for gradient in torch.autograd.grad(loss, logits)]

    expected, found = compute(torch.device("cpu")), compute(DEVICE)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=0)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()
    # Half precision comes from the network, the loss is taken in full.
    half = dice_ce_loss(outputs[0].to(DEVICE).half(), classes.to(DEVICE), batch_dice=batch_dice)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(dice_ce_loss(outputs[0], classes, batch_dice=batch_dice)), rel=1e-3)


def test_resampling_equals_the_cpu() -> None:
    image = torch.randn(1, 20, 30, 40)
    expected = resample_image(image, (25, 20, 55), nearest_axis=None)
    found = resample_image(image.to(DEVICE), (25, 20, 55), nearest_axis=None).cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("patch", [(24, 32, 32), (32, 32)])
def test_augmentation_equals_the_cpu_apart_from_noise(patch: tuple[int, ...]) -> None:
    config = AugmentConfig(noise_probability=0)
    generator = torch.Generator().manual_seed(1)
    parameters = draw_parameters(n_samples=8, n_channels=2, n_axes=len(patch), config=config, generator=generator)
    size = read_size(patch, parameters)
    images = torch.randn(8, 2, *size, generator=generator)
    labels = torch.randint(0, 4, (8, *size), generator=generator)
    expected = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    found = apply_parameters(images.to(DEVICE), labels.to(DEVICE), patch_size=patch, parameters=parameters)
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=5e-3, rtol=5e-3)
    assert (found[1].cpu() == expected[1]).float().mean() > 0.999


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_measuring_finds_peak_and_largest_batch_and_gives_all_memory_back() -> None:
    made, device = plan(), DEVICE
    configuration = made.configuration(CONFIGURATION)
    # Once before: libraries keep a workspace from their first use on.
    measure_configuration(made, configuration, device=device, max_search_s=10)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    measured = measure_configuration(made, configuration, device=device, max_search_s=10)
    assert torch.cuda.memory_allocated() == before[0]
    assert torch.cuda.memory_reserved() <= before[1]
    assert measured.configuration == CONFIGURATION
    assert measured.device == torch.cuda.get_device_name()
    assert before[0] / 2**30 < measured.peak_memory_gib < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert measured.step_time_s > 0
    assert measured.largest_batch_size > configuration.batch_size


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    """With 2 GiB that torch may take: it runs out of memory for real, again and again."""
    made, device = plan(), DEVICE
    configuration = made.configuration(CONFIGURATION)
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
