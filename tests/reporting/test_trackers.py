"""What a tracker wrote is read back with TensorBoard's own readers: the figures, and the pixels of the slices."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from autoseg.core.errors import TrainingError
from autoseg.reporting.figures import PREDICTION_COLOUR, REFERENCE_COLOUR
from autoseg.reporting.trackers import (
    EPOCHS_BETWEEN_SLICES,
    EVERY_EPOCH_UNTIL,
    GAP_PIXELS,
    MAX_SLICE_EDGE,
    MAX_SLICES,
    SLICES,
    TRACKERS,
    TensorBoardTracker,
    draw_validation_slice,
    make_tracker,
)
from autoseg.training.record import EpochFigures, ValidationSlice

LABELS = ("left kidney", "GTV/node", "心臓")
GREEN, RED = (np.rint(np.multiply(to_rgb(colour), 255)) for colour in (REFERENCE_COLOUR, PREDICTION_COLOUR))

Scalars = dict[str, list[tuple[int, float]]]


def make_epoch(epoch: int, *, iteration: int | None = None, attempt: int = 0) -> EpochFigures:
    """An epoch of ten steps; its figures are different for each epoch and attempt."""
    rng = np.random.default_rng([epoch, attempt])
    return EpochFigures(
        epoch=epoch,
        iteration=10 * epoch if iteration is None else iteration,
        time_s=3.0 * epoch,
        train_loss=rng.normal(),
        validation_loss=rng.normal(),
        validation_dice=rng.random(),
        smoothed_dice=rng.random(),
        class_dice=(rng.random(), rng.random(), math.nan),
        learning_rate=rng.random(),
        step_s=rng.random(),
        data_wait_fraction=rng.random(),
    )


def make_epochs(n: int, *, attempt: int = 0) -> list[EpochFigures]:
    return [make_epoch(i + 1, attempt=attempt) for i in range(n)]


def make_slice(case: str = "case_1", *, shape: tuple[int, int] = (64, 48)) -> ValidationSlice:
    """A bright block in the corner near (0, 0), whose prediction is four pixels too far along both axes."""
    reference, predicted = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    reference[8:20, 6:16] = 2
    predicted[12:24, 10:20] = 2
    image = np.random.default_rng(0).normal(0, 0.05, shape) + (reference > 0)
    return ValidationSlice(case=case, image=image.astype(np.float32), reference=reference, predicted=predicted)


def open_events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={accumulator.SCALARS: 0, accumulator.IMAGES: 0}
    )
    return reader.Reload()


def read_scalars(folder: Path) -> Scalars:
    reader = open_events(folder)
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def read_pictures(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """By tag and step, (height, width, 3) uint8."""
    reader = open_events(folder)
    return {
        tag: {
            event.step: np.rint(255 * matplotlib.image.imread(io.BytesIO(event.encoded_image_string))).astype(np.uint8)
            for event in reader.Images(tag)
        }
        for tag in reader.Tags()["images"]
    }


def expect_scalars(epochs: Sequence[EpochFigures]) -> Scalars:
    """What should be shown of these epochs, with the precision of the files."""
    columns = {
        "loss/training": [epoch.train_loss for epoch in epochs],
        "loss/validation": [epoch.validation_loss for epoch in epochs],
        "dice/mean": [epoch.validation_dice for epoch in epochs],
        "dice/mean, smoothed": [epoch.smoothed_dice for epoch in epochs],
        "label dice/left kidney": [epoch.class_dice[0] for epoch in epochs],
        "label dice/GTV/node": [epoch.class_dice[1] for epoch in epochs],
        "speed/learning_rate": [epoch.learning_rate for epoch in epochs],
        "speed/step_s": [epoch.step_s for epoch in epochs],
        "speed/data_wait_fraction": [epoch.data_wait_fraction for epoch in epochs],
    }
    return {
        tag: [(epoch.iteration, float(np.float32(value))) for epoch, value in zip(epochs, column, strict=True)]
        for tag, column in columns.items()
    }


def follow(folder: Path, epochs: Sequence[EpochFigures], *, done: int = 0) -> None:
    """Tracks a run of the process, which begins when `done` of the epochs are behind it."""
    tracker = TensorBoardTracker(folder, LABELS)
    for n in range(done + 1, len(epochs) + 1):
        tracker.log(epochs[:n], [make_slice()])
    tracker.close()


@pytest.fixture(autouse=True, scope="module")
def _tensorboard_is_there() -> None:
    pytest.importorskip("tensorboard")


def test_every_figure_of_every_epoch_is_there(tmp_path: Path) -> None:
    epochs = make_epochs(4)
    follow(tmp_path, epochs)
    assert read_scalars(tmp_path) == expect_scalars(epochs)


def test_what_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    first, second = make_epochs(2)
    second = dataclasses.replace(second, train_loss=math.nan, class_dice=(math.nan, 0.5, 0.25))
    follow(tmp_path, [first, second])
    scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars["loss/training"]] == [10]
    assert [step for step, _ in scalars["label dice/left kidney"]] == [10]
    assert scalars["label dice/心臓"] == [(20, 0.25)]


def test_nothing_is_written_before_the_first_epoch(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, LABELS)
    tracker.log([], [])
    tracker.close()
    tracker.close()
    assert not list(tmp_path.iterdir())


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_slices_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, LABELS)
    shown = [make_slice("b 1"), make_slice("a", shape=(30, 90)), *[make_slice("a")] * MAX_SLICES]
    tracker.log(make_epochs(1), shown)
    tracker.close()
    pictures = read_pictures(tmp_path)
    assert sorted(pictures) == [f"{SLICES}/{name}" for name in ("1 b 1", "2 a", "3 a", "4 a")]
    assert all(list(steps) == [10] for steps in pictures.values())
    np.testing.assert_array_equal(pictures[f"{SLICES}/1 b 1"][10], draw_validation_slice(shown[0]))
    np.testing.assert_array_equal(pictures[f"{SLICES}/2 a"][10], draw_validation_slice(shown[1]))


def split_panels(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = (picture.shape[1] - GAP_PIXELS) // 2
    return picture[:, :width], picture[:, -width:]


def find_colour(panel: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return (panel == colour).all(-1)


def test_outlines_lie_on_the_borders() -> None:
    shown = make_slice()
    plain, marked = split_panels(draw_validation_slice(shown))
    assert np.array_equal(plain[..., 0], plain[..., 1])
    assert np.array_equal(plain[..., 0], plain[..., 2])
    scale = plain.shape[0] // 64
    assert plain.shape == (64 * scale, 48 * scale, 3)
    # Anterior is up and the patient's right on the left, so both axes are turned round.
    for colour, rows, columns in ((GREEN, (44, 56), (32, 42)), (RED, (40, 52), (28, 38))):
        found = np.nonzero(find_colour(marked, colour))
        for axis, (first, last) in zip(found, (rows, columns), strict=True):
            assert axis.min() == pytest.approx(first * scale, abs=2)
            assert axis.max() == pytest.approx(last * scale, abs=2)
        centre = marked[sum(rows) * scale // 2, sum(columns) * scale // 2]
        assert len(set(centre.tolist())) == 1, "regions are not filled"
    coloured = find_colour(marked, GREEN) | find_colour(marked, RED)
    assert np.array_equal(marked[~coloured], plain[~coloured])


def test_both_outlines_are_legible_where_they_coincide() -> None:
    shown = make_slice()
    _, marked = split_panels(draw_validation_slice(dataclasses.replace(shown, predicted=shown.reference)))
    red, green = find_colour(marked, RED), find_colour(marked, GREEN)
    assert red.sum() == pytest.approx(green.sum(), rel=0.1)
    _, columns = np.nonzero(green[marked.shape[0] * 50 // 64, None])
    _, middle = np.nonzero(red[marked.shape[0] * 50 // 64, None])
    assert columns.min() < middle.min() <= middle.max() < columns.max()


def test_borders_between_classes_are_drawn_too() -> None:
    shown = make_slice()
    reference = shown.reference.copy()
    reference[14:20, 6:16] = 1
    nothing = np.zeros_like(reference)
    _, one = split_panels(draw_validation_slice(dataclasses.replace(shown, predicted=nothing)))
    _, two = split_panels(draw_validation_slice(dataclasses.replace(shown, predicted=nothing, reference=reference)))
    assert not find_colour(one, RED).any()
    assert find_colour(two, GREEN).sum() > find_colour(one, GREEN).sum()


def test_brightness_follows_the_image_and_not_the_prediction() -> None:
    shown = make_slice()
    plain, _ = split_panels(draw_validation_slice(shown))
    scale = plain.shape[0] // 64
    assert plain[50 * scale, 37 * scale, 0] > plain[10 * scale, 10 * scale, 0] + 50
    shown.image[40:60, 30:45] = 10
    brighter = np.zeros_like(shown.predicted)
    brighter[40:60, 30:45] = 1
    before, _ = split_panels(draw_validation_slice(shown))
    after, _ = split_panels(draw_validation_slice(dataclasses.replace(shown, predicted=brighter)))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_to_see_is_drawn_too(value: float) -> None:
    empty = np.zeros((20, 20), np.uint8)
    image = np.full((20, 20), value, np.float32)
    picture = draw_validation_slice(ValidationSlice(case="a", image=image, reference=empty, predicted=empty))
    assert not (find_colour(picture, GREEN) | find_colour(picture, RED)).any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (MAX_SLICE_EDGE, 100), (MAX_SLICE_EDGE + 1, 40), (1500, 1500)])
def test_slices_of_any_size_make_pictures_of_about_one_size(shape: tuple[int, int]) -> None:
    picture = draw_validation_slice(make_slice(shape=shape))
    plain, _ = split_panels(picture)
    assert 300 <= max(plain.shape) <= 512
    assert picture.dtype == np.uint8


def test_files_stay_small(tmp_path: Path) -> None:
    """As the class says it: with four slices of 128 x 128, one of every tenth epoch after the hundredth."""
    epochs = make_epochs(EVERY_EPOCH_UNTIL + 2 * EPOCHS_BETWEEN_SLICES)
    slices = [make_slice(f"{i}", shape=(128, 128)) for i in range(MAX_SLICES)]
    tracker = TensorBoardTracker(tmp_path, LABELS)
    tracker.log(epochs[:-1], [])
    before = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    assert before < 1.5 * 1024 * len(epochs)
    tracker.log(epochs, slices)
    after = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    assert after - before < 120 * 1024
    for further in range(1, EPOCHS_BETWEEN_SLICES + 1):
        tracker.log([*epochs, *(make_epoch(len(epochs) + i + 1) for i in range(further))], slices[:1])
    tracker.close()
    steps = list(read_pictures(tmp_path)[f"{SLICES}/1 0"])
    assert steps == [10 * len(epochs), 10 * (len(epochs) + EPOCHS_BETWEEN_SLICES)]


# -- resuming ----------------------------------------------------------------------------------------------------------


def resume_after_last_epoch(folder: Path) -> list[EpochFigures]:
    """Stopped between two epochs: nothing is lost."""
    epochs = make_epochs(6)
    follow(folder, epochs[:3])
    follow(folder, epochs, done=3)
    return epochs


def resume_twice(folder: Path) -> list[EpochFigures]:
    epochs = make_epochs(6)
    follow(folder, epochs[:2])
    follow(folder, [*epochs[:2], *(make_epoch(i, attempt=1) for i in (3, 4))], done=2)
    follow(folder, epochs, done=2)
    return epochs


def resume_from_earlier_epoch(folder: Path) -> list[EpochFigures]:
    """Killed, and resumed from a checkpoint that is two epochs older than what was shown."""
    epochs = make_epochs(6)
    follow(folder, [*epochs[:3], make_epoch(4, attempt=1), make_epoch(5, attempt=1)])
    follow(folder, epochs[:4], done=3)
    follow(folder, epochs, done=4)
    return epochs


def resume_from_the_epoch_before(folder: Path) -> list[EpochFigures]:
    """Killed after an epoch was shown and before it was saved; it comes out the same again."""
    epochs = make_epochs(5)
    follow(folder, epochs[:4])
    follow(folder, epochs, done=3)
    return epochs


def resume_with_longer_epoch(folder: Path) -> list[EpochFigures]:
    """Epochs that end by time: the one that was lost ended at an earlier step than the one in its place."""
    epochs = make_epochs(5)
    follow(folder, [*epochs[:3], make_epoch(4, iteration=33, attempt=1)])
    follow(folder, epochs, done=3)
    return epochs


def resume_with_shorter_epoch(folder: Path) -> list[EpochFigures]:
    epochs = make_epochs(5)
    follow(folder, [*epochs[:3], make_epoch(4, iteration=47, attempt=1)])
    follow(folder, epochs, done=3)
    return epochs


def track_from_the_middle(folder: Path) -> list[EpochFigures]:
    """The epochs before are known from the log."""
    epochs = make_epochs(5)
    follow(folder, epochs, done=3)
    return epochs


def track_with_a_gap(folder: Path) -> list[EpochFigures]:
    epochs = make_epochs(8)
    follow(folder, epochs[:2])
    follow(folder, epochs, done=5)
    return epochs


def train_anew(folder: Path) -> list[EpochFigures]:
    """Without resuming, with longer epochs: nothing of the earlier training may be left between them."""
    follow(folder, [make_epoch(i + 1, iteration=3 * (i + 1), attempt=1) for i in range(20)])
    epochs = make_epochs(2)
    follow(folder, epochs)
    return epochs


def train_anew_and_track_from_the_middle(folder: Path) -> list[EpochFigures]:
    follow(folder, make_epochs(6, attempt=1))
    epochs = make_epochs(4)
    follow(folder, epochs, done=2)
    return epochs


def resume_after_half_a_record(folder: Path) -> list[EpochFigures]:
    """The machine went down while the file was written: its last bytes are missing."""
    epochs = make_epochs(5)
    follow(folder, epochs[:3])
    (file,) = (folder / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    follow(folder, epochs, done=3)
    return epochs


HISTORIES = {
    history.__name__: history
    for history in (
        resume_after_last_epoch,
        resume_twice,
        resume_from_earlier_epoch,
        resume_from_the_epoch_before,
        resume_with_longer_epoch,
        resume_with_shorter_epoch,
        track_from_the_middle,
        track_with_a_gap,
        train_anew,
        train_anew_and_track_from_the_middle,
        resume_after_half_a_record,
    )
}


@dataclasses.dataclass(frozen=True)
class Histories:
    """All of `HISTORIES`, each in the folder of its name, and what should be seen of them."""

    folder: Path
    epochs: dict[str, list[EpochFigures]]


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory, _tensorboard_is_there: None) -> Histories:
    folder = tmp_path_factory.mktemp("histories")
    return Histories(folder, {name: history(folder / name) for name, history in HISTORIES.items()})


@pytest.mark.parametrize("name", HISTORIES)
def test_curves_are_those_of_a_training_without_interruption(histories: Histories, name: str) -> None:
    assert read_scalars(histories.folder / name) == expect_scalars(histories.epochs[name])


@pytest.mark.parametrize(
    "name",
    [
        "resume_after_last_epoch",
        "resume_twice",
        "resume_from_earlier_epoch",
        "resume_from_the_epoch_before",
        "resume_after_half_a_record",
    ],
)
def test_slices_of_the_epochs_that_were_kept_are_shown(histories: Histories, name: str) -> None:
    expected = [epoch.iteration for epoch in histories.epochs[name]]
    if name == "resume_after_half_a_record":
        expected.remove(30)
    reader = open_events(histories.folder / name)
    assert [event.step for event in reader.Images(f"{SLICES}/1 case_1")] == expected


@pytest.fixture(params=["true", "false"])
def address(histories: Histories, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the `tensorboard` command shows all histories, with the reader that it uses by default and the other."""
    if request.param == "true":
        pytest.importorskip("tensorboard_data_server")
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(histories.folder), "--port", "0"]
    with (
        log.open("w") as out,
        subprocess.Popen([*command, "--load_fast", request.param], stdout=out, stderr=out) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while not (found := re.search(r"http://\S+:\d+/", log.read_text())) and time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            assert found, log.read_text()
            yield found[0]
        finally:
            process.terminate()


def fetch_scalars(address: str, run: str, tag: str) -> list[tuple[int, float]]:
    url = f"{address}data/plugin/scalars/scalars?run={quote(run, safe='')}&tag={quote(tag, safe='')}"
    try:
        # Not by way of a proxy that the environment may name.
        with build_opener(ProxyHandler({})).open(url, timeout=20) as answer:
            return [(step, value) for _, step, value in json.load(answer)]
    except (OSError, HTTPException):
        return []


def test_curves_are_the_same_in_both_readers_of_the_command(histories: Histories, address: str) -> None:
    """They are others than the one above, and do not heed the same marks."""
    expected = {
        (f"{name}/tensorboard", tag): values
        for name, epochs in histories.epochs.items()
        for tag, values in expect_scalars(epochs).items()
    }
    deadline = time.monotonic() + 60
    while True:
        shown = {(run, tag): fetch_scalars(address, run, tag) for run, tag in expected}
        if shown == expected or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert shown == expected


def test_an_epoch_is_on_disk_when_the_process_is_killed_after_it(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_trackers as t\n"
        "tracker = t.make_tracker('tensorboard', Path(sys.argv[2]), t.LABELS)\n"
        "for n in (1, 2): tracker.log(t.make_epochs(n), [t.make_slice()])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], timeout=300)
    assert done.returncode == -9
    assert read_scalars(tmp_path) == expect_scalars(make_epochs(2))
    assert [list(steps) for steps in read_pictures(tmp_path).values()] == [[10, 20]]


# -- the registry ------------------------------------------------------------------------------------------------------


class Diary:
    """A tracker of a user."""

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.folder, self.labels = folder, labels

    def log(self, epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def test_trackers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(TRACKERS) == ["tensorboard"]
    assert isinstance(make_tracker("tensorboard", tmp_path, LABELS), TensorBoardTracker)
    (tmp_path / "my_trackers.py").write_text("from test_trackers import Diary\nmake_diary = Diary\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_trackers", sys.modules[__name__])
    made = make_tracker("my_trackers:make_diary", tmp_path, LABELS)
    assert isinstance(made, Diary)
    assert (made.folder, made.labels) == (tmp_path, LABELS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "tracker 'wandb' is unknown; known are tensorboard"),
        ("", "tracker '' is unknown"),
        ("no_such_package.module:Name", "'no_such_package.module:Name' cannot be loaded .No module named"),
        ("json:Name", "cannot be loaded .* has no attribute 'Name'"),
        (".module:Name", "cannot be loaded .* relative import"),
        (":Name", "tracker ':Name' is unknown"),
        ("json:", "tracker 'json:' is unknown"),
    ],
)
def test_unknown_trackers_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_tracker(name, tmp_path, LABELS)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        make_tracker("tensorboard", tmp_path, LABELS)
