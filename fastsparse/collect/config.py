"""What a collection is asked to hold. The command line is made from these fields and their help."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastsparse._settings import check, option, resolved_device

DTYPES = {"float32": ".npy", "float16": ".npy", "bfloat16": ".safetensors"}  # NumPy has no bfloat16


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Everything that a collection depends on; for its fields see ``python -m fastsparse collect --help``.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.

    Example:
        >>> from fastsparse.collect import CollectConfig
        >>> CollectConfig(model="path/to/model", texts=["corpus.jsonl"], output="here", layer=[6]).context
        256
    """

    model: str = option(
        "a Hugging Face model on this disk: its folder, or its name in the cache; nothing is downloaded",
        positional=True,
    )
    texts: Sequence[str] = option(
        ".txt, .jsonl or .parquet: files, folders of them, or globs", affects_result=False, positional=True
    )
    output: str = option("folder for the shards; gone on with if it has any", affects_result=False)
    layer: Sequence[int] = option(
        "keep the residual stream after so many layers; 0: before the first; of several, rows are (L, D)",
        (), least=0,
    )  # fmt: skip
    module: Sequence[str] = option(
        "or the output of this module, or of several, by dotted name, such as layers.5.mlp", ()
    )
    side: str = option(
        "of modules: keep what they put out, or what they are given", "output", choices=["output", "input"]
    )
    field: str = option("of .jsonl lines and .parquet rows: what holds the text", "text")
    label: str | None = option("of the same: what says where a text is from (default: file and line)", None)
    context: int = option("tokens that the model reads at once, its special ones included", 256)
    batch_size: int = option("windows of so many tokens that it reads together", 16)
    held_out_every: int = option("every so many windows one is held out, in held_out/; 0: none", 10, least=0)
    max_tokens: int | None = option("stop after so many tokens (default: all)", None)
    shard_tokens: int = option("tokens a shard, as windows fit", 2**16)
    dtype: str = option(
        "float32 or float16, in .npy; bfloat16, in .safetensors", "float32", choices=[*DTYPES]
    )
    device: str = option(
        "auto, cpu, cuda, or one GPU of several, such as cuda:1", "auto", affects_result=False
    )

    def __post_init__(self) -> None:
        check(self)
        if bool(self.layer) == bool(self.module):
            raise ValueError(
                f"layer, module: one of them must be given, got layer={self.layer!r}, module={self.module!r}"
            )
        if self.layer and self.side != "output":
            raise ValueError(f"side: must be 'output' with layer, got {self.side!r}: name modules instead")

    def result_fields(self) -> dict[str, Any]:
        """What determines the shards, besides model and text: who goes on must agree in all of it."""
        chosen = {o.name: getattr(self, o.name) for o in fields(self) if o.metadata["affects_result"]}
        return chosen | {"device": resolved_device(self.device).type}
