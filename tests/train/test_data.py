"""Shards on disk, and the order in which their tokens come."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsparse._files import File
from fastsparse.train.pairs import aligned
from fastsparse.train.shards import Shards
from fastsparse.train.stream import TokenStream

D = 3


def numbered(start: int, rows: int) -> torch.Tensor:
    """Rows that say which they are, exactly in every dtype (up to 256)."""
    return torch.arange(start, start + rows).unsqueeze(1).expand(rows, D).contiguous().float()


def write(path: Path, rows: torch.Tensor, dtype: str = "float32") -> str:
    if path.suffix == ".npy":
        np.save(path, rows.numpy().astype(dtype))
    else:
        save_file({"x": rows.to(getattr(torch, dtype))}, path)
    return str(path)


def take(sources: list[str], count: int, *, batch: int = 8, start: int = 0, **options) -> list[int]:
    """The first column of the first ``count`` tokens of a stream."""
    options = {"seed": 0, "block_tokens": 4, "buffer_tokens": 16} | options
    batches = TokenStream(Shards(sources), **options).batches(batch, start)
    rows = torch.cat([next(batches)[0] for _ in range(-(-count // batch))])[:count]
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].int().tolist()


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """57 rows in six files of every dtype and both formats, one of them empty, one in Fortran order."""
    write(tmp_path / "a.npy", numbered(0, 10))
    write(tmp_path / "b.safetensors", numbered(10, 7), "bfloat16")
    write(tmp_path / "c.npy", numbered(17, 13), ">f8")
    write(tmp_path / "d.safetensors", numbered(30, 0))
    write(tmp_path / "e.safetensors", numbered(30, 9), "float16")
    np.save(tmp_path / "f.npy", np.asfortranarray(numbered(39, 18).numpy().astype("float16")))
    return [str(tmp_path)]


def test_an_epoch_is_a_permutation_of_all_tokens(mixed: list[str]) -> None:
    epochs = take(mixed, 3 * 57)
    first, second, third = epochs[:57], epochs[57:114], epochs[114:]
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(57))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_the_order_depends_on_the_seed_alone(mixed: list[str]) -> None:
    assert take(mixed, 100) == take(mixed, 100)
    assert take(mixed, 100) != take(mixed, 100, seed=1)
    assert take(mixed, 100) == take(mixed, 100, batch=50)


def test_any_position_is_reached_at_once(mixed: list[str]) -> None:
    whole = take(mixed, 200)
    for start in (*range(20), 40, 56, 57, 58, 113, 114, 115, 129):
        assert take(mixed, 40, start=start) == whole[start : start + 40]


def test_neighbours_come_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "a.npy", numbered(0, 4096))
    order = np.array(take([source], 4096, batch=64, block_tokens=16, buffer_tokens=1024))
    # Few neighbours were neighbours on the disk, and the first buffer is drawn from all over the file.
    assert (np.abs(np.diff(order)) == 1).sum() < 100
    assert order[:64].min() < 1000
    assert order[:64].max() > 3000
    mean = order.reshape(8, 512).mean(axis=1)
    assert np.abs(mean - 2047.5).max() < 600


def test_a_buffer_as_large_as_the_data_shuffles_all_of_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a.npy", numbered(0, 64))
    order = take([source], 64, buffer_tokens=1 << 20)
    assert sorted(order) == list(range(64))
    assert np.abs(np.diff(order)).mean() > 10


def test_files_are_read_lazily(tmp_path: Path) -> None:
    """A sparse file of 64 GiB of zeros, more than this test's machine may hold in memory."""
    shape = (2**26, 256)
    array = np.lib.format.open_memmap(tmp_path / "huge.npy", mode="w+", dtype=np.float32, shape=shape)
    del array
    shards = Shards([str(tmp_path / "huge.npy")])
    assert shards.rows == 2**26
    batches = TokenStream(shards, seed=0, block_tokens=256, buffer_tokens=1024).batches(100, start=2**25)
    assert next(batches)[0].shape == (100, 256)


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    for index in range(150):
        write(tmp_path / f"{index:03}.npy", numbered(index, 1))
        write(tmp_path / f"{index:03}.safetensors", numbered(150 + index, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        assert sorted(take([str(tmp_path)], 300)) == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def names(*sources: str) -> list[str]:
    return [str(shard.path) for shard in Shards(sources).shards]


def test_sources(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.npy", numbered(0, 2)), write(tmp_path / "b.safetensors", numbered(2, 2))
    (tmp_path / "tokens.json").write_text("[]")
    (tmp_path / "within").mkdir()
    c = write(tmp_path / "within" / "c.npy", numbered(4, 2))

    assert names(str(tmp_path)) == [a, b]
    assert names(str(tmp_path / "*.npy")) == [a]
    assert names(str(tmp_path / "**" / "*.npy")) == [a, c]
    assert names(b, str(tmp_path), a) == [b, a]


def test_a_file_counts_once_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    a, b = write(folder / "a.npy", numbered(0, 2)), write(folder / "b.npy", numbered(2, 2))
    other.symlink_to(folder)
    (tmp_path / "link.npy").symlink_to(a)
    monkeypatch.chdir(tmp_path)
    spellings = [a, "folder/a.npy", "./folder/../folder/a.npy", "link.npy", "other", "other/*.npy", b]
    assert names(*spellings) == [a, "other/b.npy"]
    assert names("link.npy", "folder") == ["link.npy", "folder/b.npy"]


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    """macOS writes ._a.npy beside a.npy on disks of others."""
    a = write(tmp_path / "a.npy", numbered(0, 2))
    (tmp_path / "._a.npy").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    for source in (str(tmp_path), str(tmp_path / "*.npy"), str(tmp_path / "**" / "*")):
        assert names(source) == [a]


def test_one_of_several_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"mlp": numbered(0, 2), "attn": numbered(5, 2)}, path)
    assert Shards([str(path)], tensor="attn").shards[0].tensor == "attn"
    with pytest.raises(ValueError, match=r"a.safetensors: holds 2 tensors \(attn, mlp\); name the one"):
        Shards([str(path)])
    with pytest.raises(ValueError, match=r"tensor must be one of.*\(attn, mlp\), got 'resid'"):
        Shards([str(path)], tensor="resid")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_bad_shards(tmp_path: Path, suffix: str) -> None:
    good = write(tmp_path / f"a{suffix}", numbered(0, 5))

    def rejects(tensor: torch.Tensor, message: str, dtype: str = "float32") -> None:
        bad = write(tmp_path / f"bad{suffix}", tensor, dtype)
        with pytest.raises(ValueError, match=f"bad{suffix}: {message}"):
            Shards([good, bad])

    rejects(torch.ones(5, 4), r"every shard must have rows of the shape .*first, .* \(\(3,\)\), got \(4,\)")
    rejects(torch.ones(5, 3), r"must hold float32, .*got [iI]", dtype="int32")
    rejects(torch.ones(5), r"must hold activations \(N, D\) or \(N, L, D\), got shape \(5,\)")
    rejects(torch.ones(5, 3, 2, 1), r"must hold activations .*got shape \(5, 3, 2, 1\)")
    rejects(torch.ones(5, 0), r"must hold activations .*got shape \(5, 0\)")
    broken = tmp_path / f"broken{suffix}"
    for content in (Path(good).read_bytes()[:-4], b"something else entirely", b""):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken{suffix}: not a whole"):
            Shards([str(broken)])


def npy(header: str) -> bytes:
    """A .npy file of 12 float32 with a header of one's own."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1") + bytes(48)


def npy_of(shape: str, descr: str = "'<f4'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


BAD_NPY = {
    "header without end": (npy("{'descr': '<f4', 'shape': (4,"), "not a whole"),
    "no Python": (npy("{'descr': '<f4' 'shape'"), "not a whole"),
    "too long a header": (npy("{" + " " * 30000 + "}"), "not a whole"),
    "too deep a header": (npy("(" * 5000), "not a whole"),
    "later version": (npy_of("(4, 3)").replace(b"\x01\x00", b"\x09\x00", 1), "not a whole"),
    "negative": (npy_of("(-4, 3)"), r"must hold activations \(N, D\) or .*, got shape \(-4, 3\)"),
    "huge": (
        npy_of(f"({2**70}, 3)"),
        rf"not a whole .*shape \({2**70}, 3\) takes {2**70 * 12} bytes.*holds 48",
    ),
    "fractions": (npy_of("(4., 3)"), "not a whole"),
    "objects": (npy_of("(4, 3)", "'|O'"), "must hold float32, .*got object"),
    "fields": (npy_of("(4, 3)", "[('a', '<f4')]"), "must hold float32, .*got void32"),
    "no dtype": (npy_of("(4, 3)", "'<f5'"), "not a whole"),
    "archive": (b"PK\x03\x04" + bytes(60), "not a whole"),
}


def test_bad_npy_headers(tmp_path: Path) -> None:
    for content, message in BAD_NPY.values():
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.npy: {message}") as caught:
            Shards([str(tmp_path)])
        assert "pickle" not in str(caught.value)


def safetensors(header: object) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + bytes(48)


def safetensors_of(*offsets: object, shape: object = (4, 3), dtype: object = "F32") -> bytes:
    return safetensors({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


BAD_SAFETENSORS = {
    "header without end": safetensors(b'{"x": {'),
    "too deep a header": safetensors(b"[" * 50000),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "negative": safetensors_of(0, 48, shape=(-4, -3)),
    "backwards": safetensors_of(48, 0),
    "short": safetensors_of(0, 44),
    "huge": safetensors_of(0, 48, shape=(2**70, 3)),
    "a gap": safetensors_of(4, 48, shape=(11, 1)),
    "fractions": safetensors_of(0.0, 48.0),
    "no list": safetensors_of(0, 48, shape=None),
    "no name": safetensors_of(0, 48, dtype=[]),
    "metadata": safetensors({"__metadata__": [], "x": {}}),
}


def test_bad_safetensors_headers(tmp_path: Path) -> None:
    for content in BAD_SAFETENSORS.values():
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.safetensors: not a whole .safetensors file"):
            Shards([str(tmp_path)])


def test_bad_sources(tmp_path: Path) -> None:
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "b.npy").symlink_to(tmp_path / "gone.npy")
    (tmp_path / "a.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.npy")
    write(tmp_path / "rowless.npy", numbered(0, 0))
    for source, error, message in (
        ("empty", FileNotFoundError, "the folder holds no .npy or .safetensors file"),
        ("nothing", FileNotFoundError, "nothing: no such file or folder"),
        ("empty/*.npy", FileNotFoundError, "no file matches it as a glob"),
        ("broken", FileNotFoundError, "b.npy"),  # a link that leads nowhere
        ("pipe.npy", OSError, "pipe.npy: must be a file, got a pipe or a device"),  # not waited for
        ("a.txt", ValueError, "a.txt: a shard must be a .npy or .safetensors file, got .txt"),
        ("rowless.npy", ValueError, "must hold at least one token"),
    ):
        with pytest.raises(error, match=message):
            Shards([str(tmp_path / source)])
    with pytest.raises(ValueError, match="must name at least one"):
        Shards([])


def truncate(path: Path) -> None:
    os.truncate(path, 4096)  # whole pages are gone: where they are mapped, reading them kills the process


def replace(path: Path) -> None:
    other = path.with_name(f"other{path.suffix}")
    write(other, numbered(0, 1))
    other.replace(path)


def overwrite(path: Path) -> None:
    write(path, numbered(0, 1))


def widen(path: Path) -> None:
    rows = torch.zeros(20000, 2 * D)
    np.save(path, rows.numpy()) if path.suffix == ".npy" else save_file({"x": rows}, path)


@pytest.mark.parametrize(
    ("suffix", "opened", "change"),
    [
        (".npy", False, Path.unlink),
        (".npy", True, truncate),
        (".npy", False, replace),
        (".npy", True, widen),
        (".safetensors", True, Path.unlink),
        (".safetensors", False, truncate),
        (".safetensors", True, replace),
        (".safetensors", True, overwrite),
        (".fortran.npy", True, truncate),
        (".fortran.npy", False, overwrite),
    ],
)
def test_a_shard_that_changes_while_in_use(
    tmp_path: Path, suffix: str, opened: bool, change: Callable[[Path], None]
) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, numbered(0, 10000))
    if "fortran" in suffix:
        np.save(path, np.asfortranarray(numbered(0, 10000).numpy()))
    shards = Shards([str(path)])
    stream = TokenStream(shards, seed=0, block_tokens=4, buffer_tokens=8)
    if opened:
        next(stream.batches(4))
    inode = path.stat().st_ino
    change(path)
    if opened and (not path.exists() or path.stat().st_ino != inode):
        assert next(stream.batches(4))[0].shape == (4, D)  # the file that is open is still the old one
        return
    with pytest.raises(OSError, match=rf"data: can't be read any more: .*a{suffix}"):
        next(itertools.islice(stream.batches(1000), 20, None))


def test_a_file_that_ends_too_soon(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(bytes(100))
    with pytest.raises(OSError, match=r"a.npy: ends at byte 100, where 20 more were to be read"):
        File(tmp_path / "a.npy").fill(memoryview(bytearray(50)), 70)


def test_a_shard_that_is_only_touched_is_read_on(tmp_path: Path) -> None:
    source = write(tmp_path / "a.npy", numbered(0, 50))
    batches = TokenStream(Shards([source]), seed=0, block_tokens=4, buffer_tokens=8).batches(50)
    (first,) = next(batches)
    os.utime(source)
    assert sorted(next(batches)[0][:, 0].tolist()) == sorted(first[:, 0].tolist())


def stacked(rows: torch.Tensor) -> torch.Tensor:
    """(N, 2, D) of which each number is another."""
    return torch.stack([rows * 1000 + 10, rows * 1000 + 20], dim=1) + torch.arange(D)


@pytest.mark.parametrize("kind", ["npy", "fortran", "safetensors"])
def test_rows_of_several_sources(tmp_path: Path, kind: str) -> None:
    rows = stacked(numbered(0, 30))
    path = tmp_path / f"a.{'safetensors' if kind == 'safetensors' else 'npy'}"
    if kind == "fortran":
        np.save(path, np.asfortranarray(rows.numpy()))
    else:
        write(path, rows)
    shards = Shards([str(path)])
    assert (shards.shape, shards.rows) == ((2, D), 30)
    (found,) = next(TokenStream(shards, seed=0, block_tokens=4, buffer_tokens=8).batches(30))
    order = (found[:, 0, 0] / 1000).long()
    assert sorted(order.tolist()) == list(range(30))
    assert torch.equal(found, rows[order])


def test_what_belongs_together_stays_together(mixed: list[str], tmp_path: Path) -> None:
    targets = []
    for name, start, rows in (("a", 0, 10), ("b", 10, 7), ("c", 17, 13), ("d", 30, 9), ("e", 39, 18)):
        targets.append(write(tmp_path / f"target-{name}.npy", stacked(numbered(start, rows))))
    inputs = Shards([path for path in sorted(map(str, tmp_path.iterdir())) if "target" not in path])
    pairs = aligned(Shards(targets, setting="targets"), inputs)
    stream = TokenStream(inputs, pairs, seed=0, block_tokens=4, buffer_tokens=16)
    batches = stream.batches(10, start=5)
    for _ in range(20):
        x, y = next(batches)
        assert torch.equal(y, stacked(x.float()))
    alone = TokenStream(inputs, seed=0, block_tokens=4, buffer_tokens=16).batches(10, start=205)
    assert torch.equal(next(batches)[0], next(alone)[0])


def test_pairs_that_do_not_belong_together(tmp_path: Path) -> None:
    for folder, sizes in (("x", (4, 5)), ("y", (4, 5)), ("short", (4, 6)), ("one", (9,))):
        (tmp_path / folder).mkdir()
        for number, rows in enumerate(sizes):
            write(tmp_path / folder / f"{number}.npy", numbered(0, rows))
    x = Shards([str(tmp_path / "x")])

    def refused(*sources: str) -> str:
        with pytest.raises(ValueError, match=r"^targets: ") as caught:
            aligned(Shards([str(tmp_path / source) for source in sources], setting="targets"), x)
        return str(caught.value)

    assert aligned(Shards([str(tmp_path / "y")]), x).rows == 9
    assert refused("one") == "targets: must be as many shards as those of data (2), got 1"
    assert "short/1.npy must hold the 5 rows of " in refused("short")
    write(tmp_path / "x" / "0.npy", numbered(0, 5))
    x = Shards([str(tmp_path / "x")])
    write(tmp_path / "y" / "0.npy", numbered(0, 5))
    assert "must have the names of data's shards, in their order" in refused("y/1.npy", "y/0.npy")
    (tmp_path / "gap").mkdir()
    for name in ("0", "2"):
        write(tmp_path / "gap" / f"{name}.npy", numbered(0, 5))
    assert "gap/2.npy beside " in refused("gap")
    recipe = {"settings": {"layer": [1], "context": 64}, "from": {"model": "a", "texts": [["t", 1]]}}
    for folder, change in (("x", {}), ("y", {"layer": [2]})):
        told = recipe | {"settings": recipe["settings"] | change}
        (tmp_path / folder / "collection.json").write_text(json.dumps(told))
    assert aligned(Shards([str(tmp_path / "y")]), x).rows == 10
    (tmp_path / "y" / "held_out").mkdir()
    for name in ("0", "1"):
        write(tmp_path / "y" / "held_out" / f"{name}.npy", numbered(0, 5))
    assert refused("y/held_out").endswith("they differ in held out")
    told = {"settings": {"layer": [1], "context": 32}, "from": {"model": "b", "texts": [["t", 1]]}}
    (tmp_path / "y" / "collection.json").write_text(json.dumps(told))
    assert refused("y").endswith(f"from the tokens of {tmp_path / 'x'}, they differ in context, model")
