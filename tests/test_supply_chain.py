"""Nothing is fetched and nothing is told to anyone: the whole line runs where no network can be reached."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIENTS = {"aiohttp", "ftplib", "http", "httpx", "imaplib", "poplib", "requests", "smtplib", "telnetlib", "urllib"}

# Python runs a module of this name when it starts, in this process and in all that it starts with the same environment.
# The hook sees what the interpreter does, however a package came by the function.
BLOCK = """
import os, socket, sys

def refuse(event, arguments):
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.gethostname"):
        return
    if arguments and getattr(arguments[0], "family", None) == socket.AF_UNIX:
        return
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{event} {arguments}\\n")
    raise PermissionError(f"no network here: {event}")

sys.addaudithook(refuse)
"""

# As a user types the commands, in one process because starting one takes seconds.
WHOLE_LINE = """
import json, sys
from pathlib import Path
from autoseg.cli import main

def autoseg(*arguments):
    sys.argv = ["autoseg", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)

dataset = sys.argv[1]
autoseg("check", dataset)
autoseg("plan", dataset, "--folds", "2", "--no-preprocess")
# As a person may edit it: a network of a few thousand weights.
file = Path("autoseg-work/plan.json")
plan = json.loads(file.read_text())
for configuration in plan["configurations"].values():
    network = configuration["network"]
    network["features"] = [4 + 2 * stage for stage in range(len(network["features"]))]
file.write_text(json.dumps(plan))
autoseg("train", "--iterations", "2", "--device", "cpu")
autoseg("select")
autoseg("export", "model.autoseg")
autoseg("predict", f"{dataset}/imagesTs", "out", "--model", "model.autoseg", "--device", "cpu", "--speed", "fast")
autoseg("evaluate", "out", f"{dataset}/labelsTs")
autoseg("report")
autoseg("report", "--predictions", "out")
"""


def run_without_network(code: str, *arguments: object, folder: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs Python code in `folder` where every use of a network fails; the process, and what was tried."""
    (folder / "block").mkdir()
    (folder / "block" / "sitecustomize.py").write_text(BLOCK)
    log = folder / "network.log"
    environment = os.environ | {"PYTHONPATH": str(folder / "block"), "NETWORK_LOG": str(log), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done, log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("attempt", "event"),
    [
        ("socket.socket().connect(('192.0.2.1', 80))", "socket.connect"),
        ("socket.socket().connect_ex(('192.0.2.1', 80))", "socket.connect"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "socket.sendto"),
        ("socket.getaddrinfo('example.org', 80)", "socket.getaddrinfo"),
        ("socket.gethostbyname('example.org')", "socket.gethostbyname"),
    ],
)
def test_the_block_notices_attempts(attempt: str, event: str, tmp_path: Path) -> None:
    done, tried = run_without_network(f"import socket; {attempt}", folder=tmp_path)
    assert done.returncode == 1
    assert "no network here" in done.stderr
    assert event in tried


def test_sockets_of_this_machine_are_let_through(tmp_path: Path) -> None:
    code = "import socket; a, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'"
    done, tried = run_without_network(code, folder=tmp_path)
    assert (done.returncode, tried) == (0, ""), done.stderr


def test_the_whole_line_needs_no_network(tiny_dataset: Path, tmp_path: Path) -> None:
    done, tried = run_without_network(WHOLE_LINE, tiny_dataset, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tried == ""
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert (tmp_path / "out" / "autoseg_report.html").is_file()


def test_no_module_imports_a_client_of_a_network() -> None:
    found = []
    for file in sorted((ROOT / "autoseg").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in CLIENTS]
    assert not found


def test_versions_to_test_are_named(tmp_path: Path) -> None:
    """The script says what it wants instead of building an environment of nothing."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "test-versions", tmp_path / "scripts")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "oldest|newest" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
