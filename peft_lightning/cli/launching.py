"""Jobs of several processes: what is refused before they start, and what one says when another one is gone."""

from __future__ import annotations

import os
from collections.abc import Mapping

from peft_lightning.errors import UsageError

__all__ = ["check_launcher", "lost_peer"]

# What gloo, NCCL and their store say when the other end of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe", "recvValue")


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse restarts that would wait for ever: of torchrun, which shares its agent's store with the processes.

    Those that come back find the addresses of those before them there (pytorch/pytorch issues 135712 and 167288).

    Args:
        environment: of this process.

    Raises:
        UsageError: says what to set.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts.isdigit() and int(restarts) and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UsageError(
            f"torchrun --max-restarts = {restarts}: processes that come back would look for those that are gone; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --rdzv-backend=c10d or --standalone, or leave it at 0"
        )


def lost_peer(error: BaseException) -> str:
    """What to say of an error that another process of the job has caused by ending; empty if it is none of these."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in _GONE):
        return ""
    return (
        "another process of this job has ended, so this one ends too; why is in that one's output (killed, or out of "
        f"memory, if there is nothing); with --resume auto the job goes on from its last checkpoint ({text[:200]})"
    )
