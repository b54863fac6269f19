"""`autoseg report`, `autoseg evaluate` and `autoseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import DEFAULT_WORK, Device, Work, parse_duration, say

commands = typer.Typer()


@commands.command()
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
    say(f"Written to {page}")


@commands.command()
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
    say(f"{describe_case_dice(evaluation)}\n\n{describe_scores(evaluation)}")
    if evaluation.not_scored:
        say(f"\n{len(evaluation.not_scored)} references have no prediction and are not scored.")
    if prediction.is_dir():
        say(f"\nAll scores: {prediction / 'evaluation.json'}, and as a table: {prediction / 'evaluation.csv'}")


@commands.command()
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
    say(describe_case_dice(evaluation))
    say(f"\nReference (green) and prediction (red) on slices: {picture}")
