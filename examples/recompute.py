"""Recomputes the scores of a surface from its JSON alone: `uma rank ... --surface FILE --json > a.json`, or the decision record."""

import json
import sys
from pathlib import Path

data = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
product = (data.get("surface") or data["options"]["surface"])["aggregate"] == "product"
results, worst = data.get("all_results") or data["results"], 0.0
for result in results:
    total, score = 0.0, 1.0 if product else 0.0
    for line in result["ledger"]:
        total += line["weight"]
    for line in result["ledger"]:
        if product:
            score *= 1.0 - line["weight"] * (1.0 - line["value"])
        else:
            score += line["weight"] * line["value"] / total
    stated = result["score"] if isinstance(result["score"], float) else float.fromhex(result["score"])
    worst = max(worst, abs(min(1.0, score) - stated))
print(f"{len(results)} scores recomputed, largest difference {worst!r}")
sys.exit(worst != 0.0)
