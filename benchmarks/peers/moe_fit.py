"""moe-fit, a planner that predicts from what a token reads from storage, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any


def moe_fit_estimate(model: Path, folder: Path) -> str:
    """What moe-fit 0.1.0 says of a model's speed on this machine.

    Args:
        model: the GGUF file.
        folder: where it may write the 2 GiB file by which it measures the disk.

    Returns:
        Its range in tokens per second, or in words what it says instead.
    """
    if importlib.util.find_spec("moefit") is None:
        return "not installed"
    command = [sys.executable, "-m", "moefit.cli", "plan", str(model), "--json", "--disk", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if not ran.stdout:
        return f"failed: {ran.stderr.strip()[-200:]}"
    placement: dict[str, Any] = json.loads(ran.stdout)["placement"]
    if not placement["fits"]:
        return f"does not run: {placement['reason']}"
    low, high = placement["tokens_per_second_estimate"] or (math.nan, math.nan)
    return f"{low:.2f} to {high:.2f} tokens/s" if math.isfinite(low) else "no figure: the model fits the memory"
