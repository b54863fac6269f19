"""Pages in a real browser: on a phone and on a desktop, by day and by night."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fingerprints import CT, make_fingerprint
from training_logs import make_epochs

from autoseg.core.labels import LabelSpec
from autoseg.evaluation.crossval import N_CONFIDENCE_BINS, Calibration, CaseReview, CrossValidation, Suspect
from autoseg.evaluation.evaluate import score_case, summarise_scores
from autoseg.evaluation.scores import ScoreSettings, targets_of
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.reporting.charts import DPI, TINY_SIZE
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.predictions_page import PredictedCase, write_predictions_page
from autoseg.reporting.results_page import ConfigurationResults, write_results_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE_WIDTH, DESKTOP_WIDTH = 390, 1200
LONG = "a_name_without_any_space_as_long_as_hospitals_have_them"
LABELS = LabelSpec(names=(LONG, *(f"organ_{i}" for i in range(14))), values=tuple(range(1, 16)))
CASES = tuple(f"{LONG}_{i}" for i in range(8))


class Browser:
    """Chromium without a window, told what to do through two pipes (its DevTools protocol)."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect() -> None:
            # It reads from 3 and writes to 4; these may be numbers of the other ends, so they are moved away first.
            read_end, write_end = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read_end, 3)
            os.dup2(write_end, 4)

        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._n_sent, self._buffer, self._session = 0, b"", ""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Log.enable")

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._n_sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 2**16)
            assert piece, "the browser has gone"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        return message

    def open(self, path: Path, *, width: int, is_dark: bool = False) -> None:
        """Shows a page in a window of this many pixels."""
        self.complaints.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        address = path.resolve().as_uri()
        self._call("Page.navigate", url=address)
        while not self.evaluate(f"document.readyState === 'complete' && location.href === {json.dumps(address)}"):
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real browser without a window."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    running = Browser(program, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


def load_overlay(case: str) -> OverlayRow:
    """A block whose prediction is off by a voxel or two."""
    reference = np.zeros((8, 30, 40), np.uint8)
    for i, value in enumerate(LABELS.values):
        reference[2:6, 5:20, 2 * i + 4 : 2 * i + 6] = value
    prediction = np.roll(reference, int(case[-1]) % 3, axis=1)
    image = 50.0 * reference
    return OverlayRow(title=case, image=image, spacing_mm=(3.0, 1.0, 1.0), reference=reference, prediction=prediction)


def make_a_plan() -> Plan:
    scans = [((40, 200, 180), (3.0, 0.8, 0.8))] * 5
    fingerprint = make_fingerprint(*scans, channels=(CT,), label_volumes_ml=(1.0,) * len(LABELS.names))
    return make_plan(fingerprint, LABELS, dataset=LONG, n_folds=5)


def make_results() -> ConfigurationResults:
    scores, confusion = [], np.zeros((LABELS.n_classes, LABELS.n_classes), int)
    for case in CASES:
        row = load_overlay(case)
        assert row.reference is not None
        assert row.prediction is not None
        scores.append(score_case(case, row.prediction, row.reference, targets_of(LABELS), spacing_mm=row.spacing_mm))
        np.add.at(confusion, (row.reference, row.prediction), 1)
    middles = tuple(((np.arange(N_CONFIDENCE_BINS) + 0.5) / N_CONFIDENCE_BINS).tolist())
    crossval = CrossValidation(
        configuration="3d_fullres",
        model="abc",
        key="",
        evaluation=summarise_scores(scores, settings=ScoreSettings()),
        folds=dict.fromkeys(CASES, 0),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=Calibration(n_voxels=(9,) * N_CONFIDENCE_BINS, confidence=middles, accuracy=middles),
        reviews=tuple(CaseReview(case=case, fold=0, loss=0.5, agreement=0.8, consensus_dice=0.7) for case in CASES),
        suspects=(Suspect(case=CASES[0], score=4.25, why="; ".join(["loss 4.21 (usual 0.31)"] * 5)),),
        quality=None,
    )
    epochs = make_epochs(5, n_labels=len(LABELS.names))
    return ConfigurationResults(name="3d_fullres", curves=dict.fromkeys(range(5), epochs), crossval=crossval)


@pytest.fixture(scope="module")
def results_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With long names wherever there are names."""
    path = tmp_path_factory.mktemp("results") / "results.html"
    return write_results_page(
        path, make_a_plan(), [make_results()], selection=None, overlays=lambda _, case: load_overlay(case)
    )


@pytest.fixture(scope="module")
def predictions_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise."""
    cases = [
        PredictedCase(
            case=case,
            volumes_ml={name: 1.0 + i for name in LABELS.names},
            warnings=(f"{LONG}/{LONG}",) if i == 1 else (),
            error=f"{LONG}/{LONG}.nii.gz: no such file" if i == 2 else None,
            estimated_dice=0.8,
            is_flagged=False,
            seconds=1.0,
        )
        for i, case in enumerate(CASES)
    ]
    return write_predictions_page(
        tmp_path_factory.mktemp("predictions") / "report.html",
        LONG,
        [("model", LONG), ("scans", "8")],
        cases,
        load_overlay,
        values=LABELS.values,
        names=LABELS.names,
        structures=LABELS.names,
    )


@pytest.mark.parametrize("width", [PHONE_WIDTH, DESKTOP_WIDTH])
@pytest.mark.parametrize("is_dark", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("page", ["results_page", "predictions_page"])
def test_a_page_fits_and_is_whole(
    browser: Browser, page: str, width: int, is_dark: bool, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(page), width=width, is_dark=is_dark)
    assert not browser.complaints
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert browser.evaluate("document.images.length") > 5
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) < 128) == is_dark
    turned = browser.evaluate("getComputedStyle(document.querySelector('.chart img')).filter")
    assert (turned != "none") == is_dark, "charts are drawn on white"
    # Every link in the head of the page leads somewhere.
    assert browser.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_charts_can_be_read_on_a_phone(browser: Browser, results_page: Path) -> None:
    browser.open(results_page, width=PHONE_WIDTH)
    charts = "[...document.querySelectorAll('.chart img, .panels img, .wide-picture img')]"
    scales = browser.evaluate(f"{charts}.map(image => image.clientWidth / image.naturalWidth)")
    assert len(scales) == 4 + 1 + 9
    # The smallest type of a chart, in pixels of the page.
    assert min(scales) * TINY_SIZE * DPI / 72 > 8.5


def test_slices_can_be_seen_on_a_phone(browser: Browser, results_page: Path) -> None:
    browser.open(results_page, width=PHONE_WIDTH)
    heights = browser.evaluate("[...document.querySelectorAll('.pictures img')].map(image => image.clientHeight)")
    assert min(heights) > 200
    # They are scrolled sideways.
    assert browser.evaluate("document.querySelector('.pictures').scrollWidth") > PHONE_WIDTH
