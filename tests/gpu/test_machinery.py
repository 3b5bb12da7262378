"""The ops on CUDA tensors inside PyTorch's machinery: opcheck, torch.compile, autocast, gradcheck."""

import pytest
import torch
from gpu.problems import PROBLEMS, D, autoencoder, k, parameters
from oracle import assert_topk, random
from samples import CORE, LARGE, calls, make, tensors
from test_sparse_products import PRODUCTS

import fastsparse
from fastsparse.ops._library import OPS

# PyTorch's compiler still uses what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def _fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, backend, op, dtype):
    if backend == "reference":
        pytest.skip("opcheck asks the registered op, which the reference goes around")
    if backend not in OPS[op].kernels:
        pytest.skip(f"{op} has no {backend} kernel")
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    overload, differentiable = getattr(torch.ops.fastsparse, op).default, OPS[op].differentiable
    given = [
        value.to(device).requires_grad_(differentiable and value.is_floating_point())
        if isinstance(value, torch.Tensor)
        else value
        for value in calls(LARGE, dtype=dtype)[op][0]
    ]
    torch.library.opcheck(overload, tuple(given), **tolerance)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_a_changing_number_of_tokens(device, backend, compiler):
    compiled = torch.compile(autoencoder, fullgraph=True, dynamic=True, backend=compiler)
    for tokens in (65, 33, 64, 7):
        both = []
        for run in (compiled, autoencoder):
            leaves = parameters(device)
            x = random(tokens, D, seed=tokens).to(device)
            loss = run(x, *leaves)
            loss.backward()
            both.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, backend, dtype):
    leaves, x = parameters(device), make("x", LARGE).to(device)
    with torch.autocast(device.type, dtype):
        code = fastsparse.topk_encode(x, *leaves[:2], k=k)
        out = fastsparse.sparse_decode(*code, leaves[2])
    assert code.values.dtype == out.dtype == dtype
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves[:3])
    low = [tensor.detach().to(dtype) for tensor in (x, *leaves[:3])]
    right = fastsparse.topk_encode(*low[:3], k=k)
    assert torch.equal(code.values, right.values)
    assert torch.equal(out, fastsparse.sparse_decode(*right, low[3]))


@pytest.mark.parametrize("name", ["topk_encode", *(product.name for product in PRODUCTS)])
def test_gradcheck_in_double(device, name):
    """Without a named backend: whichever takes fp64."""
    leaves = [
        leaf.detach().to(device).requires_grad_() for leaf in tensors(*CORE[name].inputs, dtype=torch.float64)
    ]
    # Sums are carried in fp64 and in a fixed order: two runs may not differ at all.
    assert torch.autograd.gradcheck(CORE[name], leaves, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(CORE[name], leaves, nondet_tol=0.0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_is_exact_whatever_torch_is_allowed(device, backend, precision):
    """Scores of fp32 inputs are never TF32's, whatever PyTorch's own products may use."""
    x, weight = (make(name, LARGE, seed=seed) for name, seed in (("x", 3), ("weight", 4)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        if device.type == "cpu" and (x @ weight.T - x.double() @ weight.double().T).abs().max() > 1e-3:
            pytest.skip(
                "this CPU multiplies in bf16 if it may, which topk_encode takes where it has no screen"
            )
        code = fastsparse.topk_encode(x.to(device), weight.to(device), k=k)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_topk(tuple(tensor.cpu() for tensor in code), x, weight, k=k)


def test_every_problem_runs_without_a_name(device):
    for problem in PROBLEMS.values():
        assert all(tensor.device.type == device.type for tensor in problem(problem.tensors(device)))
