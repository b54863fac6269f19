"""Jobs of Slurm: submitting them through submitit, asking what became of them, cancelling them.

Nothing is asked of an accounting database, which small clusters do not have: `squeue` knows what waits and runs, and
what has ended says so in its own files.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoseg.core.errors import AutosegError

SLURM_TIMEOUT_S = 60
DEFAULT_TIME_MIN = 24 * 60
DEFAULT_CPUS_PER_GPU = 8
SIGNAL_BEFORE_END_S = 120
"""Slurm warns a job so long before its time limit; the training then saves after its step, and is requeued."""
UNLIMITED_TIMEOUTS = 1_000_000
HELD_UNTIL = "now+1hour"
"""When jobs that are held begin by themselves, should nobody release them, and the user have said nothing else."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What is asked of Slurm for each job.

    Attributes:
        partition: None for the cluster's default.
        account: to charge; None for the user's default.
        time_min: limit; what is not done then is requeued and goes on. None for the partition's limit, 24 h at most.
        gpus_per_node: None for one per process where the cluster has GPUs.
        cpus_per_task: None for 8 per process, or what the smallest node of the partition has.
        memory_gib: of each job; None for the cluster's default.
        sbatch: any other options of sbatch, without dashes, such as {"constraint": "a100"}.
    """

    partition: str | None = None
    account: str | None = None
    time_min: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory_gib: float | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What Slurm says of a job that has not ended.

    Attributes:
        state: such as "PENDING" or "RUNNING".
        reason: why it does not run, such as "Dependency"; "None" where it does.
    """

    state: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What nodes there are.

    Attributes:
        n_cpus: of the smallest.
        time_limit_min: None where there is none.
        has_gpus: whether Slurm hands out GPUs.
    """

    n_cpus: int
    time_limit_min: int | None
    has_gpus: bool


def uses_gpus(options: SlurmOptions, partition: Partition) -> bool:
    """Whether jobs that compute on a GPU get one."""
    return partition.has_gpus if options.gpus_per_node is None else options.gpus_per_node > 0


def look_at_partition(name: str | None) -> Partition:
    """The nodes of a partition.

    Args:
        name: None for the default one.

    Raises:
        AutosegError: there is no Slurm here, it does not answer, or the partition is unknown.
    """
    lines = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%P|%c|%l|%G").splitlines()]
    chosen = [line for line in lines if (line[0].rstrip("*") == name if name is not None else line[0].endswith("*"))]
    if not chosen and name is not None:
        known = ", ".join(sorted({line[0].rstrip("*") for line in lines}))
        raise AutosegError(f"Slurm has no partition '{name}'; it has {known or 'none'}")
    if not chosen:
        raise AutosegError("Slurm has no default partition; name one with --partition")
    limits = [parse_time(limit) for _, _, limit, _ in chosen]
    return Partition(
        n_cpus=min(int(re.sub(r"\D", "", cpus) or 1) for _, cpus, _, _ in chosen),
        time_limit_min=min((limit for limit in limits if limit is not None), default=None),
        has_gpus=any("gpu" in resources for _, _, _, resources in chosen),
    )


def parse_time(text: str) -> int | None:
    """Minutes of a time as Slurm writes it: "30", "30:00", "12:00:00", "2-00:00:00"; None where it is no such time.

    Seconds are rounded up to a minute.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def import_submitit() -> Any:
    """The package.

    Raises:
        AutosegError: it is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise AutosegError(
            "submitit is missing, which submits jobs to Slurm; install it beside autoseg: pip install 'submitit>=1.5.4'"
        ) from error
    return submitit


def submit_array(
    calls: Sequence[Callable[[], None]],
    *,
    folder: Path,
    name: str,
    n_processes: int,
    uses_gpu: bool,
    options: SlurmOptions,
    partition: Partition,
    after: Sequence[str] = (),
    is_held: bool = False,
) -> list[str]:
    """Submits calls as one array, or as a job where there is one only.

    A job that is killed by a signal that it cannot heed is requeued by its own script, which leaves a line in
    `killed-NUMBER` in the folder.

    Args:
        calls: each is pickled by submitit, and called on a node.
        folder: for submitit's files; on a file system that the nodes share.
        name: shown by Slurm.
        n_processes: of each job, which share its processors and have a GPU each.
        uses_gpu: whether the jobs compute on a GPU, where there are such.
        options: what the user asks for.
        partition: that it goes to.
        after: numbers of jobs that have to have succeeded before; where one has failed, these are cancelled.
        is_held: they do not begin before `release`.

    Returns:
        The numbers of the jobs.

    Raises:
        AutosegError: Slurm refuses them.
    """
    submitit = import_submitit()
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=UNLIMITED_TIMEOUTS)
    except RuntimeError as error:
        raise AutosegError(f"jobs cannot be submitted from here: {error}") from error
    time_min = options.time_min or min(DEFAULT_TIME_MIN, partition.time_limit_min or DEFAULT_TIME_MIN)
    more = {"requeue": True, **options.sbatch}
    if after:
        more |= {"dependency": ":".join(("afterok", *after)), "kill-on-invalid-dep": "yes"}
    if is_held:
        # Not as a hold: of such jobs Slurm does not look whether any node can do them.
        more.setdefault("begin", HELD_UNTIL)
    n_cpus = options.cpus_per_task or min(DEFAULT_CPUS_PER_GPU * n_processes, partition.n_cpus)
    executor.update_parameters(
        job_name=name,
        time=time_min,
        cpus_per_task=n_cpus,
        # Since Slurm 22.05 srun does not take it from the job, and would give the task one processor.
        srun_args=[f"--cpus-per-task={n_cpus}"],
        signal_delay_s=min(SIGNAL_BEFORE_END_S, time_min * 60 // 4),
        array_parallelism=max(1, len(calls)),
        stderr_to_stdout=True,
        additional_parameters=more,
        teardown=[
            "status=$?",
            # One task of an array has the number of the whole array as its own.
            'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
            'job="${job:-$SLURM_JOB_ID}"',
            # 128 and more is a signal; SIGTERM (143) is Slurm's own way to end a job.
            'if [ "$status" -gt 128 ] && [ "$status" -ne 143 ] &&'
            ' [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then',
            f'    echo "$status" >> {shlex.quote(str(folder))}/killed-"$job"',
            '    scontrol requeue "$job"',
            "fi",
            'exit "$status"',
        ],
        **_given(partition=options.partition, account=options.account, mem=_memory(options.memory_gib)),
        **_given(gpus_per_node=_gpus(options, partition, n_processes) if uses_gpu else None),
    )
    try:
        if len(calls) == 1:
            return [executor.submit(calls[0]).job_id]
        # submitit makes an array of what is submitted in one batch.
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise AutosegError(f"Slurm refuses the job '{name}': {_last_line(str(error))}") from error
    return [job.job_id for job in jobs]


def ask_squeue(ids: Sequence[str]) -> dict[str, SlurmJob]:
    """What Slurm says of those jobs that have not ended, by number.

    Raises:
        AutosegError: there is no Slurm here, or it does not answer.
    """
    if not ids:
        return {}
    wanted = ",".join(sorted({known.partition("_")[0] for known in ids}))
    try:
        text = _ask("squeue", "--noheader", "--array", f"--jobs={wanted}", "--format=%i|%T|%r")
    except AutosegError as error:
        # What has ended a while ago is unknown to it.
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in text.splitlines():
        number, state, reason = line.split("|")
        if number in ids:
            found[number] = SlurmJob(state=state, reason=reason)
    return found


def cancel(ids: Sequence[str]) -> None:
    """Cancels jobs; those that have ended already stay as they are.

    Raises:
        AutosegError: Slurm does not answer.
    """
    if ids:
        _ask("scancel", *ids)


def release(ids: Sequence[str], options: SlurmOptions) -> None:
    """Lets jobs begin that were submitted to be held, with these options.

    Raises:
        AutosegError: Slurm refuses; they begin by themselves, see `HELD_UNTIL`.
    """
    _ask("scontrol", "update", f"JobId={','.join(ids)}", f"StartTime={options.sbatch.get('begin', 'now')}")


def own_number() -> str:
    """The number of the job that this process is in, as `squeue` shows it; empty outside of one."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def requeue(job: str) -> None:
    """Puts a running job back into the queue; it is ended.

    Raises:
        AutosegError: Slurm refuses.
    """
    _ask("scontrol", "requeue", job)


def _ask(*command: str) -> str:
    """What a command of Slurm prints."""
    if shutil.which(command[0]) is None:
        raise AutosegError(
            f"there is no Slurm here: the command {command[0]} was not found; run this on a machine that can submit "
            "jobs, such as the login node; to train or predict on this one, leave out --executor slurm"
        )
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise AutosegError(f"Slurm does not answer: {' '.join(command)} took more than {SLURM_TIMEOUT_S} s") from error
    if result.returncode != 0:
        raise AutosegError(f"Slurm refuses: {' '.join(command)}: {_last_line(result.stderr)}")
    return result.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def _given(**parameters: object) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if value is not None}


def _memory(gib: float | None) -> str | None:
    return None if gib is None else f"{round(gib * 1024)}M"


def _gpus(options: SlurmOptions, partition: Partition, n_processes: int) -> int | None:
    return (options.gpus_per_node or n_processes) if uses_gpus(options, partition) else None
