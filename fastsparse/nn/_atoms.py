"""Matrices of atoms, one a row: their norms, gradients along them, and the rows that a process holds."""

import torch
from torch import Tensor, distributed

# Rows are handled in blocks of about this many numbers, so that a second look at a row finds it in the cache.
_BLOCK = 2**18


@torch.no_grad()
def normalize_(atoms: Tensor) -> None:
    """Scale every row to norm 1; a row of zeros stays."""
    wide = torch.promote_types(atoms.dtype, torch.float32)
    for rows in _blocks(atoms):
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
        rows.div_(norms.clamp_min_(torch.finfo(wide).tiny))


@torch.no_grad()
def remove_parallel_(gradient: Tensor, atoms: Tensor) -> None:
    """Take from every row of a gradient its part along the atom, which has norm 1."""
    for grad, rows in zip(_blocks(gradient), _blocks(atoms), strict=True):
        along = (grad * rows).sum(dim=1, keepdim=True)
        grad.addcmul_(rows, along, value=-1)


def own_rows(method: str, name: str, matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The rows of a (num_latents, d_model) matrix that this process holds, each of them whole.

    Raises:
        ValueError: the matrix is sharded otherwise than by rows.
    """
    if matrix.shape != shape:  # as FSDP1 and ZeRO-3 leave parameters, outside of their contexts
        raise ValueError(
            f"{method}: {name} must have shape (num_latents, d_model) = {shape}, "
            f"got shape {tuple(matrix.shape)}; gather what is sharded otherwise than by rows first"
        )
    placements = _placements(matrix)
    if not placements:
        return matrix
    if not all(place.is_replicate() or getattr(place, "dim", None) == 0 for place in placements):
        raise ValueError(
            f"{method}: {name} must be sharded by rows, Shard(0), or replicated, "
            f"got placements {tuple(placements)}"
        )
    return matrix.to_local()


def sum_of_rows_(total: Tensor, matrix: Tensor) -> None:
    """Add up, in place, what processes that hold rows of a matrix each have summed over their own."""
    for dim, place in enumerate(_placements(matrix)):
        if not place.is_replicate():
            distributed.all_reduce(total, group=matrix.device_mesh.get_group(dim))


def all_rows(rows: Tensor, matrix: Tensor) -> tuple[Tensor, slice]:
    """Of the rows that this process holds of a matrix those of all processes, and where its own are."""
    placements = _placements(matrix)
    if all(place.is_replicate() for place in placements):
        return rows, slice(None)
    from torch.distributed.tensor import DTensor

    mesh = matrix.device_mesh
    told = {"shape": matrix.shape, "stride": matrix.stride()}
    every = DTensor.from_local(torch.arange(len(matrix), device=rows.device), mesh)
    own = every.redistribute(mesh, placements).to_local()
    return DTensor.from_local(rows, mesh, placements, **told).full_tensor(), own


def _placements(matrix: Tensor) -> tuple:
    return getattr(matrix, "placements", ())  # importing DTensor to ask for it takes seconds


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each on the CPU; the whole matrix elsewhere, where launches cost more."""
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, _BLOCK // matrix.shape[1]))
