"""A model's folder, as one downloads it: config, tokenizer and weights, all made here from a seed, and of the real size.

The tokenizer has as many words as the model: every byte, then words of two, three and four letters in the order of the alphabet, each with
the merge that makes it. So it takes a process the memory that a real one takes, and every number that a model says is a text.
"""

from __future__ import annotations

import itertools
import json
import shutil
import string
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.worlds.checkpoints import write_checkpoint
from tests.worlds.model_shapes import Shape

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last words
BEGIN, END = 1, 2
_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def write_model(directory: Path, shape: Shape, shards: int = 16) -> None:
    """Nothing, where it stands already. It stands whole or not at all."""
    if directory.exists():
        return
    fresh = directory.with_name(f".{directory.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    first = shape.vocabulary - len(SPECIAL)
    numbers = {"bos_token_id": first + BEGIN, "eos_token_id": first + END}
    (fresh / "config.json").write_text(json.dumps(shape.config | numbers))
    write_tokenizer(fresh, shape.vocabulary)
    write_checkpoint(fresh, shape, shards, seed=zlib.crc32(shape.name.encode()))
    fresh.rename(directory)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """With so many words. Raises ValueError: that is fewer than bytes, or more than words of four letters."""
    words, merges = list(_alphabet()), []
    count = vocabulary - len(words) - len(SPECIAL)
    for left, right in itertools.islice(_pairs(), max(0, count)):
        words.append(left + right)
        merges.append(f"{left} {right}")
    if len(words) + len(SPECIAL) != vocabulary:
        raise ValueError(f"a tokenizer of {vocabulary} words cannot be made of bytes and of words of up to four letters")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": len(words) + at, "content": word, "special": True, **plain} for at, word in enumerate(SPECIAL)]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": bytewise,
        "post_processor": bytewise,
        "decoder": bytewise,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {word: at for at, word in enumerate(words)}, "merges": merges,
        },
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[0],
        "chat_template": _CHAT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _alphabet() -> Iterator[str]:
    """The 256 bytes, as byte-level tokenizers write them: those that can be seen as they are, the others moved up."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = itertools.count(0x100)
    for byte in range(256):
        yield chr(byte if byte in seen else next(moved))


def _pairs() -> Iterator[tuple[str, str]]:
    """What words are merged of, short ones first: a word of one letter less, and a letter."""
    words = list(string.ascii_lowercase)
    for _ in range(3):
        longer = []
        for word, letter in itertools.product(words, string.ascii_lowercase):
            yield word, letter
            longer.append(word + letter)
        words = longer
