"""From a checkpoint and shards of activations to figures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsparse import metrics
from fastsparse._files import replacing
from fastsparse._settings import resolved_device
from fastsparse.evaluate.config import EvaluateConfig
from fastsparse.nn import SparseAutoencoder
from fastsparse.train import load_sae
from fastsparse.train.shards import Shards


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` leaves.

    Attributes:
        path: of the JSON file.
        d_model, num_latents: D and M.
        measures: what was found.
    """

    path: Path
    d_model: int
    num_latents: int
    measures: metrics.Measures

    def summary(self) -> str:
        """What came of it, in lines for a terminal."""
        found = self.measures
        return "\n".join(
            [
                f"tokens              {found.num_tokens:,}",
                f"L0                  {found.l0:.2f} of {self.num_latents:,} latents",
                f"FVU                 {found.fvu:.4f}",
                f"dead                {found.num_dead:,} latents never fired",
                f"effective features  {found.effective_features:,.0f}, {found.superposition:.2f} a dimension",
                f"evaluation: {self.path.resolve()}",
            ]
        )

    def record(self) -> dict:
        """As the JSON file has it: the measures, densities as a histogram."""
        edges, counts = metrics.density_histogram(self.measures.density)
        figures = self.measures._asdict()
        del figures["density"]
        histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
        sizes = {"d_model": self.d_model, "num_latents": self.num_latents}
        return {**sizes, **figures, "density_histogram": histogram}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure an autoencoder on stored activations: L0, FVU, densities, dead latents, effective features.

    Args:
        config: which one, on which activations.

    Returns:
        :class:`Evaluation`.

    Raises:
        FileNotFoundError: there is no checkpoint, or there are no shards.
        OSError: a file can't be read or written.
        ValueError: a checkpoint or shard is damaged, their widths differ, or the model is of several sources.
        RuntimeError: CUDA was asked for and can't be used.
    """
    run = Path(config.run)
    sae = load_sae(run, device=resolved_device(config.device))
    if not isinstance(sae, SparseAutoencoder):
        raise ValueError(f"run: {run}: must be of an autoencoder of one source, got a {type(sae).__name__}")
    shards = Shards(config.data, config.tensor)
    if shards.shape != (sae.d_model,):
        raise ValueError(
            f"data: {shards.shards[0].path}: must hold rows of the run's shape, ({sae.d_model},), got "
            f"{shards.shape}"
        )
    measures = metrics.evaluate(sae, _batches(shards, config, sae.W_dec))
    folder = run if run.is_dir() else run.parent
    path = Path(config.output) if config.output else folder / "evaluation.json"
    found = Evaluation(path, sae.d_model, sae.num_latents, measures)
    with replacing(path) as file:
        file.write(json.dumps(found.record(), indent=1).encode() + b"\n")
    return found


def _batches(shards: Shards, config: EvaluateConfig, like: Tensor) -> Iterator[Tensor]:
    """Rows in their order, on the device of the autoencoder."""
    left = shards.rows if config.max_tokens is None else min(config.max_tokens, shards.rows)
    with tqdm(total=left, desc="encoding", unit="tokens", disable=None, dynamic_ncols=True) as bar:
        for shard in shards.shards:
            for start in range(0, min(shard.rows, left), config.batch_size):
                count = min(config.batch_size, shard.rows - start, left)
                rows = torch.empty(count, *shards.shape, dtype=shards.dtype)
                shards.read(shard, start, start + count, rows, np.arange(count))
                yield rows.to(like.device, torch.promote_types(like.dtype, torch.float32))
                left -= count
                bar.update(count)
                if not left:
                    return
