"""`results.json`, the same for every kind of model."""

import datetime
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai.training.run import write_text


def write_results(
    output: Path,
    benchmarks: Mapping[str, Mapping[str, Any]],
    *,
    start: float,
    limit: int | None,
    provenance: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Writes and returns `{"benchmarks": {name: scores}, "date", "seconds" since `start`, "limit", **provenance}`."""
    results = {
        "benchmarks": dict(benchmarks),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 2),
        "limit": limit,
        **(provenance or {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results
