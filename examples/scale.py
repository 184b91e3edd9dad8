"""Two engines behind one address: `uma serve --replicas 2` (extras `server` and `ray`), asked with the ordinary client.

`python examples/scale.py [MODEL]` starts a cluster of two on this machine, asks it, and stops it.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from uma_engine.client import Client

JOB = "We need a Rust developer who knows PostgreSQL."
PEOPLE = ["Ten years of Rust and databases.", "A careful nurse.", "Learns Rust, knows SQL well."]


def ask(address: str) -> None:
    with Client(address) as client:
        ranking = client.rank(JOB, PEOPLE)
    for place, ranked in enumerate(ranking, 1):
        print(f"{place}. {PEOPLE[ranked.index]:32} {ranked.score:.4f}")


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", model, "--port", "0"]
    command += ["--replicas", "2", "--threads", "1", "--kv-cache-mb", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            assert cluster.stdout is not None
            for line in cluster.stdout:
                print(line, end="")
                if found := re.search(r"https?://[\d.:]+", line):
                    ask(found.group())
                    break
        finally:
            cluster.send_signal(signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
