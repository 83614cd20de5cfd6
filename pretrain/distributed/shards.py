"""Tensors of which every rank holds some rows (DTensors over a device mesh): the rows that lie here, and where they lie
in the whole. A plain tensor is whole on every rank."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset(tensor: Tensor) -> int:
    """The place of this rank's first element in the row-major whole.

    Rows are dealt as torch.chunk deals them: ceil(rows / ranks) each, the last ranks fewer or none.
    """
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    dim = mesh.ndim - 1  # of a hybrid mesh the last; along the first all hold the same
    each = -(-tensor.shape[0] // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * each, tensor.shape[0])
    return first * tensor.shape[1:].numel()


def own_part(tensor: DTensor) -> tuple[int, Tensor]:
    """(offset, flat elements) that are this rank's to write: of its rows a share, where several ranks hold them."""
    flat = local(tensor.detach()).reshape(-1)
    mesh = tensor.device_mesh
    copies, mine = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim > 1 else (1, 0)
    lo, hi = mine * len(flat) // copies, (mine + 1) * len(flat) // copies
    return offset(tensor) + lo, flat[lo:hi]


def whole(tensor: Tensor) -> Tensor:
    """All of it on every rank, where its rows lie; all ranks call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    # rows kept in host memory travel by way of the device that the ranks talk through
    there = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(there, DTensor)
    return there.full_tensor().to(local(tensor).device)
