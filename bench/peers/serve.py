"""The worker's side: `PYTHON -m bench.peers.serve PEER VARIANT SETTINGS.json`, in the peer's own environment.

Knows how to answer one line at a time with seconds and scores; does not know who asks. Standard library only.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path


def main() -> int:
    peer, variant, settings_path = sys.argv[1:4]
    settings = json.loads(Path(settings_path).read_text())
    module = importlib.import_module(f"bench.peers.{peer}")
    if variant == "prepare":
        module.prepare(settings)
        return 0
    workload = json.loads(Path(settings["workload"]).read_text())
    tasks, version = module.start(variant, settings, workload)
    say({"ready": True, "version": version, "tasks": sorted(tasks)})
    for line in sys.stdin:
        task, _, size = line.strip().partition(" ")
        if task == "quit":
            say({"peak_rss_mib": peak_rss_mib()})
            return 0
        began, cpu = time.perf_counter(), time.process_time()
        scores = tasks[task](int(size))
        say({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "scores": scores})
    return 0


def peak_rss_mib() -> float:
    """Peak memory of this program. (getrusage counts what the process held before it became this program, too.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(reply: dict[str, object]) -> None:
    print("\n" + json.dumps(reply), flush=True)  # some libraries leave an unfinished line


if __name__ == "__main__":
    sys.exit(main())
