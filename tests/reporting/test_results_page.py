"""The page of results says what the scores are, whatever is missing and whatever names there are."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fingerprints import CT, make_fingerprint
from training_logs import make_epochs

from autoseg.core.errors import FormatError
from autoseg.core.labels import LabelSpec
from autoseg.core.steps import Step
from autoseg.evaluation.crossval import N_CONFIDENCE_BINS, Calibration, CaseReview, CrossValidation, Suspect
from autoseg.evaluation.evaluate import summarise_scores
from autoseg.evaluation.intervals import bootstrap_interval
from autoseg.evaluation.scores import MISSED, OK, ONLY_PREDICTED, CaseScore, LabelScore, ScoreSettings
from autoseg.evaluation.selection import Candidate, Comparison, Selection, StepDecision
from autoseg.inference.quality import QualityModel
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import VOID_ELEMENTS, escape
from autoseg.reporting.results_page import ConfigurationResults, write_results_page
from autoseg.training.record import EpochFigures

HOSTILE = "<script>alert(1)</script>\"'&</style>\x1b[31m\n\u202e$x^{$ 心臓"
DICE = {"good": 0.95, "middling": 0.9, "bad": 0.5, "fair": 0.8, "fine": 0.92}


class PageText(HTMLParser):
    """What a page holds, checked for balance while it is read."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.markup = markup
        self.stack: list[str] = []
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.descriptions: list[str] = []
        self.ids: list[str] = []
        self.strong: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.stack
        assert len(set(self.ids)) == len(self.ids)
        assert all(source.startswith(("data:image/", "#")) for source in self.sources), "nothing is loaded"
        assert {source[1:] for source in self.sources if source[0] == "#"} <= set(self.ids)
        assert not {"script", "link", "iframe", "object", "embed", "form"} & self.tags.keys()
        assert len(self.descriptions) == self.tags["img"], "every picture is described"
        assert all(self.descriptions)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.tags[tag] += 1
        self.sources += [value for key, value in attributes.items() if key in ("src", "href")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        assert not [key for key in attributes if key.startswith("on")]
        if tag == "img":
            self.descriptions.append(attributes.get("alt", ""))
        if tag not in VOID_ELEMENTS:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "strong":
            self.strong.append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.text += data
        if {"td", "th"} & set(self.stack):
            self.rows[-1][-1] += data
        if "strong" in self.stack:
            self.strong[-1] += data
        if {"h1", "h2", "h3"} & set(self.stack):
            self.headings[-1] += data

    def row(self, heading: str) -> list[str]:
        """The first row that begins with that heading."""
        return next(row for row in self.rows if row and row[0].startswith(heading))


def shown(text: str) -> str:
    """How a browser shows it."""
    return html.unescape(escape(text))


def make_a_plan(names: tuple[str, ...] = ("anterior", "posterior"), *, dataset: str = "Hearts") -> Plan:
    scans = [((40, 200, 180), (3.0, 0.8, 0.8))] * 5
    fingerprint = make_fingerprint(*scans, channels=(CT,), label_volumes_ml=(1.0,) * len(names))
    labels = LabelSpec(names=names, values=tuple(range(1, len(names) + 1)))
    return make_plan(fingerprint, labels, dataset=dataset, n_folds=5)


def make_label_score(label: str, dice: float, *, status: str = OK) -> LabelScore:
    return LabelScore(
        label=label,
        values=(1,),
        status=status,
        n_reference=1000,
        n_predicted=1100,
        reference_ml=1.0,
        predicted_ml=1.1,
        dice=dice,
        iou=dice / (2 - dice),
        precision=dice,
        recall=dice,
        f_beta=dice,
        volume_error=0.1,
        hd95_mm=10 * (1 - dice),
        assd_mm=math.nan,
        surface_dice=dice,
        n_lesions=1,
        n_predicted_lesions=1,
        n_matched_lesions=1,
        lesion_f1=1.0,
        lesion_recall=1.0,
        lesion_precision=1.0,
    )


def make_crossval(
    plan: Plan, dice: dict[str, float] = DICE, *, configuration: str = "3d_fullres", suspects: Sequence[str] = ()
) -> CrossValidation:
    """All labels of a case have the same Dice."""
    cases = [
        CaseScore(
            case=name,
            labels=tuple(make_label_score(label, value) for label in plan.labels.names),
            mean_dice=value,
        )
        for name, value in dice.items()
    ]
    n_classes = plan.labels.n_classes
    confusion = np.full((n_classes, n_classes), 10) + 980 * np.eye(n_classes, dtype=int)
    n_bins = N_CONFIDENCE_BINS
    middles = tuple(((np.arange(n_bins) + 0.5) / n_bins).tolist())
    reviews = tuple(CaseReview(case=case, fold=0, loss=0.5, agreement=0.8, consensus_dice=0.7) for case in dice)
    return CrossValidation(
        configuration=configuration,
        model="abc",
        key="",
        evaluation=summarise_scores(cases, settings=ScoreSettings()),
        folds={name: i % 5 for i, name in enumerate(dice)},
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=Calibration(n_voxels=(100,) * n_bins, confidence=middles, accuracy=middles),
        reviews=reviews,
        suspects=tuple(Suspect(case=case, score=4.25, why=f"because of {case}") for case in suspects),
        quality=QualityModel(
            intercept=0.1, slope=0.9, residual_std=0.0321, correlation=0.77, low_dice=0.6543, n_cases=len(dice)
        ),
    )


def make_curves(folds: Sequence[int], n_labels: int = 2) -> dict[int, list[EpochFigures]]:
    return {fold: make_epochs(5, n_labels=n_labels) for fold in folds}


def make_candidate(
    plan: Plan, names: tuple[str, ...], *, mean: float, decisions: tuple[StepDecision, ...] = ()
) -> Candidate:
    return Candidate(
        configurations=names,
        models=("abc",) * len(names),
        mean_dice=mean,
        raw_dice=mean - 0.0123,
        label_dice={label: mean for label in plan.labels.names},
        cost=123.0 * len(names),
        steps=tuple(decision.step for decision in decisions if decision.adopted),
        decisions=decisions,
    )


def make_selection(plan: Plan) -> Selection:
    """2d was chosen; the ensemble is better within noise."""
    value, name = plan.labels.values[0], plan.labels.names[0]
    decisions = (
        StepDecision(
            step=Step(kind="remove_small", target=name, values=(value,), min_ml=0.5),
            adopted=True,
            gain=0.0111,
            low=0.0022,
            high=0.0333,
            why="it raises the mean Dice",
        ),
        StepDecision(
            step=Step(kind="fill_holes", target=name, values=(value,)),
            adopted=False,
            gain=-0.0044,
            low=-0.0055,
            high=0.0066,
            why="nothing raises it",
        ),
    )
    comparison = Comparison(
        candidate="2d + 3d_fullres", against="2d", gain=0.0077, low=-0.0088, high=0.0199, better=False
    )
    return Selection(
        chosen="2d",
        candidates=(
            make_candidate(plan, ("2d",), mean=0.8111, decisions=decisions),
            make_candidate(plan, ("3d_fullres",), mean=0.8222),
            make_candidate(plan, ("2d", "3d_fullres"), mean=0.8333),
        ),
        comparisons=(comparison,),
        missing={"3d_lowres": "fold 4 is missing"},
        why="the ensemble is better within noise only",
    )


def load_overlay(configuration: str, case: str) -> OverlayRow:
    reference = np.zeros((8, 30, 40), np.uint8)
    reference[2:6, 10:20, 12:28] = 1
    return OverlayRow(
        title=case,
        image=50.0 * reference,
        spacing_mm=(3.0, 1.0, 1.0),
        reference=reference,
        prediction=np.roll(reference, 2, axis=2),
    )


def write(
    tmp_path: Path,
    plan: Plan,
    configurations: Sequence[ConfigurationResults],
    *,
    selection: Selection | None = None,
    overlays: Callable[[str, str], OverlayRow] = load_overlay,
) -> PageText:
    """Writes a page and checks what holds for all of them."""
    path = tmp_path / "report" / "results.html"
    assert write_results_page(path, plan, configurations, selection=selection, overlays=overlays) == path
    page = PageText(path.read_text(encoding="utf-8"))
    assert {file.name for file in path.parent.iterdir()} == {"results.html", "results"}, "no half-written file is left"
    charts = {base64.b64encode(file.read_bytes()).decode() for file in (path.parent / "results").glob("*.png")}
    embedded = {source.partition(",")[2] for source in page.sources if source.startswith("data:image/png")}
    assert embedded <= charts, "every chart is a file too"
    return page


def test_what_a_page_says(tmp_path: Path) -> None:
    plan = make_a_plan()
    crossval = make_crossval(plan, suspects=["fair"])
    page = write(
        tmp_path,
        plan,
        [ConfigurationResults(name="3d_fullres", curves=make_curves(range(5)), crossval=crossval)],
    )
    values = np.array(list(DICE.values()))
    low, high = bootstrap_interval(values)
    row = page.row("anterior")
    assert row[1:4] == [f"{values.mean():.3f}", f"{low:.3f} to {high:.3f}", "0.900"]
    assert row[4:] == ["5", "0", "0"]
    assert f"95% interval {low:.3f} to {high:.3f}" in page.text
    for metric, mean in (("Dice", "0.814"), ("HD95, mm", "1.86"), ("volume error, %", "+10.0")):
        cells = page.row(metric)
        assert cells[1].startswith(mean), metric
        assert cells[1] == cells[2]
    assert page.row("ASSD")[1] == "\N{EN DASH}", "what is not defined in any case"
    assert page.row("fair")[1:] == ["because of fair", "4.25"]
    assert "below 0.654 are flagged" in page.text
    assert "0.032" in page.text
    assert "clipped and scaled by numbers of the whole dataset" in page.text
    assert "each time without a fifth of the cases" in page.text
    written = {file.name for file in (tmp_path / "report" / "results").iterdir()}
    assert written == {
        *(f"3d_fullres-{name}.png" for name in ("curves", "dice", "cases", "confusion", "calibration", "volumes-1")),
        *(f"3d_fullres-{name}.png" for name in ("volumes-2", "worst-1", "worst-2", "worst-3", "best-1", "best-2")),
        "3d_fullres-typical.gif",
    }


def test_the_worst_is_named_worst_and_the_best_best(tmp_path: Path) -> None:
    plan, asked = make_a_plan(), []

    def overlay(configuration: str, case: str) -> OverlayRow:
        asked.append((configuration, case))
        return load_overlay(configuration, case)

    known = ConfigurationResults(name="3d_fullres", curves={}, crossval=make_crossval(plan))
    page = write(tmp_path, plan, [known], overlays=overlay)
    cases = [name for name in page.strong if name in DICE]
    assert cases == ["bad", "fair", "middling", "good", "fine"]
    worst, best = page.text.index("Worst cases"), page.text.index("Best cases")
    assert worst < page.text.index("bad: mean Dice 0.500") < best < page.text.index("good: mean Dice 0.950")
    assert page.text.index("Walk through middling") > best, "the one with the median Dice"
    assert [case for _, case in asked] == ["bad", "fair", "middling", "good", "fine", "middling"]
    assert any(text.startswith("Mean Dice of 5 cases, the worst is bad with 0.500") for text in page.descriptions)
    assert "Segmented by fold 2, which had not seen it" in page.text


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    plan = make_a_plan(("a", "b", "c"))
    scores = (
        make_label_score("a", 0.7),
        make_label_score("b", 0.0, status=MISSED),
        make_label_score("c", math.nan, status=ONLY_PREDICTED),
    )
    crossval = dataclasses.replace(
        make_crossval(plan),
        evaluation=summarise_scores([CaseScore(case="x", labels=scores, mean_dice=0.35)], settings=ScoreSettings()),
    )
    known = ConfigurationResults(name="3d_fullres", curves={}, crossval=crossval)
    page = write(tmp_path, plan, [known])
    assert "mean Dice 0.350 (b 0.000, a 0.700); missed: b; found, but not in the reference: c." in page.text
    assert page.row("b")[1:] == ["0.000", "\N{EN DASH}", "0.000", "1", "1", "0"]
    assert page.row("c")[4:] == ["0", "0", "1"]


def test_which_model_and_why(tmp_path: Path) -> None:
    plan = make_a_plan()
    configurations = [
        ConfigurationResults(name="3d_fullres", curves=make_curves([0, 1]), crossval=make_crossval(plan)),
        ConfigurationResults(name="2d", curves={}, crossval=make_crossval(plan, configuration="2d")),
        ConfigurationResults(name="3d_lowres", curves=make_curves([0, 2]), crossval=None),
    ]
    page = write(tmp_path, plan, configurations, selection=make_selection(plan))
    titles = [title for title in page.headings if title in ("2d", "3d_fullres", "3d_lowres")]
    assert titles == ["2d", "3d_fullres", "3d_lowres"], "the chosen one is first"
    assert page.row("2dchosen")[1:] == ["0.811", "0.799", "123 G", "remove anterior under 0.5 ml"]
    assert page.row("2d + 3d_fullres against 2d")[1:] == ["+0.0077", "-0.0088 to +0.0199", "no"]
    assert page.row("remove anterior under 0.5 ml")[1:3] == ["+0.0111", "+0.0022 to +0.0333"]
    assert "done: it raises the mean Dice" in page.row("remove anterior under 0.5 ml")[3]
    assert page.row("fill holes of anterior")[3] == "not done: nothing raises it"
    for fact in ("the ensemble is better within noise only", "3d_lowres: fold 4 is missing", "of 3 that were compared"):
        assert fact in page.text
    assert "Folds 0, 2 of 5 have begun to train." in page.text
    assert "'autoseg train -c 3d_lowres --fold 1,3,4'" in page.text
    names = {file.name for file in (tmp_path / "report" / "results").iterdir()}
    assert "2d-worst-1.png" in names
    assert not [name for name in names if name.startswith("3d_fullres-worst")], "only the chosen one has details"
    assert {"3d_fullres-dice.png", "3d_fullres-curves.png", "3d_lowres-curves.png"} <= names


def test_both_of_a_chosen_ensemble_have_details(tmp_path: Path) -> None:
    plan = make_a_plan()
    configurations = [
        ConfigurationResults(name=name, curves={}, crossval=make_crossval(plan, configuration=name))
        for name in ("2d", "3d_fullres")
    ]
    selection = dataclasses.replace(make_selection(plan), chosen="2d + 3d_fullres")
    page = write(tmp_path, plan, configurations, selection=selection)
    names = {file.name for file in (tmp_path / "report" / "results").iterdir()}
    assert {"2d-worst-1.png", "3d_fullres-worst-1.png"} <= names
    assert "New scans are segmented with 2d + 3d_fullres." in page.text


def test_before_anything_is_trained(tmp_path: Path) -> None:
    plan = make_a_plan()
    page = write(tmp_path, plan, [ConfigurationResults(name="2d", curves={}, crossval=None)])
    assert "Nothing has been trained yet" in page.text
    assert "Not trained yet: run 'autoseg train -c 2d'." in page.text
    assert not page.tags["img"]
    assert "Hearts" in write(tmp_path, plan, []).text


def test_one_fold_only(tmp_path: Path) -> None:
    plan = make_a_plan()
    known = ConfigurationResults(name="2d", curves=make_curves([0]), crossval=None)
    page = write(tmp_path, plan, [known])
    assert "only learning curves to look at" in page.text
    assert "Fold 0 of 5 has begun to train." in page.text
    assert page.tags["img"] == 1
    known = ConfigurationResults(name="2d", curves=make_curves(range(5)), crossval=None)
    assert "there is no cross-validation yet" in write(tmp_path, plan, [known]).text


def test_suspects_are_not_looked_for_in_one_fold(tmp_path: Path) -> None:
    plan = make_a_plan(("tumour",))
    crossval = make_crossval(plan, {"a": 0.5, "b": 0.6})
    alone = dataclasses.replace(crossval, folds=dict.fromkeys(crossval.folds, 0), suspects=())
    page = write(tmp_path, plan, [ConfigurationResults(name="2d", curves={}, crossval=alone)])
    assert "Several folds are needed to find them" in page.text
    assert "No case stands out" not in page.text


def test_cases_that_not_all_folds_have_seen_are_told(tmp_path: Path) -> None:
    plan = make_a_plan(("tumour",))
    whole = make_crossval(plan, {"a": 0.5, "b": 0.6, "c": 0.7})
    told = "All folds together looked at 2 of 3 cases"
    for known, is_told in ((whole, False), (dataclasses.replace(whole, reviews=whole.reviews[:2]), True)):
        page = write(tmp_path, plan, [ConfigurationResults(name="2d", curves={}, crossval=known)])
        assert (told in page.text) == is_told
        assert "No case stands out." in page.text


@pytest.mark.parametrize("dice", [{"only": 0.5}, {"only": math.nan}, {"a": math.nan, "b": 0.5}])
def test_few_cases_and_none_with_a_dice(tmp_path: Path, dice: dict[str, float]) -> None:
    plan = make_a_plan(("tumour",))
    crossval = dataclasses.replace(make_crossval(plan, dice), quality=None, reviews=())
    page = write(tmp_path, plan, [ConfigurationResults(name="2d", curves={}, crossval=crossval)])
    assert "nan" not in page.text.lower()
    assert ("Worst cases" in page.text) == any(math.isfinite(value) for value in dice.values())
    assert "Best cases" not in page.text
    assert "Several folds are needed" in page.text


def test_cases_that_cannot_be_loaded_are_told(tmp_path: Path) -> None:
    plan = make_a_plan()

    def overlay(configuration: str, case: str) -> OverlayRow:
        raise FormatError(f"{case}.nii.gz: no such file")

    crossval = make_crossval(plan, suspects=["good"])
    known = ConfigurationResults(name="3d_fullres", curves={}, crossval=crossval)
    page = write(tmp_path, plan, [known], overlays=overlay)
    assert "It cannot be shown: bad.nii.gz: no such file" in page.text
    assert "good cannot be shown: good.nii.gz: no such file" in page.text
    assert "middling cannot be shown" in page.text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plan = make_a_plan((HOSTILE, HOSTILE + "2"), dataset=HOSTILE)
    dice = {HOSTILE: 0.4, HOSTILE + "../../x": 0.9}
    crossval = make_crossval(plan, dice, configuration=HOSTILE, suspects=list(dice))
    configurations = [
        ConfigurationResults(name=HOSTILE, curves=make_curves([0]), crossval=crossval),
        ConfigurationResults(name=HOSTILE + "3", curves=make_curves([0]), crossval=None),
    ]
    selection = make_selection(plan)
    selection = dataclasses.replace(selection, missing={HOSTILE: HOSTILE}, why=HOSTILE)
    page = write(tmp_path, plan, configurations, selection=selection)
    assert shown(HOSTILE) in page.headings
    assert page.text.count(shown(HOSTILE)) > 20
    assert page.row(shown(HOSTILE))
    assert not page.tags["script"]
    names = [file.name for file in (tmp_path / "report" / "results").iterdir()]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in names)


def test_many_labels_are_told_in_tables(tmp_path: Path) -> None:
    names = tuple(f"organ {i}" for i in range(60))
    plan = make_a_plan(names)
    crossval = make_crossval(plan, {f"case {i}": 0.5 + i / 100 for i in range(30)})
    confusion = np.eye(61, dtype=int) * 1000
    confusion[7, 8] = 250
    confusion[0, 3] = 10**6
    confusion[3, 0] = 10
    crossval = dataclasses.replace(crossval, confusion=tuple(map(tuple, confusion.tolist())))
    known = ConfigurationResults(name="3d_fullres", curves=make_curves([0], 60), crossval=crossval)
    page = write(tmp_path, plan, [known])
    assert page.row("organ 59")[1] == "0.645"
    assert page.row("organ 6")[1] == "0.645"
    assert ["organ 6", "organ 7", "20.0 %", "250"] in page.rows
    assert ["organ 2", "background", "1.0 %", "10"] in page.rows
    assert len(list((tmp_path / "report" / "results").glob("*-volumes-*.png"))) == 9
    assert not list((tmp_path / "report" / "results").glob("*-confusion.png"))
    assert (tmp_path / "report" / "results.html").stat().st_size < 4e6


def test_a_thousand_cases(tmp_path: Path) -> None:
    plan = make_a_plan()
    rng = np.random.default_rng(0)
    dice = {f"case {i:04}": value for i, value in enumerate(rng.uniform(0.2, 0.95, 1000).tolist())}
    known = ConfigurationResults(
        name="3d_fullres",
        curves=make_curves(range(5)),
        crossval=make_crossval(plan, dice, suspects=list(dice)),
    )
    page = write(tmp_path, plan, [known])
    assert "... and 980 more" in page.text
    assert (tmp_path / "report" / "results.html").stat().st_size < 4e6


def test_a_page_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    plan = make_a_plan()
    known = ConfigurationResults(name="3d_fullres", curves=make_curves([0]), crossval=make_crossval(plan))
    write(tmp_path, plan, [known])
    write(tmp_path, plan, [dataclasses.replace(known, crossval=None)])
    assert [file.name for file in (tmp_path / "report" / "results").iterdir()] == ["3d_fullres-curves.png"]
