"""A Hugging Face model as a reader of windows: it gives a row of activations for every token."""

import difflib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsparse.collect.texts import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Reached(Exception):  # noqa: N818 (nothing went wrong)
    """What was to be seen has been seen: the layers above needn't run."""


class Reader:
    """A model on this disk, up to the places whose activations are kept.

    Args:
        model: its folder, or its name in the cache. Nothing is downloaded.
        layers: keep the residual stream after so many layers, each; or
        modules: what these modules put out, or
        side: are given, where this is ``"input"``.
        device: where it runs.

    Attributes:
        frame: the special tokens before and after a window.
        longest: how many tokens the model can read at once, as far as it says.
        fingerprint: of configuration and weights.

    Raises:
        OSError: there is no such model on this disk.
        ValueError: it has no such layer or module, or its tokenizer can't say where tokens are in the text.
    """

    def __init__(
        self, model: str, layers: Sequence[int], modules: Sequence[str], side: str, device: torch.device
    ) -> None:
        self._tokenizer, self._model, self._made_up = _load(model)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"model: {model}: must have a fast tokenizer, which says where tokens are in the text, "
                f"got {type(self._tokenizer).__name__}"
            )
        self._model.eval().to(device)
        self._device = device
        self._seen: dict[str, Any] = {}
        self._places = [f"layer {layer}" for layer in layers] + [f"module {module}" for module in modules]
        watched = [_module(self._model, module, side) for module in modules]
        watched += [_layer(self._model, layer) for layer in layers]
        for place, watch in zip(self._places, watched, strict=True):
            watch(partial(self._see, place))
        plain, framed = (
            self._tokenizer("a", add_special_tokens=special).input_ids for special in (False, True)
        )
        at = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        self.frame = (framed[:at], framed[at + len(plain) :])
        self.longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def fingerprint(self) -> str:
        """CRC-32 of configuration and weights; not of those that the files lack, which are drawn anew."""
        total = zlib.crc32(self._model.config.to_json_string().encode())
        for name, tensor in self._model.state_dict().items():
            if name not in self._made_up:
                total = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), total)
        return f"{total:08x}"

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and where they are in the text, without special tokens."""
        # verbose=False: a text longer than the model reads is no cause to warn, it is cut afterwards.
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return coded["input_ids"], coded["offset_mapping"]

    @torch.inference_mode()
    def read(self, windows: list[Window]) -> list[Tensor]:
        """The activations of each window's tokens, special ones dropped, on the CPU.

        Returns:
            (n, D), or (n, L, D) of several places.

        Raises:
            ValueError: a place gives something else than a vector for each token, or vectors of another width
                than the first place's.
        """
        before, after = self.frame
        framed = [[*before, *window.ids, *after] for window in windows]
        longest = max(map(len, framed))
        ids = torch.zeros(len(framed), longest, dtype=torch.int64)  # under the mask, any token will do
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(framed):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        self._seen = {}
        with suppress(_Reached):
            self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        found: list[Tensor] = []
        for place in self._places:
            seen = self._seen.get(place)
            if not isinstance(seen, Tensor) or seen.dim() != 3 or seen.shape[:2] != ids.shape:
                got = f"shape {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
                raise ValueError(
                    f"{place}: must give shape {tuple(ids.shape)} + (D,) for these tokens, got {got}"
                )
            if found and seen.shape != found[0].shape:
                raise ValueError(
                    f"{place}: must be as wide as {self._places[0]} (D = {found[0].shape[2]}), got D = "
                    f"{seen.shape[2]}"
                )
            found.append(seen.cpu())
        seen = found[0] if len(found) == 1 else torch.stack(found, dim=2)
        return [seen[row, len(before) : len(before) + len(window.ids)] for row, window in enumerate(windows)]

    def _see(self, place: str, output: Any) -> None:
        self._seen.setdefault(place, output[0] if isinstance(output, tuple) else output)
        if len(self._seen) == len(self._places):
            raise _Reached


def _load(model: str) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel", set[str]]:
    """Tokenizer, model, and the weights that its files lack, such as those of a head."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # By its folder: of a name, transformers asks a server, even where it may not download anything.
        folder = model if os.path.isdir(model) else snapshot_download(model, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded, info = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise OSError(
            f"model: {model}: must be the folder of a model, or its name in the cache: {error}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return tokenizer, loaded, set(info["missing_keys"])


Watch = Callable[[Callable[[Any], None]], Any]  # has a function called with what comes by


def _module(model: nn.Module, module: str, side: str) -> Watch:
    """Of what a module puts out, or is given."""
    named = dict(model.named_modules())
    if module not in named or not module:
        near = difflib.get_close_matches(module, named, n=5, cutoff=0) or [*named][1:6]
        raise ValueError(f"module: must be a module of the model, such as {', '.join(near)}, got {module!r}")
    return partial(_given_to if side == "input" else _put_out_by, named[module])


def _layer(model: nn.Module, layer: int) -> Watch:
    """Of the residual stream after so many layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists: Iterable[nn.ModuleList] = (
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count
    )
    blocks = next(iter(lists), None)
    if blocks is None:
        raise ValueError(f"layer: the model shows no list of its {count} layers; name a module of it instead")
    if layer > count:
        raise ValueError(f"layer: must be between 0 and the model's {count}, got {layer}")
    return partial(_put_out_by, blocks[layer - 1]) if layer else partial(_given_to, blocks[0])


def _put_out_by(module: nn.Module, see: Callable[[Any], None]) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: see(output))


def _given_to(module: nn.Module, see: Callable[[Any], None]) -> None:
    def told(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(inputs[0] if inputs else named.get("hidden_states", next(iter(named.values()), None)))

    module.register_forward_pre_hook(told, with_kwargs=True)
