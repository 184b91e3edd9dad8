"""Several processes: front ends that hold the connections, one engine process, and a supervisor that restarts what ends.

Knows frames between processes, retries and restarts; does not know what a request means or how it is computed. The engine process runs the
same application that `uma serve` runs in one process. Imports no torch: a front end is small and starts at once.
"""

from __future__ import annotations
