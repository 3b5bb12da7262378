"""What holds of every op alike, on every backend: of its samples, and of the gradients through them."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from backends import GPU_BACKENDS, host_backend_names, missing
from oracle import random
from samples import CONSTANTS, CORE, SAMPLES, SMALL, Sample, Sizes, calls, recorded, tensors
from test_composition import ONCE
from torch import Tensor

import fastsparse
from fastsparse.ops._library import OPS

every_sample = pytest.mark.parametrize("name", SAMPLES)

# Many blocks of rows and of latents, some of which are in most rows; and of channels and steps.
ROWS = Sizes(N=600, D=37, M=600, k=9, many=200, T=2, H=4)
SEQUENCES = ROWS._replace(N=5, T=70, H=37)


def differentiable(outs: tuple[Tensor, ...]) -> list[Tensor]:
    return [out for out in outs if out.requires_grad]


def gradients(outs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """From upstream gradients that differ from entry to entry."""
    upstream = [random(*out.shape, seed=30 + i, dtype=out.dtype) for i, out in enumerate(outs)]
    return torch.autograd.grad(outs, leaves, upstream, retain_graph=True, allow_unused=True)


def prepared(sample: Sample, sizes: Sizes = SMALL, dtype: torch.dtype = torch.float32):
    """A sample's tensors, and those of them that want a gradient."""
    made = sample.make(sizes, dtype=dtype)
    names = zip(sample.names, made, strict=True)
    return made, [tensor.requires_grad_() for name, tensor in names if name not in CONSTANTS]


@every_sample
def test_inputs_are_left_alone(backend, name):
    """By the op, by its gradient, and by whoever writes into what came out."""
    sample = SAMPLES[name]
    made, leaves = prepared(sample)
    before = [tensor.detach().clone() for tensor in made]
    outs = sample.run(SMALL, made)
    kept = [out.detach().clone() for out in outs]
    gradients(differentiable(outs), leaves)
    assert all(torch.equal(*pair) for pair in zip(outs, kept, strict=True))
    for out in outs:
        out.detach().add_(1)
    assert all(torch.equal(*pair) for pair in zip(made, before, strict=True))


@pytest.mark.parametrize("name", CORE)
def test_only_needed_gradients(backend, name):
    """Of every output to every input alone, which is the same as among others; whole numbers have none."""
    sample = SAMPLES[name]
    made, leaves = prepared(sample)
    outs = sample.run(SMALL, made)
    assert all(out.requires_grad == out.is_floating_point() for out in outs)
    every = [gradients([out], leaves) for out in differentiable(outs)]
    for place, wanted in enumerate(leaves):
        for leaf in leaves:
            leaf.requires_grad_(leaf is wanted)
        for out, right in zip(differentiable(sample.run(SMALL, made)), every, strict=True):
            (found,) = gradients([out], [wanted])
            assert torch.equal(found, right[place])


@pytest.mark.parametrize("name", [name for name in CORE if name.startswith(ONCE)])
def test_second_derivatives_are_the_references(name):
    sample = SAMPLES[name]
    leaves = tensors(*sample.inputs, dtype=torch.float64)
    with fastsparse.use_backend("reference"):
        assert torch.autograd.gradgradcheck(sample, leaves, fast_mode=True)
    grad, *_ = torch.autograd.grad(
        sample(*leaves).square().sum(), leaves, create_graph=True, allow_unused=True
    )
    op = name.split(",")[0]
    assert "NotImplementedError" in getattr(fastsparse, op).__doc__
    named = op.removesuffix("_step")
    with pytest.raises(NotImplementedError, match=f"^{named}: second derivatives must be taken inside"):
        grad.sum().backward()


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_backward")])
def test_a_backward_makes_what_is_needed(backend, op):
    """And of the rest tensors without elements, which gradients of gradients can pass by."""
    overload = getattr(torch.ops.fastsparse, op).default
    names = [argument.name for argument in overload._schema.arguments]
    first = next(place for place, name in enumerate(names) if name.startswith("needs_"))
    for arguments in calls()[op]:
        given, flags = arguments[:first], arguments[first:]
        right = overload(*given, *flags)
        for needs in itertools.product((False, True), repeat=len(flags)):
            if all(flag or not need for flag, need in zip(flags, needs, strict=True)):
                found = overload(*given, *needs)
                for mine, whole in zip(found, right, strict=True):
                    assert mine.shape == (0,) or torch.equal(mine, whole)
                assert sum(mine.shape != (0,) for mine in found) >= sum(needs)
                assert any(needs) or all(mine.shape == (0,) for mine in found)


@every_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_and_threaded_runs_agree_bitwise(backend, threads, name, dtype):
    if backend in ("reference", "registered"):
        pytest.skip("the kernels alone promise it: the reference is PyTorch's own sums")
    if "triton-interpreted" in backend:
        pytest.skip("Triton's interpreter runs its programs one after another in one thread")
    sample, runs = SAMPLES[name], []
    sizes = SEQUENCES if "recurrence" in name else ROWS
    if backend not in host_backend_names():
        sizes = sizes._replace(N=min(sizes.N, 40))  # whatever the threads, blocks are as many
    for count in (1, 3):
        threads(count)
        made, leaves = prepared(sample, sizes, dtype)
        outs = sample.run(sizes, made)
        runs.append([*outs, *gradients(differentiable(outs), leaves)])
    for mine, other in zip(*runs, strict=True):
        assert mine is other is None or torch.equal(mine, other)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, sample in SAMPLES.items()
        if not sample.ragged and not re.search("recurrence|column", name)
    ],
)
def test_leading_dimensions(backend, name):
    """Tokens may have any, or none; what is made for latents is summed over all of them."""
    sample, sizes = SAMPLES[name], SMALL._replace(N=24)
    made = sample.make(sizes)

    def run(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        of_tokens = ("x", "values", "indices", "hot")
        return sample.run(
            sizes, [change(v) if n in of_tokens else v for n, v in zip(sample.names, made, strict=True)]
        )

    shaped = run(lambda tensor: tensor.unflatten(0, (2, 3, 4)))
    one, none = run(lambda tensor: tensor[3]), run(lambda tensor: tensor[:0].unflatten(0, (0, 3)))
    for flat, *found in zip(run(lambda tensor: tensor), shaped, one, none, strict=True):
        if name.startswith("spmm_t"):
            (alone,) = run(lambda tensor: tensor[3:4])
            right = flat, alone, torch.zeros_like(flat)
        else:
            right = flat.unflatten(0, (2, 3, 4)), flat[3], flat[:0].unflatten(0, (0, 3))
        torch.testing.assert_close(found, list(right))


@pytest.mark.parametrize(
    "name", [name for name, sample in SAMPLES.items() if sample.ragged and "x" in sample.names]
)
def test_leading_dimensions_are_rows_of_a_ragged_code(backend, name):
    sample, sizes = SAMPLES[name], SMALL._replace(N=24)
    made = sample.make(sizes)
    shaped = [
        tensor.unflatten(0, (2, 3, 4)) if its == "x" else tensor
        for its, tensor in zip(sample.names, made, strict=True)
    ]
    assert all(map(torch.equal, sample.run(sizes, shaped), sample.run(sizes, made)))


def packed_calls(steps: int) -> list[tuple[str, list]]:
    """Of every op that takes lengths, on three sequences."""
    sizes = SMALL._replace(N=steps, T=1, H=5)
    found = [call for name in SAMPLES if "packed" in name for call in recorded(SAMPLES[name], sizes)]
    a, b = random(1, steps, 2, 2, 5, seed=1, scale=0.5), random(1, steps, 2, 5, seed=2)
    h0, bounds = random(3, 2, 5, seed=3), torch.tensor([0, 3, 3, steps])
    for reverse in (False, True):
        found.append(("linear_recurrence", [a, b, h0, reverse, bounds]))
        found.append(("linear_recurrence_backward", [a, h0, reverse, bounds, b, b, True, True, True]))
    return found


@pytest.mark.parametrize("name", [name for name in GPU_BACKENDS if not missing(name)])
@pytest.mark.parametrize("steps", [40, 1300])  # in one segment, and in several
def test_bounds_that_nobody_checked_lead_nowhere_outside(name, steps):
    """A GPU takes them on trust: emulators raise where memory that isn't the kernel's is touched."""
    if name == "triton-interpreted" and steps > 40:
        pytest.skip("Triton's interpreter takes seconds for each")

    def run(op: str, arguments: list, *bounds: int) -> tuple[Tensor, ...]:
        names = [argument.name for argument in getattr(torch.ops.fastsparse, op).default._schema.arguments]
        given = list(arguments)
        given[names.index("cu_seqlens")] = torch.tensor(bounds)
        out = GPU_BACKENDS[name].run(op, *given)
        return out if isinstance(out, tuple) else (out,)

    for call in packed_calls(steps):
        assert all(map(torch.equal, run(*call, -(2**40), 3, 3, 2**40), run(*call, 0, 3, 3, steps))), call[0]
        run(*call, steps - 10, 20, -1, 2 * steps)
