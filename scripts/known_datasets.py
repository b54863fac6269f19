"""Published facts about well-known public segmentation datasets, from which ready-made plans can be made.

Nothing here was measured: every figure comes from the sources named with it, and what no source gives is estimated,
which the note of the dataset says. All triples are in (z, y, x) order; 2D images have z = 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """How a quantity is spread over the cases of a dataset.

    Attributes:
        low: the smallest.
        median: the typical one.
        high: the largest.
    """

    low: float
    median: float
    high: float


Spreads = tuple[Spread, Spread, Spread]


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """Intensities of one channel over the foreground voxels of all cases, in the image's own unit (HU for CT).

    Attributes:
        mean, std, percentile_00_5, percentile_99_5: what CT normalisation needs.
        minimum, maximum, median: None where not published.
    """

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    minimum: float | None = None
    maximum: float | None = None
    median: float | None = None


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """What the scans of one public dataset are like.

    Attributes:
        name: for the names of files.
        title: for people.
        source: paper of the dataset, then where the statistics are from.
        n_cases: labelled training cases.
        channels: names, in order.
        labels: name to value in the label maps, without background.
        spacing_mm: of a voxel, per axis.
        shape: of the whole image in voxels, per axis.
        cropped_shape: of the box of the non-zero voxels; None where cropping removes nothing from the median case.
        cropped_fraction: median over cases of cropped volume / volume.
        intensities: per channel, or None where not published.
        note: which figures are published and which are estimated.
    """

    name: str
    title: str
    source: str
    n_cases: int
    channels: tuple[str, ...]
    labels: dict[str, int]
    spacing_mm: Spreads
    shape: Spreads
    cropped_shape: Spreads | None = None
    cropped_fraction: float = 1.0
    intensities: tuple[Intensities, ...] | None
    note: str


def _always(value: float) -> Spread:
    """The same in every case."""
    return Spread(value, value, value)


_MSD = (
    "Antonelli et al. 2022, The Medical Segmentation Decathlon, doi:10.1038/s41467-022-30695-9; "
    "Simpson et al. 2019, arXiv:1902.09063; medians and intensities: nnU-Net plans in github.com/automl/AutoNNUnet; "
    "ranges: github.com/openmedlab/Awesome-Medical-Dataset"
)
_CATALOGUE = "ranges: github.com/openmedlab/Awesome-Medical-Dataset"
_MSD_CT_NOTE = (
    "All published: medians and intensities from nnU-Net's plans of the training set, ranges from the catalogue, "
    "rounded to 0.01 mm there; that cropping removes nothing follows from the median shape after cropping."
)
_BRAIN_MM: Spreads = (_always(1.0), _always(1.0), _always(1.0))
_BRAIN_SHAPE: Spreads = (_always(155), _always(240), _always(240))
_PIXELS: Spreads = (_always(1.0), _always(1.0), _always(1.0))
_KITS19_INTENSITIES = Intensities(mean=100.93, std=76.9, percentile_00_5=-79.0, percentile_99_5=304.0)

_TOTALSEGMENTATOR_CLASSES = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
    "esophagus",
    "trachea",
    "thyroid_gland",
    "small_bowel",
    "duodenum",
    "colon",
    "urinary_bladder",
    "prostate",
    "kidney_cyst_left",
    "kidney_cyst_right",
    "sacrum",
    "vertebrae_S1",
    *(f"vertebrae_L{number}" for number in range(5, 0, -1)),
    *(f"vertebrae_T{number}" for number in range(12, 0, -1)),
    *(f"vertebrae_C{number}" for number in range(7, 0, -1)),
    "heart",
    "aorta",
    "pulmonary_vein",
    "brachiocephalic_trunk",
    "subclavian_artery_right",
    "subclavian_artery_left",
    "common_carotid_artery_right",
    "common_carotid_artery_left",
    "brachiocephalic_vein_left",
    "brachiocephalic_vein_right",
    "atrial_appendage_left",
    "superior_vena_cava",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "iliac_artery_left",
    "iliac_artery_right",
    "iliac_vena_left",
    "iliac_vena_right",
    "humerus_left",
    "humerus_right",
    "scapula_left",
    "scapula_right",
    "clavicula_left",
    "clavicula_right",
    "femur_left",
    "femur_right",
    "hip_left",
    "hip_right",
    "spinal_cord",
    "gluteus_maximus_left",
    "gluteus_maximus_right",
    "gluteus_medius_left",
    "gluteus_medius_right",
    "gluteus_minimus_left",
    "gluteus_minimus_right",
    "autochthon_left",
    "autochthon_right",
    "iliopsoas_left",
    "iliopsoas_right",
    "brain",
    "skull",
    *(f"rib_left_{number}" for number in range(1, 13)),
    *(f"rib_right_{number}" for number in range(1, 13)),
    "sternum",
    "costal_cartilages",
)

KNOWN_DATASETS: tuple[KnownDataset, ...] = (
    KnownDataset(
        name="msd_brain_tumour",
        title="MSD Task01 Brain Tumour",
        source=_MSD,
        n_cases=484,
        channels=("FLAIR", "T1w", "T1gd", "T2w"),
        labels={"edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3},
        spacing_mm=_BRAIN_MM,
        shape=_BRAIN_SHAPE,
        cropped_shape=(Spread(120, 138, 150), Spread(140, 169, 190), Spread(115, 138, 160)),
        cropped_fraction=0.36,
        intensities=(
            Intensities(
                mean=728.867,
                std=354.562,
                minimum=0.0,
                maximum=5721.0,
                median=779.0,
                percentile_00_5=104.0,
                percentile_99_5=1733.0,
            ),
            Intensities(
                mean=621.561,
                std=335.946,
                minimum=0.0,
                maximum=8761.0,
                median=644.0,
                percentile_00_5=56.0,
                percentile_99_5=2421.0,
            ),
            Intensities(
                mean=662.555,
                std=420.274,
                minimum=0.0,
                maximum=9012.0,
                median=639.0,
                percentile_00_5=44.0,
                percentile_99_5=2963.0,
            ),
            Intensities(
                mean=664.289,
                std=318.490,
                minimum=0.0,
                maximum=3346.0,
                median=647.0,
                percentile_00_5=103.0,
                percentile_99_5=1997.0,
            ),
        ),
        note=(
            "Spacing, whole shape, median cropped shape and intensities published; the range of the cropped shape is "
            "estimated, and the cropped fraction is the ratio of the published median shapes."
        ),
    ),
    KnownDataset(
        name="msd_heart",
        title="MSD Task02 Heart (left atrium)",
        source=_MSD,
        n_cases=20,
        channels=("MRI",),
        labels={"left atrium": 1},
        spacing_mm=(_always(1.37), _always(1.25), _always(1.25)),
        shape=(Spread(90, 115, 130), _always(320), _always(320)),
        cropped_shape=(Spread(90, 115, 130), _always(320), Spread(200, 232, 280)),
        cropped_fraction=0.725,
        intensities=(
            Intensities(
                mean=1090.215,
                std=165.174,
                minimum=165.0,
                maximum=1996.0,
                median=1097.0,
                percentile_00_5=598.0,
                percentile_99_5=1521.0,
            ),
        ),
        note=(
            "Spacing, whole shape, median cropped shape and intensities published; the range of the cropped width is "
            "estimated, and the cropped fraction is the ratio of the published median shapes."
        ),
    ),
    KnownDataset(
        name="msd_liver",
        title="MSD Task03 Liver (LiTS)",
        source=f"Bilic et al. 2023, The Liver Tumor Segmentation Benchmark, doi:10.1016/j.media.2022.102680; {_MSD}",
        n_cases=131,
        channels=("CT",),
        labels={"liver": 1, "cancer": 2},
        spacing_mm=(Spread(0.7, 1.0, 5.0), Spread(0.557, 0.768, 1.0), Spread(0.557, 0.768, 1.0)),
        shape=(Spread(74, 432, 987), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=99.480,
                std=37.138,
                minimum=-983.0,
                maximum=5420.0,
                median=101.0,
                percentile_00_5=-15.0,
                percentile_99_5=197.0,
            ),
        ),
        note=_MSD_CT_NOTE,
    ),
    KnownDataset(
        name="msd_hippocampus",
        title="MSD Task04 Hippocampus",
        source=_MSD,
        n_cases=260,
        channels=("MRI",),
        labels={"Anterior": 1, "Posterior": 2},
        spacing_mm=(_always(1.0), _always(1.0), _always(1.0)),
        shape=(Spread(24, 36, 47), Spread(40, 50, 59), Spread(31, 35, 43)),
        intensities=(
            Intensities(
                mean=22360.326,
                std=60656.133,
                minimum=0.0,
                maximum=486420.219,
                median=362.883,
                percentile_00_5=28.0,
                percentile_99_5=277682.031,
            ),
        ),
        note=(
            "All published: medians and intensities from nnU-Net's plans of the training set, ranges from the "
            "catalogue; the images are crops around the hippocampus, with very different intensity scales."
        ),
    ),
    KnownDataset(
        name="msd_prostate",
        title="MSD Task05 Prostate",
        source=_MSD,
        n_cases=32,
        channels=("T2", "ADC"),
        labels={"PZ": 1, "TZ": 2},
        spacing_mm=(Spread(3.0, 3.6, 4.0), Spread(0.6, 0.625, 0.75), Spread(0.6, 0.625, 0.75)),
        shape=(Spread(11, 20, 24), Spread(256, 320, 384), Spread(256, 320, 384)),
        intensities=(
            Intensities(
                mean=350.188,
                std=139.956,
                minimum=0.0,
                maximum=1326.0,
                median=327.0,
                percentile_00_5=83.0,
                percentile_99_5=822.0,
            ),
            Intensities(
                mean=1351.108,
                std=376.433,
                minimum=0.0,
                maximum=3698.0,
                median=1364.0,
                percentile_00_5=0.0,
                percentile_99_5=2563.0,
            ),
        ),
        note=(
            "All published: medians and intensities from nnU-Net's plans of the training set, ranges from the "
            "catalogue; that cropping removes nothing follows from the median shape after cropping."
        ),
    ),
    KnownDataset(
        name="msd_lung",
        title="MSD Task06 Lung",
        source=_MSD,
        n_cases=63,
        channels=("CT",),
        labels={"cancer": 1},
        spacing_mm=(Spread(0.63, 1.245, 2.5), Spread(0.6, 0.785, 0.98), Spread(0.6, 0.785, 0.98)),
        shape=(Spread(112, 252, 636), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=-273.460,
                std=346.950,
                minimum=-1024.0,
                maximum=2671.0,
                median=-162.0,
                percentile_00_5=-1024.0,
                percentile_99_5=311.0,
            ),
        ),
        note=_MSD_CT_NOTE,
    ),
    KnownDataset(
        name="msd_pancreas",
        title="MSD Task07 Pancreas",
        source=_MSD,
        n_cases=281,
        channels=("CT",),
        labels={"pancreas": 1, "cancer": 2},
        spacing_mm=(Spread(0.7, 2.5, 7.5), Spread(0.61, 0.803, 0.98), Spread(0.61, 0.803, 0.98)),
        shape=(Spread(37, 93, 751), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=80.365,
                std=72.708,
                minimum=-998.0,
                maximum=3071.0,
                median=86.0,
                percentile_00_5=-92.0,
                percentile_99_5=217.0,
            ),
        ),
        note=_MSD_CT_NOTE,
    ),
    KnownDataset(
        name="msd_hepatic_vessel",
        title="MSD Task08 Hepatic Vessel",
        source=_MSD,
        n_cases=303,
        channels=("CT",),
        labels={"Vessel": 1, "Tumour": 2},
        spacing_mm=(Spread(0.8, 5.0, 8.0), Spread(0.57, 0.799, 0.97), Spread(0.57, 0.799, 0.97)),
        shape=(Spread(24, 49, 181), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=128.670,
                std=54.577,
                minimum=-726.0,
                maximum=3072.0,
                median=129.0,
                percentile_00_5=8.0,
                percentile_99_5=268.0,
            ),
        ),
        note=f"{_MSD_CT_NOTE} The 10th percentile of the spacing along z is 1.5 mm.",
    ),
    KnownDataset(
        name="msd_spleen",
        title="MSD Task09 Spleen",
        source=_MSD,
        n_cases=41,
        channels=("CT",),
        labels={"spleen": 1},
        spacing_mm=(Spread(1.5, 5.0, 8.0), Spread(0.61, 0.793, 0.98), Spread(0.61, 0.793, 0.98)),
        shape=(Spread(31, 90, 168), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=93.193,
                std=40.784,
                minimum=-620.0,
                maximum=1038.0,
                median=97.0,
                percentile_00_5=-42.0,
                percentile_99_5=176.0,
            ),
        ),
        note=f"{_MSD_CT_NOTE} The 10th percentile of the spacing along z is 1.6 mm.",
    ),
    KnownDataset(
        name="msd_colon",
        title="MSD Task10 Colon",
        source=_MSD,
        n_cases=126,
        channels=("CT",),
        labels={"colon cancer primaries": 1},
        spacing_mm=(Spread(1.3, 5.0, 7.5), Spread(0.54, 0.781, 0.98), Spread(0.54, 0.781, 0.98)),
        shape=(Spread(37, 95, 729), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=67.201,
                std=37.132,
                minimum=-848.0,
                maximum=445.0,
                median=67.0,
                percentile_00_5=-40.0,
                percentile_99_5=188.0,
            ),
        ),
        note=f"{_MSD_CT_NOTE} The 10th percentile of the spacing along z is 3 mm.",
    ),
    KnownDataset(
        name="brats2021",
        title="BraTS 2021 (RSNA-ASNR-MICCAI)",
        source=(
            "Baid et al. 2021, arXiv:2107.02314; median shape after cropping: nnU-Net plans of 938 of the cases, "
            f"printed in a public preprocessing script; {_CATALOGUE}"
        ),
        n_cases=1251,
        channels=("T1", "T1ce", "T2", "FLAIR"),
        labels={"necrotic tumor core": 1, "peritumoral edema": 2, "enhancing tumor": 4},
        spacing_mm=_BRAIN_MM,
        shape=_BRAIN_SHAPE,
        cropped_shape=(Spread(120, 140, 150), Spread(140, 171, 195), Spread(115, 137, 160)),
        cropped_fraction=0.367,
        intensities=None,
        note=(
            "Spacing and whole shape published; median cropped shape published for 938 cases only; the range of the "
            "cropped shape is estimated, the cropped fraction is the ratio of the median shapes, and intensities are "
            "not published."
        ),
    ),
    KnownDataset(
        name="acdc",
        title="ACDC (cine MR of the heart)",
        source=f"Bernard et al. 2018, doi:10.1109/TMI.2018.2837502; {_CATALOGUE}",
        n_cases=200,
        channels=("cine MRI",),
        labels={"RV": 1, "MYO": 2, "LV": 3},
        spacing_mm=(Spread(5.0, 10.0, 10.0), Spread(0.7, 1.52, 1.95), Spread(0.7, 1.52, 1.95)),
        shape=(Spread(6, 9, 21), Spread(154, 256, 512), Spread(154, 216, 428)),
        intensities=None,
        note=(
            "Medians and ranges published, but over the 300 frames of all 150 patients, of whom 100 (two frames each) "
            "are for training; the cropped fraction is estimated, and intensities are not published."
        ),
    ),
    KnownDataset(
        name="kits19",
        title="KiTS19 (kidney tumours)",
        source=(
            "Heller et al. 2021, doi:10.1016/j.media.2020.101821; intensities: Isensee and Maier-Hein 2019, "
            f"arXiv:1908.02182; {_CATALOGUE}"
        ),
        n_cases=210,
        channels=("CT",),
        labels={"kidney": 1, "tumor": 2},
        spacing_mm=(Spread(0.5, 3.0, 5.0), Spread(0.44, 0.78, 1.04), Spread(0.44, 0.78, 1.04)),
        shape=(Spread(29, 109, 1059), _always(512), Spread(512, 512, 796)),
        intensities=(_KITS19_INTENSITIES,),
        note=(
            "Medians, ranges and the four intensity statistics published, the ranges possibly over all 300 cases; "
            "minimum, maximum and median intensity are not published; the cropped fraction is estimated."
        ),
    ),
    KnownDataset(
        name="kits23",
        title="KiTS23 (kidney tumours and cysts)",
        source=(
            "Heller et al. 2023, arXiv:2307.01984, and kits-challenge.org/kits23; intensities: those of KiTS19, "
            f"Isensee and Maier-Hein 2019, arXiv:1908.02182; {_CATALOGUE}"
        ),
        n_cases=489,
        channels=("CT",),
        labels={"kidney": 1, "tumor": 2, "cyst": 3},
        spacing_mm=(Spread(0.5, 3.0, 5.0), Spread(0.393, 0.781, 1.041), Spread(0.393, 0.781, 1.041)),
        shape=(Spread(29, 104, 1059), _always(512), Spread(512, 512, 796)),
        intensities=(_KITS19_INTENSITIES,),
        note=(
            "Medians and ranges published; the intensities are an estimate, borrowed from KiTS19, whose scans are "
            "part of this dataset but without the cysts and the later contrast phase; the cropped fraction is "
            "estimated."
        ),
    ),
    KnownDataset(
        name="amos22_ct",
        title="AMOS22 task 1 (abdominal organs, CT)",
        source=(
            "Ji et al. 2022, arXiv:2206.08023, whose appendix C.1 gives nnU-Net's clipping, mean and standard "
            f"deviation; {_CATALOGUE}"
        ),
        n_cases=200,
        channels=("CT",),
        labels={
            "spleen": 1,
            "right kidney": 2,
            "left kidney": 3,
            "gall bladder": 4,
            "esophagus": 5,
            "liver": 6,
            "stomach": 7,
            "aorta": 8,
            "postcava": 9,
            "pancreas": 10,
            "right adrenal gland": 11,
            "left adrenal gland": 12,
            "duodenum": 13,
            "bladder": 14,
            "prostate/uterus": 15,
        },
        spacing_mm=(Spread(1.25, 5.0, 5.0), Spread(0.45, 0.78, 1.07), Spread(0.45, 0.78, 1.07)),
        shape=(Spread(64, 100, 512), Spread(512, 512, 768), Spread(512, 512, 768)),
        intensities=(Intensities(mean=50.0, std=141.0, percentile_00_5=-991.0, percentile_99_5=362.0),),
        note=(
            "Medians and the four intensity statistics published; the published ranges cover MR as well, so the "
            "smallest z spacing, the largest in-plane spacing and the smallest in-plane size are estimated for CT, as "
            "is the cropped fraction; minimum, maximum and median intensity are not published."
        ),
    ),
    KnownDataset(
        name="btcv",
        title="BTCV / Synapse (abdominal organs)",
        source=(
            "Landman et al. 2015, doi:10.7303/syn3193805; intensities: nnU-Net's, as used by "
            f"github.com/yhygao/CBIM-Medical-Image-Segmentation; {_CATALOGUE}"
        ),
        n_cases=30,
        channels=("CT",),
        labels={
            "spleen": 1,
            "right kidney": 2,
            "left kidney": 3,
            "gallbladder": 4,
            "esophagus": 5,
            "liver": 6,
            "stomach": 7,
            "aorta": 8,
            "inferior vena cava": 9,
            "portal and splenic veins": 10,
            "pancreas": 11,
            "right adrenal gland": 12,
            "left adrenal gland": 13,
        },
        spacing_mm=(Spread(2.5, 3.0, 5.0), Spread(0.59, 0.76, 0.98), Spread(0.59, 0.76, 0.98)),
        shape=(Spread(85, 127, 198), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=82.92,
                std=136.97,
                percentile_00_5=-958.0,
                percentile_99_5=327.0,
                minimum=-1024.0,
                maximum=826.0,
            ),
        ),
        note=(
            "Medians, ranges and intensities published, minimum and maximum as the extremes of a table by organ; the "
            "median intensity is not published, and the cropped fraction is estimated."
        ),
    ),
    KnownDataset(
        name="flare22",
        title="FLARE22 (abdominal organs, the 50 labelled cases)",
        source=f"Ma et al. 2023, arXiv:2308.05862; intensities and {_CATALOGUE}",
        n_cases=50,
        channels=("CT",),
        labels={
            "liver": 1,
            "right kidney": 2,
            "spleen": 3,
            "pancreas": 4,
            "aorta": 5,
            "inferior vena cava": 6,
            "right adrenal gland": 7,
            "left adrenal gland": 8,
            "gallbladder": 9,
            "esophagus": 10,
            "stomach": 11,
            "duodenum": 12,
            "left kidney": 13,
        },
        spacing_mm=(Spread(2.5, 2.5, 5.0), Spread(0.64, 0.74, 0.77), Spread(0.64, 0.74, 0.77)),
        shape=(Spread(71, 97, 113), _always(512), _always(512)),
        intensities=(
            Intensities(
                mean=92.0,
                std=172.0,
                minimum=-1024.0,
                maximum=1204.0,
                median=123.0,
                percentile_00_5=-975.0,
                percentile_99_5=231.0,
            ),
        ),
        note=(
            "All published, in one catalogue only, whose ranges look narrower than those of the scans may be; the "
            "cropped fraction is estimated."
        ),
    ),
    KnownDataset(
        name="totalsegmentator_v2",
        title="TotalSegmentator v2 (117 structures, 1.5 mm)",
        source=(
            "Wasserthal et al. 2023, doi:10.1148/ryai.230024, and doi:10.5281/zenodo.6802613; classes: "
            f"github.com/wasserth/TotalSegmentator; {_CATALOGUE}"
        ),
        n_cases=1082,
        channels=("CT",),
        labels={name: value for value, name in enumerate(_TOTALSEGMENTATOR_CLASSES, start=1)},
        spacing_mm=(_always(1.5), _always(1.5), _always(1.5)),
        shape=(Spread(29, 231, 851), Spread(48, 231, 467), Spread(47, 241, 499)),
        intensities=(Intensities(mean=-50.4, std=503.4, percentile_00_5=-1004.0, percentile_99_5=1588.0),),
        note=(
            "Spacing, classes, median and range of the shape published, the shape over all 1228 cases; the percentiles "
            "are those of the official 3 mm model, mean and standard deviation belong to the same plans but were not "
            "checked against them; minimum, maximum and median intensity are not given; the cropped fraction is "
            "estimated."
        ),
    ),
    KnownDataset(
        name="drive",
        title="DRIVE (vessels of the retina, 2D colour)",
        source=f"Staal et al. 2004, doi:10.1109/TMI.2004.825627; {_CATALOGUE}",
        n_cases=20,
        channels=("R", "G", "B"),
        labels={"vessel": 1},
        spacing_mm=_PIXELS,
        shape=(_always(1), _always(584), _always(565)),
        intensities=None,
        note=(
            "The shape is published and the same for all images; there is no physical spacing, so it counts pixels; "
            "the cropped fraction is estimated (the dark surround is not exactly zero), and intensities are not "
            "published."
        ),
    ),
    KnownDataset(
        name="cvc_clinicdb",
        title="CVC-ClinicDB (polyps in colonoscopy, 2D colour)",
        source=f"Bernal et al. 2015, doi:10.1016/j.compmedimag.2015.02.007; {_CATALOGUE}",
        n_cases=612,
        channels=("R", "G", "B"),
        labels={"polyp": 1},
        spacing_mm=_PIXELS,
        shape=(_always(1), _always(288), _always(384)),
        intensities=None,
        note=(
            "The shape is published and the same for all images; there is no physical spacing, so it counts pixels; "
            "the cropped fraction is estimated, and intensities are not published."
        ),
    ),
)
