"""The most memory a part of a process used.

On a CUDA device this is what torch's allocator held at most. Elsewhere it is the resident set of the whole
process (code, libraries and data included), so that two arms are compared by their difference and not by
their ratio.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_bytes", "reset_peak"]


def reset_peak() -> None:
    """Start a new measurement, where the system allows it (Linux and CUDA)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # Writing 5 resets the peak resident set: proc(5), /proc/pid/clear_refs.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the most bytes in use since ``reset_peak`` (or ever, where that cannot reset)."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
