"""The demo from text to report, step after step; what is finished is found again by the next run."""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import fastsparse
from fastsparse.demo import text
from fastsparse.demo.activations import LAYER, WEIGHTS, Activations, collect
from fastsparse.demo.comparison import compare
from fastsparse.demo.features import Code, telling
from fastsparse.demo.report import Result, write
from fastsparse.info import environment
from fastsparse.nn import TopKSAE, fvu
from fastsparse.train import TrainConfig, TrainResult, train

ROUNDS = 15  # of the comparison
CHUNK = 4096  # tokens encoded at once after training


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo does; the defaults take two minutes of training on two cores.

    Attributes:
        output: folder for everything that it makes.
        steps, batch_size: of training.
        num_latents: M; k: active latents.
        lr: learning rate of Adam; higher than for long runs.
        device: auto, cpu or cuda.
    """

    output: Path
    steps: int = 1600
    batch_size: int = 2048
    num_latents: int = 6144
    k: int = 32
    lr: float = 1e-3
    device: str = "auto"


def run(settings: Settings, say: Callable[[str], None] = lambda line: None) -> tuple[Result, Path]:
    """Run the demo.

    Args:
        settings: what to do.
        say: told of each part as it begins.

    Returns:
        What the report shows, and the path of the report.

    Raises:
        ValueError: a setting is out of range.
        OSError: the output folder can't be written to.
        RuntimeError: CUDA was asked for and can't be used.
        TrainingInterrupted: Ctrl-C during training; the next run goes on from there.
    """
    output = settings.output
    config = _config(settings)
    device = config.resolved_device()
    output.mkdir(parents=True, exist_ok=True)
    say("activations: MiniLM reads Python's language reference")
    activations = collect(text.clean(text.language_reference()), output, device)
    say(f"training: {config.steps:,} steps, top {config.k} of {config.num_latents:,} latents, on {device}")
    trained = train(_place(config, activations, output))
    say(f"report: statistics, and {ROUNDS} training steps against dense PyTorch")
    result = _evaluate(settings, activations, trained, device)
    report = output / "report.html"
    write(result, report)
    return result, report


def _config(settings: Settings) -> TrainConfig:
    return TrainConfig(
        data=[],
        output="",
        num_latents=settings.num_latents,
        k=settings.k,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        warmup_steps=settings.steps // 20,
        decay_steps=settings.steps // 3,
        # The default of 10 M tokens is more than this run sees: a latent silent for four passes is dead here.
        dead_after=300_000,
        log_every=5,
        checkpoint_every=200,
        device=settings.device,
    )


def _place(config: TrainConfig, activations: Activations, output: Path) -> TrainConfig:
    """A training run's folder is named after all that decides its outcome: other settings, other folder."""
    recipe = json.dumps([activations.path.name, config.result_fields()], sort_keys=True)
    name = f"sae-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    return replace(config, data=[str(activations.shards("train"))], output=str(output / name))


def _evaluate(
    settings: Settings, activations: Activations, trained: TrainResult, device: torch.device
) -> Result:
    sae = trained.sae.to(device)
    train_rows, held_out_rows = (activations.rows(split) for split in ("train", "held_out"))
    train_code, train_fvu = _encode(sae, train_rows)
    held_out_code, held_out_fvu = _encode(sae, held_out_rows)
    values, indices = (torch.cat(pair) for pair in zip(train_code, held_out_code, strict=True))
    code = Code(values.numpy(), indices.numpy(), sae.num_latents, activations.tokens())
    log = [json.loads(line) for line in trained.log.read_text().splitlines()]
    before = [0, *(line["tokens"] for line in log)]
    return Result(
        d_model=sae.d_model,
        num_latents=sae.num_latents,
        k=sae.k,
        batch=settings.batch_size,
        steps=[line["step"] for line in log],
        fvu_by_step=[line["fvu"] for line in log],
        train_fvu=train_fvu,
        held_out_fvu=held_out_fvu,
        l0=(held_out_code.values > 0).sum(dim=1).float().mean().item(),
        counts=code.counts,
        num_train=len(train_rows),
        num_held_out=len(held_out_rows),
        # From the rates and not from a clock: a run may have been interrupted for a night.
        seconds=sum(
            (line["tokens"] - seen) / line["tokens_per_second"]
            for line, seen in zip(log, before, strict=False)
        ),
        comparison=compare(
            sae,
            train_rows.to(device),
            batch=settings.batch_size,
            rounds=ROUNDS,
            lr=settings.lr,
            watch=lambda rounds: tqdm(rounds, desc="fastsparse against dense", unit="round", disable=None),
        ),
        features=telling(code),
        environment=_environment(settings, device),
    )


@torch.no_grad()
def _encode(sae: TopKSAE, rows: torch.Tensor) -> tuple[fastsparse.TopK, float]:
    """The codes of all rows, on the CPU, and the FVU of their reconstructions."""
    codes, reconstructions = [], []
    for chunk in rows.split(CHUNK):
        code = sae.encode(chunk.to(sae.W_enc.device))
        reconstructions.append(sae.decode(code).cpu())
        codes.append(code)
    whole = fastsparse.TopK(*(torch.cat(part).cpu() for part in zip(*codes, strict=True)))
    return whole, fvu(torch.cat(reconstructions), rows).item()


def _environment(settings: Settings, device: torch.device) -> list[tuple[str, str]]:
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]["model"]
    return [
        ("model", f"MiniLM (all-MiniLM-L6-v2, from {WEIGHTS}), output of layer {LAYER} of 6"),
        ("text", f"Python {platform.python_version()} language reference, every paragraph once"),
        (
            "autoencoder",
            f"TopK, M = {settings.num_latents:,}, k = {settings.k}, AuxK, Adam at {settings.lr:g}",
        ),
        ("fastsparse", f"{fastsparse.__version__}, backend {_backend(device)}"),
        ("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", processor),
    ]


def _backend(device: torch.device) -> str:
    """The backend that serves the device's tensors."""
    own = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device.type]
    usable = [b for b in fastsparse.backends().values() if b.available and b.name in ("reference", *own)]
    return f"{usable[-1].name} ({usable[-1].detail})"
