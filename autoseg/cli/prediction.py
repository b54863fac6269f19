"""`autoseg predict` and `autoseg export`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import (
    DEFAULT_WORK,
    Account,
    Configuration,
    CpusPerTask,
    Device,
    Executor,
    Folds,
    GpusPerNode,
    Memory,
    Partition,
    Sbatch,
    Time,
    Work,
    parse_model_folds,
    say,
    slurm_options,
    work_option,
)
from autoseg.core.errors import AutosegError

commands = typer.Typer()


@commands.command()
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
        bool | None,
        typer.Option(
            "--overwrite/--continue",
            help="Segment all images, or those without a label map only; default: all, and on a cluster the latter.",
        ),
    ] = None,
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
        bool,
        typer.Option(
            "--fix", help="Resample channels that lie on another grid than the first; mend voxels that are NaN."
        ),
    ] = False,
    postprocessing: Annotated[
        bool,
        typer.Option("--postprocessing/--no-postprocessing", help="Do the steps that cross-validation found to help."),
    ] = True,
    executor: Executor = "local",
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Jobs of the cluster that share the images; default: 1.")
    ] = None,
    partition: Partition = None,
    time: Time = None,
    gpus_per_node: GpusPerNode = None,
    cpus_per_task: CpusPerTask = None,
    memory: Memory = None,
    account: Account = None,
    sbatch: Sbatch = None,
) -> None:
    """Segment every image of a folder; the label maps have the images' own geometry."""
    from autoseg.pipeline.jobs.batch import PredictRequest
    from autoseg.pipeline.jobs.start import submit_prediction
    from autoseg.pipeline.jobs.tasks import predict_as_asked

    if work is not None and model is not None:
        raise AutosegError("-w and --model both say what to segment with; leave one of them out")
    options = slurm_options(
        executor,
        partition=partition,
        time=time,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        memory=memory,
        account=account,
        sbatch=sbatch,
        jobs=jobs,
    )
    request = PredictRequest(
        images=tuple(images),
        output=output,
        model=model,
        configuration=configuration,
        folds=parse_model_folds(folds),
        device=device,
        speed=speed,
        mirroring=mirroring,
        step_fraction=step,
        overwrite=options is None if overwrite is None else overwrite,
        save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty,
        max_ram_gib=max_ram,
        max_vram_gib=max_vram,
        compile=compile_networks,
        postprocess=postprocessing,
        fix=fix,
    )
    if options is not None:
        if part != "1/1":
            raise AutosegError(
                "--part is for processes of your own; on a cluster, --jobs says how many parts there are"
            )
        folder = work or (DEFAULT_WORK if model is None else output)
        ids = submit_prediction(folder, request, n_jobs=jobs or 1, options=options)
        say(f"{len(ids)} jobs submitted\nNext: autoseg status{work_option(folder)}")
        return
    files = predict_as_asked(request, work or DEFAULT_WORK, part=_parse_part(part))
    say(f"{len(files)} label maps in {output}")


@commands.command()
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

    Of an ensemble that was selected, name one configuration with -c. A cascade does not go into one file yet: copy the
    folders of both stages side by side.
    """
    from autoseg import pipeline

    file = pipeline.export(work, target, configuration=configuration, folds=parse_model_folds(folds))
    say(f"Written to {file}\nNext: autoseg predict IN OUT --model {shlex.quote(str(file))}")


def _parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match:
        raise AutosegError(f"found the part '{text}', expected for instance 2/8")
    return int(match[1]), int(match[2])
