"""Presets: which network to plan, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.core.errors import PlanError
from autoseg.planning.plan import NetworkPlan
from autoseg.planning.topology import Topology

BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
"""By number of spatial axes."""

TRAINABLE_CONFIGURATIONS = ("2d", "3d_fullres")
TRAINABLE_ARCHITECTURES = ("unet",)
"""What the rest of the package can train so far; the planner itself knows more."""


@dataclass(frozen=True, kw_only=True)
class Budget:
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
    def max_values_per_patch(self) -> float:
        """What one patch may take so that `min_batch_size` of them fit."""
        return self.values * self.batch_size / self.min_batch_size


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
    budgets: dict[int, Budget]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: int
    max_data_fraction: float

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
            2: Budget(batch_size=12, values=values_2d, min_batch_size=12),
            3: Budget(batch_size=2, values=values_3d, min_batch_size=2),
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
            memory_gib=8,
            budgets={
                2: Budget(batch_size=12, values=85e6, min_batch_size=2),
                3: Budget(batch_size=2, values=560e6, min_batch_size=2),
            },
            encoder_blocks=(2,),
            decoder_blocks=2,
            max_data_fraction=0.05,
        ),
        _residual("resenc_m", 8, 135e6, 680e6),
        _residual("resenc_l", 24, 380e6, 2100e6),
        _residual("resenc_xl", 40, 560e6, 3600e6),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        PlanError: there is none, or the package cannot train it yet.
    """
    ready = [preset.name for preset in PRESETS.values() if preset.architecture in TRAINABLE_ARCHITECTURES]
    if name not in ready:
        state = "cannot be trained yet" if name in PRESETS else "does not exist"
        raise PlanError(f"preset '{name}' {state}; choose one of {', '.join(ready)}")
    return PRESETS[name]
