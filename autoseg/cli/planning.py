"""`autoseg plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import DEFAULT_WORK, Work, say, say_json, work_option
from autoseg.core.errors import AutosegError

commands = typer.Typer()

Fix = Annotated[
    bool,
    typer.Option(
        "--fix",
        help="Mend what is safe, in memory and never in your files: channels on another grid than the first, label "
        "values near whole numbers, masks of 0 and 255, also with grey borders, voxels that are NaN.",
    ),
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Read files that a manifest names outside of its folder.")
]


@commands.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="A folder or manifest; the layout is recognised.")],
    work: Work = DEFAULT_WORK,
    fix: Fix = False,
    test_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Images that must not be among those to train on; default: imagesTs beside them."
        ),
    ] = None,
    allow_outside: AllowOutside = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
) -> None:
    """Look for everything that is wrong with a dataset. The exit code is 0 where a plan can be made of it, otherwise 2.

    What is found is kept in check.json of the work folder too; 'autoseg plan' does not check again what had no error.
    """
    from autoseg import pipeline
    from autoseg.core.errors import ERROR
    from autoseg.reporting.text import describe_check

    result = pipeline.check(dataset, work, fix=fix, test_folder=test_images, allow_outside=allow_outside)
    if as_json:
        say_json(result)
    else:
        say(describe_check(result))
    if result.count(ERROR):
        raise typer.Exit(AutosegError.exit_code)


@commands.command()
def plan(
    dataset: Annotated[
        Path | None,
        typer.Argument(help="A folder or manifest; the layout is recognised.", show_default=False),
    ] = None,
    work: Work = DEFAULT_WORK,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--configurations",
            "--configuration",
            help="Plan and preprocess only these, such as 2d,3d_fullres, or all. By default all that make sense are "
            "planned, and the cases are preprocessed for the one that this machine trains, where that is certain.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="unet, resenc-m, resenc-l or resenc-xl (residual encoder).")] = "unet",
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of the GPU to plan for; default: the preset's 8, 8, 24 or 40."),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(metavar="MM", help="Target spacing (z, y, x) such as 3,0.8,0.8, or one number for all axes."),
    ] = None,
    patch_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VOXELS",
            help="64,192,192 for 3d_fullres, 512,512 for 2d, 3d_lowres=96,96,96 for another; through-plane axis first.",
        ),
    ] = None,
    batch_size: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Patches per step: 4 for every configuration, 2d=12 for one."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Take spacing, patch and network from plans/NAME.json or another plan.json."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Folds of the cross-validation; default: 5.")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="BY",
            help="Keep the cases of a patient in one fold: column:NAME of the manifest, a CSV file with the columns "
            "case and group, or an expression for case names such as '(.+)_slice\\d+'.",
        ),
    ] = None,
    stratify: Annotated[
        str | None,
        typer.Option(
            metavar="BY",
            help="As many cases of each value in every fold: a column of the manifest, or a CSV file with the columns "
            "case and value.",
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One fold that validates on these cases: one name per line, or a CSV file."),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Folds from nnU-Net's splits_final.json or a work folder's splits.json."),
    ] = None,
    fix: Fix = False,
    allow_outside: AllowOutside = False,
    preprocess: Annotated[bool, typer.Option(help="Preprocess the cases now.")] = True,
    explain: Annotated[bool, typer.Option("--explain", help="Print the reason of every decision.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
    fingerprint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan without images, from autoseg's or nnU-Net's fingerprint."),
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --fingerprint: channels and labels; default: dataset.json beside it."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run training steps on the GPU for peak memory and the largest batch.")
    ] = False,
    device: Annotated[str, typer.Option(help="With --measure: the GPU to measure on, as in cuda:1.")] = "auto",
) -> None:
    """Check a dataset, look at its scans, decide how to segment them, and preprocess them.

    Without DATASET, --explain, --json and --measure are about the plan in the work folder.
    """
    from autoseg import pipeline
    from autoseg.data.splits import DEFAULT_N_FOLDS, SplitChoices
    from autoseg.planning.choices import Choices, parse_choices, split_names
    from autoseg.planning.estimates import estimate
    from autoseg.reporting.text import describe_plan, explain_plan

    choices = parse_choices(
        preset=preset,
        gpu_memory_gib=gpu_memory,
        configurations=configurations or (),
        spacing=spacing,
        patch_sizes=patch_size or (),
        batch_sizes=batch_size or (),
    )
    split_choices = SplitChoices(groups=groups, stratify=stratify, validation=validation, splits=splits)
    if measure:
        pipeline.require_gpu(device)
    workspace = pipeline.Workspace(root=work)
    if fingerprint is not None:
        if dataset is not None or measure:
            raise AutosegError("--fingerprint plans without images: leave out DATASET and --measure")
        if split_choices != SplitChoices():
            raise AutosegError(
                "--fingerprint knows no cases: leave out --groups, --stratify, --validation and --splits"
            )
        made, seen = pipeline.plan_from_fingerprint(
            fingerprint,
            _find_dataset_json(fingerprint, dataset_json),
            choices=choices,
            like=like,
            n_folds=folds or DEFAULT_N_FOLDS,
        )
    elif dataset_json is not None:
        raise AutosegError("--dataset-json belongs to --fingerprint, which is missing")
    elif dataset is not None:
        made = pipeline.plan(
            dataset,
            work,
            choices=choices,
            like=like,
            n_folds=folds,
            splits=split_choices,
            fix=fix,
            allow_outside=allow_outside,
            preprocess="none" if not preprocess else "all" if "all" in split_names(configurations or ()) else "chosen",
            measure_on=device if measure else None,
        )
        seen = workspace.read_fingerprint()
    else:
        if not (explain or as_json or measure):
            raise AutosegError("name the dataset to plan for, or a --fingerprint; 'autoseg plan --help' tells more")
        others = (like, folds, *dataclasses.astuple(split_choices))
        if dataclasses.replace(choices, configurations=None) != Choices() or any(other is not None for other in others):
            raise AutosegError(
                "without DATASET the plan stays as it is; name it, or leave out the options that change the plan"
            )
        made = workspace.read_plan()
        if measure:
            made = pipeline.measure(work, configurations=choices.configurations, device=device)
        seen = workspace.read_fingerprint()
    if as_json:
        say_json(made)
        return
    say(explain_plan(made, estimate(seen, made)) if explain else describe_plan(made))
    if fingerprint is None:
        say(f"\nThe plan with all reasons: {workspace.plan_file}, and as a page: {workspace.plan_page}")
        folds_to_train = f"0..{made.n_folds - 1}" if made.n_folds > 1 else "0"
        say(f"Next: autoseg train --fold {folds_to_train}{work_option(work)}")


def _find_dataset_json(fingerprint: Path, named: Path | None) -> Path:
    """The file that names channels and labels: as the user says, or beside the fingerprint."""
    if not fingerprint.is_file():
        raise AutosegError(f"{fingerprint}: no such file")
    file = named or fingerprint.with_name("dataset.json")
    if named is None and not file.is_file():
        raise AutosegError(f"{file}: no such file; name the channels and labels with --dataset-json")
    return file
