"""What `gpu_suite.py` says: rows and means from the results of its jobs, and tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Speeds with few processors that are wanted: of what the network alone reaches, and of nnU-Net's best case.
FEW_CPUS = 2
WANTED_OF_OWN, WANTED_OF_PEER = 0.95, 1.3
MAX_REASON = 90


# -- figures -----------------------------------------------------------------------------------------------------------


def pair_speeds(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each dataset, side, mode and number of processors: without data, the whole loop, and their ratio."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        key = tuple(result[name] for name in ("size", "side", "mode", "cpus"))
        row = rows.setdefault(key, dict(zip(("size", "side", "mode", "cpus"), key, strict=True)))
        if "failure" in result:
            row["failure"] = result["failure"]
            continue
        prefix = "no_data" if result["what"] == "no data" else "whole_loop"
        row[f"{prefix}_steps_per_s"] = result["steps_per_s"]
        row[f"{prefix}_busy"] = result["utilization"]
        row["reserved_gib"], row["precision"] = result["reserved_gib"], result.get("precision", row.get("precision"))
        if prefix == "whole_loop" and row.get("no_data_steps_per_s"):
            row["ratio"] = round(row["whole_loop_steps_per_s"] / row["no_data_steps_per_s"], 3)
            row["epoch_s"] = round(250 / row["whole_loop_steps_per_s"], 1)
    return list(rows.values())


def compare_with_goals(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is wanted of the whole loop with few processors, and what was found."""
    goals = []
    rows = pair_speeds(results)
    for size in dict.fromkeys(row["size"] for row in rows):
        ours = [
            row
            for row in rows
            if (row["size"], row["side"], row["cpus"]) == (size, "autoseg", FEW_CPUS) and "ratio" in row
        ]
        if not ours:
            continue
        # The faster mode is the harder one to feed.
        best = max(ours, key=lambda row: row["no_data_steps_per_s"])
        name = f"{size}, {FEW_CPUS} processors, {best['mode']}: whole loop / "
        goals.append(goal(f"{name}no data", best["ratio"], WANTED_OF_OWN))
        theirs = [row for row in rows if (row["size"], row["side"]) == (size, "nnU-Net")]
        best_cases = [row["no_data_steps_per_s"] for row in theirs if "no_data_steps_per_s" in row]
        if best_cases:
            found = round(best["whole_loop_steps_per_s"] / max(best_cases), 3)
            goals.append(goal(f"{name}nnU-Net's best case", found, WANTED_OF_PEER))
        fed = [row for row in theirs if row["cpus"] == FEW_CPUS and "whole_loop_steps_per_s" in row]
        if fed:
            found = round(best["whole_loop_steps_per_s"] / fed[0]["whole_loop_steps_per_s"], 3)
            goals.append(goal(f"{name}nnU-Net's whole loop on the same", found, None))
    return goals


def goal(name: str, found: float, wanted: float | None) -> dict[str, Any]:
    return {"goal": name, "found": found, "wanted": wanted, "met": None if wanted is None else found >= wanted}


def cross_validate(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Dice of each label, the mean over all cases that have it, and of each fold, the mean over labels."""
    cases = [result for result in results if result["what"] == "case"]
    folds = [result for result in results if result["what"] == "fold"]
    label_dice = mean_of_labels(cases)
    for fold in folds:
        own = mean_of_labels([case for case in cases if case["fold"] == fold["fold"]])
        fold["label_dice"], fold["mean_dice"] = own, mean(list(own.values()))
    return {
        "where": "on the network's grid, against the stored labels",
        "n_cases": len(cases),
        "label_dice": label_dice,
        "mean_dice": mean(list(label_dice.values())),
        "folds": folds,
    }


def mean_of_labels(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    names = list(cases[0]["dice"]) if cases else []
    return {name: mean([case["dice"][name] for case in cases]) for name in names}


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 4) if known else None


# -- tables ------------------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows under the titles of the columns; what is not known is a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    cells = [list(columns.values()), *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def print_tables(report: dict[str, Any]) -> None:
    """What is worth reading, the most important last."""
    names = {"preset": "memory of", "patch": "patch", "batch": "batch", "estimated_gib": "estimated GiB"}
    print_table(report["memory"], names | {"measured_gib": "GiB", "step_s": "step s", "largest_batch": "largest batch"})
    names = {"size": "prediction of", "shape": "voxels", "predict_s": "s", "first_s": "first s", "reserved_gib": "GiB"}
    print_table(report["prediction"], names)
    if report["folds"]:
        folds = report["folds"]
        names = {"fold": "fold", "steps": "steps", "training_s": "training s", "step_s": "step s"}
        names |= {"data_wait_fraction": "waiting", "predict_case_s": "predict s", "mean_dice": "mean Dice"}
        print_table(folds["folds"], names)
        rows = [{"label": name, "dice": value} for name, value in folds["label_dice"].items()]
        title = f"Dice of {folds['n_cases']} cases, {folds['where']}"
        print_table([*rows, {"label": "mean", "dice": folds["mean_dice"]}], {"label": "label", "dice": title})
    names = {"size": "steps per s", "side": "of", "mode": "mode", "cpus": "CPUs", "no_data_steps_per_s": "no data"}
    names |= {"whole_loop_steps_per_s": "whole loop", "ratio": "ratio", "no_data_busy": "busy, no data"}
    names |= {"whole_loop_busy": "busy, loop", "reserved_gib": "GiB", "precision": "precision"}
    print_table(report["speed"], names)
    rows = [job for job in report["jobs"] if job["status"] != "done"]
    rows = [row | {"text": last_line(row["text"])[:MAX_REASON]} for row in rows]
    for row in report["speed"]:
        if "failure" in row:
            name = f"{row['size']}, {row['mode']}, {row['cpus']} processors"
            rows.append({"section": "speed", "name": name, "status": "failed", "text": row["failure"][:MAX_REASON]})
    print_table(rows, {"section": "not done", "name": "what", "status": "why", "text": ""})
    for test in (job for job in report["jobs"] if job["section"] == "tests"):
        lines = [line for line in test["text"].splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("\n".join([*lines, f"tests: {last_line(test['text']) or test['status']}"]))
    print_table(report["goals"], {"goal": "goal", "found": "found", "wanted": "wanted", "met": "met"})
    machine = report["machine"]
    print(
        f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('cpus')} processors, torch {machine.get('torch')}, "
        f"Python {machine.get('python')}; {report['seconds']:.0f} s of {report['max_time_s']:.0f} s"
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def print_table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> None:
    if rows:
        print(format_table(rows, columns) + "\n")
