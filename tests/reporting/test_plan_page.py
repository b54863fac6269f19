"""The page is parsed as a browser would: every fact is there once, whatever names and numbers there are."""

from __future__ import annotations

import dataclasses
import html
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import fingerprints
import numpy as np
import pytest

from autoseg.core.errors import MAX_SHOWN_PER_KIND, Problem
from autoseg.core.labels import LabelSpec
from autoseg.planning.cost import list_stages
from autoseg.planning.estimates import Estimates, estimate
from autoseg.planning.fingerprint import CaseFingerprint, Fingerprint
from autoseg.planning.plan import Measurement, Plan, Reason
from autoseg.planning.planner import make_plan
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import VOID_ELEMENTS, escape, format_large, format_number, format_size
from autoseg.reporting.plan_figures import place_on_axes
from autoseg.reporting.plan_page import write_plan_page

HOSTILE = "<script>alert(1)</script>\"'&</style>\x1b[31m\n\u202e$x$ 心臓"
SHAPE = (40, 200, 180)
SPACING_MM = (3.0, 0.8, 0.8)


class Page(HTMLParser):
    """What a page holds, checked for balance while it is read."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.reasons: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.exact: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID_ELEMENTS:
            self.stack.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data":
            self.exact.append(int(attributes["value"] or ""))
        if "data-subject" in attributes:
            self.reasons.append((attributes["data-subject"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        names = [tag for tag, _ in self.stack]
        if "style" in names:
            return
        self.text += data
        if {"td", "th"} & set(names):
            self.rows[-1][-1] += data
        if self.stack and "data-subject" in self.stack[-1][1]:
            subject, known = self.reasons[-1]
            self.reasons[-1] = subject, known + data

    def row(self, heading: str) -> list[str]:
        """The only row that begins with that heading."""
        (row,) = [row for row in self.rows if row and row[0] == heading]
        return row


def make_case(i: int, volumes_ml: tuple[float, ...], spacing_mm: tuple[float, float, float]) -> CaseFingerprint:
    shape = (SHAPE[0] + i % 7, SHAPE[1], SHAPE[2])
    return CaseFingerprint(
        case=f"case_{i:03}", shape=shape, spacing_mm=spacing_mm, cropped_shape=shape, label_volumes_ml=volumes_ml
    )


def make_labels(n: int) -> LabelSpec:
    return LabelSpec(names=tuple(f"organ {i}" for i in range(n)), values=tuple(range(1, n + 1)))


def make_fingerprint(
    n_cases: int = 5,
    *,
    channels: tuple[str, ...] = ("CT",),
    n_labels: int = 2,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    has_volumes: bool = True,
) -> Fingerprint:
    """Cases of which every other one lacks the last label."""
    cases = []
    for i in range(n_cases):
        volumes_ml = [0.5 * (j + 1) * (1 + i / 10) for j in range(n_labels)]
        volumes_ml[-1] *= i % 2 == 0
        cases.append(make_case(i, tuple(volumes_ml) if has_volumes else (), spacing_mm))
    return Fingerprint(
        cases=tuple(cases),
        channels=tuple(dataclasses.replace(fingerprints.CT, name=name) for name in channels),
        median_cropped_fraction=1.0,
    )


def make(fingerprint: Fingerprint, labels: LabelSpec | None = None, *, dataset: str = "Hearts") -> Plan:
    return make_plan(fingerprint, labels or make_labels(2), dataset=dataset, n_folds=5)


def shown(text: str) -> str:
    """How a browser shows it."""
    return html.unescape(escape(text))


def write(
    path: Path, plan: Plan, fingerprint: Fingerprint, estimates: Estimates | None = None, **options: object
) -> Page:
    """Writes the page and reads it back."""
    written = write_plan_page(
        path / "report" / "plan.html",
        plan,
        fingerprint,
        estimates or estimate(fingerprint, plan),
        **options,  # type: ignore[arg-type]
    )
    assert [file.name for file in written.parent.iterdir()] == ["plan.html"], "no half-written file is left"
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search("https?://", re.sub('base64,[^"]*', "", text))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & page.tags.keys()
    assert Counter(page.reasons) == Counter((shown(reason.subject), shown(reason.text)) for reason in plan.reasons)
    return page


def make_overlay(title: str = "case_000", values: tuple[int, ...] = (1, 2)) -> OverlayRow:
    image, label = np.zeros((6, 30, 40), np.float32), np.zeros((6, 30, 40), np.uint16)
    for i, value in enumerate(values):
        label[1:5, 5:25, 4 * i : 4 * i + 3] = value
    return OverlayRow(title=title, image=image + 50.0 * label, spacing_mm=(3.0, 1.0, 1.0), reference=label)


def test_what_a_page_says(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    plan = make(fingerprint)
    page = write(tmp_path, plan, fingerprint, overlays=[make_overlay()])
    for fact in ("Hearts", "CT", "organ 0, organ 1", f"recommended configuration is {plan.recommended}"):
        assert fact in page.text
    spacing, size, extent = [row for row in page.rows if row[0] == "z, from feet to head"]
    assert spacing[1:5] == ["3", "3", "3", "3"]
    assert size[1:4] == ["40", "42", "44"]
    assert extent[1:4] == ["120", "126", "132"]
    assert extent[4] == format_number(3 * plan.configurations["3d_fullres"].patch_size[0])
    assert page.row("organ 0 (1)")[1:4] == ["5 of 5", "0.6", "0.5 to 0.7"]
    assert page.row("organ 1 (2)")[1:4] == ["3 of 5", "1.2", "1 to 1.4"]
    assert "Provenance of the plan: autoseg: " in page.text
    assert page.tags["img"] == 3
    assert "measured" not in page.text.lower()
    assert "Warnings" not in page.text


def test_reasons_of_any_subject_are_shown_once(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    plan = make(fingerprint)
    extra = (
        Reason(subject="configurations.2d.network.kernel_sizes", text="by hand"),
        Reason(subject="configurations.2d.patch_size", text="a second reason"),
        Reason(subject="configurations.4d", text="there is no fourth axis"),
        Reason(subject="recommended", text="and because somebody said so"),
        Reason(subject="", text="no subject"),
    )
    page = write(tmp_path, dataclasses.replace(plan, reasons=plan.reasons + extra), fingerprint)
    assert page.row("network.kernel_sizes")[2] == "by hand"
    assert page.row("configurations.4d")[2] == "there is no fourth axis"
    assert page.row("3d_lowres")[1] == "not planned"


def test_a_plan_without_reasons(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    page = write(tmp_path, dataclasses.replace(make(fingerprint), reasons=()), fingerprint)
    assert "Why" not in page.text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    fingerprint = make_fingerprint(channels=(HOSTILE, "T2"))
    cases = tuple(dataclasses.replace(case, case=HOSTILE + case.case) for case in fingerprint.cases)
    fingerprint = dataclasses.replace(fingerprint, cases=cases)
    labels = LabelSpec(names=(HOSTILE, HOSTILE + "2"), values=(1, 2))
    plan = make(fingerprint, labels, dataset=HOSTILE)
    plan = dataclasses.replace(
        plan,
        provenance={HOSTILE: HOSTILE},
        measurements=(
            Measurement(
                configuration="2d",
                key=plan.measurement_key("2d"),
                device=HOSTILE,
                peak_memory_gib=1.0,
                step_time_s=1.0,
                largest_batch_size=2,
            ),
        ),
    )
    problem = Problem(kind=HOSTILE, case=HOSTILE, found=HOSTILE, expected=HOSTILE, advice=HOSTILE)
    estimates = dataclasses.replace(estimate(fingerprint, plan), warnings=(problem,))
    hostile_reason = Reason(subject=HOSTILE, text=HOSTILE)
    plan = dataclasses.replace(plan, reasons=(*plan.reasons, hostile_reason))
    page = write(tmp_path, plan, fingerprint, estimates, overlays=[make_overlay(HOSTILE)])
    assert shown(HOSTILE) == "<script>alert(1)</script>\"'&</style>\\x1b[31m\\n\\u202e$x$ 心臓"
    assert page.text.count(shown(HOSTILE)) > 15
    text = (tmp_path / "report" / "plan.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert text.count("<style>") == text.count("</style>") == 1
    assert Page(text).row(f"{shown(HOSTILE)} (1)")[1] == "5 of 5"


def test_a_name_that_is_no_valid_unicode(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    page = write(tmp_path, make(fingerprint, dataset="caf\udce9"), fingerprint)
    assert "caf\\udce9" in page.text


def test_totals_are_the_sums_of_the_stages(tmp_path: Path) -> None:
    fingerprint = make_fingerprint(channels=("T1", "T2"))
    plan = make(fingerprint)
    plan = dataclasses.replace(
        plan, configurations={"3d_fullres": plan.configurations["3d_fullres"]}, recommended="3d_fullres"
    )
    plan = dataclasses.replace(plan, reasons=())
    page = write(tmp_path, plan, fingerprint)
    stages = list_stages(plan.configurations["3d_fullres"], n_channels=2, n_outputs=3)
    costs = np.array([(stage.n_parameters, stage.n_values, stage.n_multiply_adds) for stage in stages])
    n = costs.size
    np.testing.assert_array_equal(np.reshape(page.exact[:n], costs.shape), costs)
    assert page.exact[n : n + 3] == costs.sum(axis=0).tolist()
    assert page.row("total")[-3:] == [format_large(total) for total in costs.sum(axis=0).tolist()]
    bottleneck = page.row(f"{len(stages)}, bottleneck")
    assert bottleneck[1] == format_size(stages[-1].patch_size)
    assert bottleneck[5:8] == [str(stages[-1].features), str(stages[-1].encoder_blocks), "\N{EN DASH}"]


def test_the_cascade_has_the_previous_prediction_as_input(tmp_path: Path) -> None:
    scans = [((400, 512, 512), (1.0, 0.8, 0.8))] * 20
    fingerprint = fingerprints.make_fingerprint(*scans, channels=(fingerprints.CT,), label_volumes_ml=(1.0, 2.0))
    plan = make(fingerprint)
    assert "3d_cascade_fullres" in plan.configurations
    page = write(tmp_path, plan, fingerprint)
    assert page.text.count("One patch with 1 input channel,") == 3
    assert page.text.count("One patch with 3 input channels,") == 1


def test_a_2d_plan_of_another_axis_order(tmp_path: Path) -> None:
    case = CaseFingerprint(
        case="slide",
        shape=(300, 1, 200),
        spacing_mm=(1.0, 4.0, 0.5),
        cropped_shape=(300, 1, 200),
        label_volumes_ml=(1.0, 0.0),
    )
    fingerprint = Fingerprint(cases=(case,), channels=(fingerprints.CT,), median_cropped_fraction=1.0)
    plan = make(fingerprint)
    assert plan.axis_order == (1, 0, 2)
    assert place_on_axes(plan, "2d", (1.0, 0.5)) == (1.0, None, 0.5)
    page = write(tmp_path, plan, fingerprint)
    rows = [row for row in page.rows if row[0] in ("z, from feet to head", "y, from back to front")]
    assert [row[4] for row in rows[:2]] == ["1", "\N{EN DASH}"]
    assert page.row("organ 1 (2)")[1] == "0 of 1"
    assert "pixels" in page.text


def test_a_dataset_as_large_as_they_come(tmp_path: Path) -> None:
    channels = tuple(f"T{i}" for i in range(20))
    fingerprint = make_fingerprint(500, channels=channels, n_labels=200)
    rng = np.random.default_rng(0)
    cases = tuple(
        dataclasses.replace(case, label_volumes_ml=tuple((10 ** rng.uniform(-3, 3, 200)).tolist()))
        for case in fingerprint.cases
    )
    fingerprint = dataclasses.replace(fingerprint, cases=cases)
    page = write(tmp_path, make(fingerprint, make_labels(200)), fingerprint)
    assert (tmp_path / "report" / "plan.html").stat().st_size < 2e6
    assert len([row for row in page.rows if row[0].startswith("organ ")]) == 200
    assert len([row for row in page.rows if row[0] in channels]) == 20
    assert "and 194 more" in page.text


@pytest.mark.parametrize("n_labels", [1, 200])
def test_one_case(tmp_path: Path, n_labels: int) -> None:
    fingerprint = make_fingerprint(1, n_labels=n_labels)
    page = write(tmp_path, make(fingerprint, make_labels(n_labels)), fingerprint)
    assert page.row("organ 0 (1)")[1] == "1 of 1"


def test_without_volumes_and_without_a_label_in_any_case(tmp_path: Path) -> None:
    fingerprint = make_fingerprint(has_volumes=False)
    assert "Volumes where" not in write(tmp_path, make(fingerprint), fingerprint).text
    cases = tuple(dataclasses.replace(case, label_volumes_ml=(0.0, 0.0)) for case in fingerprint.cases)
    fingerprint = dataclasses.replace(fingerprint, cases=cases)
    assert write(tmp_path, make(fingerprint), fingerprint).row("organ 1 (2)")[1] == "0 of 5"


def test_warnings_are_grouped_and_counted(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    plan = make(fingerprint)
    many = [Problem(kind="odd", case=f"c{i}", found="this", advice="look at it") for i in range(MAX_SHOWN_PER_KIND + 5)]
    other = Problem(kind="odd", case="c99", found="that", advice="leave it")
    estimates = dataclasses.replace(estimate(fingerprint, plan), warnings=(*many, other))
    page = write(tmp_path, plan, fingerprint, estimates)
    assert f"odd ({len(many)})" in page.text
    assert "odd (1)" in page.text
    assert "... and 5 more" in page.text
    assert f"c{MAX_SHOWN_PER_KIND - 1}: found this" in page.text
    assert f"c{MAX_SHOWN_PER_KIND}: found this" not in page.text
    assert page.text.count("look at it") == 1


def test_measured_and_earlier_times(tmp_path: Path) -> None:
    fingerprint = make_fingerprint()
    plan = make(fingerprint)
    measured = Measurement(
        configuration="3d_fullres",
        key=plan.measurement_key("3d_fullres"),
        device="H200",
        peak_memory_gib=7.25,
        step_time_s=0.1,
        largest_batch_size=9,
    )
    plan = dataclasses.replace(plan, measurements=(measured,))
    page = write(tmp_path, plan, fingerprint, epoch_times_s={"3d_fullres": 71.0})
    assert ["3d_fullres", "H200", "7.2 GiB", "100 ms", "25 s", "9"] in page.rows
    (costs,) = [row for row in page.rows if row[0] == "3d_fullres" and row[-1] == "1 min 11 s"]
    assert costs[2].endswith(" case_004")
    assert [row[-1] for row in page.rows if row[0] == "2d"] == ["\N{EN DASH}"]


def test_examples_have_a_legend_of_what_is_seen(tmp_path: Path) -> None:
    fingerprint = make_fingerprint(n_labels=12)
    labels = LabelSpec(names=tuple("abcdefghijkl"), values=tuple(range(5, 65, 5)))
    rows = [
        make_overlay("many", (5, 10, 15, 20, 25, 30, 35, 60)),
        make_overlay("unlisted", (7,)),
        dataclasses.replace(make_overlay("none"), reference=None),
    ]
    page = write(tmp_path, make(fingerprint, labels), fingerprint, overlays=rows)
    for entry in ("a (5)", "g (35)", "l (60)", "unknown (7)", "no labels here"):
        assert entry in page.text
