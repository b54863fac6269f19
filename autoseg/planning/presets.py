"""Presets: which network to plan, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoseg.core.errors import PlanError
from autoseg.planning.plan import NetworkPlan, suggest
from autoseg.planning.topology import Topology

MIN_BATCH_SIZE = 2
BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
"""By number of spatial axes."""


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """How many feature-map values fit the target GPU.

    Attributes:
        batch_size: the batch of the calibration.
        values: feature-map values of one patch that was seen to fit with this batch.
        min_batch_size: the patch is shortened until this batch fits.
    """

    batch_size: int
    values: float
    min_batch_size: int

    @property
    def capacity(self) -> float:
        """Feature-map values that fit at once, over the whole batch."""
        return self.values * self.batch_size

    @property
    def max_values_per_patch(self) -> float:
        """What one patch may take so that `min_batch_size` of them fit."""
        return self.capacity / self.min_batch_size

    def largest_batch_size(self, values: float) -> int:
        """How many patches of so many feature-map values fit; 0 where not even one does."""
        fitting = self.values / values * self.batch_size
        # Rounded as the published method does; a batch of two, the least that it trains, must fit as a whole.
        return max(round(fitting), MIN_BATCH_SIZE) if fitting >= MIN_BATCH_SIZE else int(fitting)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A kind of network and the memory it may take.

    Attributes:
        name: what the user types.
        architecture: a name in `autoseg.planning.memory.ENCODER_COUNTS`.
        memory_gib: of the GPU that the plan aims at.
        budgets: by number of spatial axes, for `memory_gib`.
        encoder_blocks: convolutions or residual blocks per encoder stage; the last entry repeats.
        decoder_blocks: convolutions per decoder stage.
        max_data_fraction: a batch covers at most this fraction of all voxels of the dataset.
    """

    name: str
    architecture: str
    memory_gib: float
    budgets: dict[int, MemoryBudget]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: int
    max_data_fraction: float

    def scaled(self, memory_gib: float) -> Preset:
        """The same kind of network for a GPU of another size: what fits grows in proportion."""
        budgets = {
            n_axes: replace(budget, values=budget.values * (memory_gib / self.memory_gib))
            for n_axes, budget in self.budgets.items()
        }
        return replace(self, memory_gib=memory_gib, budgets=budgets)

    def needed_memory_gib(self, values: float, *, batch_size: int, n_axes: int) -> float:
        """About how much memory training takes with patches of so many feature-map values."""
        return values * batch_size / self.budgets[n_axes].capacity * self.memory_gib

    def network(self, topology: Topology) -> NetworkPlan:
        """The network of this preset with that topology."""
        n_stages, n_axes = topology.n_stages, len(topology.patch_size)
        cap = MAX_FEATURES[n_axes]
        blocks = self.encoder_blocks + self.encoder_blocks[-1:] * n_stages
        return NetworkPlan(
            architecture=self.architecture,
            features=tuple(min(BASE_FEATURES * 2**stage, cap) for stage in range(n_stages)),
            strides=topology.strides,
            kernel_sizes=topology.kernel_sizes,
            encoder_blocks=blocks[:n_stages],
            decoder_blocks=(self.decoder_blocks,) * (n_stages - 1),
        )


def _residual(name: str, memory_gib: float, values_2d: float, values_3d: float) -> Preset:
    return Preset(
        name=name,
        architecture="resenc_unet",
        memory_gib=memory_gib,
        budgets={
            2: MemoryBudget(batch_size=12, values=values_2d, min_batch_size=12),
            3: MemoryBudget(batch_size=2, values=values_3d, min_batch_size=2),
        },
        encoder_blocks=(1, 3, 4, 6),
        decoder_blocks=1,
        max_data_fraction=1.0,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="unet",
            architecture="unet",
            memory_gib=8.0,
            budgets={
                2: MemoryBudget(batch_size=12, values=85e6, min_batch_size=2),
                3: MemoryBudget(batch_size=2, values=560e6, min_batch_size=2),
            },
            encoder_blocks=(2,),
            decoder_blocks=2,
            max_data_fraction=0.05,
        ),
        _residual("resenc-m", 8.0, 135e6, 680e6),
        _residual("resenc-l", 24.0, 380e6, 2100e6),
        _residual("resenc-xl", 40.0, 560e6, 3600e6),
    )
}


def find_preset(name: str, memory_gib: float | None = None) -> Preset:
    """The preset of that name, for a GPU of that size or of the preset's own.

    Raises:
        PlanError: there is none.
    """
    if name not in PRESETS:
        raise PlanError(f"there is no preset '{name}'; {suggest(name, PRESETS)}")
    preset = PRESETS[name]
    return preset if memory_gib is None else preset.scaled(memory_gib)
