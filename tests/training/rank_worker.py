"""One of several processes that train together, for `test_ranks.py`: a task per line of its input, an answer for each.

It writes the weights that it ends with to the file "result" of its task.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from autoseg.core.errors import TrainingError, TrainingInterrupted
from autoseg.core.serialize import from_plain, read_json
from autoseg.planning.plan import Plan
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.checkpoint import save_weights
from autoseg.training.config import TrainConfig
from autoseg.training.ranks import joined
from autoseg.training.record import TrainingChoices
from autoseg.training.trainer import train_fold

CPU = torch.device("cpu")


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains; tells how often it was asked to stop, which is after every step, how often an epoch was shown, and what
    it raised."""
    n_asked, n_shown, raised = 0, 0, ""

    def stop() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked == task.get("stop_after")

    def count_epoch(*_: object) -> None:
        nonlocal n_shown
        n_shown += 1

    compile_with = torch.compile
    if "compile_with" in task:
        torch.compile = functools.partial(compile_with, backend=task["compile_with"])
    try:
        with joined(task["index"], task["count"], rendezvous=Path(task["rendezvous"]), device=CPU) as ranks:
            network = train_fold(
                Path(task["folder"]),
                read_json(Path(task["plan"]), Plan),
                from_plain(TrainingChoices, task["choices"]),
                training=[PreprocessedCase(Path(case)) for case in task["training"]],
                validation=[PreprocessedCase(Path(case)) for case in task["validation"]],
                config=from_plain(TrainConfig, task["config"]),
                device=CPU,
                stop=stop,
                on_epoch=count_epoch,
                ranks=ranks,
            )
        save_weights(Path(task["result"]), network)
    except (TrainingInterrupted, TrainingError) as error:
        raised = f"{type(error).__name__}: {error}"
    finally:
        torch.compile = compile_with
    return {"n_asked": n_asked, "n_shown": n_shown, "raised": raised}


def main() -> None:
    # On volumes as small as those of tests, handing work to more threads takes longer than the work.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(train(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
