"""Left and right in the names of labels: what a class becomes in a mirror."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_ABBREVIATED = {"l": "left", "r": "right", "lh": "left", "rh": "right", "lt": "left", "rt": "right"}
_WRITTEN_OUT = {
    "left": (
        "left links linke linken linkem linker linkes gauche gauches izquierda izquierdas izquierdo izquierdos "
        "sinistra sinistre sinistri sinistro esquerda esquerdas esquerdo esquerdos sinister sinistrum 左"
    ),
    "right": (
        "right rechts rechte rechten rechtem rechter rechtes droit droite droites droits derecha derechas derecho "
        "derechos destra destre destri destro direita direitas direito direitos dexter dextra dextrum 右"
    ),
}
_SIDE_OF = _ABBREVIATED | {word: side for side, words in _WRITTEN_OUT.items() for word in words.split()}
"""In English, German, Dutch, French, Spanish, Italian, Portuguese, Latin, Chinese and Japanese."""

_OPPOSITE = {"left": "right", "right": "left"}

# Names that say nothing of a label, as tools give them that were told none.
_NAMELESS = re.compile(r"((label|class|structure|region|roi|object|value)[ _-]?)?\d+")

MIN_PREFIXED = 4
"""Letters of a word that may begin with that of its side; "LV" and "RV" are chambers of the heart."""

# Left and right chambers of the heart are organs of different shape: a mirrored left ventricle is no right ventricle.
_HEART = re.compile(
    r"heart|[ck]ard|^myo$|[aá]tri|herz|vorhof|hart|boezem|oreillette|c(œ|oe)ur|cuore|coraz|coraç|心|^房$"
)
_VENTRICLE = re.compile(r"ventr[ií][ck]|kamm?er")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What mirroring left and right does to the classes of a dataset.

    Attributes:
        opposite: for each class, the background included, the class that it becomes; a class without a side stays.
        unpaired: names that have a side but no counterpart that mirrors them, or that may have one, because they are
            numbers; where there are any, left and right must not be mirrored at all.
    """

    opposite: tuple[int, ...]
    unpaired: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether any class becomes another one."""
        return self.opposite != tuple(range(len(self.opposite)))


def find_sides(names: Sequence[str]) -> Sides:
    """Finds pairs such as "kidney_left" and "kidney_right", "Left-Hippocampus", "lung L", "caudateLeft", "lkidney".

    Args:
        names: of the foreground classes, in order.

    Returns:
        The sides. The left and right sides of a heart count as unpaired, and so do one side alone and several names
        that are numbers: a network that learns from mirrored kidneys which of them is label 1 learns neither.
    """
    words = _part_prefixes([_split(name) for name in names])
    has_heart = any(_is_of_heart(of_name) or _is_bare_ventricle(of_name) for of_name in words)
    sided = [tuple(_SIDE_OF.get(word, word) for word in of_name) for of_name in words]
    classes = {of_name: number for number, of_name in enumerate(sided, start=1)}
    opposite = list(range(len(names) + 1))
    nameless = [name for name in names if is_nameless(name)]
    unpaired = nameless if len(nameless) > 1 else []
    for number, (of_name, with_side) in enumerate(zip(words, sided, strict=True), start=1):
        mirrored = tuple(_OPPOSITE.get(word, word) for word in with_side)
        if mirrored == with_side:
            continue
        if sided.count(with_side) > 1 or sided.count(mirrored) > 1:
            # "kidney l" and "kidney left": which of them mirrors "kidney r" is not known.
            unpaired.append(names[number - 1])
        elif mirrored in classes and not (has_heart and _is_chamber(of_name)):
            opposite[number] = classes[mirrored]
        elif _is_written_out(of_name) or mirrored in classes:
            unpaired.append(names[number - 1])
    return Sides(opposite=tuple(opposite), unpaired=tuple(unpaired))


def is_nameless(name: str) -> bool:
    """Whether it says nothing of the label, such as "2" or "label 2"."""
    return _NAMELESS.fullmatch(name.lower()) is not None


def _split(name: str) -> tuple[str, ...]:
    """Words in lower case: parted by what is no letter, where a capital follows a small letter, and at 左 and 右."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?=[左右])|(?<=[左右])", " ", name)
    return tuple(re.findall(r"[^\W\d_]+|\d+", parted.lower()))


def _part_prefixes(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Parts "lkidney" into l and kidney where there is "rkidney"; else the l belongs to the word, as in "liver"."""
    known = {word for of_name in names for word in of_name}

    def part(word: str) -> tuple[str, ...]:
        has_side = len(word) >= MIN_PREFIXED and word[0] in "lr" and {"l": "r", "r": "l"}[word[0]] + word[1:] in known
        return (word[0], word[1:]) if has_side else (word,)

    return [tuple(itertools.chain.from_iterable(map(part, of_name))) for of_name in names]


def _is_of_heart(words: tuple[str, ...]) -> bool:
    return any(_HEART.search(word) for word in words)


def _is_chamber(words: tuple[str, ...]) -> bool:
    return _is_of_heart(words) or any(_VENTRICLE.match(word) for word in words)


def _is_bare_ventricle(words: tuple[str, ...]) -> bool:
    """Those of the brain are called lateral."""
    is_ventricle = [_VENTRICLE.match(word) is not None for word in words]
    return len(words) == 2 and any(is_ventricle) and any(word in _SIDE_OF for word in words)


def _is_written_out(words: tuple[str, ...]) -> bool:
    """A lone "r" or "l" may stand for anything."""
    return any(word in _SIDE_OF and word not in _ABBREVIATED for word in words)
