"""The world's tokenizer: a real CLIP tokenizer (byte-level BPE) whose merges are learnt from the caption grammar."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .captions import NUMBERS, PREFIXES, RELATION_WORDS
from .scenes import COLOURS, SHAPES

MAX_TOKENS = 16  # the longest caption: 14 words and commas, with start and end tokens
START, END = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """Every word a caption can contain, sorted."""
    phrases = [*PREFIXES, *COLOURS, *SHAPES, *(s + "s" for s in SHAPES), "and", "an"]
    phrases += [w for words in [*NUMBERS.values(), *RELATION_WORDS.values()] for w in words]
    return sorted({w for phrase in phrases for w in re.findall(r"[a-z]+", phrase)})


def make_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer: every grammar word is one token, any other text falls back to pieces and bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(grammar_words() * 10, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocab[START] = len(vocab)
    vocab[END] = len(vocab)  # highest id: open_clip pools the text at the largest token
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(folder: Path | str) -> None:
    """Write the tokenizer's files into `folder`."""
    make_tokenizer().save_pretrained(str(folder))
