"""What PyTorch's allocator held on a CPU, by its own events: exact, the same at every run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any], before: int = 0) -> int:
    """The most bytes held at once while a function runs.

    Args:
        before: held when it starts.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    held = most = before
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
