"""Virtual environments of the peers, under the ignored folder `.peers/`.

Knows venv and pip; does not know what is installed for what.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.rows import ROOT

HOME = Path(os.environ.get("UMA_PEERS_HOME") or ROOT / ".peers")


def environment(name: str, requirements: Sequence[str], build: Mapping[str, str]) -> Path:
    """The Python of peer `name`, made on first use and made anew when its requirements change. `build` is added to pip's environment."""
    home = HOME / name
    python, stamp = home / "venv/bin/python", home / "installed"
    wanted = hashlib.sha256(repr((sorted(requirements), sorted(build.items()))).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"{name}: installing {', '.join(requirements)}", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], check=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for step in requirements:  # in order: torch's CPU build first, so that nothing else pulls another
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", step], check=True, env=env | dict(build))
    stamp.write_text(wanted)
    return python
