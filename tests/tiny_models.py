"""Language models of a few numbers, on disk as Hugging Face keeps them."""

from pathlib import Path

import torch

WORDS = ["the", "value", "of", "an", "object", "is", "never", "a", "type", "it", "and", "so", "on"]
D, LAYERS, CONTEXT = 8, 3, 32


def save(folder: Path, kind: str = "bert", seed: int = 0, **sizes: int) -> str:
    """A model with weights drawn at random, and a tokenizer of whole words; returns the folder's name.

    "bert" reads [CLS] and [SEP] around a text, and sees both ways; "gpt2" reads the text alone, forwards.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        config = transformers.BertConfig(
            vocab_size=len(special + WORDS), hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=CONTEXT, **sizes,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=len(special + WORDS), n_embd=D, n_layer=LAYERS, n_head=2, n_positions=CONTEXT, **sizes
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)
