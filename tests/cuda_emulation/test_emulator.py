"""The CUDA emulator itself: every primitive against its definition, and every kind of bug caught."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from cuda_emulation import build as emulator
from cuda_emulation.probes import SOURCE, Machine, build_probes

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

SEEDS = (1, 4)
FULL = 0xFFFFFFFF


@pytest.fixture(scope="module", params=["plain", "racecheck"])
def machine(request) -> Machine:
    return Machine(request.param)


@pytest.fixture
def racecheck() -> Machine:
    return Machine("racecheck")


@pytest.fixture
def plain() -> Machine:
    return Machine("plain")


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch) -> int:
    monkeypatch.setenv("FASTSPARSE_EMULATOR_SEED", str(request.param))
    return request.param


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


# ---- primitives ----


def test_indices(machine):
    grid, block = (3, 2, 2), (5, 3, 4)
    out = machine.run("indices", out=6 * 12 * 60, grid=grid, block=block).reshape(12, 60, 6)
    for number, found in enumerate(out):
        assert (found[:, 3:] == (number % 3, number // 3 % 2, number // 6)).all()
        assert found[:, :3].tolist() == [[t % 5, t // 5 % 3, t // 15] for t in range(60)]


TYPES = {"int": 4, "unsigned": 4, "float": 4, "long": 8, "unsigned long long": 8, "double": 8}


def shuffled(lane: int, operand: int, width: int) -> list[int]:
    """The lanes that shfl, up, down and xor read from (PTX ISA, shfl.sync)."""
    first, b = lane // width * width, operand % 32
    last = first + width - 1
    return [
        first + b % width,
        lane - b if lane - b >= first else lane,
        lane + b if lane + b <= last else lane,
        lane ^ b if lane ^ b <= last else lane,
        first + (lane * lane + 1) % width,
    ]


@pytest.mark.parametrize("kind", TYPES)
def test_shuffles(machine, kind):
    words = random_words(64) & np.uint64(FULL if TYPES[kind] == 4 else 2**64 - 1)
    for width, operand in itertools.product((1, 2, 4, 8, 16, 32), (0, 1, 3, 16, 31, 32, 33)):
        out = machine.run(f"shuffles<{kind}>", words, 5 * 64, block=64, a=operand, b=width, c=FULL)
        expected = [
            [words[t // 32 * 32 + source] for source in shuffled(t % 32, operand, width)] for t in range(64)
        ]
        assert out.reshape(64, 5).tolist() == np.array(expected).tolist()


def test_shuffles_from_lanes_outside_the_mask_give_all_ones(machine):
    mask = 0x00FF0F0F
    words = np.arange(32, dtype=np.uint64)
    out = machine.run("shuffles<int>", words, 5 * 32, a=3, b=32, c=mask).reshape(32, 5)
    for lane in range(32):
        sources = shuffled(lane, 3, 32)
        expected = [words[s] if mask >> s & 1 else FULL for s in sources] if mask >> lane & 1 else [0] * 5
        assert out[lane].tolist() == np.array(expected).tolist()


@pytest.mark.parametrize("mask", [FULL, 1, 0x80000001, 0x0FF000F0, 0x55555555])
def test_votes_matches_and_reductions(machine, mask):
    words = random_words(32, seed=mask) & np.uint64(FULL)
    assert_votes(machine, mask, words)
    assert_votes(machine, mask, words % np.uint64(3))
    assert_votes(machine, mask, np.full(32, words[0]))
    assert_votes(machine, mask, np.zeros(32, np.uint64))
    assert_votes(machine, mask, np.eye(32, dtype=np.uint64)[mask.bit_length() - 1])


def assert_votes(machine: Machine, mask: int, words: np.ndarray) -> None:
    out = machine.run("votes", words, 14 * 32, c=mask).reshape(32, 14)
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    mine = [int(words[lane]) for lane in lanes]
    signed = [value - 2**32 if value >= 2**31 else value for value in mine]
    together = [
        any(mine),
        all(mine),
        sum(1 << lane for lane in lanes if words[lane]),
        None,
        mask | 1 << 32 if len(set(mine)) == 1 else 0,
        sum(mine) % 2**32,
        min(mine),
        max(mine),
        np.bitwise_and.reduce(mine),
        np.bitwise_or.reduce(mine),
        np.bitwise_xor.reduce(mine),
        sum(mine) % 2**32,
        min(signed) % 2**32,
        max(signed) % 2**32,
    ]
    for lane in lanes:
        together[3] = sum(1 << other for other in lanes if words[other] == words[lane])
        assert out[lane].tolist() == [int(value) for value in together]
    assert not out[[lane for lane in range(32) if lane not in lanes]].any()


def test_tensor_core(machine):
    """mma.m16n8k16 of bf16, whose fragments the PTX ISA draws: rows g and g + 8, pairs of columns."""
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(-99, 100, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    words = np.zeros((32, 10), np.uint64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        words[lane, :4] = [pair(a[g + down, 2 * t + right :]) for right in (0, 8) for down in (0, 8)]
        words[lane, 4:6] = [pair(b[2 * t + down :, g]) for down in (0, 8)]
        words[lane, 6:] = c[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1] * 2].view(np.uint32)
    out = machine.run("tensor_core", words, 4 * 32).astype(np.uint32).view(np.float32).reshape(32, 4)
    right = c + a @ b
    for lane, found in enumerate(out):
        g, t = divmod(lane, 4)
        assert found.tolist() == right[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1] * 2].tolist()


def pair(numbers: np.ndarray) -> int:
    """The first two in bf16, which holds them, in a word."""
    first, second = (int(bits) >> 16 for bits in numbers[:2].copy().view(np.uint32))
    return second << 16 | first


@pytest.mark.parametrize("block", [1, 31, 32, 33, (8, 4, 3), 1024])
def test_barriers(machine, block):
    threads = int(np.prod(block))
    for pattern in (np.zeros, np.ones, lambda n: np.arange(n) % 3 == 1):
        words = pattern(2 * threads).astype(np.uint64)
        out = machine.run("barriers", words, 8 * threads, grid=2, block=block).reshape(2, threads, 4)
        for mine, found in zip(words.reshape(2, threads), out, strict=True):
            true = int(mine.sum())
            assert (found == (true, true > 0, true == threads, threads - true)).all()


@pytest.mark.parametrize(
    ("kind", "shared"), [("int", 0), ("unsigned", 1), ("unsigned long long", 0), ("unsigned long long", 1)]
)
def test_atomics(machine, kind, shared, seed):
    bits = 64 if "long" in kind else 32
    n, words = 96, random_words(96) % np.uint64(2**20)
    values = [int(word) for word in words]
    out = [int(word) for word in machine.run(f"atomics<{kind}>", words, 16 + 2 * n, block=n, a=shared)]
    # Where all bits but the highest were set: ~0 >> 1 is -1 for int.
    rest = 2**32 - 1 if kind == "int" else 2 ** (bits - 1) - 1
    least = 2**32 - 1 if kind == "int" else min(values)
    assert out[0] == out[7] == sum(values)
    assert out[1:3] == [max(values), least]
    assert out[4:7] == [
        rest & int(np.bitwise_and.reduce(words)),
        int(np.bitwise_or.reduce(words)),
        int(np.bitwise_xor.reduce(words)),
    ]
    # One after another: what each addition found is the sum of those before it.
    found = sorted(zip(out[16::2], values, strict=True))
    assert [before for before, _ in found] == [0, *itertools.accumulate(value for _, value in found)][:-1]
    # What each exchange brought another took, but for the last.
    assert sorted([*out[17::2], out[3]]) == sorted([0, *values])


@pytest.mark.parametrize("kind", ["float", "double"])
def test_float_atomics(machine, kind):
    words = np.arange(128, dtype=np.uint64)
    assert machine.run(f"float_atomics<{kind}>", words, 1, block=128)[0] == words.sum()


def test_atomics_that_wrap(machine):
    up, down, less = (int(word) for word in machine.run("other_atomics", out=3, block=40, a=6))
    assert (up, down, less) == (40 % 7, (7 - 40 % 7) % 7, 2**32 - 120)


@pytest.mark.parametrize("threads", [1, 33, 40])
def test_shared_memory(machine, threads):
    words = random_words(2 * threads) >> np.uint64(2)
    out = machine.run("shared_memory", words, 2 * threads, block=threads, shared=8 * threads)
    reverse = words[:threads][::-1]
    assert (out[:threads] == 2 * reverse + 1 + (np.arange(threads, dtype=np.uint64) + 1) % threads).all()
    assert not out[threads:].any()


def test_bits(machine):
    words = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, *random_words(58).tolist()]
    out = machine.run("bits", words, 10 * 64, grid=2)

    def of(value: int) -> list[int]:
        low = value % 2**32

        def first(bits):
            return (bits & -bits).bit_length()

        return [
            *(low.bit_count(), value.bit_count(), first(low), first(value)),
            *(32 - low.bit_length(), 64 - value.bit_length()),
            *(int(f"{low:032b}"[::-1], 2), int(f"{value:064b}"[::-1], 2)),
            *(low * (value >> 32) >> 32, value * (value ^ 0x123456789ABCDEF0) >> 64),
        ]

    assert out.reshape(64, 10).tolist() == [of(value) for value in words]


def test_directed_rounding(machine):
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 2**32, (4096, 2), dtype=np.uint32)
    pairs[:1024] = pairs[:1024] & 0x807FFFFF | 0x3F000000 + (pairs[:1024] >> 8 & 0x0F800000)  # of one size
    a, b = pairs.view(np.float32).T
    fine = np.isfinite(a) & np.isfinite(b)
    a, b = a[fine][: 32 * 100], b[fine][: 32 * 100]
    words = a.view(np.uint32).astype(np.uint64) | b.view(np.uint32).astype(np.uint64) << np.uint64(32)
    out = machine.run("rounding", words, 6 * len(a), grid=100).astype(np.uint32).view(np.float32)
    out = out.reshape(-1, 6)
    greatest = Fraction(float(np.finfo(np.float32).max))
    for x, y, found in zip(map(Fraction, a.tolist()), map(Fraction, b.tolist()), out, strict=True):
        for exact, up, down in zip((x + y, x - y, x * y), found[::2], found[1::2], strict=True):
            if abs(exact) > greatest:
                assert (up, down) == ((np.inf, greatest) if exact > 0 else (-greatest, -np.inf))
                continue
            assert Fraction(float(down)) <= exact <= Fraction(float(up))
            assert up == (down if exact == Fraction(float(down)) else np.nextafter(down, np.float32(np.inf)))


def test_conversions(machine):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    generator = np.random.default_rng(0)
    floats = generator.integers(0, 2**32, 2**16, dtype=np.uint32)
    # Around every value of either half: itself, the middle to the next, and a bit to either side.
    for wide in (halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()):
        bits = wide.numpy().view(np.uint32)
        floats = np.concatenate(
            (floats, *(bits + np.uint32(add) for add in (0, 0xFFF, 0x1000, 0x1001, 0x8000)))
        )
    floats = floats[: len(floats) // 2**10 * 2**10]
    words = floats.astype(np.uint64) | (np.arange(len(floats)) % 2**16).astype(np.uint64) << np.uint64(32)
    out = machine.run("conversions", words, 4 * len(floats), grid=len(floats) // 2**10, block=2**10)
    out = torch.from_numpy(out.view(np.int64)).view(-1, 4)
    value = torch.from_numpy(floats.view(np.float32))
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        narrowed = out[:, column].to(torch.int16).view(dtype)
        assert torch.equal(narrowed.isnan(), value.isnan())
        exact = value.to(dtype)
        same = narrowed.view(torch.int16) == exact.view(torch.int16)
        assert (same | value.isnan()).all()
        widened = out[: 2**16, column + 2].to(torch.int32).view(torch.float32)
        right = halves.view(dtype).float()
        assert ((widened.view(torch.int32) == right.view(torch.int32)) | right.isnan()).all()
        assert torch.equal(widened.isnan(), right.isnan())


def test_extremes(machine):
    def double(value: float) -> int:
        return int(np.float64(value).view(np.uint64))

    def single(value: float) -> int:
        return int(np.float32(value).view(np.uint32))

    found = machine.run("extremes", out=8, block=1).tolist()
    minus = 2**64
    assert found == [minus - 1, FULL, minus - 5, single(2.0), single(1.5), double(2.5), 4, minus - 9]


def test_packets(machine):
    words = random_words(2 * 8 + 2)
    assert words.ctypes.data % 16 == 0, "NumPy aligns them"
    assert (machine.run("packets", words, 2 * 8, block=8) == words[:16]).all()


def test_no_threads_are_no_launch(machine):
    assert not machine.run("indices", out=6, grid=(0, 1, 1)).any()
    assert not machine.run("indices", out=6, block=(0, 1, 1)).any()


# ---- the schedule ----


def orders(machine, **options) -> list[int]:
    return machine.run("order", out=1 + 6 * 64, grid=6, block=64, **options)[1:].tolist()


def test_a_seed_decides_the_schedule(machine, monkeypatch):
    found = set()
    for seed in range(20):
        monkeypatch.setenv("FASTSPARSE_EMULATOR_SEED", str(seed))
        once = orders(machine)
        assert once == orders(machine)
        found.add(tuple(once))
    assert len(found) == 20
    first = np.array([np.reshape(order, (6, 64)) for order in found])
    assert len(np.unique(first[:, :, 0].argmin(axis=1))) > 2, "every block is first some time"
    assert len(np.unique((first % 64).argmin(axis=2))) > 30, "every thread is first some time"


def test_without_a_seed_every_launch_has_its_own(machine, monkeypatch):
    monkeypatch.delenv("FASTSPARSE_EMULATOR_SEED", raising=False)
    assert len({tuple(orders(machine)) for _ in range(5)}) == 5


def test_a_failure_prints_the_seed_that_reproduces_it(plain, monkeypatch):
    monkeypatch.delenv("FASTSPARSE_EMULATOR_SEED", raising=False)
    found = set()
    for _ in range(8):
        with pytest.raises(RuntimeError, match="FASTSPARSE_EMULATOR_SEED=") as raised:
            plain.run("misaligned_atomic", out=64, grid=40, block=96)
        message = str(raised.value)
        monkeypatch.setenv("FASTSPARSE_EMULATOR_SEED", re.search(r"SEED=(\d+)", message)[1])
        for _ in range(3):
            with pytest.raises(RuntimeError) as again:
                plain.run("misaligned_atomic", out=64, grid=40, block=96)
            assert re.sub("0x[0-9a-f]+", "", str(again.value)) == re.sub("0x[0-9a-f]+", "", message)
        monkeypatch.delenv("FASTSPARSE_EMULATOR_SEED")
        found.add(re.search(r"block .*, thread [^:]*", message)[0])
    assert len(found) > 1, "another seed, another thread first"


def test_a_seed_that_is_no_number(machine, monkeypatch):
    monkeypatch.setenv("FASTSPARSE_EMULATOR_SEED", "12x")
    with pytest.raises(RuntimeError, match="FASTSPARSE_EMULATOR_SEED: must be a whole number, got '12x'"):
        orders(machine)


def test_threads_of_the_host_take_turns(machine):
    words = random_words(256) >> np.uint64(9)

    def summed(_) -> list[int]:
        return machine.run("tree_sum", words, 3, grid=3, block=256).tolist()

    with ThreadPoolExecutor(4) as threads:
        assert all(found == [words.sum()] * 3 for found in threads.map(summed, range(80)))


# ---- programs without a bug, in which none is found ----


def test_tree_sum(machine, seed):
    for threads in (2, 32, 64, 1024):
        words = random_words(threads) >> np.uint64(10)
        assert (machine.run("tree_sum", words, 2, grid=2, block=threads) == words.sum()).all()


def test_groups_of_lanes(machine, seed):
    words = random_words(96)
    for lanes in (1, 2, 8, 32):
        out = machine.run("groups_of_lanes", words, 96, block=96, a=lanes)
        for first in range(0, 96, lanes):
            rounds = 1 + first // lanes % 3
            assert (out[first : first + lanes] == np.roll(words[first : first + lanes], -rounds)).all()


def test_neighbouring_bytes_are_no_race(machine, seed):
    out = machine.run("neighbours", [5], 3 * 8, grid=3, block=64).view(np.uint8)
    assert (out.reshape(3, 64) == np.arange(64) + 5).all()


# ---- bugs ----

RACES = [
    ("race", {"block": 64}, "race|that no thread of the block has written"),
    ("missing_barrier_before_a_write", {"block": 64}, "race"),
    ("missing_syncwarp", {}, "race"),
    ("syncwarp_of_half", {}, "race|that no thread of the block has written"),
    ("race_of_blocks", {"grid": 2}, r"and a write by block \(\d, 0, 0\)"),
    ("read_of_another_block", {"grid": 3, "block": 1}, r"by block \(\d, 0, 0\)"),
    ("write_after_another_blocks_read", {"grid": 3, "block": 1, "a": 1}, r"by block \(\d, 0, 0\)"),
    ("plain_beside_atomic", {}, "a read of 4 bytes.* an atomic by|an atomic of 4 bytes.* a read by"),
]


@pytest.mark.parametrize(("probe", "options", "says"), RACES, ids=[race[0] for race in RACES])
def test_races(racecheck, seed, probe, options, says):
    with pytest.raises(RuntimeError, match=says) as raised:
        racecheck.run(probe, np.arange(1024), 1024, **options)
    message = str(raised.value)
    assert re.match(
        rf"{probe}<<<\(\d+, 1, 1\), \(\d+, 1, 1\), 0>>>, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): ",
        message,
    )
    assert f"FASTSPARSE_EMULATOR_SEED={seed}" in message
    assert "probes.cu:" in message or shutil.which("addr2line") is None, "the line is named"
    # And the machine is none the worse.
    assert racecheck.run("tree_sum", [1, 2], 1, block=2)[0] == 3


@pytest.mark.parametrize("probe", ["race", "missing_barrier_before_a_write"])
def test_random_schedules_give_a_race_wrong_results(plain, seed, probe):
    words = np.arange(1, 257, dtype=np.uint64)
    right = np.roll(words, -1 if probe == "race" else -3)
    assert (plain.run(probe, words, 256, block=256) != right).any()


def test_writes_beyond_shared_memory(machine, seed):
    for dynamic, position in ((0, 40), (0, 47), (0, -1), (1, 33), (1, 40), (1, -1)):
        options = {"a": dynamic, "b": position, "shared": 8 * 33, "c": 1}
        with pytest.raises(RuntimeError, match=r"out of bounds|a write -?[0-9]+ bytes from the beginning of"):
            machine.run("shared_out_of_bounds", **options)
        machine.run("shared_out_of_bounds", **{**options, "b": 32})


def test_reads_beyond_shared_memory(racecheck, seed):
    says = "thread .1, 0, 0.: out of bounds: a read of 8 bytes, unallotted shared memory"
    for position in (33, 40, -1, 20000):
        with pytest.raises(RuntimeError, match=says):
            racecheck.run("shared_read_out_of_bounds", out=1, b=position, shared=8 * 33)


def test_shared_memory_that_nobody_wrote_is_poison(plain, seed):
    out = plain.run("uninitialised", out=32, shared=4 * 32).astype(np.uint32).view(np.float32)
    assert np.isnan(out[3])
    assert (np.delete(out, 3) == 1).all()
    left = plain.run("left_by_another_block", out=64, grid=2)
    assert (left == 2**64 - 1).all()


def test_reads_of_shared_memory_that_nobody_wrote(racecheck, seed):
    says = r"thread \(3, 0, 0\): a read of 4 bytes, byte 12 of 128 of dynamic shared memory, that no thread"
    with pytest.raises(RuntimeError, match=says):
        racecheck.run("uninitialised", out=32, shared=4 * 32)
    assert (racecheck.run("left_by_another_block", out=64, grid=2, a=1) == 1).all()
    with pytest.raises(RuntimeError, match="that no thread of the block has written"):
        racecheck.run("left_by_another_block", out=64, grid=2)


TWO_WARPS = {"block": 64}
DIVERGENCE = [
    ("exit_before_barrier", TWO_WARPS, r"divergent barrier: 63 of 64 threads wait, 1 have exited"),
    ("barrier_in_branches", TWO_WARPS, r"divergent barrier: at __syncthreads \(probes.cu:\d+\) while"),
    ("barriers_of_two_kinds", TWO_WARPS, r"divergent barrier: at __syncthreads.* while \d+ threads wait at"),
    ("missing_lane", {}, "thread .7, 0, 0.: exits, but is named in|names a lane that is gone: thread .7,"),
    ("caller_not_in_mask", {}, "thread .0, 0, 0.: __syncwarp .*: the caller, lane 0, isn't in its mask"),
    ("masks_that_differ", {}, "divergent warp: at __ballot_sync with mask"),
    ("shuffles_of_two_kinds", {}, "divergent warp: at __shfl_(up|down)_sync .* while thread"),
    ("shuffle_in_branches", {}, "divergent warp: at __shfl_sync"),
    ("shuffle_against_barrier", {}, "deadlock: thread .* waits at __shfl_sync .*; thread .* waits at __sync"),
    ("lanes_that_are_not_there", {"block": 48}, "mask 0xffffffff names lanes of a warp that has 16"),
    ("odd_width", {}, "__shfl_sync: width must be a power of two up to 32, got 12"),
    ("misaligned_atomic", {}, "misaligned: an access of 4 bytes at 0x"),
    ("trap", {}, "__trap"),
    *(("packets", {"block": 8, "a": off}, "misaligned: an access of 16 bytes") for off in (1, 2, 4, 8)),
    ("wild_address", {"a": 8}, "thread .4, 0, 0.: segmentation fault at 0x8"),
    ("wild_address", {"a": 2**46 + 16}, f"thread .4, 0, 0.: segmentation fault at {2**46 + 16:#x}"),
    ("deep_recursion", {"a": 2000}, "stack overflow: a thread has 131072 bytes here"),
]  # fmt: skip


@pytest.mark.parametrize(("probe", "options", "says"), DIVERGENCE, ids=[case[0] for case in DIVERGENCE])
def test_divergence_and_misuse(machine, seed, probe, options, says):
    for _ in range(2):  # the machine is none the worse
        with pytest.raises(RuntimeError, match=says) as raised:
            machine.run(probe, random_words(40), 80, grid=2, **options)
        assert str(raised.value).startswith(f"{probe}<<<(2, 1, 1), ({options.get('block', 32)}, 1, 1), 0>>>")
        assert str(raised.value).endswith(f"(FASTSPARSE_EMULATOR_SEED={seed})")
        assert machine.run("tree_sum", [1, 2], 1, block=2)[0] == 3


def test_recursion_that_is_not_too_deep(machine):
    machine.run("deep_recursion", [1], 32, a=20)


LAUNCHES = [
    ({"block": 1025}, r"a block of \(1025, 1, 1\) is 1025 threads"),
    ({"block": (32, 33)}, r"a block of \(32, 33, 1\) is 1056 threads"),
    ({"block": (1, 1, 65)}, r"a block of \(1, 1, 65\)"),
    ({"grid": (1, 65536)}, r"a grid of \(1, 65536, 1\): at most \(2147483647, 65535, 65535\)"),
    ({"grid": (1, 1, 65536)}, "a grid of"),
    ({"grid": 2**31}, "a grid of"),
    ({"shared": 99 * 1024 + 1}, "101377 bytes of dynamic shared memory: a block may have 101376"),
    ({"a": 2}, "static shared memory of 51200 bytes: a block may have 49152"),
    ({"a": 1, "shared": (59 << 10) + 1}, "60417 bytes of dynamic and 40960 of static shared memory"),
]


def test_launches_beyond_the_limits(machine):
    for options, says in LAUNCHES:
        with pytest.raises(RuntimeError, match=says):
            machine.run("static_memory", **options)


def test_launches_at_the_limits(machine):
    for options in ({"block": 1024}, {"block": (16, 1, 64)}, {"grid": (1, 4, 5)}, {"shared": 99 * 1024}):
        machine.run("static_memory", **options)
    machine.run("static_memory", a=1, shared=59 << 10)


def test_launch_bounds(machine):
    for probe, bound in (("bounded<float>", 96), ("bounded_by_argument<64>", 128)):
        machine.run(probe, out=96, grid=1, block=96 if bound == 96 else 1)
        with pytest.raises(RuntimeError, match=f"the kernel's __launch_bounds__ allows {bound}$|{bound} "):
            machine.run(probe, out=256, block=bound + 1)


# ---- all of memory: AddressSanitizer, in a process that starts with its runtime ----


def sanitized(calls: list[tuple]) -> subprocess.CompletedProcess:
    """Make calls of Machine.run under AddressSanitizer."""
    build_probes("address")
    environment = {**os.environ, **emulator.preload(), "PYTHONPATH": str(emulator.HERE.parent)}
    command = [sys.executable, "-m", "cuda_emulation.probes", json.dumps(calls)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_sound_programs_under_address_sanitizer():
    words = list(range(1024))
    done = sanitized(
        [
            ("tree_sum", words, 8, {"grid": 8, "block": 1024}),
            ("groups_of_lanes", words, 96, {"block": 96, "a": 8}),
            ("shared_memory", words, 80, {"block": 40, "shared": 320}),
            ("missing_lane", words, 0, {"fails": True}),  # which leaves 31 stacks in mid-air
            ("barriers", words, 4096, {"grid": 2, "block": 512}),
            ("atomics<int>", words, 256, {"block": 96, "a": 1}),
        ]
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("probe", "options", "kind"),
    [
        ("global_out_of_bounds", {"b": -1}, "heap-buffer-overflow"),
        ("global_read_out_of_bounds", {"b": 64}, "heap-buffer-overflow"),
        ("shared_out_of_bounds", {"b": 40}, "use-after-poison"),
        ("shared_read_out_of_bounds", {"b": 33, "shared": 8 * 33}, "use-after-poison"),
    ],
)
def test_out_of_bounds_under_address_sanitizer(probe, options, kind):
    done = sanitized([(probe, list(range(64)), 64, options)])
    assert done.returncode != 0
    assert f"AddressSanitizer: {kind}" in done.stderr
    assert f"{probe}" in done.stderr


# ---- the same words ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_nvcc_takes_the_probes(tmp_path):
    command = ["nvcc", "-std=c++20", "-arch=sm_80", f"-I{emulator.CSRC}", "-ptx", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "probes.ptx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "job[0] = __activemask();",  # which lanes happen to run together
        "atomicAdd(reinterpret_cast<unsigned long*>(job), 1ul);",  # CUDA has none for this type
        "__shared__ int word; job[0] = word;",  # which an emulator of C++ can't give each block anew
    ],
)
def test_what_is_not_emulated_does_not_compile(tmp_path, body):
    source = tmp_path / "kernel.cu"
    source.write_text(f'#include "cuda/device.cuh"\n__global__ void kernel(unsigned* job) {{ {body} }}\n')
    command = [emulator.compiler(), *emulator.FLAGS, "-fsyntax-only", str(source)]
    assert subprocess.run(command, capture_output=True).returncode != 0
    source.write_text(source.read_text().replace(body, "job[0] = threadIdx.x;"))
    assert subprocess.run(command, capture_output=True).returncode == 0
