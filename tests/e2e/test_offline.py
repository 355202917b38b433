"""Once its assets are unpacked, the main job on the embedded model asks no network (DATA 1)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae import assets

REFUSING = '''
import socket

def refuse(self, address, *rest):
    if self.family == socket.AF_UNIX:
        return socket.socket._as_it_was(self, address, *rest)
    with open({log!r}, "a") as file:
        file.write(f"{{address}}\\n")
    raise OSError(101, "Network is unreachable")

socket.socket._as_it_was = socket.socket.connect
socket.socket.connect = refuse
socket.getaddrinfo = lambda host, *rest, **more: refuse(socket.socket(), host)
'''


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_embedded_model_runs_without_a_network(tmp_path: Path) -> None:
    for name in assets.ASSETS:
        assets.fetch(name)
    log, root = tmp_path / "asked.txt", tmp_path / "results"
    (tmp_path / "sitecustomize.py").write_text(REFUSING.format(log=str(log)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    words = ["--preset", "tiny", "--architectures", "topk", "--interp.latents", "2", "--effect-windows", "0",
             "--evals", "reconstruction", "explanation", "--root", str(root)]  # fmt: skip
    command = [sys.executable, "-m", "evals.run_all", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not log.exists(), log.read_text()
    assert not json.loads((root / "run.json").read_text())["failures"] and (root / "site" / "index.html").is_file()
    ask = "import socket; socket.create_connection(('127.0.0.1', 9))"
    refused = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    assert "unreachable" in refused.stderr and log.exists()  # it would have been noticed
