"""The command line: parse, call the pipeline, print."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from autoseg import __version__
from autoseg.core.errors import AutosegError

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="autoseg",
    help="Plans, trains and runs the best segmentation network for a folder of medical scans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Work = Annotated[Path, typer.Option("-w", "--work", help="The work folder.")]
Configuration = Annotated[
    str | None,
    typer.Option("-c", "--configuration", help="2d, 3d_fullres, cascade, ...; the recommended one by default."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
DEFAULT_WORK = Path("autoseg-work")
Folds = Annotated[str | None, typer.Option(help="0..4, 0,2, 3; default: all that are trained to their end.")]
# Of a model, whose folds are known only when it is loaded.
MAX_FOLDS = 1000


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and results.")] = False,
) -> None:
    del version
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    # What nibabel mends silently in a header, autoseg refuses in words of its own.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@app.command()
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
            help="Plan and preprocess only these, such as 2d,3d_fullres; or preprocess all. By default all that make "
            "sense are planned, and the cases are preprocessed for the recommended one.",
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
    fix: Annotated[
        bool, typer.Option("--fix", help="Resample channels that lie on another grid than the first; never your files.")
    ] = False,
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
    device: Device = "auto",
) -> None:
    """Check a dataset, look at its scans, decide how to segment them, and preprocess them.

    Without DATASET, --explain, --json and --measure are about the plan in the work folder.
    """
    from autoseg import pipeline
    from autoseg.core.serialize import dump_json
    from autoseg.data.splits import DEFAULT_N_FOLDS, SplitChoices
    from autoseg.planning.choices import Choices, parse_choices, split_names

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
        if not fingerprint.is_file():
            raise AutosegError(f"{fingerprint}: no such file")
        beside = dataset_json or fingerprint.with_name("dataset.json")
        if dataset_json is None and not beside.is_file():
            raise AutosegError(f"{beside}: no such file; name the channels and labels with --dataset-json")
        made, seen = pipeline.plan_from_fingerprint(
            fingerprint, beside, choices=choices, like=like, n_folds=folds or DEFAULT_N_FOLDS
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
        typer.echo(dump_json(made))
        return
    if explain:
        from autoseg.planning.estimates import estimate
        from autoseg.reporting.text import explain_plan

        typer.echo(explain_plan(made, estimate(seen, made)))
    else:
        from autoseg.reporting.text import describe_plan

        typer.echo(describe_plan(made))
    if fingerprint is None:
        typer.echo(f"\nThe plan with all reasons: {workspace.plan_file}, and as a page: {workspace.plan_page}")
        folds_to_train = f"0..{made.n_folds - 1}" if made.n_folds > 1 else "0"
        typer.echo(f"Next: autoseg train --fold {folds_to_train}{_work_option(work)}")


@app.command()
def train(
    fold: Annotated[str, typer.Option("--fold", help="0..4, 0,2, 3 or all.")] = "all",
    configuration: Configuration = None,
    work: Work = DEFAULT_WORK,
    epochs: Annotated[int | None, typer.Option(min=1, help="Budget: epochs of 250 steps.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Budget: training steps.")] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            help="Budget: training time of each fold, such as 15m, 1h30m or 90s; the validation comes on top."
        ),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, patches and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint where there is one.")] = True,
    recipe: Annotated[str, typer.Option(help="fast, or published (the schedule of the nnU-Net paper).")] = "fast",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Patches per step; default: the plan's, on a CPU at most 2.")
    ] = None,
    validate: Annotated[bool, typer.Option(help="Score each fold on whole volumes; after the last, select.")] = True,
    network: Annotated[
        str, typer.Option(help="auto: a short --max-time takes smaller patches and a narrower network; or planned.")
    ] = "auto",
    sampling: Annotated[
        str | None,
        typer.Option(
            help="published, or balanced: patches centred on each class of the dataset equally often; default: of the "
            "recipe."
        ),
    ] = None,
    augment: Annotated[
        str, typer.Option(help="torch; batchgenerators (the classic pipeline on the CPU, for comparison); or none.")
    ] = "torch",
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Mirror patches; default: in trainings that are long enough. Prediction then averages such copies.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto (the fastest that the device trains well in), float32, bfloat16 or float16.")
    ] = "auto",
    compile_network: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: in trainings of 15 minutes on a GPU."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only operations that repeat bit for bit; slower on a GPU.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="tensorboard: curves and sample slices for it, in the fold's folder."),
    ] = None,
    checkpoint_interval: Annotated[
        str, typer.Option(help="Save the state at the end of each epoch, and after this time at the latest.")
    ] = "10m",
    force: Annotated[
        bool, typer.Option("--force", help="With -c cascade: make one where the plan has found none necessary.")
    ] = False,
) -> None:
    """Train folds of the cross-validation and score each on its validation cases.

    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 save and stop with the exit codes 130, 143 and 138; the same command goes on
    from there. Whatever else ends the training loses what came after the last checkpoint.

    -c cascade trains all folds of the first stage before, where they are missing, each within the same budget.
    """
    from autoseg import pipeline
    from autoseg.data.splits import parse_folds
    from autoseg.reporting.text import describe_label_dice
    from autoseg.training.config import Budget, TrainConfig

    n_folds = len(pipeline.Workspace(root=work).read_splits().folds)
    if force:
        pipeline.force_cascade(work, configuration)
    budget = Budget.make(
        epochs=epochs, iterations=iterations, max_time_s=parse_duration(max_time) if max_time is not None else None
    )
    config = TrainConfig(
        budget=budget,
        recipe=recipe,
        batch_size=batch_size,
        seed=seed,
        network=network,
        sampling=sampling,
        augment=augment,
        mirror=mirror,
        precision=precision,
        compile=compile_network,
        deterministic=deterministic,
    )
    with _stop_on_signals() as stop:
        scores = pipeline.train(
            work,
            folds=parse_folds(fold, n_folds=n_folds),
            configuration=configuration,
            config=config,
            device=device,
            resume=resume,
            validate=validate,
            checkpoint_interval_s=parse_duration(checkpoint_interval),
            track_with=track or (),
            stop=stop,
        )
    for number, evaluation in scores.items():
        if evaluation is not None:
            typer.echo(f"\nFold {number}, {len(evaluation.cases)} validation cases")
            typer.echo(describe_label_dice(evaluation))
    typer.echo(f"\nNext: autoseg predict IN OUT{_work_option(work)}")


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IN...", help="A folder of images, or one or more images.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the label maps.", show_default=False)],
    work: Annotated[
        Path | None, typer.Option("-w", "--work", help="The work folder.", show_default=str(DEFAULT_WORK))
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="In place of -w: a file from 'autoseg export', or the folder of a trained configuration.",
        ),
    ] = None,
    configuration: Configuration = None,
    folds: Folds = None,
    device: Device = "auto",
    speed: Annotated[
        str,
        typer.Option(help="best; balanced: no mirrored copies; or fast: that, tiles further apart, and one fold."),
    ] = "best",
    mirroring: Annotated[
        bool | None,
        typer.Option("--mirroring/--no-mirroring", help="Average over mirrored copies; default: if trained on such."),
    ] = None,
    step: Annotated[
        float | None,
        typer.Option(min=0.05, max=1.0, help="Distance of tiles, as a fraction of the patch; default: 0.5."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--continue", help="Segment all images, or those without a label map only.")
    ] = True,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="2/8: the second of eight parts of the images, for eight processes.")
    ] = "1/1",
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write a map of each label's probability.")
    ] = False,
    save_uncertainty: Annotated[
        bool, typer.Option("--save-uncertainty", help="Also write maps of the entropy and the folds' disagreement.")
    ] = False,
    max_ram: Annotated[
        float | None, typer.Option(metavar="GIB", help="Refuse images that need more memory; default: the machine's.")
    ] = None,
    max_vram: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="GPU memory for sums over tiles; default: half of what is free."),
    ] = None,
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="torch.compile, which takes a minute or more; for many images on a GPU.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Resample channels that lie on another grid than the first.")
    ] = False,
    postprocessing: Annotated[
        bool,
        typer.Option("--postprocessing/--no-postprocessing", help="Steps that cross-validation found to help."),
    ] = True,
) -> None:
    """Segment every image of a folder; the label maps have the images' own geometry."""
    from autoseg import pipeline

    if work is not None and model is not None:
        raise AutosegError("-w and --model both say what to segment with; leave one of them out")
    files = pipeline.predict(
        images,
        output,
        work or DEFAULT_WORK,
        model=model,
        configuration=configuration,
        folds=_parse_model_folds(folds),
        device=device,
        speed=speed,
        mirroring=mirroring,
        step_fraction=step,
        overwrite=overwrite,
        part=_parse_part(part),
        save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty,
        max_ram_gib=max_ram,
        max_vram_gib=max_vram,
        compile=compile_networks,
        postprocess=postprocessing,
        fix=fix,
    )
    typer.echo(f"{len(files)} label maps in {output}")


@app.command()
def export(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL.autoseg", help="The file to write.", show_default="beside the model's folder"),
    ] = None,
    work: Work = DEFAULT_WORK,
    configuration: Configuration = None,
    folds: Folds = None,
) -> None:
    """Write a trained model into one file, to predict with anywhere: no images, names of cases or paths are in it.

    A cascade does not go into one file yet: copy the folders of both stages side by side.
    """
    from autoseg import pipeline

    file = pipeline.export(work, target, configuration=configuration, folds=_parse_model_folds(folds))
    typer.echo(f"Written to {file}\nNext: autoseg predict IN OUT --model {shlex.quote(str(file))}")


@app.command()
def select(
    work: Work = DEFAULT_WORK,
    device: Device = "auto",
    ensembles: Annotated[
        bool, typer.Option("--ensembles/--no-ensembles", help="Also compare ensembles of two configurations.")
    ] = True,
) -> None:
    """Compare all trained configurations, decide post-processing, and choose what 'predict' uses."""
    from autoseg import pipeline
    from autoseg.reporting.text import describe_selection

    with _stop_on_signals() as stop:
        selection = pipeline.select(work, device=device, ensembles=ensembles, stop=stop)
    typer.echo(describe_selection(selection))
    typer.echo(f"\nNext: autoseg report{_work_option(work)}")


@app.command()
def report(
    work: Work = DEFAULT_WORK,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of predictions to report on, in place of the work folder."),
    ] = None,
) -> None:
    """Write a page with curves, scores and pictures of a work folder, or of a folder of predictions."""
    from autoseg import pipeline

    page = pipeline.report(work) if predictions is None else pipeline.report_predictions(predictions)
    typer.echo(f"Written to {page}")


@app.command()
def evaluate(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="A folder of label maps.", show_default=False)],
    reference: Annotated[Path, typer.Argument(metavar="REF", help="A folder of references.", show_default=False)],
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUES", help="Score the labels of these values as one, too: whole=1,2."),
    ] = None,
    ignore: Annotated[
        int | None, typer.Option(metavar="VALUE", help="Leave out voxels that have this value in the reference.")
    ] = None,
    beta: Annotated[
        float, typer.Option(help="Of the F-measure: recall counts this many times as much as precision.")
    ] = 2.0,
    tolerance: Annotated[
        float, typer.Option(metavar="MM", help="Of the surface Dice: surfaces this close count as equal.")
    ] = 2.0,
    lesion_iou: Annotated[
        float, typer.Option(metavar="IOU", help="Intersection over union from which two lesions may match.")
    ] = 0.1,
) -> None:
    """Score label maps against references of the same file names: overlap, surfaces, lesions, volumes.

    All scores of every case and label are in evaluation.json and evaluation.csv beside the label maps.
    """
    from autoseg import pipeline
    from autoseg.evaluation.scores import ScoreSettings, parse_regions
    from autoseg.reporting.text import describe_case_dice, describe_scores

    settings = ScoreSettings(beta=beta, tolerance_mm=tolerance, min_lesion_iou=lesion_iou, ignore=ignore)
    regions = parse_regions(region or ())
    evaluation = pipeline.evaluate(prediction, reference, regions=regions, settings=settings)
    typer.echo(f"{describe_case_dice(evaluation)}\n\n{describe_scores(evaluation)}")
    if evaluation.not_scored:
        typer.echo(f"\n{len(evaluation.not_scored)} references have no prediction and are not scored.")
    if prediction.is_dir():
        typer.echo(f"\nAll scores: {prediction / 'evaluation.json'}, and as a table: {prediction / 'evaluation.csv'}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="For the data and the results.")] = Path("autoseg-demo"),
    max_time: Annotated[str, typer.Option(help="Training time.")] = "4m",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the data and the training.")] = 0,
) -> None:
    """Run the whole line on generated CT-like scans: plan, train, predict, evaluate, draw."""
    from autoseg import pipeline
    from autoseg.reporting.text import describe_case_dice

    evaluation, picture = pipeline.run_demo(folder, max_time_s=parse_duration(max_time), device=device, seed=seed)
    typer.echo(describe_case_dice(evaluation))
    typer.echo(f"\nReference (green) and prediction (red) on slices: {picture}")


def parse_duration(text: str) -> float:
    """Seconds from "15m", "1h30m", "90s" or "90".

    Raises:
        AutosegError: not of that form, or zero.
    """
    match = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower()
    )
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise AutosegError(f"found the time '{text}', expected for instance 15m, 1h30m or 90s")
    return seconds


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGINT, SIGTERM and SIGUSR1 only ask it to stop; a second one ends it at once.

    Clusters send SIGUSR1 some time before they end a job. Where the block has stopped, the exit code is that of the
    signal.

    Yields:
        Whether to stop.
    """
    from autoseg.training.trainer import TrainingInterrupted

    received: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        received.append(number)
        logger.info("stopping after this step; once more ends at once")
        signal.signal(number, before[number])

    # Windows has no SIGUSR1.
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before: dict[int, Any] = {int(number): signal.signal(number, note) for number in known}
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(128 + received[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse_model_folds(text: str | None) -> tuple[int, ...] | None:
    """The folds of a model that a user names; None for its own choice."""
    from autoseg.data.splits import parse_folds

    return None if text is None or text.strip() == "all" else parse_folds(text, n_folds=MAX_FOLDS)


def _parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match:
        raise AutosegError(f"found the part '{text}', expected for instance 2/8")
    return int(match[1]), int(match[2])


def _work_option(work: Path) -> str:
    return "" if work == DEFAULT_WORK else f" -w {shlex.quote(str(work))}"


def main() -> None:
    """Runs the command line. Errors that a user can mend are printed without a traceback; the exit code is theirs."""
    try:
        app()
    except AutosegError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # The disk is full, a folder cannot be written, a share is gone: the system's own words say it best.
        typer.echo(f"Error: {error.filename or ''}: {error.strerror or error}. Nothing more was done.", err=True)
        sys.exit(AutosegError.exit_code)


if __name__ == "__main__":
    main()
