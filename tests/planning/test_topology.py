"""Strides and kernels, with answers worked out by hand."""

from __future__ import annotations

from autoseg.planning.topology import axes_to_halve, plan_topology


def test_isotropic_cube_is_halved_until_four_voxels_remain() -> None:
    topology = plan_topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert topology.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert topology.kernel_sizes == ((3, 3, 3),) * 6
    assert topology.patch_size == (128, 128, 128)
    assert topology.divisor == (32, 32, 32)


def test_patch_is_padded_to_the_strides() -> None:
    # 50 -> 25 -> 13 -> 7 and 35 -> 18 -> 9 -> 5: three halvings each.
    topology = plan_topology((1.0, 1.0), (50, 35))
    assert topology.divisor == (8, 8)
    assert topology.patch_size == (56, 40)


def test_coarse_axis_waits_until_the_fine_ones_have_caught_up() -> None:
    # In-plane 1 mm -> 2 -> 4: only then is 7 mm less than twice as coarse. 12 -> 6 ends it.
    topology = plan_topology((7.0, 1.0, 1.0), (12, 256, 224))
    assert [stride[0] for stride in topology.strides] == [1, 1, 1, 2, 1, 1]
    assert [kernel[0] for kernel in topology.kernel_sizes] == [1, 1, 3, 3, 3, 3]
    assert all(stride[1:] == (2, 2) for stride in topology.strides[1:])
    assert topology.patch_size == (12, 256, 224)


def test_exactly_twice_as_coarse_still_waits() -> None:
    assert axes_to_halve((2.0, 1.0, 1.0), (64, 64, 64)) == (1, 2)
    assert axes_to_halve((1.99, 1.0, 1.0), (64, 64, 64)) == (0, 1, 2)


def test_an_axis_that_is_too_small_does_not_hold_back_coarser_ones() -> None:
    assert axes_to_halve((1.0, 4.0, 4.0), (7, 64, 64)) == (1, 2)


def test_a_single_axis_needs_twelve_voxels() -> None:
    assert axes_to_halve((1.0, 1.0), (12, 7)) == (0,)
    assert axes_to_halve((1.0, 1.0), (11, 7)) == ()


def test_fractional_size_counts_as_it_is() -> None:
    assert axes_to_halve((1.0, 1.0), (7.5, 7.5)) == ()
    assert plan_topology((1.0, 1.0), (227.5, 227.5)).patch_size == (256, 256)


def test_bottleneck_kernel_is_three_even_where_the_axis_never_caught_up() -> None:
    topology = plan_topology((999.0, 1.0, 1.0), (2, 16, 16))
    assert topology.kernel_sizes == ((1, 3, 3), (1, 3, 3), (3, 3, 3))


def test_patch_too_small_for_any_halving_is_enlarged_to_two_stages() -> None:
    assert plan_topology((1.0, 1.0, 1.0), (3, 6, 7)).patch_size == (8, 8, 8)
    assert plan_topology((5.0, 1.0, 1.0), (3, 6, 7)).patch_size == (3, 8, 8)
    assert plan_topology((5.0, 5.0, 1.0), (1, 1, 1)).patch_size == (1, 1, 12)
    assert all(plan_topology((1.0, 1.0), (edge, 1)).n_stages == 2 for edge in range(1, 12))
