"""Tiny tokenizers of every type that models have, with and without a space before the first word."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokens import byte_tokenizer

CORPUS = [
    "Once upon a time, there was a cat. It said: don't!",
    "naïve café 中文 中国 \U0001f600\U0001f680 été",
    "a  b\n\n c",
]
END = "<|end|>"


def _finished(tokenizer: Tokenizer, **settings: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **settings)


def byte_level(prefix_space: bool) -> PreTrainedTokenizerFast:
    """Merged, so that tokens begin and end within characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer)


def _pieces() -> dict[str, int]:
    letters = sorted({"▁", *(letter for letter in "".join(CORPUS) if letter.isascii() and letter != " ")})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {piece: i for i, piece in enumerate(["<unk>", *bytes_, *letters, "▁a", "▁t", "he", "▁c", "at"])}


def byte_fallback(prefix_space: bool) -> PreTrainedTokenizerFast:
    """As Llama's: characters that are no token are a token a byte."""
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁", "c"), ("a", "t")]
    tokenizer = Tokenizer(models.BPE(_pieces(), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix_space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _finished(tokenizer)


def metaspace(prefix_space: bool) -> PreTrainedTokenizerFast:
    """As T5's and Gemma's: spaces are a mark, which a first token loses."""
    scheme = "always" if prefix_space else "never"
    letters = {"▁", *(letter for text in CORPUS for letter in text if letter != " ")}
    scored = [("<unk>", 0.0), *((piece, -3.0) for piece in sorted(letters)), ("▁a", -1.0), ("▁cat", -1.0)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _finished(tokenizer)


def word_piece(cleans: bool) -> PreTrainedTokenizerFast:
    """As BERT's: spaces between words, taken out before marks where it cleans up."""
    letters = sorted({letter for text in CORPUS for letter in text if not letter.isspace()})
    pieces = ["[UNK]", *letters, *("##" + letter for letter in letters), "cat", "##at", "don", "n", "s"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleans)
    return _finished(tokenizer, clean_up_tokenization_spaces=cleans)


def word_ends() -> PreTrainedTokenizerFast:
    """As the first GPT's: a mark at the end of words, which is a space but at the end."""
    letters = sorted({letter for text in CORPUS for letter in text if not letter.isspace()})
    pieces = ["<unk>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _finished(tokenizer)


def with_added(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With added tokens that are text: marks, words with spaces around, and letters that the model writes otherwise."""
    words = ["<think>", AddedToken(" c ", normalized=False), "中文", "é", AddedToken("<l>", lstrip=True, rstrip=True)]
    tokenizer.add_tokens(words, special_tokens=False)
    return tokenizer


ALL: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": cache(byte_tokenizer),
    "byte-level": cache(lambda: byte_level(False)),
    "byte-level, prefix space": cache(lambda: byte_level(True)),
    "byte fallback": cache(lambda: byte_fallback(False)),
    "byte fallback, prefix space": cache(lambda: byte_fallback(True)),
    "metaspace": cache(lambda: metaspace(False)),
    "metaspace, prefix space": cache(lambda: metaspace(True)),
    "WordPiece": cache(lambda: word_piece(False)),
    "WordPiece that cleans up": cache(lambda: word_piece(True)),
    "word ends": cache(word_ends),
    "byte-level, added tokens": cache(lambda: with_added(byte_level(False))),
    "byte fallback, added tokens": cache(lambda: with_added(byte_fallback(True))),
    "WordPiece, added tokens": cache(lambda: with_added(word_piece(False))),
    "byte-level by Python": cache(lambda: ByT5Tokenizer(eos_token=END)),
}
"""By name; each is built once."""
