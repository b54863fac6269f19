"""Fingerprints of datasets that are nowhere."""

from __future__ import annotations

from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint

CT = ChannelFingerprint(
    name="CT",
    mean=80.0,
    std=200.0,
    minimum=-1024.0,
    maximum=30000.0,
    median=50.0,
    percentile_00_5=-900.0,
    percentile_99_5=1000.0,
)
"""With a piece of metal in a scan."""

Scan = tuple[tuple[int, int, int], tuple[float, float, float]]
"""Shape and spacing in millimetres."""


def make_channel_fingerprint(name: str = "CT") -> ChannelFingerprint:
    """For tests to which intensities do not matter."""
    return ChannelFingerprint(
        name=name, mean=1.0, std=1.0, minimum=0.0, maximum=2.0, median=1.0, percentile_00_5=0.0, percentile_99_5=2.0
    )


def make_fingerprint(
    *scans: Scan,
    channels: tuple[ChannelFingerprint, ...] = (make_channel_fingerprint(),),
    label_volumes_ml: tuple[float, ...] = (1.0,),
) -> Fingerprint:
    """A case for each scan, with nothing to crop and the same volumes of labels."""
    cases = tuple(
        CaseFingerprint(
            case=f"c{index}",
            shape=shape,
            spacing_mm=spacing_mm,
            cropped_shape=shape,
            label_volumes_ml=label_volumes_ml,
        )
        for index, (shape, spacing_mm) in enumerate(scans)
    )
    return Fingerprint(cases=cases, channels=channels, median_cropped_fraction=1.0)
