"""Training steps of the libraries that people train with, Adam included: as they are, and with one line
before them, ``fastsparse.compat.<library>.apply()``. Their own losses; peers alone. Of recurrences a layer,
forward and backward.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import pursuits, shapes, steps
from benchmarks.bars import by_machine, speed_bars
from benchmarks.cases import OURS, matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import close_all
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab
from benchmarks.peers import pararnn_torch
from benchmarks.recurrences import GRU, LSTM, Cell, Layer
from benchmarks.shapes import Given, Sequences, Shape, each
from benchmarks.steps import Parameters, PeerStep

THEIRS, RELAID = "as it is", f"{OURS}, relayout_"
MAY = 2e-2  # of a gradient's norm, as in bench_encoder_steps
OF_RECURRENT = 5.0  # how many times as fast the line must make a recurrent layer


class Trained(NamedTuple):
    """What a library trains.

    Attributes:
        adapter: the module of fastsparse.compat.
        peer: the module of benchmarks.peers, and the step in it.
        least: how many times as fast the line must make it, with bf16 products and without.
        pursuit: whether it is a matching pursuit, which has its own problem.
        relaid: whether its adapter has a relayout_, which is measured, too.
    """

    adapter: str
    peer: str
    step: str
    least: tuple[float, float]
    options: Mapping[str, Any] = MappingProxyType({})
    pursuit: bool = False
    relaid: bool = False


TRAINED = {
    "SAELens TopK": Trained("sae_lens", "sae_lens", "SAELensStep", (5.0, 3.5), relaid=True),
    "SAELens BatchTopK": Trained("sae_lens", "sae_lens", "SAELensBatchTopKStep", (3.0, 3.0), relaid=True),
    "SAELens Matryoshka": Trained(
        "sae_lens", "sae_lens", "SAELensBatchTopKStep", (3.0, 3.0), {"parts": (16, 8, 4, 2)}
    ),
    "SAELens matching pursuit": Trained(
        "sae_lens", "sae_lens", "SAELensPursuitStep", (6.0, 6.0), pursuit=True
    ),
    "dictionary_learning TopK": Trained(
        "dictionary_learning", "dictionary_learning", "DictionaryLearningStep", (5.0, 3.5), relaid=True
    ),
    "sparsify": Trained("sparsify", "sparsify", "SparsifyStep", (1.8, 1.5)),
    "overcomplete matching pursuit": Trained(
        "overcomplete", "overcomplete", "OvercompletePursuitStep", (20.0, 20.0), pursuit=True
    ),
}


class Training:
    """A step of the library and its optimiser's, with or without the line."""

    def __init__(self, trained: Trained, parameters: Parameters, k: int, applied: bool, relaid: bool) -> None:
        peer = import_module(f"benchmarks.peers.{trained.peer}")
        self.step: PeerStep = getattr(peer, trained.step)(parameters, k, **trained.options)
        self.optimizer = torch.optim.Adam(list(self.step.leaves.values()), lr=1e-5)
        adapter = import_module(f"fastsparse.compat.{trained.adapter}")
        self.adapter = adapter if applied else None
        if relaid:
            adapter.relayout_(self.step.module)

    def run(self, x: Tensor) -> PeerStep:
        return self._run(x) if self.adapter is None else under(self.adapter, partial(self._run, x))

    def _run(self, x: Tensor) -> PeerStep:
        self.step.run(x)
        self.optimizer.step()
        return self.step


def under(adapter: Any, run: Callable[[], Any]) -> Any:
    """What a run gives with the line before it.

    Without a look at sources; applying and undoing take some 15 ms even so, which count here.
    """
    with adapter.apply(force=True, least_work=0) as library:
        before = library.status().served.total()
        found = run()
        if library.status().served.total() == before:
            raise RuntimeError(f"nothing was served: {library.status()}")
        return found


def jobs(lab: Lab) -> Iterator[Job]:
    if not lab.peers or lab.gpu:
        return
    for name, trained in TRAINED.items():
        (shape,) = lab.shapes([shapes.PURSUIT_STEP] if trained.pursuit else shapes.STEP[:1])
        (given,) = each(0, [shape], "fp32")
        bars = partial(speed_bars, f"{name} step ({shape})", {THEIRS: by_machine(*trained.least)})
        need = 24 * matrix_bytes((shape.M, shape.D)) + 12 * matrix_bytes((shape.N, shape.M))
        yield Job("drop_in", name, given, partial(case, lab, given, trained), bars, need)
    for name, cell in (("GRU", GRU), ("LSTM", LSTM)):
        name = f"pararnn-torch {name}, forward + backward"
        (shape,) = lab.shapes([shapes.RECURRENCE])
        bars = partial(speed_bars, f"{name} ({shape})", {THEIRS: OF_RECURRENT})
        yield Job("drop_in", name, Given(shape), partial(layer, lab, cell, shape), bars)


def case(lab: Lab, given: Given, trained: Trained) -> dict[str, Any]:
    shape = given.shape
    parameters, x = _problem(shape, trained)
    expected = Training(trained, parameters, shape.k, False, False).run(x).found()
    check = partial(steps.check, expected, MAY)

    def contender(who: str, applied: bool, relaid: bool = False) -> Contender:
        build: Callable[[], Training] = partial(Training, trained, parameters, shape.k, applied, relaid)
        return steps.contender(who, build, lambda training: training.run(x), check)

    work = Work(8 * matrix_bytes((shape.M, shape.D)), 2.0 * shape.N * shape.D * shape.M)
    contenders = [contender(OURS, True), contender(THEIRS, False)]
    if trained.relaid:
        contenders.append(contender(RELAID, True, relaid=True))
    return lab.measure(shape, contenders, work)


def layer(lab: Lab, cell: Cell, shape: Sequences) -> dict[str, Any]:
    """A ParaRNN in training: its input product, recurrence, and all gradients."""
    adapter = import_module("fastsparse.compat.pararnn")
    own = Layer(cell, shape)
    expected, peer = own.expected(), pararnn_torch.ParaRNNLayer(own)

    def check(found: list[Tensor]) -> str:
        return close_all(expected, pararnn_torch.STATES, peer.arranged(found))

    contenders = [
        Contender(OURS, lambda: under(adapter, peer.run), check),
        Contender(THEIRS, peer.run, check, samples=3),
    ]
    return lab.measure(shape, contenders)


def _problem(shape: Shape, trained: Trained) -> tuple[Parameters, Tensor]:
    return pursuits.problem(shape)[:2] if trained.pursuit else steps.problem(shape)
