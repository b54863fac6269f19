"""Left and right in the names of labels."""

from __future__ import annotations

import pytest

from autoseg.core.sides import find_sides


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("kidney_left", "kidney_right"),
        ("Left-Hippocampus", "Right-Hippocampus"),
        ("left lung", "right lung"),
        ("lung_L", "lung_R"),
        ("caudateLeft", "caudateRight"),
        ("ctx-lh-1", "ctx-rh-1"),
        ("rib_left_10", "rib_right_10"),
        ("LEFT EYE", "right eye"),
        ("lkidney", "rkidney"),
        ("LHippocampus_1", "RHippocampus_1"),
        ("kidney lt", "kidney rt"),
        ("Niere links", "Niere rechts"),
        ("linker Lungenflügel", "rechter Lungenflügel"),
        ("rein gauche", "rein droit"),
        ("oreille gauche", "oreille droite"),
        ("riñón izquierdo", "riñón derecho"),
        ("Niere der linken Seite", "Niere der rechten Seite"),
        ("Ren sinister", "Ren dexter"),
        ("Seitenventrikel links", "Seitenventrikel rechts"),
        ("左肾", "右肾"),
        ("左乳房", "右乳房"),
    ],
)
def test_pairs_become_each_other(left: str, right: str) -> None:
    sides = find_sides(("liver", left, "spine", right))
    assert sides.opposite == (0, 1, 4, 3, 2)
    assert sides.has_pairs
    assert sides.unpaired == ()


@pytest.mark.parametrize(
    "names",
    [("liver", "tumour"), ("LV", "RV", "myo"), ("cleft", "bright"), ("vertebrae_L1", "l"), ("label 1", "tumour")],
)
def test_names_without_a_side_stay(names: tuple[str, ...]) -> None:
    sides = find_sides(names)
    assert not sides.has_pairs
    assert sides.unpaired == ()


def test_several_numbers_may_have_sides() -> None:
    assert find_sides(("1", "label 2", "liver")).unpaired == ("1", "label 2")


def test_names_that_mean_the_same_have_no_mirror_image() -> None:
    names = ("kidney l", "kidney r", "kidney left", "kidney right", "lung left", "lung right")
    sides = find_sides(names)
    assert sides.opposite == (0, 1, 2, 3, 4, 6, 5)
    assert sides.unpaired == names[:4]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("ventricule gauche", "ventricule droit"),
        ("linker Ventrikel", "rechter Ventrikel"),
        ("linker Vorhof", "rechter Vorhof"),
        ("linke Herzkammer", "rechte Herzkammer"),
        ("ventrículo izquierdo", "ventrículo derecho"),
        ("atrio sinistro", "atrio destro"),
        ("oreillette gauche", "oreillette droite"),
        ("左心室", "右心室"),
        ("左房", "右房"),
    ],
)
def test_chambers_of_the_heart_in_other_languages(left: str, right: str) -> None:
    sides = find_sides((left, right))
    assert not sides.has_pairs
    assert sides.unpaired == (left, right)


def test_one_side_alone_has_no_mirror_image() -> None:
    sides = find_sides(("lung_upper_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right"))
    assert sides.opposite == (0, 2, 1, 3)
    assert sides.unpaired == ("lung_middle_lobe_right",)


def test_sides_of_the_heart_are_different_organs() -> None:
    heart = find_sides(("heart_atrium_left", "heart_atrium_right", "kidney_left", "kidney_right"))
    assert heart.opposite == (0, 1, 2, 4, 3)
    assert heart.unpaired == ("heart_atrium_left", "heart_atrium_right")
    assert find_sides(("left ventricle", "right ventricle", "myocardium")).unpaired == (
        "left ventricle",
        "right ventricle",
    )
    assert find_sides(("LVentricle", "RVentricle", "Myo")).unpaired == ("LVentricle", "RVentricle")
    # Those of the brain are alike.
    assert find_sides(("lateral ventricle left", "lateral ventricle right")).opposite == (0, 2, 1)
