"""Cases of one patient, or of one object, where the names of a public dataset tell them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from autoseg.data.dataset import Case

logger = logging.getLogger(__name__)

_NAMES = (
    # The Carvana challenge has 16 photographs of each car: 00087a6bd4dc_01.jpg to 00087a6bd4dc_16.jpg.
    re.compile(r"([0-9a-f]{12})_(?:0[1-9]|1[0-6])"),
    # Hearts at the end of filling and of beating: patient001_frame01 and patient001_frame12 of ACDC, A1D0Q7_ED and
    # A1D0Q7_ES of others.
    re.compile(r"(patient\d+)_frame\d+"),
    re.compile(r"(.+)_(?:ED|ES)"),
)


def group_by_name(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases of a dataset in groups, where all of them have names by which one of the known datasets groups its own.

    Those whose layout has grouped them already stay as they are.
    """
    if any(case.group != case.id for case in cases):
        return tuple(cases)
    for pattern in _NAMES:
        groups = [match[1] for case in cases if (match := pattern.fullmatch(case.id))]
        n_groups = len(set(groups))
        if len(groups) == len(cases) and n_groups < len(cases):
            logger.info("%d cases are of %d patients by their names, whose folds they share", len(cases), n_groups)
            return tuple(replace(case, group=group) for case, group in zip(cases, groups, strict=True))
    return tuple(cases)
