"""The GPU kernels fit their GPUs: they compile, nothing spills, and the committed table lists them."""

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from compilation import table
from compilation.tools import TRITON_VERSIONS, MissingError, cuda_library, cuda_records, triton_records
from compilation.usage import (
    MATRIX,
    SHARED_LIMITS,
    Usage,
    cuobjdump,
    matrix_instructions,
    of_amd_assembly,
    of_cuda_binary,
    with_a_stack,
)
from fastsparse.backend import _cuda


def under_triton(version: str, *paths: Path, **options) -> list[dict]:
    """Records, or a skip with the reason why there can be none; in CI that is an error."""
    try:
        return triton_records(version, *paths, **options)
    except MissingError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITON_VERSIONS)
def test_triton_kernels(version):
    title = f"Triton {version}"
    records = under_triton(version, known=table.known(title))
    assert_fit(records)
    assert_listed(title, records)


def test_cuda_kernels():
    try:
        records = cuda_records()
    except MissingError as missing:
        if os.environ.get("FASTSPARSE_CUDA") == "1":  # insisted on, as .ci/run does where nvcc is
            raise
        pytest.skip(str(missing))
    assert_fit(records)
    assert_listed("CUDA C++", records)
    failure = _cuda.failure  # to ask is to load it
    assert _cuda.library, failure
    built = [code for code in _cuda.contents.split() if code.startswith("sm_")]
    assert {record["target"] for record in records} == set(built)
    # What cuobjdump's table of sizes leaves out is the source's doing: one target tells it of all.
    stacks = with_a_stack(*cuda_library(), built[0])
    assert not [name for name in stacks if name.startswith("_ZN10fastsparse")]


def assert_fit(records: list[dict]) -> None:
    complaints = list(table.complaints(records))
    assert not complaints, "\n".join(complaints)


def assert_listed(title: str, records: list[dict]) -> None:
    """The table names these very kernels; how many registers they take may drift."""
    found = {(record["name"], record["target"]) for record in records}
    targets = {target for _, target in found}  # a CUDA library may be built for fewer
    listed = {(record["name"], record["target"]) for record in table.read().get(title, [])}
    assert found == {(name, target) for name, target in listed if target in targets}, (
        "docs/compilation.md is behind: python -m tests.compilation --write"
    )


def test_the_page_is_made_of_the_data():
    data = table.read()
    assert table.PAGE.read_text(encoding="utf-8") == table.page(data)
    assert {f"Triton {version}" for version in TRITON_VERSIONS} <= data.keys()
    assert not [complaint for records in data.values() for complaint in table.complaints(records)]
    records = [record for records in data.values() for record in records]
    slow = {(r["name"], r["target"]) for r in records if r.get("matrix") == "mma.sync"}
    assert slow >= table.KNOWN_BY_MMA_SYNC


# The tool itself: it must find what is planted.

PLANTED = """
import os

import torch
import triton
import triton.language as tl


@triton.jit
def twice(x):
    return x + x


@triton.jit
def scale(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, twice(values) * tl.sum(values))  # all of them live until the sum is known


@triton.jit
def product(x, y, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for i in range(n):  # a tile of both for every stage
        tile = x + i * 2 * SIZE * SIZE
        total += tl.dot(tl.load(tile + square), tl.load(tile + SIZE * SIZE + square))
    tl.store(y + square, total)


@triton.jit
def wrong(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


@tl.core.builtin
def crash(_semantic=None):  # what a compiler's crash looks like from outside
    os.abort()


@triton.jit
def abort(x):
    crash()


# more kernels


def calls():
    x, half = torch.empty(64, device="meta"), torch.empty(64, device="meta", dtype=torch.bfloat16)
    few = {"num_warps": 1} | ({"waves_per_eu": 8} if torch.version.hip else {"maxnreg": 48})
    yield "planted", "fits", lambda: scale[1,](x, x, BLOCK=1024)
    yield "planted", "spills", lambda: scale[1,](x, x, BLOCK=4096, **few)
    yield "planted", "too much", lambda: product[1,](half, x, 7, SIZE=128, num_stages=5, num_warps=8)
    yield "planted", "few rows", lambda: product[1,](half, x, 7, SIZE=16, num_warps=4)
    yield "planted", "doesn't compile", lambda: wrong[1,](x, x, BLOCK=32)
    yield "planted", "aborts", lambda: abort[1,](x)
"""


@pytest.fixture
def planted(tmp_path):
    """Compiles a module of Triton kernels given as text, under the newest Triton."""

    def compiled(text: str, **options) -> list[dict]:
        (tmp_path / "planted.py").write_text(text)
        return under_triton(TRITON_VERSIONS[-1], tmp_path, package="planted", calls="planted", **options)

    return compiled


@pytest.mark.slow
def test_what_is_planted_is_found(planted):
    complaints = {
        "scale, spills": "bytes a thread are spilled",
        "product, too much": "bytes of shared memory",
        "wrong, doesn't compile": "the compiler ended with an error",
        "abort, aborts": "the compiler ended with SIGABRT",
    }
    found = {(record["name"], record["target"]): record for record in planted(PLANTED)}
    assert len(found) == len(SHARED_LIMITS) * (2 + len(complaints))
    for target in SHARED_LIMITS:
        assert_fit([found["planted: scale, fits", target]])
        assert found["planted: scale, fits", target]["registers"] > 4
        for name, complaint in complaints.items():
            said = list(table.complaints([found[f"planted: {name}", target]]))
            assert any(complaint in line for line in said), (name, target, said)
        few = list(table.complaints([found["planted: product, few rows", target]]))
        if target in ("sm_90", "sm_100"):  # whose instructions want 64 rows; the others' want 16
            assert few[0].endswith(f"16-bit matrices by mma.sync, {target} has {MATRIX[target]}"), few
        else:
            assert not few


def test_a_kernel_that_nothing_launches_is_an_error(planted):
    more = "@triton.jit\ndef unused(x):\n    return x"
    with pytest.raises(RuntimeError, match="no call launches unused, and no kernel uses it"):
        planted(PLANTED.replace("# more kernels", more))


DOUBLES = """
import torch
import triton
import triton.language as tl


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n))


def calls():
    x = torch.empty(64, device="meta")
    for given, n in ((x, 1), (x[4:], 1), (x[1:], 1), (x, 16)):  # the second is as the first
        yield "doubles", "all", lambda: double[1,](given, x, n, BLOCK=64, num_warps=4)
"""


@pytest.mark.slow
def test_what_is_known_is_compiled_again_only_if_it_has_changed(planted, tmp_path):
    def registers(text: str, cache: str, known: list[dict]) -> dict[tuple[str, str], int]:
        found = planted(text, cache=tmp_path / cache, known=known)
        return {(record["target"], record["key"]): record["registers"] for record in found}

    records = planted(DOUBLES, cache=tmp_path / "first")
    assert {record["name"].removeprefix("doubles: double, all, ") for record in records} == {
        "n = 1, x = *fp32:16", "n = 1, x = *fp32", "n = i32:16, x = *fp32:16",
    }  # fmt: skip
    known = [record | {"registers": 1000 + record["registers"]} for record in records[1:]]
    moved = DOUBLES.replace("@triton.jit", "\n\n@triton.jit")
    again = registers(moved, "again", known)
    assert again == {(record["target"], record["key"]): record["registers"] for record in records[:1] + known}
    changed = registers(DOUBLES.replace("2 * ", "3 * "), "changed", known)
    assert not again.keys() & changed.keys()
    assert max(changed.values()) < 1000


def test_cuda_spills_are_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(
        textwrap.dedent("""
        extern "C" __global__ void fits(float* x) { x[threadIdx.x] *= 2; }
        extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
          float kept[128];
          for (int i = 0; i < 128; ++i) kept[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 128; ++i) x[(127 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i * 37) % 128];
        }
        extern "C" __global__ void shares(float* x) {
          __shared__ float all[4096];
          all[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          x[threadIdx.x] = all[(threadIdx.x * 7) % 4096];
        }
        __device__ __noinline__ float deep(float* x, int n) {
          return n ? deep(x, n - 1) * x[n] + x[n + 1] : x[0];
        }
        extern "C" __global__ void recurses(float* x, int n) { x[threadIdx.x] = deep(x, n); }
        """)
    )
    nvcc, tool = shutil.which("nvcc"), cuobjdump()
    if nvcc is None or tool is None:
        assert os.environ.get("FASTSPARSE_CUDA") != "1", (
            "CUDA is insisted on, and nvcc or cuobjdump is missing"
        )
        pytest.skip("nvcc or cuobjdump is missing")
    cubin = tmp_path / "planted.cubin"
    subprocess.run([nvcc, "-cubin", "-arch=sm_90", "-o", cubin, source], check=True)
    usages = {name: usage for _, name, usage in of_cuda_binary(cubin, tool, "sm_90")}
    assert not list(usages["fits"].complaints("sm_90"))
    assert usages["shares"] == Usage(usages["shares"].registers, 4 * 4096, 0)
    assert list(usages["spills"].complaints("sm_90"))
    assert with_a_stack(cubin, tool, "sm_90") == {"spills", "recurses"}


def test_amd_spills_are_found():
    def assembly(vgprs: int, spilled: int, scratch: int) -> str:
        return (
            f"    .group_segment_fixed_size: 512\n    .private_segment_fixed_size: {scratch}\n"
            f"    .sgpr_count:     19\n    .vgpr_count:     {vgprs}\n    .vgpr_spill_count: {spilled}\n"
        )

    assert of_amd_assembly(assembly(64, 0, 0)) == Usage(64, 512, 0)
    assert of_amd_assembly(assembly(256, 3, 0)).spilled == 12
    assert of_amd_assembly(assembly(256, 3, 16)).spilled == 16


@pytest.mark.parametrize(
    ("by", "instruction"),
    [
        ("mma.sync", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};"),
        ("wgmma", "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 1;"),
        ("tcgen05.mma", "@p tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;"),
        ("v_mfma", "v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]"),
        ("no matrix instruction", "fma.rn.f32 %r1, %r2, %r3, %r1;"),
        ("no matrix instruction", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2};"),
    ],
)
def test_matrix_instructions_are_told_apart(by, instruction):
    dot = "    %7 = tt.dot %5, %6, %0 : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>"
    assert matrix_instructions(dot, instruction) == by
    assert matrix_instructions(dot.replace("bf16", "f32"), instruction) == ""
    for target, best in MATRIX.items():
        assert bool(list(Usage(8, 0, 0, by).complaints(target))) == (by != best)


@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_shared_memory_has_a_limit(target):
    assert not list(Usage(8, SHARED_LIMITS[target], 0).complaints(target))
    assert list(Usage(8, SHARED_LIMITS[target] + 1, 0).complaints(target))
