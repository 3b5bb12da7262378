"""The training loop."""

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fastsparse._files import locked
from fastsparse._settings import differences, resolved_device
from fastsparse.nn import Model, SAELoss
from fastsparse.train import checkpoint
from fastsparse.train.config import TrainConfig
from fastsparse.train.log import Log
from fastsparse.train.models import MODELS
from fastsparse.train.pairs import aligned
from fastsparse.train.shards import Shards
from fastsparse.train.stream import TokenStream

_LOG = "log.jsonl"


@dataclass(frozen=True)
class Metrics:
    """One line of the log.

    Attributes:
        step, tokens: how many, from the start of the run, resumes included.
        lr: the rate of this step.
        loss, fvu, aux, penalty, l0, density, dead: of this step's batch, as in
            :class:`fastsparse.nn.SAELoss`.
        seconds: since this process began to train.
        tokens_per_second: since the line before, or since this process began.
    """

    step: int
    tokens: int
    lr: float
    loss: float
    fvu: float
    aux: float
    penalty: float
    l0: float
    density: float
    dead: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves: the autoencoder, its last checkpoint, the log, and the last step's metrics.

    ``metrics`` is None where an earlier call had already done all steps.
    """

    sae: Model
    checkpoint: Path
    log: Path
    metrics: Metrics | None

    def summary(self) -> str:
        """What came of it, in lines for a terminal."""
        first = "all steps had been done before"
        if (m := self.metrics) is not None:
            figures = f"loss {m.loss:.4f}, FVU {m.fvu:.4f}, L0 {m.l0:.1f}, {m.dead} dead latents"
            first = f"step {m.step}: {figures}"
        return f"{first}\ncheckpoint: {self.checkpoint}\nlog: {self.log}"


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: training stopped between two steps, with a checkpoint."""

    def __init__(self, signal_number: int, step: int, path: Path) -> None:
        super().__init__(f"interrupted after step {step}; run the same command again to go on from {path}")
        self.signal_number = signal_number


def train(config: TrainConfig, *, on_metrics: Callable[[Metrics], None] | None = None) -> TrainResult:
    """Train a sparse model on stored activations, or go on where an earlier run stopped.

    A run that was killed, at any moment, and started again ends with the same weights, bit for bit, as one
    that never stopped (on the same machine and PyTorch, with the same number of threads; on CUDA, where
    ``torch.use_deterministic_algorithms`` is on). All state is in the newest checkpoint of ``config.output``
    and, for the order of the data, in the seed and the step.

    Args:
        config: what to train, on what.
        on_metrics: called with the :class:`Metrics` of every line of the log.

    Returns:
        :class:`TrainResult`.

    Raises:
        TypeError, ValueError: the shards don't fit together or to the model, the model can't have such
            options, or the checkpoint doesn't fit the configuration.
        FileNotFoundError: there are no shards.
        OSError: a checkpoint or the log can't be written (a full disk), a shard can't be read any more or has
            become another, or another run is using the folder; the last checkpoint is kept.
        FloatingPointError: the loss, or what a checkpoint would hold, is not finite; the last checkpoint is
            from before.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        RuntimeError: CUDA was asked for and can't be used.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from fastsparse.train import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"x": torch.randn(512, 16)}, folder / "activations.safetensors")
        >>> data = [str(folder / "activations.safetensors")]
        >>> sizes = dict(num_latents=64, options={"k": 4}, batch_size=128, steps=20, device="cpu")
        >>> train(TrainConfig(data=data, output=str(folder / "run"), **sizes)).sae.W_dec.shape
        torch.Size([64, 16])

    Source: Gao et al. 2024, arXiv 2406.04093, section 2 and appendix A; of each model, what its class names.
    """
    folder = Path(config.output)
    own = partial(_is_own, folder)
    shards, targets = Shards(config.data, config.tensor, ignore=own), None
    if config.targets:
        targets = aligned(Shards(config.targets, config.tensor, ignore=own, setting="targets"), shards)
    if config.batch_size > shards.rows:
        raise ValueError(
            f"batch_size: must be at most the number of tokens in the shards ({shards.rows}), "
            f"got {config.batch_size}"
        )
    kind = MODELS[config.model]
    sizes = kind.sizes_of(shards.shape, targets and targets.shape)
    sizes |= {"num_latents": config.num_latents} | config.all_options()
    generator = torch.Generator().manual_seed(config.seed)
    sae = kind(**sizes, generator=generator).to(resolved_device(config.device))
    details = {"config": config.result_fields(), "shards": shards.fingerprint(), "sae": sizes}
    details["shards"] += targets.fingerprint() if targets else []
    details["data"] = [os.path.abspath(source) for source in config.data]  # where a report looks for the text
    details = json.loads(json.dumps(details))  # as a checkpoint tells them: lists, no tuples
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return _train(config, shards, targets, sae, details, folder, on_metrics or (lambda metrics: None))


def _is_own(folder: Path, path: Path) -> bool:
    """Whether a file is the log, or a checkpoint, of the run in a folder, which may lie among the data."""
    return os.path.realpath(path) == os.path.realpath(folder / _LOG) or checkpoint.is_own(folder, path)


def _train(
    config: TrainConfig,
    shards: Shards,
    targets: Shards | None,
    sae: Model,
    details: dict,
    folder: Path,
    on_metrics: Callable[[Metrics], None],
) -> TrainResult:
    device = next(sae.parameters()).device
    stream = TokenStream(
        shards,
        targets,
        seed=config.seed,
        block_tokens=config.block_tokens,
        buffer_tokens=config.buffer_tokens,
    )
    # One fused pass over parameters, gradients and moments instead of a dozen.
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=True)
    checkpoint.remove_partial(folder)
    newest = next(reversed(checkpoint.checkpoints(folder)), None)
    done = 0 if newest is None else _resume(newest, details, config.steps, sae, optimizer)
    batches = stream.batches(config.batch_size, start=done * config.batch_size)
    if newest is None:
        first = next(batches)
        sae.init_decoder_bias_(*(part.to(device) for part in first))
        batches = itertools.chain([first], batches)

    log_path, metrics = folder / _LOG, None
    with (
        Log(log_path, done) as log,
        _Bar(config.steps, done) as bar,
        _signals() as received,
    ):
        clock, step = _Clock(config.batch_size, done), done
        for step in range(done + 1, config.steps + 1):
            lr = config.rate_at(step)
            batch = [part.to(device, torch.float32) for part in next(batches)]
            out = _step(sae, optimizer, batch, lr, config.bf16)
            stop = bool(received)  # looked at once: what comes later in this step ends the next one
            due = stop or step == config.steps or step % config.checkpoint_every == 0
            if due or step % config.log_every == 0:
                metrics = _measure(out, step, lr, clock)
                bar.show(metrics)
            if step % config.log_every == 0:
                log.write(asdict(metrics))
                on_metrics(metrics)
            if due:
                log.sync()
                newest = checkpoint.save(folder, step, sae, optimizer, details, config.keep_checkpoints)
            bar.advance()
            if stop:
                break
        if received:
            raise TrainingInterrupted(received[0], step, newest)
    return TrainResult(sae.eval(), newest, log_path, metrics)


def _step(
    sae: Model, optimizer: torch.optim.Adam, batch: Sequence[torch.Tensor], lr: float, bf16: bool
) -> SAELoss:
    """One step of training on a batch: the tokens, and the targets where there are any."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
        out = sae.loss(*batch)
    out.loss.backward()
    sae.after_backward_()
    optimizer.step()
    sae.after_step_()
    sae.count_firings_(out.code, group="self")  # a run is one process, whatever else runs beside it
    return out


def _measure(out: SAELoss, step: int, lr: float, clock: "_Clock") -> Metrics:
    told = torch.stack([out.loss.detach(), out.fvu, out.aux, out.penalty, out.l0])
    loss, fvu, aux, penalty, l0 = told.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: the loss is {loss}: the activations hold NaN or infinities, or lr is too high "
            f"({lr:g}); the last checkpoint is from before"
        )
    seconds, rate = clock.read(step)
    figures = (loss, fvu, aux, penalty, l0, out.density, out.num_dead)
    return Metrics(step, step * clock.batch_size, lr, *figures, seconds, rate)


def _resume(newest: Path, details: dict, steps: int, sae: Model, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint in place, if it is of the run that is asked for, and return its step."""
    state = checkpoint.load(newest)
    differences(state.metadata["config"], details["config"], str(state.path))
    if state.metadata["shards"] != details["shards"]:
        raise ValueError(
            f"data: must be the {len(state.metadata['shards'])} shards that {state.path} was trained on "
            "(names, order, rows and dtypes), got others; to start anew, name another output folder"
        )
    if state.step > steps:
        raise ValueError(f"steps: must be at least the {state.step} that {state.path} has done, got {steps}")
    checkpoint.restore(state, sae, optimizer)
    return state.step


class _Clock:
    """Times of one process, monotonic."""

    def __init__(self, batch_size: int, step: int) -> None:
        self.batch_size = batch_size
        self._began = self._before = time.monotonic()
        self._step = step

    def read(self, step: int) -> tuple[float, float]:
        """Seconds since the beginning, and tokens a second since the last reading."""
        now = time.monotonic()
        rate = (step - self._step) * self.batch_size / max(now - self._before, 1e-9)
        self._before, self._step = now, step
        return round(now - self._began, 3), round(rate, 1)


class _Bar:
    """A progress bar where standard error is a terminal."""

    def __init__(self, steps: int, done: int) -> None:
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)

    def show(self, metrics: Metrics) -> None:
        penalty = f"penalty {metrics.penalty:.4f}, " if metrics.penalty else ""  # many models have none
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, FVU {metrics.fvu:.4f}, {penalty}L0 {metrics.l0:.1f}, "
            f"dead {metrics.dead}, {metrics.tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )

    def advance(self) -> None:
        self._bar.update()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the step is finished first; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # handlers belong to the main thread: there the signal acts as its owner decided
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
