"""Where there is a GPU, both of our backends for it must be there."""

import pytest
import torch

import fastsparse
from fastsparse.info import environment


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_is_available(cuda, name):
    backend = fastsparse.backends()[name]
    assert backend.available, backend.detail


def test_the_device_is_described(cuda):
    assert torch.cuda.get_device_name(cuda) in str(environment()["cuda"])


def test_tensors_of_a_gpu_run_without_a_name(cuda):
    x = torch.eye(4, device=cuda)
    values, indices = fastsparse.topk_encode(x, x, k=2)
    assert values.device == indices.device == x.device
    assert values[:, 0].tolist() == [1.0] * 4
