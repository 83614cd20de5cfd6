"""What torch, CUDA, NCCL and gloo say when a GPU, a link or another rank fails, as what a person can do about it; and
any other error of a rank, with its place."""

from __future__ import annotations

import platform
import sysconfig
import traceback
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import UserError
from pretrain.exit_codes import CRASHED, HUNG, LOST

_HERE = Path(__file__).parents[1]
_PYTHON = sysconfig.get_path("stdlib")


class _Failure(NamedTuple):
    signs: tuple[str, ...]
    told: str
    exit_code: int


_EXCLUDE = "The same command resumes; leave {host} out (Slurm: --exclude={host}) and have its GPUs looked at"

_FAILURES = (
    _Failure(
        ("ECC error", "uncorrectable", "fallen off the bus", "GPU is lost", "Xid", "hardware error", "NVLink"),
        f"GPU {{gpu}} is broken. {_EXCLUDE} (`nvidia-smi -q -d ECC,PAGE_RETIREMENT`, `dmesg | grep Xid`)",
        CRASHED,
    ),
    _Failure(
        ("device-side assert",),
        "a kernel on GPU {gpu} refused an index or a value, a label beyond the classes for one. The lines above it are "
        "of another place: CUDA_LAUNCH_BLOCKING=1 before the same command shows the right one",
        CRASHED,
    ),
    _Failure(
        ("illegal memory access", "unspecified launch failure", "misaligned address", "CUDNN_STATUS_EXECUTION_FAILED"),
        "a kernel on GPU {gpu} broke off. CUDA_LAUNCH_BLOCKING=1 before the same command shows which. Should it never "
        f"happen on another node, GPU {{gpu}} is broken. {_EXCLUDE}",
        CRASHED,
    ),
    _Failure(
        ("busy or unavailable", "invalid device ordinal", "no CUDA-capable device", "driver version is insufficient"),
        "GPU {gpu} cannot be used: see `nvidia-smi` on {host} for other processes on it and for what the driver says, "
        "and start one process a GPU",
        CRASHED,
    ),
    _Failure(
        ("imed out waiting", "imed out after", "operation timeout", "Socket Timeout", "timeout caused pair closure"),
        "it waited too long for another rank, which is stuck or gone: RUN/heartbeat shows where each stands. The same "
        "command resumes",
        HUNG,
    ),
    _Failure(
        (
            "Connection closed by peer",
            "Connection reset by peer",
            "remote process exited",
            "Broken pipe",
            "communicator was aborted",
            "ncclRemoteError",
        ),
        "it lost another rank, which ended first: its own message says why, unless it was killed",
        LOST,
    ),
    _Failure(
        ("NCCL error", "ncclUnhandled", "ncclSystemError", "ncclInternalError"),
        "NCCL failed at GPU {gpu}. NCCL_DEBUG=INFO before the same command says at which link; "
        "NCCL_SOCKET_IFNAME chooses the network. Should it be always this node: leave {host} out "
        "(Slurm: --exclude={host})",
        CRASHED,
    ),
)


def explained(error: RuntimeError, rank: int, device: str) -> UserError | None:
    """`error` of `rank` (on `device`, such as "cuda:3") as a UserError with what to do; None: not one that is known."""
    text = str(error)
    for failure in _FAILURES:
        if any(sign in text for sign in failure.signs):
            host = platform.node()
            told = failure.told.format(host=host, gpu=device.removeprefix("cuda:"))
            if failure.exit_code == LOST:  # how the line broke tells nothing
                return UserError(f"rank {rank} on {host}: {told}", exit_code=LOST)
            said = text.strip().splitlines()[0]
            return UserError(f"rank {rank} on {host}: {told}. ({said}{place(error)})", exit_code=failure.exit_code)
    return None


def crashed(error: Exception, rank: int, *, whole: bool) -> UserError:
    """`error` of `rank`, which nobody foresaw, as one line with its place; `whole`: the traceback below it."""
    said = f"rank {rank} on {platform.node()}: {type(error).__name__}: {error}{place(error)}"
    return UserError(said + f"\n{''.join(traceback.format_exception(error))}" * whole, exit_code=CRASHED)


def _is_own(file: Path) -> bool:
    """Neither Python's nor an installed package's, but for this one."""
    others = {"site-packages", "dist-packages"} & set(file.parts) or file.is_relative_to(_PYTHON)
    return file.is_relative_to(_HERE) or not (others or file.name.startswith("<frozen"))


def place(error: Exception) -> str:
    """Where `error` was raised, as ", file:line in function": the innermost line of ours or of a plug-in, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(Path(frame.filename))]
    return "".join(f", {f.filename}:{f.lineno} in {f.name}" for f in (own or frames)[-1:])
