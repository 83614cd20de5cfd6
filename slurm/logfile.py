"""The logs that jobs write: where each is, and how an attempt begins in it."""

from __future__ import annotations

from pathlib import Path


def log_file(folder: Path, job: str, rank: int = 0, stream: str = "err") -> Path:
    """The log of one rank of a job, as submitit names it."""
    return folder / f"{job}_{rank}_log.{stream}"


def heading(job: str, restart: int, rank: int, host: str) -> str:
    """The line that begins an attempt in the log of a rank."""
    return f"--- job {job}, restart {restart}: rank {rank} on {host}"
