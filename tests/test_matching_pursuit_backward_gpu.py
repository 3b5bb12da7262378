"""matching_pursuit_backward on GPUs where it takes turns: chunks of tokens, tiles of steps, large D."""

import pytest
import torch
from backends import GPU_BACKENDS, missing
from knobs import turned
from oracle import random

from fastsparse import reference

BACKENDS = [name for name in GPU_BACKENDS if not missing(name)]


@pytest.fixture(params=BACKENDS)
def gradients(request):
    """``gradients(arguments, scratch)`` on a backend, in chunks of so many bytes of scratch memory."""
    backend = GPU_BACKENDS[request.param]

    def run(arguments: tuple, scratch: int) -> tuple[torch.Tensor, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if backend.library is not None:
                with turned(backend.library(), bytes=scratch):
                    return backend.run("matching_pursuit_backward", *arguments)
            from fastsparse.kernels import matching_pursuit_backward

            patch.setattr(matching_pursuit_backward, "SCRATCH", scratch)
            return backend.run("matching_pursuit_backward", *arguments)

    return run


def problem(N: int, D: int, M: int, k: int, dtype: torch.dtype, normalized: bool) -> tuple:
    """A pursuit's outputs, some rows of which stop early, and gradients that reach them."""
    x, dictionary = random(N, D, seed=1), random(M, D, seed=2)
    scale = 1.0 if normalized else 1.3
    dictionary = dictionary / dictionary.norm(dim=1, keepdim=True) * scale
    x, dictionary = x.to(dtype), dictionary.to(dtype)
    tol = x.float().norm(dim=1).median().item() / 2
    pursued = reference.matching_pursuit(x, dictionary, k, tol, False, normalized)
    d_values, d_residual = random(N, k, seed=3, dtype=dtype), random(N, D, seed=4, dtype=dtype)
    return (*pursued, dictionary, d_values, d_residual, normalized, True, True)


# Chunks of a token each; chunks that end anywhere in an atom that goes on through several tiles; more columns
# than CUDA's registers hold.
@pytest.mark.parametrize(
    ("shape", "tokens", "dtype", "normalized"),
    [
        ((7, 12, 9, 3), 1, torch.bfloat16, False),
        ((90, 5, 2, 9), 60, torch.float32, False),
        ((90, 5, 2, 9), 90, torch.float32, True),
        ((2, 8200, 3, 2), 1, torch.float32, True),
    ],
)
def test_chunks(gradients, shape, tokens, dtype, normalized):
    arguments = problem(*shape, dtype, normalized)
    right = reference.matching_pursuit_backward(*arguments)
    _, D, _, k = shape
    found, again = (gradients(arguments, 4 * tokens * D * k) for _ in range(2))
    for mine, same, theirs in zip(found, again, right, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, same)
        error = (mine.double() - theirs.double()).abs().max()
        assert error <= 32 * torch.finfo(dtype).eps * theirs.double().abs().max()
