"""A T5 encoder of a few thousand weights with a real tokenizer.json, made on the spot."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

SIZES = {"vocab_size": 259, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}


@lru_cache
def tokenizer():
    """A token per byte, <pad> 0, </s> 1, <unk> 2, and </s> at the end, as T5 has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save(folder: Path, **changes) -> torch.nn.Module:
    """Writes model and tokenizer as transformers does, returns the model; ``changes`` go to its T5Config."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**{**SIZES, **changes})).eval()
    for parameter in model.parameters():  # T5's own initialisation leaves little to tell apart
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model
