"""Training folds, and validating each on whole volumes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import TrainingError, WorkspaceError, first_line, list_some
from autoseg.core.locks import locked
from autoseg.core.runtime import never, resolve_device
from autoseg.pipeline.cascade import prepare_second_stage
from autoseg.pipeline.choose import select
from autoseg.pipeline.complete import why_incomplete
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.fold_validation import validate_fold
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.pipeline.quick import configuration_for_time
from autoseg.pipeline.settle import refuse_other_training, settle_training
from autoseg.pipeline.stored import open_preprocessed
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.training.config import CHECKPOINT_INTERVAL_S, TrainConfig
from autoseg.training.record import EpochFigures, FoldFiles, TrainingChoices, ValidationSlice, read_log

if TYPE_CHECKING:
    import torch

    from autoseg.data.dataset import Dataset
    from autoseg.data.splits import Splits
    from autoseg.evaluation.scores import Evaluation
    from autoseg.planning.plan import Plan
    from autoseg.preprocessing.store import PreprocessedCase
    from autoseg.training.ranks import Ranks
    from autoseg.training.trainer import OnEpoch

logger = logging.getLogger(__name__)

CURVES = "curves.png"
CURVES_INTERVAL_S = 30.0
MEMORY_BUDGET_GIB = 1.0
"""Cases to train on and those to validate on are each kept in memory up to this; what is beyond is read from disk."""


def train(
    work: Path | str = DEFAULT_WORK,
    *,
    folds: Sequence[int] | None = None,
    configuration: str | None = None,
    config: TrainConfig | None = None,
    device: str = "auto",
    resume: bool = True,
    validate: bool = True,
    and_select: bool = True,
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
    track_with: Sequence[str] = (),
    stop: Callable[[], bool] = never,
    ranks: Ranks | None = None,
) -> dict[int, Evaluation | None]:
    """Trains folds of a configuration one after the other and validates each on whole volumes.

    When the last missing fold of a configuration has been trained, the configuration is cross-validated, and `select`
    compares it with the others.

    Example:
        >>> import autoseg
        >>> from autoseg.training.config import Budget, TrainConfig
        >>> scores = autoseg.train("work", folds=[0], config=TrainConfig(budget=Budget(iterations=4)), device="cpu")
        >>> sorted(scores)
        [0]

    Args:
        work: the work folder, planned.
        folds: which; None for all.
        configuration: its name; None for the recommended one, or what suits the time better, see
            `configuration_for_time`. The second stage of a cascade is also called "cascade"; what is missing of its
            first stage is trained before.
        config: budget, recipe and seed; None for a full training.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: go on from checkpoints where there are some.
        validate: predict and score the validation cases of each fold.
        and_select: after that, select when all folds are trained.
        checkpoint_interval_s: the state is saved at the end of each epoch, and after this time at the latest.
        track_with: names of trackers to send each epoch to, see `autoseg.reporting.trackers.TRACKERS`.
        stop: asked after every step; True saves and raises.
        ranks: of the processes that train together, of which this is one; None where it is alone.

    Returns:
        The whole-volume scores of each fold; None for each where `validate` is False, and in all processes but the
        first.

    Raises:
        WorkspaceError: the work folder is not planned.
        TrainingError: see `autoseg.training.trainer.train_fold`.
        TrainingInterrupted: `stop` said so.
    """
    from autoseg.training.ranks import ALONE

    workspace = Workspace(root=Path(work))
    plan, dataset, splits = workspace.read_plan(), workspace.read_dataset(), workspace.read_splits()
    where = resolve_device(device)
    config, ranks = config or TrainConfig(), ranks or ALONE
    wanted = range(len(splits.folds)) if folds is None else folds
    if configuration is None:
        chosen = configuration_for_time(
            workspace, config, device=device, folds=wanted, resume=resume, n_processes=ranks.count
        )
        # It may have been given a configuration on a coarser grid.
        plan = workspace.read_plan()
    else:
        chosen = default_configuration(plan, configuration)
    _check_request(workspace, plan, dataset, splits, wanted=wanted)
    model = workspace.model(chosen.name)
    completed: list[int] = []
    if ranks.is_first:
        # Before cases are made anew for another plan, which others may be training on.
        refuse_other_training(model, plan, chosen, config, folds=wanted, resume=resume)
        preprocess_cases(workspace, dataset, plan, chosen.name, announce=True)
        if chosen.previous is not None:
            train_first_stage = partial(
                train,
                work,
                config=config,
                device=device,
                # Whoever selects waits until no first stage is being completed, and this one would wait for itself.
                and_select=False,
                checkpoint_interval_s=checkpoint_interval_s,
                track_with=track_with,
                stop=stop,
            )
            completed = prepare_second_stage(
                workspace, plan, chosen, train_folds=train_first_stage, device=device, stop=stop
            )
    settle = partial(
        settle_training,
        model,
        plan,
        chosen,
        config,
        folds=wanted,
        n_cases=len(splits.folds[0].training),
        device=where,
        n_processes=ranks.count,
    )
    settled = settle(resume=resume) if ranks.is_first else None
    ranks.wait()
    # The others read what the first one has decided; what is to begin anew has been deleted by it.
    adapted, choices, spent_s = settled or settle(resume=True)
    training = _FoldTraining(
        workspace=workspace,
        splits=splits,
        plan=plan,
        configuration=chosen.name,
        adapted=adapted,
        choices=choices,
        config=config,
        device=where,
        ranks=ranks,
        resume=resume,
        validate=validate,
        checkpoint_interval_s=checkpoint_interval_s,
        track_with=track_with,
        stop=stop,
    )
    results = {}
    for fold in wanted:
        results[fold] = training.run(fold, spent_s=spent_s if fold == wanted[0] else 0.0, is_last=fold == wanted[-1])
    if validate and and_select and ranks.is_first and (completed or why_incomplete(workspace, chosen.name) is None):
        select(work, device=device, stop=stop)
    return results


def _check_request(
    workspace: Workspace, plan: Plan, dataset: Dataset, splits: Splits, *, wanted: Sequence[int]
) -> None:
    if plan.channels != dataset.channels:
        raise WorkspaceError(
            f"{workspace.plan_file}: has the channels {', '.join(plan.channels)}, the dataset has "
            f"{', '.join(dataset.channels)}; correct 'normalization', or plan again"
        )
    unknown = sorted(set(wanted) - set(range(len(splits.folds))))
    if unknown:
        raise TrainingError(f"found the folds {unknown}, expected folds from 0 to {len(splits.folds) - 1}")
    in_folds = {case for fold in splits.folds for case in (*fold.training, *fold.validation)}
    if gone := sorted(in_folds - {case.id for case in dataset.cases}):
        raise WorkspaceError(
            f"{workspace.splits_file}: has cases that the dataset does not have any more: {list_some(gone)}; plan again"
        )


@dataclass(frozen=True, kw_only=True)
class _FoldTraining:
    """What the folds of one call of `train` share; attributes that are not told here are those of `train`.

    Attributes:
        plan: of the work folder, whose grids the cases are on.
        configuration: its name.
        adapted, choices: as settled for all folds of the model.
    """

    workspace: Workspace
    splits: Splits
    plan: Plan
    configuration: str
    adapted: Plan
    choices: TrainingChoices
    config: TrainConfig
    device: torch.device
    ranks: Ranks
    resume: bool
    validate: bool
    checkpoint_interval_s: float
    track_with: Sequence[str]
    stop: Callable[[], bool]

    def run(self, fold: int, *, spent_s: float, is_last: bool) -> Evaluation | None:
        """Trains and validates a fold.

        Args:
            fold: which.
            spent_s: of its time, on choosing the network.
            is_last: of those that the processes train together.

        Returns:
            Its scores, in the first process, where it is validated.
        """
        from autoseg.training.trainer import train_fold

        files = FoldFiles.of(self.workspace.model(self.configuration), fold)
        split, is_first = self.splits.folds[fold], self.ranks.is_first
        # Another process, on this machine or another, may be training the fold.
        lock = locked(files.lock, waiting_for=f"trains {files.folder}") if is_first else nullcontext()
        with lock, _unmarked_at_end(files):
            trackers = self.track_with if is_first else ()
            with _followers(files.folder, trackers, labels=self.plan.labels.structures) as on_epoch:
                train_fold(
                    files.folder,
                    self.adapted,
                    self.choices,
                    training=self._open_cases(split.training),
                    validation=self._open_cases(split.validation),
                    config=self.config,
                    device=self.device,
                    resume=self.resume,
                    spent_s=spent_s,
                    checkpoint_interval_s=self.checkpoint_interval_s,
                    stop=self.stop,
                    on_epoch=on_epoch,
                    ranks=self.ranks,
                )
            if is_last:
                self.ranks.part()
            if is_first:
                _try(CURVES, _draw_curves, files.folder, read_log(files.log))
                if self.validate:
                    return validate_fold(
                        self.workspace, self.configuration, fold, device=str(self.device), stop=self.stop
                    )
        return None

    def _open_cases(self, ids: Iterable[str]) -> list[PreprocessedCase]:
        """Preprocessed cases, in memory as far as `MEMORY_BUDGET_GIB` goes."""
        from autoseg.preprocessing.store import load_into_memory

        stored = [open_preprocessed(self.workspace, self.plan, self.configuration, case) for case in ids]
        return load_into_memory(stored, budget_gib=MEMORY_BUDGET_GIB)


@contextmanager
def _unmarked_at_end(files: FoldFiles) -> Iterator[None]:
    """Removes the mark that the fold has begun, so that one that fails before its first step binds no other fold."""
    try:
        yield
    finally:
        files.begun.unlink(missing_ok=True)


@contextmanager
def _followers(folder: Path, trackers: Sequence[str], *, labels: Sequence[str]) -> Iterator[OnEpoch]:
    """What is to be called after each epoch: it draws the curves and tells the trackers, of which any may fail."""
    from autoseg.reporting.trackers import make_tracker

    followers: dict[str, OnEpoch] = {CURVES: _curve_drawer(folder)}
    with ExitStack() as stack:
        for name in trackers:
            tracker = make_tracker(name, folder, labels)
            stack.callback(_try, name, tracker.close)
            followers[name] = tracker.log

        def on_epoch(epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
            for name, follow in list(followers.items()):
                if not _try(name, follow, epochs, slices):
                    del followers[name]

        yield on_epoch


def _try(name: str, call: Callable[..., None], *arguments: object) -> bool:
    """Whether it succeeds; where it does not, for whatever reason, the training goes on without it."""
    try:
        call(*arguments)
    except Exception as error:
        logger.warning("%s: the training goes on without: %s", name, first_line(error))
        return False
    return True


def _curve_drawer(folder: Path) -> OnEpoch:
    """Draws the curves of a fold now and then, and soon after the training has begun."""
    drawn_at_s = [-CURVES_INTERVAL_S]

    def draw(epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
        del slices
        if epochs[-1].time_s - drawn_at_s[0] >= CURVES_INTERVAL_S:
            _draw_curves(folder, epochs)
            drawn_at_s[0] = epochs[-1].time_s

    return draw


def _draw_curves(folder: Path, epochs: Sequence[EpochFigures]) -> None:
    from autoseg.reporting.figures import draw_curves

    draw_curves(folder / CURVES, epochs, title=folder.name)
