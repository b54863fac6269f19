"""The GPU benchmark without a GPU: its sections run, and its report says what happened to each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_clock
import gpu_report
import gpu_suite
import pytest
import torch

from autoseg.pipeline import plan
from autoseg.planning.choices import Choices

LABELS = {"liver", "spleen", "kidneys", "aorta", "lesion"}


@pytest.fixture(scope="module")
def work(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder as it would be carried to another machine."""
    folder = tmp_path_factory.mktemp("carried") / "work"
    plan(tiny_dataset, folder, choices=Choices(configurations=("3d_fullres",)))
    for file in ("dataset.json", "check.json", "fingerprint.json"):
        (folder / file).unlink()
    return folder


def run_suite(json_file: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and standard output of a quick run on the CPU."""
    command = [sys.executable, gpu_suite.__file__, "--device", "cpu", "--quick", "--json", str(json_file)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert json_file.is_file(), done.stderr
    return done.returncode, json.loads(json_file.read_text()), done.stdout


@pytest.mark.slow
def test_every_section_runs(work: Path, tmp_path: Path) -> None:
    status, report, output = run_suite(tmp_path / "report.json", "--work", str(work), "--cpus", "1", "2")
    assert status == 0, output
    # They ran, and skipped themselves.
    (tests,) = [job for job in report["jobs"] if job["section"] == "tests"]
    assert "skipped" in tests["text"].splitlines()[-1]
    assert report["tests_passed"] is None
    assert {job["status"] for job in report["jobs"] if job["section"] != "peer"} == {"done"}
    assert report["machine"]["gpu"] is None
    assert {row["cpus"] for row in report["speed"]} >= {1}
    for row in report["speed"]:
        assert (row["size"], row["side"], row["mode"]) == ("tiny", "autoseg", "eager")
        assert row["ratio"] == pytest.approx(row["whole_loop_steps_per_s"] / row["no_data_steps_per_s"], rel=0.01)
        assert row["no_data_busy"] is None
    folds = report["folds"]
    assert [fold["fold"] for fold in folds["folds"]] == [0, 1]
    assert [fold["steps"] for fold in folds["folds"]] == [2, 2]
    assert folds["label_dice"].keys() == LABELS
    assert all(0 <= value <= 1 for value in folds["label_dice"].values() if value is not None)
    assert folds["n_cases"] == 3
    assert [row["preset"] for row in report["memory"]] == ["unet", "resenc-l"]
    assert report["prediction"][0]["predict_s"] > 0
    (left_out,) = [job for job in report["jobs"] if job["section"] == "peer"]
    assert (left_out["status"], left_out["text"]) == ("skipped", "--peer was not given")
    # The tables come last, and the machine in the last line.
    assert output.rstrip().splitlines()[-1].startswith(report["machine"]["cpu"])
    assert "Dice of 3 cases, on the network's" in output


def test_a_failure_leaves_the_other_sections_as_they_are(work: Path, tmp_path: Path) -> None:
    broken = tmp_path / "work"
    broken.mkdir()
    for file in ("plan.json", "splits.json"):
        (broken / file).write_text((work / file).read_text())
    arguments = ("--sections", "folds", "prediction", "--work", str(broken), "--folds", "1")
    status, report, output = run_suite(tmp_path / "report.json", *arguments)
    assert status == 1
    failed, done = report["jobs"]
    assert (failed["section"], failed["status"], done["status"]) == ("folds", "failed", "done")
    assert "the preprocessed case cannot be read" in failed["text"]
    assert "the preprocessed case cannot be read" in output
    assert report["folds"] is None
    assert report["prediction"]


def test_what_does_not_fit_the_time_is_left_out(tmp_path: Path) -> None:
    arguments = ("--sections", "memory", "prediction", "--max-time", "0.1")
    status, report, output = run_suite(tmp_path / "report.json", *arguments)
    assert status == 0
    assert [job["status"] for job in report["jobs"]] == ["skipped"] * 3
    assert "not done" in output


def test_a_process_that_takes_too_long_is_ended_and_its_results_are_kept() -> None:
    child = f"import time; print('{gpu_clock.RESULT}' + '{{\"found\": 1}}', flush=True); time.sleep(60)"
    # It leaves another process behind, which would hold the output open.
    text = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    job = gpu_suite.Job(section="speed", name="sleeps", command=(sys.executable, "-c", text), n_cpus=1)
    outcome = gpu_suite.run_process(job, 10.0)
    assert outcome.status == "out of time"
    assert outcome.results == [{"found": 1}]
    assert outcome.seconds < 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose utilization torch knows")
def test_utilization_is_asked_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, told = tmp_path / "nvidia-smi", tmp_path / "told"
    tool.write_text(f"#!/bin/sh\n[ $# = 0 ] && exit\nwhile true; do echo 40; echo 60; >'{told}'; sleep 0.1; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    utilization = gpu_clock.Utilization(torch.device("cuda"))
    utilization.start()
    for _ in range(1000):
        if told.exists():
            break
        time.sleep(0.01)
    utilization.stop()
    assert utilization.source == "nvidia-smi"
    assert utilization.percent == pytest.approx(50, abs=10)


def speed(side: str, what: str, cpus: int, steps_per_s: float, mode: str = "eager") -> dict[str, Any]:
    found = {"size": "liver", "side": side, "what": what, "cpus": cpus, "mode": mode, "steps_per_s": steps_per_s}
    return found | {"utilization": 90.0, "reserved_gib": 1.0}


def test_goals_take_our_fastest_mode_and_the_peers_best_case() -> None:
    results = [
        speed("autoseg", "no data", 2, 10.0),
        speed("autoseg", "whole loop", 2, 9.9),
        speed("autoseg", "no data", 2, 12.0, "compiled"),
        speed("autoseg", "whole loop", 2, 9.0, "compiled"),
        speed("autoseg", "no data", 16, 13.0, "compiled"),
        speed("nnU-Net", "no data", 2, 4.0, "compiled"),
        speed("nnU-Net", "no data", 16, 6.0, "compiled"),
        speed("nnU-Net", "whole loop", 2, 1.0, "compiled"),
    ]
    goals = {goal["goal"].partition(": ")[2]: goal["found"] for goal in gpu_report.compare_with_goals(results)}
    assert goals == {
        "whole loop / no data": 0.75,
        "whole loop / nnU-Net's best case": 1.5,
        "whole loop / nnU-Net's whole loop on the same": 9.0,
    }
    assert [goal["met"] for goal in gpu_report.compare_with_goals(results)] == [False, True, None]
    row = next(row for row in gpu_report.pair_speeds(results) if row["cpus"] == 16 and row["side"] == "autoseg")
    assert "ratio" not in row


def test_cross_validated_dice_is_the_mean_over_cases_that_have_the_label() -> None:
    cases = [
        {"what": "case", "fold": 0, "case": "a", "dice": {"organ": 0.5, "lesion": None}},
        {"what": "case", "fold": 0, "case": "b", "dice": {"organ": 0.7, "lesion": 0.2}},
        {"what": "case", "fold": 1, "case": "c", "dice": {"organ": 0.9, "lesion": None}},
    ]
    folds = [{"what": "fold", "fold": 0}, {"what": "fold", "fold": 1}]
    found = gpu_report.cross_validate(cases + folds)
    assert found["label_dice"] == {"organ": 0.7, "lesion": 0.2}
    assert found["mean_dice"] == pytest.approx(0.45)
    assert [fold["mean_dice"] for fold in found["folds"]] == [0.4, 0.9]
    assert found["folds"][1]["label_dice"] == {"organ": 0.9, "lesion": None}
