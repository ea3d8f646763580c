"""The words of the toy language and its tokenizer, made in memory, for backbones that need neither hub nor folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TOY_VOCABULARY", "TOY_WORDS", "toy_tokenizer"]

TOY_WORDS: dict[str, tuple[str, ...]] = {
    "determiners": ("the", "this", "that"),
    "colours": ("red", "black", "white", "brown", "grey", "yellow"),
    "animals": ("cat", "dog", "horse", "fish"),
    "verbs": ("sleeps", "runs", "eats", "plays"),
    "copulas": ("is", "looks", "seems"),
    "negations": ("not", "hardly"),
    "good": ("good", "clever", "brave"),
    "bad": ("bad", "silly", "lazy"),
    "sizes": ("tiny", "small", "average", "large", "huge"),
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = tuple(word for words in TOY_WORDS.values() for word in words)

TOY_VOCABULARY = (
    *_SPECIAL,
    *_WORDS,
    # A multiple of 8 keeps the matrix products of a masked-language-model head aligned.
    *(f"[unused{i}]" for i in range(-(len(_SPECIAL) + len(_WORDS)) % 8)),
)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the toy language: a token per word, BERT's special tokens and token types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(TOY_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
