"""What a call does on a GPU while it takes time: its kernels, replayed as a CUDA graph, what was tuned."""

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Clock

SAMPLES = 5


def traced(run: Callable[[], Any], clock: Clock, gpu: bool) -> dict[str, Any]:
    """``graph``, seconds of a replay, which an eager call's exceed where it waits for the host; ``kernels``.

    What can't be had says why: a call that waits for the device can't be captured.
    """
    ways = {**({"graph": lambda: replayed(run, clock)} if gpu else {}), "kernels": lambda: kernels(run, gpu)}
    found = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def kernels(run: Callable[[], Any], gpu: bool) -> list[dict[str, Any]]:
    """Every kernel of a call, or without a GPU every op: its calls and microseconds, the slowest first."""
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        run()
        if gpu:
            torch.cuda.synchronize()
    own = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == own]
    times = [event.self_device_time_total if gpu else event.self_cpu_time_total for event in events]
    rows = sorted(zip(times, events, strict=True), key=lambda row: -row[0])
    return [{"kernel": event.key[:80], "calls": event.count, "us": us} for us, event in rows if us > 0]


def replayed(run: Callable[[], Any], clock: Clock) -> float:
    """Seconds of the call as a CUDA graph, captured after what PyTorch's documents ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    sample = clock(graph.replay)
    return statistics.median(sample() for _ in range(SAMPLES))


def tuned(known: int = 0) -> list[dict[str, Any]]:
    """What Triton's launchers timed after the first ``known``: by key, each configuration's microseconds.

    The device is left out of the keys: the provenance has it. The fastest, which they take, comes first.
    """
    with contextlib.suppress(ImportError):
        from fastsparse.kernels._launch import timed

        return [
            {
                "key": [str(part) for part in key if not isinstance(part, torch.device)],
                "us": [
                    [asdict(configuration), 100 * ms]  # ms: of ten launches
                    for configuration, ms in sorted(of.items(), key=lambda item: item[1])
                ],
            }
            for key, of in list(timed.items())[known:]
        ]
    return []
