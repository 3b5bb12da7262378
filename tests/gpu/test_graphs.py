"""Every op can be captured in a CUDA graph, and a replay computes on what its inputs hold then."""

import pytest
import torch
from gpu.problems import PROBLEMS, D, N, autoencoder, parameters, same
from samples import LARGE, SAMPLES, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def captured(run):
    """A graph of ``run`` and what it returned while captured; warmed up as PyTorch's documents ask."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # Triton compiles and tunes, libraries allocate their workspaces
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if SAMPLES[name].counted])
def test_replay(cuda, backend, name, dtype):
    problem = PROBLEMS[name]
    inputs = problem.tensors(cuda, dtype)
    graph, out = captured(lambda: problem(inputs))
    for seed in (0, 1, 2):
        fresh = problem.tensors(cuda, dtype, seed)
        for mine, other in zip(inputs, fresh, strict=True):
            mine.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert same(out, problem(fresh)), f"inputs {seed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay_of_a_training_step(cuda, backend, dtype):
    leaves, x = parameters(cuda, dtype), make("x", LARGE, dtype=dtype).to(cuda)

    def step():
        loss = autoencoder(x, *leaves)
        return (loss, *torch.autograd.grad(loss, leaves))

    graph, out = captured(step)
    for seed in (0, 1):
        x.copy_(make("x", LARGE, dtype=dtype, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        got = tuple(tensor.clone() for tensor in out)
        assert same(got, step())


def test_a_graph_without_a_named_backend(cuda):
    leaves, x = parameters(cuda), make("x", LARGE).to(cuda)
    graph, (out,) = captured(lambda: (autoencoder(x, *leaves).detach(),))
    x.copy_(make("x", LARGE, seed=1))
    graph.replay()
    torch.testing.assert_close(out, autoencoder(x, *leaves).detach(), rtol=0, atol=0)
    assert x.shape == (N, D)
