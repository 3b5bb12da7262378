"""What a GPU adds to the ways of calling an op wrongly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sparse_products import every_product

import fastsparse

TESTS = str(Path(__file__).parents[1])


def test_operands_on_different_devices(cuda, backend):
    x, weight = torch.ones(2, 4, device=cuda), torch.ones(8, 4)
    with pytest.raises(ValueError, match=r"weight must be on the device of x \(cuda:\d+\), got cpu"):
        fastsparse.topk_encode(x, weight, k=2)
    with pytest.raises(ValueError, match=r"indices must be on the device of values \(cuda:\d+\), got cpu"):
        fastsparse.spmm(x, torch.zeros(2, 4).long(), torch.ones(8, 4, device=cuda))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_cpu_tensors_on_a_backend_for_gpus(cuda, name):
    x = torch.ones(2, 4)
    with (
        fastsparse.use_backend(name),
        pytest.raises(RuntimeError, match=f"'{name}' was asked for and runs on cuda"),
    ):
        fastsparse.topk_encode(x, x, k=1)


def test_gpu_tensors_on_the_cpu_backend(cuda):
    if not fastsparse.backends()["cpu"].available:
        pytest.skip("the CPU kernels were not built")
    x = torch.ones(2, 4, device=cuda)
    with (
        fastsparse.use_backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' was asked for and runs on cpu"),
    ):
        fastsparse.topk_encode(x, x, k=1)


def test_fewer_eligible_latents_than_k(cuda, backend):
    x, weight = torch.ones(2, 4, device=cuda), torch.ones(8, 4, device=cuda)
    mask = torch.arange(8, device=cuda) < 3
    with pytest.raises(ValueError, match=r"number of eligible latents \(3\), got k=4"):
        fastsparse.topk_encode(x, weight, k=4, latent_mask=mask)


CHECKED = """
import sys, torch, fastsparse
from test_sparse_products import PRODUCTS
name, op, offender = sys.argv[1], sys.argv[2], int(sys.argv[3])
product = next(product for product in PRODUCTS if product.name == op)
made = [value.cuda() if isinstance(value, torch.Tensor) else value for value in product.make(3, 2, 5, 4)]
made[product.takes.index("indices")][2, 1] = offender
with fastsparse.use_backend(name):
    try:
        product(*made)
    except IndexError as error:
        print(error)
"""


@every_product
@pytest.mark.parametrize(("offender", "said"), [(5, "got 5"), (-1, "got -1"), (4, "")])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_indices_are_checked_when_debugging(cuda, name, product, offender, said):
    command = [sys.executable, "-c", CHECKED, name, product.name, str(offender)]
    paths = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "FASTSPARSE_DEBUG": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = f"{product.name}: indices[2, 1] must be in [0, 5), {said}\n" if said else ""
    assert done.stdout == expected
