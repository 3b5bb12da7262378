"""From a training run and the text of its activations to what the page shows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastsparse
from fastsparse._settings import resolved_device
from fastsparse.collect.folder import RECIPE, Folder
from fastsparse.collect.texts import Window
from fastsparse.functional import Ragged
from fastsparse.info import environment
from fastsparse.nn import SparseAutoencoder
from fastsparse.report.config import ReportConfig
from fastsparse.report.features import Code, telling
from fastsparse.report.page import Panel, Result, Scores, write
from fastsparse.report.tokens import Tokens
from fastsparse.train import load_sae
from fastsparse.train.checkpoint import checkpoints, load
from fastsparse.train.models import in_words

CHUNK = 4096  # tokens encoded at once
SAMPLE = 2**16  # rows that figures of one's own get


@dataclass(frozen=True)
class Report:
    """What :func:`report` leaves: the page, and what it shows."""

    path: Path
    result: Result

    def summary(self) -> str:
        """What came of it, in lines for a terminal."""
        return f"{self.result.summary()}\nreport: {self.path.resolve()}"


def report(
    config: ReportConfig,
    *,
    panels: Callable[[SparseAutoencoder, Tensor], Sequence[Panel]] = lambda sae, rows: (),
) -> Report:
    """Write a page that shows how a run learned, and what its latents stand for.

    Args:
        config: of which run, on which text.
        panels: from the autoencoder and some rows of activations to figures of your own.

    Returns:
        :class:`Report`.

    Raises:
        FileNotFoundError: the run has no checkpoint, or its activations are not from ``fastsparse collect``.
        OSError: a file can't be read, or the page not written.
        ValueError: a checkpoint or shard is damaged, their widths differ, or the model is of several sources.
        RuntimeError: CUDA was asked for and can't be used.
    """
    run, device = Path(config.run), resolved_device(config.device)
    found = checkpoints(run) if run.is_dir() else []
    if not found:
        raise FileNotFoundError(f"run: {run}: must be the folder of a training run, which holds checkpoints")
    told = load(found[-1]).metadata
    folder = _collection(config.data, told.get("data", []))
    sae = load_sae(found[-1], device=device)
    if not isinstance(sae, SparseAutoencoder):
        raise ValueError(f"run: {run}: must be of an autoencoder of one source, got a {type(sae).__name__}")
    read = _Reading(sae)
    read.all_of(folder, config.max_tokens)
    recipe, code = folder.recipe(), read.code()
    result = Result(
        title=config.title or f"What the latents of {run.resolve().name} stand for",
        place=_place(recipe["settings"]),
        d_model=sae.d_model,
        num_latents=sae.num_latents,
        batch=told["config"]["batch_size"],
        log=_log(run),
        training=read.training.scores(),
        held_out=read.held_out.scores(),
        counts=code.counts,
        features=telling(code, count=config.features),
        panels=panels(sae, read.sample),
        environment=_environment(run, told, recipe, device),
    )
    path = Path(config.output) if config.output else run / "report.html"
    write(result, path)
    return Report(path, result)


class _Part:
    """Sums over the tokens of one kind, in fp64: what is left of them, and what there was."""

    def __init__(self, width: int) -> None:
        self.tokens, self.active, self.error, self.square = 0, 0, 0.0, 0.0
        self.sum = torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor, estimate: Tensor, active: Tensor) -> None:
        wide = x.double()
        self.tokens += len(x)
        self.active += int(active.sum())
        self.error += float((wide - estimate).square().sum())
        self.square += float(wide.square().sum())
        self.sum += wide.sum(dim=0).cpu()

    def scores(self) -> Scores | None:
        """None of no tokens."""
        if not self.tokens:
            return None
        variance = self.square - float(self.sum.square().sum()) / self.tokens
        return Scores(self.tokens, self.error / (variance or 1.0), self.active / self.tokens)


class _Reading:
    """An autoencoder reads a collection, piece by piece; codes and text stay.

    Attributes:
        sample: some of the rows, on the autoencoder's device.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae = sae
        self._windows: list[Window] = []
        self._codes: list[tuple[Tensor, Tensor, Tensor]] = []
        self.training, self.held_out = _Part(sae.d_model), _Part(sae.d_model)
        self.sample = torch.empty(0, sae.d_model)

    def all_of(self, folder: Folder, max_tokens: int) -> None:
        """Read pieces until there are no more, or so many tokens are read."""
        if not folder.pieces():
            raise ValueError(f"data: {folder.path}: must hold at least one piece, got none yet")
        bar = tqdm(range(folder.pieces()), desc="encoding", unit="piece", disable=None, dynamic_ncols=True)
        for number in bar:
            windows = folder.windows(number)
            for held_out in (False, True):
                own = [window for window in windows if window.held_out is held_out]
                rows = folder.rows(number, held_out=held_out)
                wanted = (sum(len(window.ids) for window in own), self._sae.d_model)
                if own and rows.shape != wanted:
                    raise ValueError(
                        f"data: {folder.path}: piece {number} must hold activations {wanted} for its text "
                        f"and this run, got {tuple(rows.shape)}"
                    )
                self._windows += own
                for chunk in rows.split(CHUNK) if own else ():
                    self._encode(chunk, self.held_out if held_out else self.training)
            if self.training.tokens + self.held_out.tokens >= max_tokens:
                break

    @torch.no_grad()
    def _encode(self, rows: Tensor, part: _Part) -> None:
        x = rows.to(self._sae.W_dec.device, torch.float32)
        code = self._sae.encode(x)
        ragged = code if isinstance(code, Ragged) else Ragged.from_topk(code)
        values = ragged.values.abs()  # a signed latent fires either way
        part.add(x, self._sae.decode(code), values > 0)
        self._codes.append((values.cpu(), ragged.indices.to(torch.int32).cpu(), ragged.row_counts().cpu()))
        if len(self.sample) < SAMPLE:
            self.sample = torch.cat([self.sample.to(x), x])

    def code(self) -> Code:
        """The codes, of the training tokens and the held-out ones as they came."""
        values, indices, counts = (torch.cat(part).numpy() for part in zip(*self._codes, strict=True))
        rows = np.repeat(np.arange(len(counts)), counts)
        spans = [np.array(window.spans, dtype=np.int64).reshape(-1, 2) for window in self._windows]
        labels, texts, held_out = (
            [getattr(window, name) for window in self._windows] for name in ("label", "text", "held_out")
        )
        return Code(values, indices, rows, self._sae.num_latents, Tokens(labels, texts, spans, held_out))


def _collection(named: str | None, trained_on: Sequence[str]) -> Folder:
    """The folder that collect made: the one that is named, or that a run's data lie in."""
    if named is not None:
        return Folder(Path(named))
    for source in map(Path, trained_on):
        for place in (source, source.parent):
            if (place / RECIPE).is_file():
                return Folder(place)
    raise FileNotFoundError(
        "data: must be a folder that `fastsparse collect` made, to know the text of the activations; "
        f"the run was trained on {', '.join(trained_on) or 'what it does not say'}"
    )


def _log(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def _place(settings: dict) -> str:
    """What of the model was collected."""
    if settings["module"]:
        return f"{settings['side']} of {', '.join(settings['module'])}"
    return f"residual stream after layer {', '.join(map(str, settings['layer']))}"


def _environment(run: Path, told: dict, recipe: dict, device: torch.device) -> list[tuple[str, str]]:
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]["model"]
    config = told["config"]
    options = in_words(config["model"], config)
    sizes = ", ".join(filter(None, [config["model"], f"M = {config['num_latents']:,}", options]))
    return [
        ("run", f"{run.resolve().name}, after {told['step']:,} steps"),
        ("model", f"{'/'.join(Path(recipe['settings']['model']).parts[-2:])}, {_place(recipe['settings'])}"),
        ("text", ", ".join(name for name, _ in recipe["from"]["texts"])),
        ("autoencoder", f"{sizes}, Adam at {config['lr']:g}"),
        ("fastsparse", f"{fastsparse.__version__}, backend {_backend(device)}"),
        ("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", processor),
    ]


def _backend(device: torch.device) -> str:
    """The backend that serves the device's tensors."""
    own = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device.type]
    usable = [b for b in fastsparse.backends().values() if b.available and b.name in ("reference", *own)]
    return f"{usable[-1].name} ({usable[-1].detail})"
