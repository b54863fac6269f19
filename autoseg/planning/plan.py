"""The plan: every decision about a dataset, each with its reason, in a file that a person can read and edit."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import digest, later

PLAN_VERSION = 2
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""What the planner makes."""

SET_BY_USER = "set by user"
"""How a reason begins where the user has decided."""

MAX_BLOCKS, MAX_FEATURES, MAX_STAGES = 100, 2**16, 32
"""Far more than any network has; a plan that comes from elsewhere must not keep a machine busy with building one."""

SCHEMES = ("ct", "zscore", "rgb_to_0_1", "rescale_to_0_1", "none")
"""How intensities can be scaled; `autoseg.preprocessing.normalize.NORMALIZERS` does it."""


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
        n_axes = len(self.strides[0]) if self.strides else 0
        if n_axes not in (2, 3) or any(len(entry) != n_axes for entry in (*self.strides, *self.kernel_sizes)):
            raise PlanError("network: strides and kernel_sizes need 2 numbers (2D) or 3 numbers (3D) per stage")
        lengths = {len(self.features), len(self.strides), len(self.kernel_sizes), len(self.encoder_blocks)}
        if len(lengths) != 1 or len(self.decoder_blocks) != len(self.features) - 1:
            raise PlanError(
                "network: features, strides, kernel_sizes and encoder_blocks need one entry per stage, "
                "decoder_blocks one fewer"
            )
        if len(self.features) > MAX_STAGES or max(self.features, default=0) > MAX_FEATURES:
            raise PlanError(f"network: at most {MAX_STAGES} stages of at most {MAX_FEATURES} features are possible")
        if max((*self.encoder_blocks, *self.decoder_blocks), default=0) > MAX_BLOCKS:
            raise PlanError(f"network: at most {MAX_BLOCKS} blocks per stage are possible")
        if len(self.features) < 2 or min(*self.encoder_blocks, *self.decoder_blocks) < 1:
            raise PlanError("network: at least 2 stages are needed, each with at least 1 block")
        if min(self.features) < 1 or min(min(stride) for stride in self.strides) < 1 or set(self.strides[0]) != {1}:
            raise PlanError("network: features and strides must be positive, and the first stride all ones")
        if any(edge < 1 or edge % 2 == 0 for kernel in self.kernel_sizes for edge in kernel):
            raise PlanError(f"network: kernel_sizes are {_listed(self.kernel_sizes)}, expected odd numbers")

    @property
    def divisor(self) -> tuple[int, ...]:
        """What a patch must be divisible by, per axis."""
        return tuple(prod(stage[axis] for stage in self.strides) for axis in range(len(self.strides[0])))


@dataclass(frozen=True, kw_only=True)
class ConfigurationPlan:
    """One way to segment the dataset: a grid, a patch and a network. Arrays are in the plan's `axis_order`.

    Attributes:
        name: one of `CONFIGURATIONS`, `2d_quick` or `3d_quick`, which a short training adds, or any other in a plan
            that a person has edited.
        spacing_mm: target spacing: (y, x) for 2D, whose slices keep their distance, (z, y, x) for 3D.
        median_shape: median size of a case on this grid, in voxels, same axes as `spacing_mm`.
        largest_shape: likewise, the largest size along each axis.
        patch_size: in voxels, same axes as `spacing_mm`.
        batch_size: patches per training step on a GPU of the planned size.
        lowres_axis: index of the one axis that is resampled with nearest neighbour because it is more than three
            times coarser than the finest; None where there is no such axis. Judged again per case at resampling.
        batch_dice: whether Dice is summed over the batch before the ratio is taken.
        previous: the configuration whose prediction is an extra input; None but for the cascade.
        network: the network.
        smoothed: whether images are smoothed before they are resampled to larger voxels, so that each of these is a
            mean of theirs, with less noise, and not one of them. The published method does not, and label maps are not:
            their borders would become rounder than they are.
    """

    name: str
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    largest_shape: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    lowres_axis: int | None
    batch_dice: bool
    previous: str | None
    network: NetworkPlan
    smoothed: bool = later(False)

    def __post_init__(self) -> None:
        n_axes = len(self.network.strides[0])
        for name in ("spacing_mm", "median_shape", "largest_shape", "patch_size"):
            value = getattr(self, name)
            if len(value) != n_axes:
                raise PlanError(
                    f"{self.name}: {name} is {_listed(value)}, expected {n_axes} numbers, one per axis of the network"
                )
            if not all(0 < edge < math.inf for edge in value):
                raise PlanError(f"{self.name}: {name} is {_listed(value)}, expected positive numbers")
        divisor = self.network.divisor
        if any(size % step for size, step in zip(self.patch_size, divisor, strict=True)):
            nearest = [max(round(size / step), 1) * step for size, step in zip(self.patch_size, divisor, strict=True)]
            raise PlanError(
                f"{self.name}: patch_size {_listed(self.patch_size)} is not divisible by the network's strides "
                f"{_listed(divisor)}; the nearest that is: {_listed(nearest)}"
            )
        if self.patch_size == divisor:
            raise PlanError(
                f"{self.name}: patch_size {_listed(self.patch_size)} leaves a single voxel in the lowest stage, which "
                f"cannot be normalized; the nearest that leaves more: {_listed((*divisor[:-1], 2 * divisor[-1]))}"
            )
        if self.batch_size < 1:
            raise PlanError(f"{self.name}: batch_size is {self.batch_size}, expected at least 1")
        if self.lowres_axis is not None and not 0 <= self.lowres_axis < n_axes:
            raise PlanError(f"{self.name}: lowres_axis is {self.lowres_axis}, expected null or 0 to {n_axes - 1}")

    @property
    def n_axes(self) -> int:
        """2 or 3: the number of spatial axes of a patch."""
        return len(self.patch_size)


@dataclass(frozen=True, kw_only=True)
class ChannelNormalization:
    """How the intensities of one channel are scaled.

    Attributes:
        channel: the channel's name.
        scheme: one of `SCHEMES`.
        use_mask: z-score inside the non-zero mask only, zero outside.
        mean, std, percentile_00_5, percentile_99_5: of the foreground voxels of all cases, for "ct".
        minimum: likewise; None where that is not known, or does not matter.
    """

    channel: str
    scheme: str
    use_mask: bool
    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    minimum: float | None = later(None)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            advice = suggest(self.scheme, SCHEMES)
            raise PlanError(f"normalization of '{self.channel}': the scheme '{self.scheme}' is unknown; {advice}")
        numbers = (self.mean, self.std, self.percentile_00_5, self.percentile_99_5)
        in_order = self.percentile_00_5 <= self.percentile_99_5 and self.std >= 0
        if self.scheme == "ct" and not (all(map(math.isfinite, numbers)) and in_order):
            raise PlanError(
                f"normalization of '{self.channel}': found the mean {self.mean:g}, the standard deviation {self.std:g} "
                f"and the percentiles {self.percentile_00_5:g} and {self.percentile_99_5:g}, expected finite numbers "
                "in order"
            )

    @property
    def decisive(self) -> tuple[str | bool | float, ...]:
        """What of it a scaled voxel depends on: the statistics of all cases only where the scheme uses them."""
        statistics = (self.mean, self.std, self.percentile_00_5, self.percentile_99_5)
        return (self.scheme, self.use_mask, *(statistics if self.scheme == "ct" else ()))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What training steps of a configuration took on a device.

    Attributes:
        configuration: its name.
        key: digest of all that the figures depend on, see `Plan.measurement_key`.
        device: name of the device.
        peak_memory_gib: at the plan's batch size, all that torch held at once.
        step_time_s: of one step at the plan's batch size, augmentation included, reading not.
        largest_batch_size: that the device could train.
    """

    configuration: str
    key: str
    device: str
    peak_memory_gib: float
    step_time_s: float
    largest_batch_size: int


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
        preset: a name in `autoseg.planning.presets.PRESETS`: the kind of network.
        gpu_memory_gib: of the GPU that patch and batch were made for.
        normalization: one entry per channel, in order.
        axis_order: the network's axes as indices into (Z, Y, X): through-plane axis first.
        n_folds: how many folds of cross-validation there are.
        configurations: by name.
        recommended: the configuration that is used where none is named.
        reasons: why, decision by decision.
        measurements: what was measured on a device, configuration by configuration; empty until then.
        provenance: what made the plan: autoseg's version, and digests of the fingerprint and of the decisions.
        optional_channels: names of those that some cases lack.
        spacing_range_mm: the smallest and the largest spacing of the scans along Z, Y and X, as they were before
            resampling; None where that is not known.
    """

    version: int
    dataset: str
    labels: LabelSpec
    preset: str
    gpu_memory_gib: float
    normalization: tuple[ChannelNormalization, ...]
    axis_order: tuple[int, int, int]
    n_folds: int
    configurations: dict[str, ConfigurationPlan]
    recommended: str
    reasons: tuple[Reason, ...]
    measurements: tuple[Measurement, ...] = ()
    provenance: dict[str, str]
    optional_channels: tuple[str, ...] = ()
    spacing_range_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None = later(None)

    def __post_init__(self) -> None:
        if self.version != PLAN_VERSION:
            raise PlanError(
                f"the plan has format {self.version}, this autoseg reads format {PLAN_VERSION}; plan the dataset again"
            )
        if sorted(self.axis_order) != [0, 1, 2]:
            raise PlanError(f"axis_order is {list(self.axis_order)}, expected a permutation of [0, 1, 2]")
        if self.n_folds < 1:
            raise PlanError(f"n_folds is {self.n_folds}, expected at least 1")
        if not self.normalization or not 0 < self.gpu_memory_gib < math.inf:
            raise PlanError("the plan needs at least one channel in normalization, and a gpu_memory_gib above 0")
        for name, configuration in self.configurations.items():
            # A person may add configurations of any name; it becomes the name of a folder.
            if configuration.name != name or not re.fullmatch(r"\w[\w.-]*", name):
                raise PlanError(
                    f"configurations: found the name '{configuration.name}' under '{name}', expected the same name of "
                    "letters, digits, dots, hyphens and underscores"
                )
            if configuration.previous is not None and self.configuration(configuration.previous).previous is not None:
                raise PlanError(f"{name}: its previous, {configuration.previous}, is a second stage itself")
            if configuration.previous is not None and self.configuration(configuration.previous).n_axes != 3:
                raise PlanError(f"{name}: its previous, {configuration.previous}, is not 3D; for none, write null")
        self.configuration(self.recommended)

    def is_set_by_user(self, configuration: str, decision: str) -> bool:
        """Whether the user has decided, for instance, the "patch_size" of a configuration."""
        subject = f"configurations.{configuration}.{decision}"
        return any(reason.subject == subject and reason.text.startswith(SET_BY_USER) for reason in self.reasons)

    def configuration(self, name: str) -> ConfigurationPlan:
        """The configuration of that name.

        Raises:
            PlanError: there is none.
        """
        if name not in self.configurations:
            raise PlanError(f"the plan has no configuration '{name}'; {suggest(name, self.configurations)}")
        return self.configurations[name]

    @property
    def cascade(self) -> ConfigurationPlan | None:
        """The second stage of the cascade; None where there is none."""
        return next((known for known in self.configurations.values() if known.previous is not None), None)

    def n_previous(self, name: str) -> int:
        """Foreground classes that a configuration gets from its first stage; 0 where it has none.

        Raises:
            PlanError: there is no such configuration.
        """
        return self.labels.n_classes - 1 if self.configuration(name).previous is not None else 0

    def grid(self, name: str) -> str:
        """The configuration whose preprocessed cases the named one uses: the first of the same spacing and smoothing.

        Raises:
            PlanError: there is no such configuration.
        """
        chosen = self.configuration(name)
        wanted = chosen.spacing_mm, chosen.smoothed
        return next(
            other for other, known in self.configurations.items() if (known.spacing_mm, known.smoothed) == wanted
        )

    def decisions_digest(self) -> str:
        """Of what the reasons are about: where it is not the one in the provenance, a person has edited the plan."""
        return digest((self.configurations, self.normalization, self.axis_order, self.recommended))

    @property
    def is_edited(self) -> bool:
        """Whether a person has changed a decision since the plan was made."""
        return self.provenance.get("decisions", self.decisions_digest()) != self.decisions_digest()

    def signed(self) -> Plan:
        """The plan with the digest of its decisions in its provenance."""
        return replace(self, provenance={**self.provenance, "decisions": self.decisions_digest()})

    def extended(self, added: Mapping[str, ConfigurationPlan], reasons: Sequence[Reason]) -> Plan:
        """The plan with more configurations, signed; what it said before on the subjects of the reasons is replaced."""
        subjects = {reason.subject for reason in reasons}
        kept = (reason for reason in self.reasons if reason.subject not in subjects)
        return replace(self, configurations={**self.configurations, **added}, reasons=(*kept, *reasons)).signed()

    def measurement_key(self, name: str) -> str:
        """Digest of all that the time and the memory of a configuration depend on."""
        return digest((self.configuration(name), self.labels.n_outputs, len(self.channels)))

    def measurement(self, name: str) -> Measurement | None:
        """What was measured of a configuration as it is now.

        Raises:
            PlanError: there is no such configuration.
        """
        key = self.measurement_key(name)
        return next((known for known in self.measurements if known.key == key), None)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in order."""
        return tuple(channel.channel for channel in self.normalization)

    @property
    def optional_indices(self) -> tuple[int, ...]:
        """Positions of the channels that cases may lack."""
        return tuple(index for index, name in enumerate(self.channels) if name in self.optional_channels)


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that was probably meant, or all there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(names)}"


def _listed(values: Iterable[object]) -> str:
    return str([list(value) if isinstance(value, tuple) else value for value in values])
