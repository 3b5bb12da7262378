"""The command line: what it prints, what it returns, and that Ctrl-C is survived."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsparse
from fastsparse.__main__ import main
from fastsparse.train import load_sae
from fastsparse.train.models import MODELS, options_of

SIZES = ["--num-latents", "32", "--k", "2", "--batch-size", "32", "--device", "cpu", "--log-every", "1"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "a.npy", torch.randn(300, 8, generator=generator).numpy())
    return str(tmp_path / "a.npy")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastsparse", *arguments]


def wait_for_steps(log: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("model", "options", "chosen"),
    [
        ("topk", "--budgets 2 4 --budget-weights 1 0.5", {"budgets": (2, 4), "budget_weights": (1, 0.5)}),
        (
            "batchtopk",
            "--k 1.5 --no-unit-norm --prefixes 8",
            {"k": 1.5, "unit_norm": False, "prefixes": (8,)},
        ),
        ("jumprelu", "--threshold 0.5 --no-learn-threshold", {"initial_threshold": 0.5}),
        ("mp", "--no-nonnegative --aux-k 3", {"nonnegative": False, "aux_k": 3, "unit_norm": True}),
    ],
)
def test_train(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture, model: str, options: str, chosen: dict
) -> None:
    run = tmp_path / "run"
    named = ["--model", model, *SIZES, *options.split()]
    arguments = ["train", data, "--output", str(run), "--steps", "7", *named]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("step 7: loss ")
    assert f"checkpoint: {run}/checkpoint-000000007.safetensors\nlog: {run}/log.jsonl\n" in out
    assert err == ""  # no progress bar where there is no terminal
    assert steps(run / "log.jsonl")[-1] == 7
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("all steps had been done before\n")
    sae = load_sae(run)
    assert {name: getattr(sae, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{empty}", "--output", "{run}"], "{empty}: the folder holds no .npy or .safetensors file"),
        (["train", "{data}", "--output", "{run}", "--k", "99"], "k must be at most num_latents (32)"),
        (["train", "{data}", "--output", "{data}"], "{data}"),
        (
            ["evaluate", "{empty}", "--data", "{data}"],
            "{empty}: the folder holds no checkpoint-*.safetensors",
        ),
        (["report", "{empty}"], "run: {empty}: must be the folder of a training run, which holds"),
    ],
)
def test_errors_are_explained_without_a_traceback(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "run": tmp_path / "run", "data": data}
    command, *rest = (argument.format(**names) for argument in arguments)
    assert main([command, *(SIZES if command == "train" else ()), *rest]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastsparse: error: ")
    assert message.format(**names) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "command"),
        ("train", "data, --output, --num-latents, --k"),
        ("train x --output y --k two", "argument --k: invalid int value: 'two'"),
        ("train x --output y --num-latents 2 --model omp", "argument --model: invalid choice: 'omp'"),
        (
            "train x --output y --num-latents 2 --k 1 --nonnegative",
            "unrecognized arguments: --nonnegative; those of the model topk are --k, --activation, --groups",
        ),
        ("train x --output y --num-latents 2 --model mp --k 1 --groups 2", "mp are --k, --nonnegative"),
        ("report x --fly", "unrecognized arguments: --fly\n"),
        ("fly", "'fly'"),
    ],
)
def test_usage_errors(arguments: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage: fastsparse" in err
    assert message in err


@pytest.mark.parametrize("model", MODELS)
def test_help_shows_the_options_of_the_model_that_is_named(model: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"--model={model}", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"options of the model {model}: {options_of(model).__doc__}" in shown
    for about in fields(options_of(model)):
        assert f"--{about.name.replace('_', '-')}" in shown
        assert about.metadata["help"] in shown


def test_after_ctrl_c_the_same_command_goes_on(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", data, "--output", str(run), "--steps", "400", *SIZES]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*arguments), **pipe) as process:
        wait_for_steps(run / "log.jsonl", 60, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    step = steps(run / "log.jsonl")[-1]
    checkpoint = run / f"checkpoint-{step:09d}.safetensors"
    advice = f"run the same command again to go on from {checkpoint}"
    assert err == f"fastsparse: interrupted after step {step}; {advice}\n"
    assert checkpoint.exists()
    assert out == ""
    assert main(arguments) == 0
    assert steps(run / "log.jsonl") == list(range(1, 401))


def test_progress_bar_on_a_terminal(data: str, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    run = tmp_path / "run"
    arguments = command("train", data, "--output", str(run), "--steps", "60", *SIZES)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how Linux says that the other side is closed
            while piece := os.read(controller, 65536):
                shown += piece
    os.close(controller)
    assert process.returncode == 0
    text = shown.decode()
    for word in ("60/60", "loss 0.", "FVU 0.", "L0 ", "dead 0", "tokens/s"):
        assert word in text


def test_without_the_extras_there_is_help_and_an_error_that_names_them(tmp_path: Path) -> None:
    """collect misses transformers alone, where the others miss NumPy."""
    script = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"  # torch grumbles where numpy is missing
        "import importlib.util as u\n"
        "gone = ('numpy', 'safetensors', 'tqdm')\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in gone else find(name, *rest)\n"
        "from fastsparse.__main__ import main\n"
        "for command in ('collect', 'train', 'evaluate', 'report'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "sizes = ['--num-latents', '2', '--k', '1']\n"
        "codes = [main(['collect', 'm', 'x', '--output', 'y', '--layer', '1']), main(['report', 'y'])]\n"
        "codes.append(main(['evaluate', 'y', '--data', 'x']))\n"
        "sys.exit(main(['train', 'x', '--output', 'y', *sizes]) + sum(codes))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 4
    for option in ("--keep-checkpoints", "(default: 4096)", "--held-out-every", "--max-tokens"):
        assert option in done.stdout
    assert done.stderr.splitlines() == [
        f"fastsparse: error: fastsparse.{command} needs numpy, which is not installed: "
        f"pip install 'fastsparse-torch[{extra}]'"
        for command, extra in (
            ("collect", "collect"),
            ("report", "train"),
            ("evaluate", "train"),
            ("train", "train"),
        )
    ]


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastsparse {fastsparse.__version__}\n"


def test_a_terminal_without_the_letters_of_a_path(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows them escaped; a run that is finished doesn't fail for it."""
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii", write_through=True))
    monkeypatch.chdir(tmp_path)
    assert main(["train", data, "--output", "größe-\udcff", "--steps", "2", *SIZES]) == 0
    assert rb"checkpoint: gr\xf6\xdfe-\udcff/checkpoint-000000002.safetensors" in terminal.getvalue()
