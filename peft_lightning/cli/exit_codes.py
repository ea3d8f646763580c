"""The exit statuses of the command, with what each means."""

from __future__ import annotations

__all__ = ["EXIT_CODES"]

EXIT_CODES = {
    0: "all went well",
    1: "failed: data, a file or the disk cannot be used, a study's cell failed, doctor found something broken",
    2: "wrong usage: an option, a configuration or a grid has a value that is not allowed",
    130: "stopped by Ctrl-C; what is saved stays, and the same command goes on: fit with --resume auto",
    138: "stopped by SIGUSR1 (a cluster's warning); the same goes for it",
    143: "stopped by SIGTERM; the same goes for it",
}
"""What the command's exit status says; beside 0 it comes with one line that begins with ``peft-lightning: error:``, or
with the place of the checkpoint that a signal left."""
