"""What a user sets instead of the planner: taken over, checked, and the rest derived from it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from fingerprints import make_fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec
from autoseg.planning.checks import check_plan
from autoseg.planning.choices import Choices, parse_choices
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import PRESETS

LABELS = LabelSpec(names=("organ",), values=(1,))


LARGE = make_fingerprint(*[((400, 512, 512), (1.0, 0.8, 0.8))] * 20)
SMALL = make_fingerprint(*[((60, 70, 80), (1.0, 1.0, 1.0))] * 20)


def plan(fingerprint: Fingerprint = LARGE, **typed: Any) -> Plan:
    return make_plan(fingerprint, LABELS, dataset="test", n_folds=5, choices=parse_choices(**typed))


def reason(of: Plan, subject: str) -> str:
    (text,) = [reason.text for reason in of.reasons if reason.subject == subject]
    return text


def test_what_is_typed_is_understood() -> None:
    assert parse_choices() == Choices()
    assert parse_choices(configurations=["2d,3d_fullres", "2d"]).configurations == ("2d", "3d_fullres")
    assert parse_choices(configurations=["all"]).configurations is None
    assert parse_choices(spacing="3, 0.8,0.7").spacing_mm == (3.0, 0.8, 0.7)
    assert parse_choices(spacing="1.5").spacing_mm == (1.5, 1.5, 1.5)
    typed = parse_choices(patch_sizes=["64x128x128", "256,512", "3d_lowres=32,32,32"], batch_sizes=["4", "2d=12"])
    assert typed.patch_sizes == {"3d_fullres": (64, 128, 128), "2d": (256, 512), "3d_lowres": (32, 32, 32)}
    assert [typed.batch_size_of(name) for name in ("2d", "3d_fullres", "3d_lowres")] == [12, 4, 4]
    assert typed.named == {"3d_fullres", "2d", "3d_lowres"}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"spacing": "1,2"}, "three numbers"),
        ({"spacing": "thin"}, "for instance 3,0.8,0.8"),
        ({"spacing": "0,1,1"}, "three positive numbers"),
        ({"spacing": "nan"}, "three positive numbers"),
        ({"patch_sizes": ["64.5,64,64"]}, "for instance 64,192,192"),
        ({"patch_sizes": ["64"]}, "expected 3 whole numbers"),
        ({"patch_sizes": ["2d=64,64,64"]}, "expected 2 whole numbers"),
        ({"patch_sizes": ["0,64,64"]}, "at least 1"),
        ({"patch_sizes": ["3d_fulres=64,64,64"]}, "did you mean '3d_fullres'"),
        ({"batch_sizes": ["2,3"]}, "for instance 4 or 2d=12"),
        ({"batch_sizes": ["0"]}, "at least 1"),
        ({"configurations": [""]}, "no configuration is named"),
        ({"preset": "resenc"}, "no preset 'resenc'"),
        ({"configurations": ["4d"]}, "choose one of 2d, 3d_fullres"),
        ({"gpu_memory_gib": 0.0}, "more than 0"),
        ({"gpu_memory_gib": math.nan}, "more than 0"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_an_example(typed: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_choices(**typed)


def test_spacing_is_taken_and_the_rest_follows() -> None:
    made = plan(spacing="2,1.6,4")
    assert made.axis_order == (2, 0, 1)
    full = made.configurations["3d_fullres"]
    assert full.spacing_mm == (4.0, 2.0, 1.6)
    assert full.median_shape == (102.0, 200.0, 256.0)
    assert made.configurations["2d"].spacing_mm == (2.0, 1.6)
    for name in ("2d", "3d_fullres"):
        assert reason(made, f"configurations.{name}.spacing_mm").startswith("set by user")


def test_patch_is_taken_with_the_network_that_suits_it() -> None:
    made = plan(patch_sizes=["64,96,96", "2d=256,256"])
    for name in ("3d_fullres", "3d_cascade_fullres"):
        assert made.configurations[name].patch_size == (64, 96, 96)
    assert made.configurations["3d_fullres"].network.divisor == (16, 16, 16)
    assert made.configurations["3d_fullres"].batch_size > 2
    assert made.configurations["2d"].patch_size == (256, 256)
    assert reason(made, "configurations.3d_fullres.patch_size").startswith("set by user: 64 x 96 x 96")
    default = plan()
    assert made.configurations["3d_lowres"] == default.configurations["3d_lowres"]


def test_what_is_set_for_others_than_the_chosen_does_not_count_or_is_refused() -> None:
    made = plan(configurations=["2d"], batch_sizes=["12"])
    assert made.configurations["2d"].batch_size == 12
    with pytest.raises(PlanError, match="2d is set but not among the configurations that are chosen"):
        plan(configurations=["3d_fullres"], patch_sizes=["2d=256,256"])
    with pytest.raises(PlanError, match="3d_lowres does not suit this dataset: none is needed"):
        plan(SMALL, batch_sizes=["3d_lowres=2"])


def test_batch_is_taken() -> None:
    made = plan(SMALL, batch_sizes=["3", "2d=5"])
    assert {name: known.batch_size for name, known in made.configurations.items()} == {"2d": 5, "3d_fullres": 3}
    assert reason(made, "configurations.3d_fullres.batch_size").startswith("set by user: 3")
    # A batch of one leaves room for a patch of nearly twice the size.
    larger = plan(patch_sizes=["128,160,160"], batch_sizes=["3d_fullres=1", "3d_cascade_fullres=1"])
    assert larger.configurations["3d_fullres"].patch_size == (128, 160, 160)
    check_plan(larger)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"patch_sizes": ["100,130,130"]}, "is not divisible by the network's strides.* 96,128,128"),
        ({"patch_sizes": ["256,256,256"]}, r"needs about 5\d.*--gpu-memory 5\d would do.* 128,128,128"),
        ({"patch_sizes": ["2d=4096,4096"]}, "larger than the largest case, 512 x 512.* 512,512"),
        (
            {"batch_sizes": ["3d_fullres=7"]},
            r"3d_fullres: batch_size 7 needs about 2\d.* the plan is for 8 GiB.* valid value is 2",
        ),
        ({"preset": "resenc-xl", "gpu_memory_gib": 0.0005}, "even the smallest patch.*use --gpu-memory"),
    ],
)
def test_what_is_not_valid_is_refused_with_the_nearest_that_is(typed: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**typed)


def test_more_memory_gives_more_patch_or_batch() -> None:
    def taken(gib: float) -> float:
        full = plan(gpu_memory_gib=gib).configurations["3d_fullres"]
        return count_feature_map_values(full.network, full.patch_size, 2) * full.batch_size

    assert taken(4) < taken(8) < taken(16) < taken(80)
    made = plan(gpu_memory_gib=24)
    assert made.gpu_memory_gib == 24
    assert "set by user" in reason(made, "gpu_memory_gib")
    assert plan(gpu_memory_gib=8).configurations == plan().configurations


def nearest_valid(fingerprint: Fingerprint, **typed: Any) -> str | None:
    """What the error advises; None where there is no error."""
    try:
        plan(fingerprint, **typed)
    except PlanError as error:
        return re.findall(r"the nearest valid (?:one|value) is ([\d,]+)", str(error))[0].strip(",")
    return None


edges = st.integers(1, 400)


@given(
    st.tuples(edges, edges, edges),
    st.sampled_from(["1", "5,0.8,0.8", "1,3,0.5"]),
    st.booleans(),
    st.sampled_from(["unet", "resenc-m"]),
)
@settings(max_examples=150, deadline=None)
def test_the_nearest_valid_patch_is_accepted(
    wanted: tuple[int, int, int], spacing: str, is_large: bool, preset: str
) -> None:
    typed, fingerprint = ",".join(map(str, wanted)), LARGE if is_large else SMALL
    advised = nearest_valid(fingerprint, patch_sizes=[typed], spacing=spacing, preset=preset)
    made = plan(fingerprint, patch_sizes=[advised or typed], spacing=spacing, preset=preset)
    assert ",".join(map(str, made.configurations["3d_fullres"].patch_size)) == (advised or typed)
    check_plan(made)


@given(edges, st.sampled_from(sorted(PRESETS)))
@settings(max_examples=50, deadline=None)
def test_the_nearest_valid_batch_is_accepted(wanted: int, preset: str) -> None:
    advised = nearest_valid(SMALL, batch_sizes=[f"3d_fullres={wanted}"], preset=preset)
    check_plan(plan(SMALL, batch_sizes=[f"3d_fullres={advised or wanted}"], preset=preset))
