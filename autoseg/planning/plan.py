"""The plan: every decision about a dataset, each with its reason, in a file that a person can read and edit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A U-Net, stage by stage from the input to the bottleneck.

    Attributes:
        architecture: a name in `autoseg.networks.build.ARCHITECTURES`.
        features: channels of each stage.
        strides: down-sampling at the entrance of each stage; the first is all ones. Its length is 2 for 2D, 3 for 3D.
        kernel_sizes: convolution kernel of each stage.
        encoder_blocks: convolutions (plain) or residual blocks per encoder stage.
        decoder_blocks: convolutions per decoder stage, highest resolution first; one fewer than there are stages.
    """

    architecture: str
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.features), len(self.strides), len(self.kernel_sizes), len(self.encoder_blocks)}
        if len(lengths) != 1 or len(self.decoder_blocks) != len(self.features) - 1:
            raise PlanError(
                "network: features, strides, kernel_sizes and encoder_blocks need one entry per stage, "
                "decoder_blocks one fewer"
            )
        if len(self.features) < 2 or min(*self.encoder_blocks, *self.decoder_blocks) < 1:
            raise PlanError("network: at least 2 stages are needed, each with at least 1 block")
        if any(edge % 2 == 0 for kernel in self.kernel_sizes for edge in kernel):
            raise PlanError(f"network: kernel_sizes are {list(self.kernel_sizes)}, expected odd numbers")

    @property
    def divisor(self) -> tuple[int, ...]:
        """What a patch must be divisible by, per axis."""
        return tuple(prod(stage[axis] for stage in self.strides) for axis in range(len(self.strides[0])))


@dataclass(frozen=True, kw_only=True)
class ConfigurationPlan:
    """One way to segment the dataset: a grid, a patch and a network. Arrays are in the plan's `axis_order`.

    Attributes:
        name: "2d", "3d_fullres", "3d_lowres" or "3d_cascade_fullres".
        spacing_mm: target spacing: (y, x) for 2D, whose slices keep their distance, (z, y, x) for 3D.
        median_shape: median size of a case on this grid, in voxels, same axes as `spacing_mm`.
        patch_size: in voxels, same axes as `spacing_mm`.
        batch_size: patches per training step on a GPU of the planned size.
        lowres_axis: index of the one axis that is resampled with nearest neighbour because it is more than three
            times coarser than the finest; None where there is no such axis. Judged again per case at resampling.
        batch_dice: whether Dice is summed over the batch before the ratio is taken.
        previous: the configuration whose prediction is an extra input; None but for the cascade.
        network: the network.
    """

    name: str
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    lowres_axis: int | None
    batch_dice: bool
    previous: str | None
    network: NetworkPlan

    def __post_init__(self) -> None:
        for size, divisor in zip(self.patch_size, self.network.divisor, strict=True):
            if size % divisor:
                mended = -(-size // divisor) * divisor
                raise PlanError(
                    f"{self.name}: patch_size {list(self.patch_size)} is not divisible by the network's strides "
                    f"{list(self.network.divisor)}; {size} would have to be {mended}"
                )
        if self.batch_size < 1:
            raise PlanError(f"{self.name}: batch_size is {self.batch_size}, expected at least 1")

    @property
    def n_axes(self) -> int:
        """2 or 3: the number of spatial axes of a patch."""
        return len(self.patch_size)


@dataclass(frozen=True, kw_only=True)
class ChannelNormalization:
    """How the intensities of one channel are scaled.

    Attributes:
        channel: the channel's name.
        scheme: a name in `autoseg.preprocessing.normalize.NORMALIZERS`: "ct", "zscore" or "rgb_to_0_1".
        use_mask: z-score inside the non-zero mask only, zero outside.
        mean, std, percentile_00_5, percentile_99_5: of the foreground voxels of all cases, for "ct".
    """

    channel: str
    scheme: str
    use_mask: bool
    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a decision was taken.

    Attributes:
        subject: what was decided, as a path into the plan: "axis_order", "configurations.3d_fullres.patch_size".
        text: one sentence with its numbers.
    """

    subject: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided about a dataset.

    Attributes:
        version: of this file's format.
        dataset: the dataset's name.
        labels: classes of the dataset.
        normalization: one entry per channel, in order.
        axis_order: the network's axes as indices into (Z, Y, X): through-plane axis first.
        n_folds: how many folds of cross-validation there are.
        configurations: by name.
        recommended: the configuration that is used where none is named.
        reasons: why, decision by decision.
        provenance: what made the plan: autoseg's version, and the digest of the fingerprint.
    """

    version: int
    dataset: str
    labels: LabelSpec
    normalization: tuple[ChannelNormalization, ...]
    axis_order: tuple[int, int, int]
    n_folds: int
    configurations: dict[str, ConfigurationPlan]
    recommended: str
    reasons: tuple[Reason, ...]
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        if self.version != PLAN_VERSION:
            raise PlanError(
                f"the plan has format {self.version}, this autoseg reads format {PLAN_VERSION}; plan the dataset again"
            )
        if sorted(self.axis_order) != [0, 1, 2]:
            raise PlanError(f"axis_order is {list(self.axis_order)}, expected a permutation of [0, 1, 2]")
        self.configuration(self.recommended)

    def configuration(self, name: str) -> ConfigurationPlan:
        """The configuration of that name.

        Raises:
            PlanError: there is none.
        """
        if name not in self.configurations:
            raise PlanError(f"the plan has no configuration '{name}'; it has {', '.join(self.configurations)}")
        return self.configurations[name]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in order."""
        return tuple(channel.channel for channel in self.normalization)
