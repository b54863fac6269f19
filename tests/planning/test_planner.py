"""Plans against known ones: worked out by hand, and those of the reference implementation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.core.errors import PlanError
from autoseg.core.geometry import find_lowres_axis
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import from_plain, to_plain
from autoseg.networks.build import build_network
from autoseg.planning.checks import check_plan
from autoseg.planning.choices import Choices
from autoseg.planning.configurations import coarsen
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.grid import choose_grid
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.patch import fit_patch, initial_patch_size
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.planning.planner import choose_normalization, make_plan
from autoseg.planning.presets import PRESETS

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference" / "nnunet_plans"
REFERENCE_PRESETS = {
    "unet_8gb": "unet",
    "resenc_m_9gb": "resenc-m",
    "resenc_l_24gb": "resenc-l",
    "resenc_xl_40gb": "resenc-xl",
}
SCHEMES = {"ZScoreNormalization": "zscore", "CTNormalization": "ct", "RGBTo01Normalization": "rgb_to_0_1"}


def make_fingerprint(
    *cases: tuple[tuple[int, int, int], tuple[float, float, float]],
    channels: tuple[str, ...] = ("MRI",),
    cropped_fraction: float = 1.0,
) -> Fingerprint:
    """A fingerprint of (shape, spacing_mm) per case."""
    return Fingerprint(
        cases=tuple(
            CaseFingerprint(
                case=f"case_{index:03}",
                shape=shape,
                spacing_mm=spacing_mm,
                cropped_shape=shape,
                label_volumes_ml=(1.0,),
            )
            for index, (shape, spacing_mm) in enumerate(cases)
        ),
        channels=tuple(
            ChannelFingerprint(
                name=name,
                mean=10.0,
                std=5.0,
                minimum=-3.0,
                maximum=50.0,
                median=9.0,
                percentile_00_5=-2.0,
                percentile_99_5=40.0,
            )
            for name in channels
        ),
        median_cropped_fraction=cropped_fraction,
    )


def make_labels(n_classes: int = 2) -> LabelSpec:
    """Labels with that many classes, the background included."""
    return LabelSpec(names=tuple(f"class_{i}" for i in range(1, n_classes)), values=tuple(range(1, n_classes)))


def plan(fingerprint: Fingerprint, n_classes: int = 2, **choices: Any) -> Plan:
    return make_plan(fingerprint, make_labels(n_classes), dataset="test", n_folds=5, choices=Choices(**choices))


def reason(of: Plan, subject: str) -> str:
    """The text of the only reason about `subject`."""
    (text,) = [reason.text for reason in of.reasons if reason.subject == subject]
    return text


# --- Against the reference implementation ---------------------------------------------------------------------------

REFERENCE_NAMES = sorted(path.stem for path in REFERENCE.glob("*.json"))
needs_reference = pytest.mark.skipif(not REFERENCE_NAMES, reason="no reference plans in ../shared/reference")


def read_reference(name: str) -> tuple[dict[str, Any], Fingerprint, LabelSpec]:
    data = json.loads((REFERENCE / f"{name}.json").read_text())
    found = data["fingerprint"]
    names = data["dataset"]["channel_names"]
    fingerprint = make_fingerprint(
        *[(tuple(s), tuple(p)) for s, p in zip(found["shapes_after_crop"], found["spacings"], strict=True)],
        channels=tuple(names[str(index)] for index in range(len(names))),
        cropped_fraction=found["median_relative_size_after_cropping"],
    )
    return data, fingerprint, make_labels(len(data["dataset"]["labels"]))


def as_reference(configuration: ConfigurationPlan, data: dict[str, Any]) -> dict[str, Any]:
    """The fields of the reference that `configuration` answers, in the reference's terms."""
    network = configuration.network
    blocks = "n_conv_per_stage" if "n_conv_per_stage" in data else "n_blocks_per_stage"
    answers: dict[str, Any] = {
        "spacing": pytest.approx(list(configuration.spacing_mm), rel=1e-6),
        "median_image_size_in_voxels": configuration.median_shape,
        "patch_size": configuration.patch_size,
        "batch_size": configuration.batch_size,
        "batch_dice": configuration.batch_dice,
        "n_stages": len(network.features),
        "features_per_stage": network.features,
        "kernel_sizes": network.kernel_sizes,
        "strides": network.strides,
        blocks: network.encoder_blocks,
        "n_conv_per_stage_decoder": network.decoder_blocks,
    }
    return {key: to_plain(value) if isinstance(value, tuple) else value for key, value in answers.items()}


@needs_reference
@pytest.mark.parametrize("reference_preset", REFERENCE_PRESETS)
@pytest.mark.parametrize("name", REFERENCE_NAMES or ["none"])
def test_plan_equals_the_reference(name: str, reference_preset: str) -> None:
    data, fingerprint, labels = read_reference(name)
    if reference_preset not in data["plans"]:
        pytest.skip(f"{name} has no plan for {reference_preset}")
    expected = data["plans"][reference_preset]
    choices = Choices(preset=REFERENCE_PRESETS[reference_preset])
    made = make_plan(fingerprint, labels, dataset=name, n_folds=5, choices=choices)
    assert list(made.axis_order) == expected["transpose_forward"]
    assert made.configurations.keys() == expected["configurations"].keys()
    for key, configuration in made.configurations.items():
        wanted = expected["configurations"][key]
        if configuration.previous:
            assert configuration.previous == wanted["previous_stage"]
            inherited = dataclasses.replace(configuration, name="3d_fullres", previous=None)
            assert inherited == made.configurations[wanted["inherits_from"]]
            continue
        answers = as_reference(configuration, wanted)
        assert answers == {field: wanted[field] for field in answers}, key
        assert [SCHEMES[scheme] for scheme in wanted["normalization_schemes"]] == [
            channel.scheme for channel in made.normalization
        ]
        assert wanted["use_mask_for_norm"] == [channel.use_mask for channel in made.normalization]
    assert from_plain(Plan, to_plain(made)) == made


# --- Against answers worked out by hand -----------------------------------------------------------------------------


def test_spacing_is_the_median_and_shape_the_median_on_that_grid() -> None:
    grid = choose_grid(
        make_fingerprint(
            ((40, 100, 100), (2.0, 1.0, 1.0)), ((60, 100, 100), (1.0, 1.0, 1.0)), ((50, 80, 90), (1.5, 2.0, 1.0))
        ).cases
    )
    assert grid.axis_order == (0, 1, 2)
    assert grid.spacing_mm == (1.5, 1.0, 1.0)
    # Along z: 40 * 2 / 1.5 = 53.3, 60 / 1.5 = 40, 50. Along y: 100, 100, 160.
    assert grid.median_shape == (50.0, 100.0, 100.0)


def test_coarse_axis_takes_its_tenth_percentile() -> None:
    made = plan(make_fingerprint(*[((20, 300, 300), (z, 1.0, 1.0)) for z in (3.0, 4.0, 5.0, 6.0, 7.0)]))
    full = made.configurations["3d_fullres"]
    assert full.spacing_mm == pytest.approx((3.4, 1.0, 1.0))
    assert full.lowres_axis == 0
    text = reason(made, "configurations.3d_fullres.spacing_mm")
    assert "spacing of z is the 10th percentile, 3.4 mm, because the median 5 mm is more than 3 times 1 mm" in text


def test_coarse_axis_stays_coarser_than_the_others() -> None:
    cases = [((20, 300, 300), (z, 1.0, 1.0)) for z in (0.5, 0.5, 5.0, 5.0, 5.0)]
    assert choose_grid(make_fingerprint(*cases).cases).spacing_mm == (1.00001, 1.0, 1.0)


def test_coarse_axis_keeps_its_median_where_there_are_many_slices() -> None:
    made = plan(make_fingerprint(*[((100, 300, 300), (z, 1.0, 1.0)) for z in (3.0, 5.0, 7.0)]))
    assert made.configurations["3d_fullres"].spacing_mm[0] == 5.0
    assert "100 slices times 3 are not less than 300" in reason(made, "configurations.3d_fullres.spacing_mm")


def test_axis_order_puts_the_coarsest_axis_first() -> None:
    made = plan(make_fingerprint(((200, 180, 30), (1.0, 0.9, 4.0))))
    assert made.axis_order == (2, 0, 1)
    assert made.configurations["3d_fullres"].spacing_mm == (4.0, 1.0, 0.9)
    assert made.configurations["3d_fullres"].median_shape == (30.0, 200.0, 180.0)
    assert made.configurations["2d"].spacing_mm == (1.0, 0.9)
    assert "median in-plane spacing, 1 x 0.9 mm" in reason(made, "configurations.2d.spacing_mm")
    assert reason(made, "axis_order").startswith("x is the through-plane axis")


def test_flat_axis_is_through_plane_whatever_its_spacing() -> None:
    made = plan(make_fingerprint(((300, 1, 200), (1.0, 0.1, 1.0)), ((320, 1, 220), (1.0, 0.5, 1.0))))
    assert made.axis_order == (1, 0, 2)
    assert set(made.configurations) == {"2d"}
    assert made.recommended == "2d"
    assert made.configurations["2d"].median_shape == (310.0, 210.0)


def test_initial_patch_is_a_cube_in_millimetres() -> None:
    assert initial_patch_size((1.0, 1.0, 1.0)) == (256, 256, 256)
    assert initial_patch_size((8.0, 1.0, 1.0)) == (64, 512, 512)
    assert initial_patch_size((0.5, 2.0)) == (4096, 1024)


def test_patch_is_cut_to_the_median_case_and_to_the_memory() -> None:
    small = fit_patch((1.0, 1.0, 1.0), (36.0, 50.0, 35.0), 3, PRESETS["unet"])
    assert (small.patch_size, small.n_shrinks) == ((40, 56, 40), 0)
    large = fit_patch((1.0, 1.0, 1.0), (500.0, 500.0, 500.0), 3, PRESETS["unet"])
    assert large.patch_size == (128, 128, 128)
    assert large.initial_patch_size == (256, 256, 256)
    assert large.n_shrinks > 0


def test_batch_covers_at_most_a_twentieth_of_the_data() -> None:
    made = plan(make_fingerprint(*[((36, 50, 35), (1.0, 1.0, 1.0))] * 200), n_classes=3)
    # 200 * 36 * 50 * 35 * 0.05 = 630,000 voxels; a 3D patch has 89,600, a 2D patch 2,240.
    assert made.configurations["3d_fullres"].batch_size == 7
    assert made.configurations["2d"].batch_size == 281
    assert "7 would cover 5% of all voxels" in reason(made, "configurations.3d_fullres.batch_size")


def test_batch_is_at_least_two() -> None:
    made = plan(make_fingerprint(((36, 50, 35), (1.0, 1.0, 1.0))))
    # 5 % of 63,000 voxels are 1.4 patches in 2D and none in 3D.
    assert [configuration.batch_size for configuration in made.configurations.values()] == [2, 2]
    assert "2 is the least" in reason(made, "configurations.2d.batch_size")


@pytest.mark.parametrize(
    ("name", "all_from", "all_to", "scheme"),
    [
        ("image", -1024.0, 1500.0, "ct"),
        ("Image 1", -900.0, 150.0, "ct"),
        ("0001", -1000.0, 900.0, "ct"),
        ("image", -300.0, 1500.0, "zscore"),
        ("image", -1024.0, 100.0, "zscore"),
        ("image", None, None, "zscore"),
        ("MR", -1024.0, 1500.0, "zscore"),
    ],
)
def test_a_channel_without_a_name_may_be_ct(
    name: str, all_from: float | None, all_to: float | None, scheme: str
) -> None:
    (known,) = make_fingerprint(((64, 64, 64), (1.0,) * 3), channels=(name,)).channels
    channel = dataclasses.replace(known, all_from=all_from, all_to=all_to)
    (chosen,), (why,) = choose_normalization([channel], 1.0)
    assert chosen.scheme == scheme
    assert ("Hounsfield" in why.text) == (scheme == "ct")


def test_normalization_by_channel_name() -> None:
    schemes = {
        "CT": "ct",
        "ct": "ct",
        "T1": "zscore",
        "rgb_to_0_1": "rgb_to_0_1",
        "rescale_to_0_1": "rescale_to_0_1",
        "noNorm": "none",
        "R": "zscore",
    }
    channels = tuple(schemes)
    for cropped_fraction, masked in ((0.7499, True), (0.75, False)):
        made = plan(make_fingerprint(((64, 64, 64), (1.0,) * 3), channels=channels, cropped_fraction=cropped_fraction))
        assert [(channel.channel, channel.scheme) for channel in made.normalization] == list(schemes.items())
        for channel in made.normalization:
            assert channel.use_mask == (masked and channel.scheme == "zscore")
        assert made.channels == channels
        assert made.normalization[0].percentile_99_5 == 40.0
        assert "-2 to 40" in reason(made, "normalization[0]")


def test_batch_dice_follows_from_the_low_resolution() -> None:
    large = plan(make_fingerprint(*[((400, 512, 512), (1.0, 0.8, 0.8))] * 20))
    assert large.configurations["3d_fullres"].batch_dice
    assert set(large.configurations) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    small = plan(make_fingerprint(*[((100, 140, 140), (1.0, 1.0, 1.0))] * 20))
    assert not small.configurations["3d_fullres"].batch_dice
    assert "none is needed" in reason(small, "configurations.3d_lowres")


def test_low_resolution_grows_the_fine_axes_first() -> None:
    assert coarsen((5.0, 1.0, 1.0)) == (5.0, 1.03, 1.03)
    assert coarsen((2.0, 1.0, 1.0)) == pytest.approx((2.06, 1.03, 1.03))


@pytest.mark.parametrize(("size", "fate"), [(200, "none is needed"), (204, "none is worth it")])
def test_low_resolution_is_made_only_where_it_pays(size: int, fate: str) -> None:
    # The patch of 128^3 covers 26.2 % of 200^3 and 24.7 % of 204^3; for the latter one step of 3 % is enough.
    made = plan(make_fingerprint(((size,) * 3, (1.0,) * 3)))
    assert made.configurations["3d_fullres"].patch_size == (128, 128, 128)
    assert not made.configurations["3d_fullres"].batch_dice
    assert fate in reason(made, "configurations.3d_lowres")


def test_low_resolution_lets_the_patch_cover_a_quarter() -> None:
    planned = plan(make_fingerprint(((270,) * 3, (1.0,) * 3))).configurations
    # 270 / 1.03^9 = 206.9, of which 128^3 covers 23.7 %; 270 / 1.03^10 = 200.9, of which it covers 25.9 %.
    assert planned["3d_lowres"].spacing_mm == pytest.approx((1.03**10,) * 3)
    assert planned["3d_lowres"].median_shape == (201.0, 201.0, 201.0)
    assert planned["3d_fullres"].batch_dice
    assert not planned["3d_lowres"].batch_dice


def test_half_a_voxel_stays_half_where_an_axis_keeps_its_spacing() -> None:
    made = plan(make_fingerprint(((76, 900, 900), (3.6, 0.7, 0.7)), ((77, 900, 900), (3.6, 0.7, 0.7))))
    low = made.configurations["3d_lowres"]
    assert made.configurations["3d_fullres"].median_shape[0] == 76.5
    assert low.spacing_mm[0] == 3.6
    # A half is rounded to the even number, as in the published implementation; 76.5 * 3.6 / 3.6 is a little more.
    assert low.median_shape[0] == 76


def test_configurations_can_be_chosen() -> None:
    fingerprint = make_fingerprint(*[((400, 512, 512), (1.0, 0.8, 0.8))] * 20)
    made = plan(fingerprint, configurations=("3d_cascade_fullres",))
    assert set(made.configurations) == {"3d_lowres", "3d_cascade_fullres"}
    assert made.configurations["3d_cascade_fullres"].previous == "3d_lowres"
    assert made.recommended == "3d_cascade_fullres"
    assert not any("configurations.2d" in reason.subject for reason in made.reasons)
    assert plan(fingerprint, configurations=("2d",)).recommended == "2d"
    with pytest.raises(
        PlanError, match=r"3d_lowres does not suit this dataset: none is needed: a patch .* 2d, 3d_fullres"
    ):
        plan(make_fingerprint(((100, 140, 140), (1.0,) * 3)), configurations=("3d_lowres",))
    with pytest.raises(PlanError, match=r"3d_fullres does not suit this dataset: .* a single slice"):
        plan(make_fingerprint(((1, 140, 140), (1.0,) * 3)), configurations=("3d_fullres",))


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "recommended"),
    [
        ((7, 256, 256), (3.0, 1.0, 1.0), "2d"),
        ((8, 256, 256), (3.0, 1.0, 1.0), "3d_fullres"),
        ((20, 30, 30), (50.0, 1.0, 1.0), "2d"),
        # Large slices leave memory for four of them only.
        ((20, 3000, 3000), (5.0, 0.05, 0.05), "2d"),
        ((96, 96, 96), (1.0, 1.0, 1.0), "3d_fullres"),
        # A patch of 128^3 covers 5.1 % of 345^3 and 4.9 % of 349^3.
        ((345, 345, 345), (1.0, 1.0, 1.0), "3d_fullres"),
        ((349, 349, 349), (1.0, 1.0, 1.0), "3d_cascade_fullres"),
    ],
)
def test_recommended_follows_from_the_context_that_a_patch_sees(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], recommended: str
) -> None:
    made = plan(make_fingerprint((shape, spacing_mm)))
    assert made.recommended == recommended
    assert f"the median case's {shape[0]} slices" in reason(made, "recommended")


def test_lowres_axis_needs_more_than_three_times_and_no_equal() -> None:
    assert find_lowres_axis((3.1, 1.0, 1.0)) == 0
    assert find_lowres_axis((3.0, 1.0, 1.0)) is None
    assert find_lowres_axis((4.0, 4.0, 1.0)) is None


def test_every_decision_has_one_reason() -> None:
    made = plan(make_fingerprint(*[((20, 320, 320), (3.6, 0.6, 0.6))] * 30, channels=("T2", "ADC")))
    subjects = [reason.subject for reason in made.reasons]
    assert len(subjects) == len(set(subjects))
    for name in made.configurations:
        for decision in ("spacing_mm", "patch_size", "network", "batch_size", "batch_dice"):
            assert f"configurations.{name}.{decision}" in subjects
    assert {"axis_order", "normalization[0]", "normalization[1]", "recommended"} <= set(subjects)
    assert made.provenance.keys() == {"autoseg", "fingerprint", "decisions"}


def test_unknown_preset_names_the_known_ones() -> None:
    fingerprint = make_fingerprint(((64,) * 3, (1.0,) * 3))
    with pytest.raises(PlanError, match="no preset 'resenc_l'; did you mean 'resenc-l'"):
        plan(fingerprint, preset="resenc_l")
    with pytest.raises(PlanError, match="choose one of unet, resenc-m, resenc-l, resenc-xl"):
        plan(fingerprint, preset="huge")


def test_impossible_fingerprints_are_refused() -> None:
    with pytest.raises(PlanError, match="0 cases"):
        plan(make_fingerprint())
    bad = make_fingerprint(((64, 64, 64), (1.0, math.nan, 1.0)), ((64, 0, 64), (1.0,) * 3), ((64,) * 3, (1.0,) * 3))
    with pytest.raises(PlanError, match=r"(?s)impossible geometry \(2\).*case_000.*case_001"):
        plan(bad)


# --- Against whatever comes -----------------------------------------------------------------------------------------


def check_sound(fingerprint: Fingerprint, n_classes: int, preset: str = "unet") -> Plan:
    """A network that can be built and trained within memory."""
    made = plan(fingerprint, n_classes, preset=preset)
    assert from_plain(Plan, to_plain(made)) == made
    for configuration in made.configurations.values():
        network = configuration.network
        assert len(network.features) >= 2
        assert min(configuration.median_shape) >= 1
        assert all(s % d == 0 for s, d in zip(configuration.patch_size, network.divisor, strict=True))
        values = count_feature_map_values(network, configuration.patch_size, n_classes)
        assert values <= PRESETS[preset].budgets[configuration.n_axes].max_values_per_patch
    check_plan(made)
    return made


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((20, 3000, 3000), (5.0, 0.05, 0.05)),
        ((3000, 20, 3000), (1.0, 1.0, 1.0)),
        ((2000, 2000, 2000), (0.01, 0.01, 0.01)),
        ((1, 1, 1), (1.0, 1.0, 1.0)),
        ((7, 7, 7), (1.0, 1.0, 1.0)),
        ((3, 5, 2), (5.0, 0.5, 0.7)),
        ((1, 7, 2000), (50.0, 0.01, 50.0)),
        ((2, 4000, 3), (0.01, 50.0, 0.01)),
    ],
)
@pytest.mark.parametrize("n_classes", [2, 201])
def test_degenerate_data(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], n_classes: int) -> None:
    check_sound(make_fingerprint((shape, spacing_mm)), n_classes)


def test_many_labels_shorten_the_patch() -> None:
    cases = [((200, 200, 200), (1.0, 1.0, 1.0))] * 3
    few, many = (plan(make_fingerprint(*cases), n).configurations["3d_fullres"].patch_size for n in (2, 201))
    assert math.prod(many) < math.prod(few)


sizes = st.one_of(st.integers(1, 16), st.integers(1, 2000))
spacings = st.one_of(st.floats(0.01, 50.0), st.sampled_from([0.5, 1.0, 3.0, 50.0]))
geometries = st.tuples(st.tuples(sizes, sizes, sizes), st.tuples(spacings, spacings, spacings))


@given(
    st.lists(geometries, min_size=1, max_size=6),
    st.integers(1, 80),
    st.sampled_from([2, 3, 20, 201]),
    st.sampled_from(sorted(PRESETS)),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_fingerprint(
    cases: list[tuple[tuple[int, int, int], tuple[float, float, float]]], repeats: int, n_classes: int, preset: str
) -> None:
    check_sound(make_fingerprint(*(cases * repeats)), n_classes, preset)


@given(geometries, st.sampled_from([2, 5]), st.sampled_from(sorted(PRESETS)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_torch_can_train_what_is_planned(
    case: tuple[tuple[int, int, int], tuple[float, float, float]], n_classes: int, preset: str
) -> None:
    """At a reduced width, on patches of the planned size; they are small because the planned GPU is."""
    made = plan(make_fingerprint(case, case), n_classes, preset=preset, gpu_memory_gib=0.2)
    for configuration in made.configurations.values():
        network = dataclasses.replace(configuration.network, features=(2,) * len(configuration.network.features))
        module = build_network(network, n_channels=1, n_outputs=n_classes)
        images = torch.rand(1, 1, *configuration.patch_size)
        outputs = module.train()(images)
        assert outputs[0].shape == (1, n_classes, *configuration.patch_size)
        sum(output.square().mean() for output in outputs).backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@given(geometries)
@settings(max_examples=30, deadline=None)
def test_permuted_axes_give_the_same_network(
    case: tuple[tuple[int, int, int], tuple[float, float, float]],
) -> None:
    # Made unequal, because of equal axes the first one is taken, and those are different ones after a permutation.
    shape, (z, y, x) = case
    spacing_mm = (z + y + x, y, x)
    rolled = make_fingerprint(((shape[1], shape[2], shape[0]), (spacing_mm[1], spacing_mm[2], spacing_mm[0])))
    direct, permuted = plan(make_fingerprint((shape, spacing_mm))), plan(rolled)
    if direct.axis_order == (0, 1, 2):
        assert permuted.axis_order == (2, 0, 1)
        assert permuted.configurations == direct.configurations


def test_the_fingerprint_is_not_touched_and_plans_repeat() -> None:
    fingerprint = make_fingerprint(*[((20, 320, 320), (3.6, 0.6, 0.6))] * 30)
    copy = dataclasses.replace(fingerprint)
    assert plan(fingerprint) == plan(copy)
    assert fingerprint == copy
