"""Work goes to the caller's stream and device, from any thread."""

import threading

import pytest
import torch
from gpu.problems import PROBLEMS, same

problems = pytest.mark.parametrize("name", PROBLEMS)
LONG = 200_000_000  # cycles: a tenth of a second


@problems
def test_side_stream(cuda, backend, name):
    """What the side stream writes late, the op must read: on another stream it would come too early."""
    problem = PROBLEMS[name]
    fresh = problem.tensors(cuda, seed=1)
    expected = problem(fresh)
    inputs = problem.tensors(cuda, seed=0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for mine, other in zip(inputs, fresh, strict=True):
            mine.copy_(other)
        out = problem(inputs)
    stream.synchronize()
    assert same(out, expected)


def test_two_threads(cuda, backend):
    """Each on a stream of its own, on problems of its own, at once."""
    rounds, faults = 20, []
    expected = {
        (name, seed): problem(problem.tensors(cuda, seed=seed))
        for name, problem in PROBLEMS.items()
        for seed in (0, 1)
    }
    torch.cuda.synchronize()
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                inputs = {name: problem.tensors(cuda, seed=seed) for name, problem in PROBLEMS.items()}
                start.wait(60)
                for _ in range(rounds):
                    for name, problem in PROBLEMS.items():
                        out = problem(inputs[name])
                        torch.cuda.current_stream().synchronize()
                        if not same(out, expected[name, seed]):
                            faults.append(f"{name}, inputs {seed}")
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not faults


@problems
def test_second_device(cuda, backend, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    problem, there = PROBLEMS[name], torch.device("cuda", 1)
    with torch.cuda.device(0):
        out = problem(problem.tensors(there))
        assert torch.cuda.current_device() == 0
        assert all(tensor.device == there for tensor in out)
        expected = problem(problem.tensors(torch.device("cuda", 0)))
    assert same(tuple(tensor.cpu() for tensor in out), tuple(tensor.cpu() for tensor in expected))
