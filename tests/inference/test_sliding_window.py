"""Tiles, mirroring and averaging, with networks whose answer is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoseg.core.errors import PredictionError
from autoseg.core.labels import LabelSpec, Region
from autoseg.core.runtime import autocast_dtype
from autoseg.inference import sliding_window
from autoseg.inference.sliding_window import (
    CompiledNetwork,
    SlidingWindow,
    WindowConfig,
    gaussian_weight,
    predict_logits,
    tile_starts,
)
from autoseg.networks.outputs import BACKGROUND_LOGIT, Outputs

# Smaller than, equal to and larger than the patch of (4, 6, 8), and mixtures.
SHAPES = [(3, 4, 5), (4, 6, 8), (9, 13, 17), (2, 6, 20), (1, 1, 1), (11, 3, 8)]
PATCH = (4, 6, 8)
# What a pass in bfloat16 may differ by, relative to the size of the logits.
TOLERANCE = 1e-5 if autocast_dtype(torch.device("cpu")) is None else 2e-2
CPU = torch.device("cpu")
REGIONS = LabelSpec(
    names=("rim", "core"),
    values=(1, 2),
    regions=(Region(name="whole", values=(1, 2), written=1), Region(name="core", values=(2,), written=2)),
)


class Constant(nn.Module):
    """Logits that depend on nothing."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, images: Tensor) -> Tensor:
        shape = (-1, *(1,) * (images.ndim - 2))
        return self.values.reshape(shape).repeat(len(images), 1, *images.shape[2:])


class Copy(nn.Module):
    """The image and its negative, exactly: nothing that autocast would touch."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat((images, -images), dim=1)


class Shift(nn.Module):
    """The neighbour before each voxel along each axis: as far from symmetric as can be."""

    def forward(self, images: Tensor) -> Tensor:
        shifted = [torch.zeros_like(images) for _ in range(images.ndim - 2)]
        for axis, target in enumerate(shifted):
            target.narrow(axis + 2, 1, images.shape[axis + 2] - 1).copy_(
                images.narrow(axis + 2, 0, images.shape[axis + 2] - 1)
            )
        return torch.cat(shifted, dim=1)


def config(n_axes: int, *, mirror: bool, step_fraction: float = 0.5) -> WindowConfig:
    axes = tuple(range(n_axes)) if mirror else ()
    return WindowConfig(patch_size=PATCH[-n_axes:], mirror_axes=axes, step_fraction=step_fraction)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_constant_networks_give_their_mean_everywhere(shape: tuple[int, ...], n_axes: int, mirror: bool) -> None:
    networks = [Constant(1.5, -3.0, 0.0), Constant(0.5, -1.0, 7.0)]
    result = predict_logits(torch.randn(2, *shape), networks, n_outputs=3, config=config(n_axes, mirror=mirror))
    assert result.shape == (3, *shape)
    assert result.dtype == torch.float32
    expected = torch.tensor([1.0, -2.0, 3.5]).reshape(3, 1, 1, 1).expand(3, *shape)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step_fraction", [0.1, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_pointwise_network_equals_the_network_on_the_volume(
    shape: tuple[int, ...], n_axes: int, mirror: bool, step_fraction: float
) -> None:
    """Every tile and mirrored copy is put back where it came from."""
    image = torch.randn(1, *shape)
    window = config(n_axes, mirror=mirror, step_fraction=step_fraction)
    result = predict_logits(image, [Copy()], n_outputs=2, config=window)
    torch.testing.assert_close(result, torch.cat((image, -image)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_axes", [2, 3])
def test_convolution_of_one_voxel_equals_the_convolution_of_the_volume(n_axes: int) -> None:
    torch.manual_seed(0)
    kinds: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
    network = kinds[n_axes](2, 3, 1)
    image = torch.randn(2, 7, 11, 19)
    weight, bias = (parameter.detach() for parameter in network.parameters())
    expected = torch.einsum("kc,czyx->kzyx", weight.flatten(1), image) + bias.reshape(-1, 1, 1, 1)
    result = predict_logits(image, [network], n_outputs=3, config=config(n_axes, mirror=True))
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("voxels_per_batch", [1, 3 * 4 * 6 * 8, 2**19])
def test_size_of_the_batches_does_not_matter(voxels_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(1, 9, 13, 17)
    expected = predict_logits(image, [Shift()], n_outputs=3, config=config(3, mirror=True))
    monkeypatch.setitem(sliding_window.MAX_BATCH_VOXELS, "cpu", voxels_per_batch)
    result = predict_logits(image, [Shift()], n_outputs=3, config=config(3, mirror=True))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("mirror_axes", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_mirroring_is_the_mean_over_flipped_volumes_in_3d(mirror_axes: tuple[int, ...]) -> None:
    """The volume is one tile, so that flipping it by hand is flipping the tile."""
    image = torch.randn(1, *PATCH)
    combinations = [axes for size in range(len(mirror_axes) + 1) for axes in itertools.combinations(mirror_axes, size)]
    assert len(combinations) == 2 ** len(mirror_axes)
    copies = []
    for axes in combinations:
        in_batch = [axis + 2 for axis in axes]
        copies.append(Shift()(image[None].flip(in_batch)).flip(in_batch)[0])
    result = predict_logits(
        image, [Shift()], n_outputs=3, config=WindowConfig(patch_size=PATCH, mirror_axes=mirror_axes)
    )
    torch.testing.assert_close(result, torch.stack(copies).mean(dim=0), atol=1e-6, rtol=1e-6)
    assert (result - copies[0]).abs().max() > 0.1


def test_mirroring_is_the_mean_over_flipped_slices_in_2d() -> None:
    """Axis 0 of a 2D patch is Y: Z is never mirrored."""
    image = torch.randn(1, 5, *PATCH[1:])
    copies = []
    for axes in [(), (2,), (3,), (2, 3)]:
        slices = image.movedim(1, 0)
        copies.append(Shift()(slices.flip(axes)).flip(axes).movedim(0, 1))
    result = predict_logits(image, [Shift()], n_outputs=2, config=config(2, mirror=True))
    torch.testing.assert_close(result, torch.stack(copies).mean(dim=0), atol=1e-6, rtol=1e-6)


def test_overlapping_tiles_are_weighted_by_the_gaussian() -> None:
    """Two tiles along the last axis, averaged by hand."""
    image = torch.randn(1, 4, 6, 12)
    result = predict_logits(image, [Shift()], n_outputs=3, config=config(3, mirror=False))
    weight = gaussian_weight(PATCH)
    total, weights = torch.zeros(3, 4, 6, 12), torch.zeros(4, 6, 12)
    for start in (0, 4):
        place = (..., slice(start, start + 8))
        total[place] += (
            Shift()(image[None])[0][place] * weight if start == 0 else (Shift()(image[place][None])[0] * weight)
        )
        weights[place] += weight
    torch.testing.assert_close(result, total / weights, atol=1e-6, rtol=1e-5)


def test_small_volume_lies_in_the_middle_of_its_padding() -> None:
    seen = []

    class Record(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return images

    image = torch.ones(1, 2, 6, 5)
    predict_logits(image, [Record()], n_outputs=1, config=config(3, mirror=False))
    expected = torch.zeros(1, 1, *PATCH)
    expected[0, 0, 1:3, :, 1:6] = 1
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)


def test_input_is_not_changed() -> None:
    image = torch.randn(1, 9, 13, 17)
    before = image.clone()
    predict_logits(image, [Copy()], n_outputs=2, config=config(3, mirror=True))
    assert torch.equal(image, before)


# -- tiles and weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_fraction", [0.1, 0.25, 0.5, 0.73, 1.0])
def test_tiles_reach_from_end_to_end_without_gaps(step_fraction: float) -> None:
    for patch, size in itertools.product((1, 2, 3, 5, 8, 64), (*range(1, 40), 200, 511)):
        starts = tile_starts(size, patch, step_fraction)
        assert starts[0] == 0
        assert starts[-1] == max(0, size - patch)
        gaps = [after - before for before, after in itertools.pairwise(starts)]
        # Starts are whole voxels, so that a step may be rounded up, though never beyond the patch.
        assert all(0 < gap <= min(patch, -int(-patch * step_fraction // 1)) for gap in gaps), (size, patch, starts)


def test_tile_starts_known_by_hand() -> None:
    assert tile_starts(10, 16, 0.5) == [0]
    assert tile_starts(16, 16, 0.5) == [0]
    assert tile_starts(17, 16, 0.5) == [0, 1]
    assert tile_starts(32, 16, 0.5) == [0, 8, 16]
    assert tile_starts(33, 16, 0.5) == [0, 6, 11, 17]


def test_each_slice_is_predicted_once_in_2d() -> None:
    assert tile_starts(7, 1, 0.5) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("patch", [(8,), (1, 1), (5, 16), (64, 3), (4, 6, 8), (32, 40, 24)])
def test_gaussian_weight(patch: tuple[int, ...]) -> None:
    weight = gaussian_weight(patch)
    assert weight.shape == patch
    assert weight.dtype == torch.float32
    assert float(weight.max()) == 1
    assert float(weight.min()) > 0
    for axis in range(len(patch)):
        torch.testing.assert_close(weight, weight.flip(axis))
        half = weight.narrow(axis, 0, (patch[axis] + 1) // 2)
        assert (half.diff(dim=axis) >= 0).all()


def test_gaussian_weight_has_a_sigma_of_an_eighth_of_the_patch() -> None:
    weight = gaussian_weight((33,))
    assert float(weight[16 + 4] / weight[16]) == pytest.approx(
        float(torch.exp(torch.tensor(-0.5 * (4 / (33 / 8)) ** 2)))
    )


@pytest.mark.parametrize("step_fraction", [0.0, -0.5, 1.01])
def test_step_fraction_is_checked(step_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"step_fraction is .*, expected more than 0 and at most 1"):
        WindowConfig(patch_size=PATCH, step_fraction=step_fraction)


@pytest.mark.parametrize("n_axes", [2, 3])
def test_a_mirrored_image_gives_the_mirrored_prediction_with_the_sides_changed(n_axes: int) -> None:
    """Whatever the network: it need not know left from right for this to hold."""
    torch.manual_seed(0)
    convolution = nn.Conv3d if n_axes == 3 else nn.Conv2d
    network = convolution(1, 4, 3, padding=1).eval()
    window = WindowConfig(
        patch_size=PATCH[-n_axes:],
        mirror_axes=tuple(range(n_axes)),
        side_axis=n_axes - 1,
        opposite=(0, 2, 1, 3),
    )
    image = torch.randn(1, *SHAPES[0])
    direct = predict_logits(image, [network], n_outputs=4, config=window)
    mirrored = predict_logits(image.flip(3), [network], n_outputs=4, config=window)
    torch.testing.assert_close(mirrored, direct.flip(3)[[0, 2, 1, 3]], atol=2e-2, rtol=1e-2)
    unaware = predict_logits(image, [network], n_outputs=4, config=dataclasses.replace(window, opposite=()))
    assert not torch.allclose(unaware, direct, atol=0.1)


class SecondStage(nn.Module):
    """A convolution of an image and of a mask for each class that the first stage has found."""

    def __init__(self, n_axes: int, *, n_previous: int, n_outputs: int) -> None:
        super().__init__()
        self.convolution = (nn.Conv3d if n_axes == 3 else nn.Conv2d)(1 + n_previous, n_outputs, 3, padding=1)
        self.n_previous = n_previous

    def forward(self, images: Tensor) -> Tensor:
        assert images[:, 1].unique().tolist() == images[:, 1].unique().round().tolist()
        masks = [images[:, 1:] == index for index in range(1, self.n_previous + 1)]
        output: Tensor = self.convolution(torch.cat([images[:, :1], *(mask.to(images.dtype) for mask in masks)], dim=1))
        return output


@pytest.mark.parametrize("n_axes", [2, 3])
def test_what_a_first_stage_has_found_changes_sides_in_the_mirror_too(n_axes: int) -> None:
    """Mirrored image, mirrored and swapped classes of the first stage: mirrored and swapped logits, of any network.

    The outputs are two regions that change places; of the classes of the first stage, 1 and 2 do.
    """
    torch.manual_seed(0)
    network = SecondStage(n_axes, n_previous=3, n_outputs=2).eval()
    window = WindowConfig(
        patch_size=PATCH[-n_axes:],
        mirror_axes=tuple(range(n_axes)),
        side_axis=n_axes - 1,
        opposite=(1, 0),
        opposite_previous=(0, 2, 1, 3),
    )
    image, found = torch.randn(1, *SHAPES[0]), torch.randint(0, 4, (1, *SHAPES[0]))
    swapped = torch.tensor([0, 2, 1, 3])[found]
    both, mirrored = torch.cat([image, found.float()]), torch.cat([image, swapped.float()]).flip(3)
    direct = predict_logits(both, [network], n_outputs=2, config=window)
    other = predict_logits(mirrored, [network], n_outputs=2, config=window)
    torch.testing.assert_close(other, direct.flip(3)[[1, 0]], atol=2e-2, rtol=1e-2)
    unaware = predict_logits(mirrored, [network], n_outputs=2, config=dataclasses.replace(window, opposite_previous=()))
    assert not torch.allclose(unaware, other, atol=0.1)


def test_what_was_not_looked_at_has_the_logits_that_are_given() -> None:
    """Of regions, whose background is no channel."""
    image = torch.zeros(1, *PATCH[:2], 24)
    image[..., :4] = 1
    empty = Outputs.of(REGIONS).empty_logits
    window = SlidingWindow([Constant(3.0, -2.0)], config(3, mirror=False), n_outputs=2, device=CPU, empty_logits=empty)
    for separate in (False, True):
        swept = window.sweep(image, separate=separate, is_empty=lambda place: not image[(slice(None), *place)].any())
        found = torch.cat([logits.float() for _, logits in swept], dim=1)
        torch.testing.assert_close(found[..., 8:], torch.full_like(found[..., 8:], -BACKGROUND_LOGIT))
        seen = torch.tensor([3.0, -2.0]).reshape(2, 1, 1, 1).expand(2, *PATCH)
        torch.testing.assert_close(found[..., :4], seen[..., :4])
        # Half of the first tile lies in the second one, which was not looked at.
        assert (found[..., 3:9].diff(dim=-1) <= 0).all()
        decided = Outputs.of(REGIONS).decide(found)
        assert (decided[..., :4] == 1).all()
        assert not decided[..., 8:].any()


# Row by row


def sweep(image: Tensor, networks: list[nn.Module], window: WindowConfig, **options: Any) -> Tensor:
    """The logits of the whole volume (K, Z, Y, X), put together from rows that must come in order, each once."""
    axis = options.get("axis", 0)
    whole = SlidingWindow(networks, window, n_outputs=2, device=CPU)
    parts, expected = [], 0
    for rows, logits in whole.sweep(image, **options):
        assert rows.start == expected
        assert logits.shape[1] == rows.stop - rows.start
        expected = rows.stop
        parts.append(logits.float())
    assert expected == image.shape[1 + axis]
    return torch.cat(parts, dim=1).movedim(1, 1 + axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_may_advance_along_any_axis(shape: tuple[int, ...], n_axes: int, axis: int) -> None:
    image = torch.randn(1, *shape)
    window = config(n_axes, mirror=True)
    expected = predict_logits(image, [Copy(), Constant(1.0, 2.0)], n_outputs=2, config=window)
    found = sweep(image, [Copy(), Constant(1.0, 2.0)], window, axis=axis)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_networks_kept_apart() -> None:
    image = torch.randn(1, 9, 13, 17)
    window = dataclasses.replace(config(3, mirror=True), side_axis=2, opposite=(1, 0))
    networks: list[nn.Module] = [Copy(), Constant(1.0, 5.0)]
    apart = sweep(image, networks, window, separate=True)
    assert apart.shape == (4, 9, 13, 17)
    for number, network in enumerate(networks):
        alone = predict_logits(image, [network], n_outputs=2, config=window)
        torch.testing.assert_close(apart[2 * number : 2 * number + 2], alone, atol=1e-5, rtol=1e-5)


def test_large_sums_are_kept_in_half_precision_and_only_for_rows_that_tiles_still_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.randn(1, 40, 13, 17)
    expected = predict_logits(image, [Copy()], n_outputs=2, config=config(3, mirror=False))
    monkeypatch.setattr(sliding_window, "MAX_FULL_PRECISION_BYTES", 100)
    most = 0
    allocate = sliding_window._Sums._allocate

    def watch(self: Any, first: int, last: int) -> Any:
        nonlocal most
        made = allocate(self, first, last)
        most = max(most, sum(total.shape[1] for total, _ in self._open.values()) + last - first)
        assert made[0].dtype == torch.float16
        return made

    monkeypatch.setattr(sliding_window._Sums, "_allocate", watch)
    window = SlidingWindow([Copy()], config(3, mirror=False), n_outputs=2, device=CPU)
    found = torch.cat([logits.float() for _, logits in window.sweep(image)], dim=1)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=2e-3)
    assert 0 < most <= PATCH[0]
    assert window.sums_bytes((40, 13, 17), axis=0) == 2 * 2 * PATCH[0] * 13 * 17


def test_the_axis_with_the_smallest_sums_is_chosen() -> None:
    window = SlidingWindow([Copy()], config(3, mirror=False), n_outputs=2, device=CPU)
    assert window.choose_axis((40, 13, 17)) == 0
    assert window.choose_axis((5, 60, 17)) == 1
    assert window.choose_axis((4, 6, 80)) == 2


@pytest.mark.parametrize("n_axes", [2, 3])
def test_boxes_of_background_are_not_looked_at(n_axes: int) -> None:
    """Where a tile sees more than background it counts as ever; elsewhere it is surely background."""
    image = torch.zeros(1, 24, 18, 24)
    image[:, :9, 2:8, :10] = torch.randn(1, 9, 6, 10)
    looked_at: list[int] = []

    class Counting(Copy):
        def forward(self, images: Tensor) -> Tensor:
            looked_at.append(len(images))
            assert images.flatten(1).any(dim=1).all()
            return super().forward(images)

    window = config(n_axes, mirror=False)
    found = sweep(image, [Counting()], window, is_empty=lambda place: not image[(slice(None), *place)].any())
    n_looked_at = sum(looked_at)
    occupied = image[0] != 0
    everywhere = sweep(image, [Copy()], window)
    assert torch.equal(found[:, occupied], everywhere[:, occupied])
    assert (found.argmax(dim=0)[~occupied] == 0).all()
    assert found[:, -1, -1, -1].tolist() == pytest.approx([BACKGROUND_LOGIT, 0.0])
    axes = zip(image.shape[1:], window.tile, strict=True)
    n_tiles = math.prod(len(tile_starts(size, patch, window.step_fraction)) for size, patch in axes)
    assert 0 < n_looked_at < n_tiles / 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["GPU", "cuDNN", "CPU", "Python"],
)
def test_out_of_memory_takes_fewer_tiles_at_a_time_and_says_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Small(Copy):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 3:
                raise error
            return super().forward(images)

    caplog.set_level("INFO")
    image = torch.randn(1, 9, 13, 17)
    result = predict_logits(image, [Small()], n_outputs=2, config=config(3, mirror=True))
    torch.testing.assert_close(result, torch.cat((image, -image)), atol=1e-5, rtol=1e-5)
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert all("short of memory" in text for text in said)
    assert "2 tiles at a time" in said[-1] or "3 tiles at a time" in said[-1]


def test_one_tile_that_does_not_fit_is_an_error_in_words() -> None:
    class Huge(Copy):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(PredictionError, match=r"memory of this machine.*can't allocate memory.*end what else"):
        predict_logits(torch.randn(1, 9, 13, 17), [Huge()], n_outputs=2, config=config(3, mirror=True))


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Copy):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        predict_logits(torch.randn(1, 9, 13, 17), [Broken()], n_outputs=2, config=config(3, mirror=True))


def test_sums_move_to_the_memory_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    image = torch.randn(1, 20, 13, 17)
    expected = predict_logits(image, [Copy()], n_outputs=2, config=config(3, mirror=False))
    allocate = sliding_window._Sums._allocate
    n_asked = 0

    def fail_once(self: Any, first: int, last: int) -> Any:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(self, first, last)

    monkeypatch.setattr(sliding_window._Sums, "_allocate", fail_once)
    result = predict_logits(image, [Copy()], n_outputs=2, config=config(3, mirror=False))
    assert torch.equal(result, expected)
    assert sum("summed in the memory of the machine" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("works", [True, False])
def test_compiled_networks_give_the_same_and_one_that_fails_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, works: bool
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler")

    compile_with = torch.compile
    backend = "aot_eager" if works else fail
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_with(module, backend=backend, **options))
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1)
    image = torch.randn(1, 9, 13, 17)
    expected = predict_logits(image, [network], n_outputs=2, config=config(3, mirror=True))
    window = SlidingWindow([CompiledNetwork(network)], config(3, mirror=True), n_outputs=2, device=CPU)
    found = torch.cat([logits for _, logits in window.sweep(image)], dim=1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    warnings = [record.getMessage() for record in caplog.records if "could not be compiled" in record.getMessage()]
    assert len(warnings) == (0 if works else 1)


def test_smaller_batches_are_filled_up_to_the_size_that_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images * 2

    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    network, image = CompiledNetwork(Watched()), torch.randn(6, 1, 4, 4, 4)
    for n_images in (4, 3, 1):
        assert torch.equal(network(image[:n_images]), 2 * image[:n_images])
    with pytest.raises(torch.OutOfMemoryError):
        network(image)
    assert torch.equal(network(image[:3]), 2 * image[:3])
    assert sizes == [4, 4, 4, 6, 3]
