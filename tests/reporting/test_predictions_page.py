"""Predictions without references: what stands out is found, and the page says so."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoseg.core.errors import FormatError
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import escape
from autoseg.reporting.predictions_page import PredictedCase, write_predictions_page
from autoseg.reporting.standouts import MIN_CASES, find_standouts, find_typical, score_volumes, tell_reasons

HOSTILE = "<script>alert(1)</script>\"'&</style>\x1b[31m\n\u202e$x^{$ 心臓"
NAMES = ("liver", "spleen")


def make_case(
    name: str,
    *volumes_ml: float,
    warnings: tuple[str, ...] = (),
    error: str | None = None,
    estimated_dice: float | None = None,
    is_flagged: bool = False,
) -> PredictedCase:
    return PredictedCase(
        case=name,
        volumes_ml=dict(zip(NAMES, volumes_ml, strict=False)),
        warnings=warnings,
        error=error,
        estimated_dice=estimated_dice,
        is_flagged=is_flagged,
        seconds=3.0,
    )


def make_cases(n: int = 12) -> list[PredictedCase]:
    """Much alike: volumes differ by a few percent."""
    return [make_case(f"case {i:02}", 1500.0 * (1 + i / 100), 200.0 * (1 - i / 100)) for i in range(n)]


def load_overlay(case: str) -> OverlayRow:
    label = np.zeros((8, 30, 40), np.uint8)
    label[2:6, 10:20, 12:20] = 1
    label[2:6, 10:20, 20:28] = 5
    return OverlayRow(title=case, image=50.0 * label, spacing_mm=(3.0, 1.0, 1.0), prediction=label)


def write(
    tmp_path: Path,
    cases: list[PredictedCase],
    overlays: Callable[[str], OverlayRow] = load_overlay,
    *,
    names: tuple[str, ...] = NAMES,
) -> str:
    """Writes a page, and returns its text without its markup."""
    path = tmp_path / "out" / "report.html"
    facts = [("model", "3d_fullres"), ("scans", str(len(cases)))]
    assert (
        write_predictions_page(
            path, "Predictions", facts, cases, overlays, values=(1, 5), names=names, structures=names
        )
        == path
    )
    assert {file.name for file in path.parent.iterdir()} == {"report.html", "report"}, "no half-written file is left"
    markup = path.read_text(encoding="utf-8")
    assert not re.search("https?://", re.sub('base64,[^"]*', "", markup))
    assert "<script" not in markup
    assert markup.count("<img") == len(
        re.findall('<img src="data:image/(?:png|jpeg|gif);base64,[^"]+" alt="[^"]+">', markup)
    )
    return html.unescape(re.sub("<[^>]*>", "|", re.sub("<style>.*?</style>", "", markup, flags=re.DOTALL)))


def test_usual_cases_do_not_stand_out() -> None:
    assert not find_standouts(make_cases(), NAMES)


def test_an_unusual_volume_stands_out() -> None:
    cases = [*make_cases(), make_case("large", 4500.0, 200.0), make_case("small", 1500.0, 20.0)]
    small, large = find_standouts(cases, NAMES)
    assert (small.case, large.case) == ("small", "large"), "the farthest first"
    assert large.reasons[0].startswith("liver is unusually large: 4,500 ml (median 1,5")
    assert small.reasons[0].startswith("spleen is unusually small: 20 ml")


def test_scores_are_robust() -> None:
    """Half of the volumes are e times as large as the other half but for one, which is a million times as large."""
    cases = [make_case(f"{i}", math.e ** (i % 3)) for i in range(9)] + [make_case("far", 1e6)]
    z = score_volumes(cases, ["liver"])["liver"]
    # Logarithms 0, 1, 2 thrice each and one more: the median is 1, and so is the median distance from it.
    assert z["0"] == pytest.approx(-1 / 1.4826)
    assert z["1"] == pytest.approx(0)
    assert z["far"] == pytest.approx((math.log(1e6) - 1) / 1.4826)


def test_small_differences_never_stand_out() -> None:
    cases = [make_case(f"{i}", 100.0) for i in range(20)]
    assert not find_standouts([*cases, make_case("other", 110.0)], ["liver"])
    assert find_standouts([*cases, make_case("other", 150.0)], ["liver"])


def test_a_missing_label_stands_out_where_nearly_all_have_it() -> None:
    (found,) = find_standouts([*make_cases(), make_case("without", 1500.0, 0.0)], NAMES)
    assert (found.case, found.reasons) == ("without", ("spleen is missing, which nearly all others have",))
    rare = [dataclasses.replace(case, volumes_ml={"liver": 1500.0}) for case in make_cases()]
    assert not find_standouts([*rare, make_case("with", 1500.0, 200.0)], NAMES)


def test_few_cases_do_not_tell_what_is_usual() -> None:
    cases = [*make_cases(MIN_CASES - 3), make_case("large", 9000.0, 0.0)]
    assert not find_standouts(cases, NAMES)
    warned = make_case("warned", 1.0, warnings=("coarse",))
    assert [found.case for found in find_standouts([*cases, warned], NAMES)] == ["warned"]


def test_the_gravest_come_first() -> None:
    cases = [
        *make_cases(),
        make_case("warned", 1500.0, 200.0, warnings=("coarse voxels",)),
        make_case("missing", 1500.0, 0.0, warnings=("coarse voxels",)),
        make_case("failed", error="cannot be read"),
        make_case("low", 1500.0, 200.0, estimated_dice=0.6, is_flagged=True),
        make_case("lower", 1500.0, 200.0, estimated_dice=0.5, is_flagged=True),
    ]
    found = find_standouts(cases, NAMES)
    assert [standout.case for standout in found] == ["failed", "lower", "low", "missing", "warned"]
    assert found[0].reasons == ("it has no label map: cannot be read",)
    assert found[1].reasons == ("the folds agree little: a Dice of 0.50 is to be expected",)
    assert tell_reasons(found[3]) == "spleen is missing, which nearly all others have; coarse voxels"
    many = make_case("many", 1.0, warnings=tuple("abcdef"))
    assert tell_reasons(find_standouts([many], NAMES)[0]) == "a; b; c; d; and 2 more"


def test_typical_cases_have_usual_volumes() -> None:
    cases = [*make_cases(13), make_case("failed", error="x"), make_case("large", 9000.0, 200.0)]
    assert [case.case for case in find_typical(cases, NAMES, n=1)] == ["case 06"]
    assert not find_typical([make_case("failed", error="x")], NAMES, n=3)


def test_a_thousand_cases_with_many_labels_are_quick() -> None:
    names = [f"organ {i}" for i in range(118)]
    rng = np.random.default_rng(0)
    volumes_ml = rng.lognormal(0, 0.3, (1000, 118))
    cases = [
        dataclasses.replace(make_case(f"{i}"), volumes_ml=dict(zip(names, row.tolist(), strict=True)))
        for i, row in enumerate(volumes_ml)
    ]
    assert len(find_standouts(cases, names)) < 200
    assert len(find_typical(cases, names, n=3)) == 3


def test_what_a_page_says(tmp_path: Path) -> None:
    cases = [
        *make_cases(13),
        make_case("large", 4500.0, 200.0, estimated_dice=0.9),
        make_case("failed", error="the file is empty"),
    ]
    text = write(tmp_path, cases)
    for fact in (
        "14 of 15 scans were segmented.",
        "2 stand out and should be looked at first.",
        "it has no label map: the file is empty",
        "liver is unusually large: 4,500 ml",
        "liver (1)",
        "spleen (5)",
        "Walk through case 06",
        "14 of 14",
        "0.90",
    ):
        assert fact in text
    folder = tmp_path / "out" / "report"
    names = {"standout-1.png", "typical-1.png", "typical-2.png", "typical-3.png", "typical-1.gif", "volumes.png"}
    assert {file.name for file in folder.iterdir()} == names
    with Image.open(folder / "typical-1.gif") as walk:
        assert getattr(walk, "n_frames", 1) == 8
        pixels = np.asarray(walk.convert("RGB")).astype(int)
    assert not ((pixels[..., 1] > 150) & (pixels[..., 0] < 80)).any(), "there is no reference"


def test_a_reference_is_not_shown(tmp_path: Path) -> None:
    def overlay(case: str) -> OverlayRow:
        row = load_overlay(case)
        return dataclasses.replace(row, reference=np.full_like(row.prediction, 1), prediction=row.prediction)

    assert "spleen (5)" in write(tmp_path, make_cases(), overlay)


def test_cases_that_cannot_be_loaded_are_told(tmp_path: Path) -> None:
    def overlay(case: str) -> OverlayRow:
        raise FormatError(f"{case}.nii.gz: no such file")

    text = write(tmp_path, [*make_cases(13), make_case("large", 4500.0, 200.0)], overlay)
    assert "It cannot be shown: large.nii.gz: no such file" in text
    assert "It cannot be shown: case 06.nii.gz: no such file" in text


@pytest.mark.parametrize(
    "cases",
    [[], [make_case("only", 1.0, 2.0)], [make_case("failed", error="x")], [make_case("empty", 0.0, 0.0)]],
    ids=["none", "one", "failed", "empty"],
)
def test_few_cases(tmp_path: Path, cases: list[PredictedCase]) -> None:
    text = write(tmp_path, cases)
    assert "nan" not in text.lower()
    assert f"{sum(case.error is None for case in cases)} of {len(cases)} scans were segmented." in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = (HOSTILE, HOSTILE + "2")
    cases = [
        dataclasses.replace(make_case(f"{HOSTILE}/../{i}", warnings=(HOSTILE,)), volumes_ml={HOSTILE: 1.0 + i / 9})
        for i in range(9)
    ]
    text = write(tmp_path, cases, names=names)
    assert text.count(html.unescape(escape(HOSTILE))) > 20
