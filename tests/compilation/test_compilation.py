"""The GPU kernels fit their GPUs: they compile, nothing spills, and the committed table lists them."""

import os
import shutil
import subprocess
import textwrap
from itertools import product
from pathlib import Path

import pytest

from compilation import table
from compilation.tools import TRITON_VERSIONS, MissingError, cuda_records, kernel_modules, triton_records
from compilation.usage import SHARED_LIMITS, Usage, cuobjdump, of_amd_assembly, of_cuda_binary


def under_triton(version: str, modules: list[str], *paths: Path, **options) -> list[dict]:
    """Records, or a skip with the reason why there can be none; in CI that is an error."""
    try:
        return triton_records(version, modules, *paths, **options)
    except MissingError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITON_VERSIONS)
def test_triton_kernels(version):
    title = f"Triton {version}"
    records = under_triton(version, kernel_modules(), known=table.known(title))
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


# The tool itself: it must find what is planted.

PLANTED = '''
import os

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


# more kernels


class Fatal(int):
    """What a compiler's crash looks like from outside."""

    def __gt__(self, other):
        os.abort()


POINTERS = {"x": "*fp32:16", "y": "*fp32:16"}
HALVES = {"x": "*bf16:16", "y": "*fp32:16", "n": "i32"}


def specimens():
    return [
        ("fits", scale, POINTERS, {"BLOCK": 1024}, {"num_warps": 4}),
        ("spills", scale, POINTERS, {"BLOCK": 4096}, {"num_warps": 1, "maxnreg": 48, "waves_per_eu": 8}),
        ("too much shared memory", product, HALVES, {"SIZE": 128}, {"num_stages": 5, "num_warps": 8}),
        ("doesn't compile", wrong, POINTERS, {"BLOCK": 32}, {}),
        ("aborts", scale, POINTERS, {"BLOCK": 32}, {"num_warps": Fatal(1)}),
    ]
'''


@pytest.fixture
def planted(tmp_path):
    """Compiles a module of Triton kernels given as text, under the newest Triton."""

    def compiled(text: str, **options) -> list[dict]:
        (tmp_path / "planted.py").write_text(text)
        return under_triton(TRITON_VERSIONS[-1], ["planted"], tmp_path, **options)

    return compiled


@pytest.mark.slow
def test_what_is_planted_is_found(planted):
    complaints = {
        "spills": "bytes a thread are spilled",
        "too much shared memory": "bytes of shared memory",
        "doesn't compile": "the compiler ended with an error",
        "aborts": "the compiler ended with SIGABRT",
    }
    found = {(record["name"], record["target"]): record for record in planted(PLANTED)}
    assert found.keys() == set(product([f"planted: {name}" for name in ("fits", *complaints)], SHARED_LIMITS))
    for target in SHARED_LIMITS:
        assert_fit([found["planted: fits", target]])
        assert found["planted: fits", target]["registers"] > 4
        for name, complaint in complaints.items():
            said = list(table.complaints([found[f"planted: {name}", target]]))
            assert any(complaint in line for line in said), (name, target, said)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (('"y": "*fp32:16"}\nHALVES', '"z": "*fp32:16"}\nHALVES'), "in one of both"),
        (
            ("# more kernels", "@triton.jit\ndef unused(x):\n    return x"),
            "unused is no specimen, and no kernel uses it",
        ),
        (('("spills"', '("fits"'), "two specimens have one name"),
    ],
)
def test_specimens_must_be_all_kernels_and_their_very_arguments(planted, spoil, message):
    assert PLANTED.count(spoil[0]) == 1
    with pytest.raises(RuntimeError, match=message):
        planted(PLANTED.replace(*spoil))


DOUBLES = """
import triton
import triton.language as tl


@triton.jit
def double(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at))


def specimens():
    return [("doubles", double, {"x": "*fp32:16", "y": "*fp32:16"}, {"BLOCK": 1024}, {"num_warps": 4})]
"""


@pytest.mark.slow
def test_what_is_known_is_compiled_again_only_if_it_has_changed(planted, tmp_path):
    def registers(text: str, cache: str, known: list[dict]) -> dict[tuple[str, str], int]:
        found = planted(text, cache=tmp_path / cache, known=known)
        return {(record["target"], record["key"]): record["registers"] for record in found}

    records = planted(DOUBLES, cache=tmp_path / "first")
    known = [record | {"registers": 1000 + record["registers"]} for record in records[1:]]
    again = registers(DOUBLES, "again", known)
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


def test_amd_spills_are_found():
    def assembly(vgprs: int, spilled: int, scratch: int) -> str:
        return (
            f"    .group_segment_fixed_size: 512\n    .private_segment_fixed_size: {scratch}\n"
            f"    .sgpr_count:     19\n    .vgpr_count:     {vgprs}\n    .vgpr_spill_count: {spilled}\n"
        )

    assert of_amd_assembly(assembly(64, 0, 0)) == Usage(64, 512, 0)
    assert of_amd_assembly(assembly(256, 3, 0)).spilled == 12
    assert of_amd_assembly(assembly(256, 3, 16)).spilled == 16


@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_shared_memory_has_a_limit(target):
    assert not list(Usage(8, SHARED_LIMITS[target], 0).complaints(target))
    assert list(Usage(8, SHARED_LIMITS[target] + 1, 0).complaints(target))
