"""Templates: tokens as of the whole text, cutting, and label words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.templates import Filler, Template, shortened, word_numbers
from tests.reference import prompts as oracle

TOKENIZER: Any = toy_tokenizer()


def byte_level() -> Any:
    """A tokenizer in the manner of RoBERTa: a word with a space before it is one token, without one it is letters."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("cat", "dog", "is", "It", "great", "was")
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = ["\u0120", *word]
        merges += [("".join(parts[:n]), parts[n]) for n in range(1, len(parts))]
    merges = list(dict.fromkeys(merges))
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True, special=True)
    backend.add_special_tokens(["<s>", "</s>", "<pad>", mask])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token=mask
    )


def whole(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


@pytest.mark.parametrize(
    ("template", "texts", "text"),
    [
        ("{0} this is {mask}", ["the cat runs"], "the cat runs this is [MASK]"),
        ("{mask} {0}", ["the cat runs"], "[MASK] the cat runs"),
        ("{mask}: {1} {{is}} {0}", ["cat", "dog"], "[MASK]: dog {is} cat"),
        ("{0:bare}? {mask}, {1:lower}", [" the cat runs.! ", "That dog"], "the cat runs? [MASK], that dog"),
        ("the {0:bare,lower} {mask} {1}", ["CAT.", "Dog."], "the cAT [MASK] Dog."),
    ],
)
def test_tokens_are_those_of_the_whole_text(template: str, texts: list[str], text: str) -> None:
    filler = Filler(Template(template, len(texts)), TOKENIZER)
    ((slots),) = filler.slots([texts])
    tokens, place = filler.filled(slots)
    assert tokens == whole(TOKENIZER, text)
    assert tokens[place] == TOKENIZER.mask_token_id and tokens.count(TOKENIZER.mask_token_id) == 1
    word = whole(TOKENIZER, "good")[0]
    assert filler.filled(slots, word) == (whole(TOKENIZER, text.replace("[MASK]", "good")), place)


@pytest.mark.parametrize("template", ["{0} It was {mask}.", "It was {mask}: {0}", "{mask} {0}"])
def test_spaces_are_those_of_a_sentence(template: str) -> None:
    tokenizer = byte_level()
    filler = Filler(Template(template, 1), tokenizer)
    (slots,) = filler.slots([["cat is dog"]])
    text = template.format("cat is dog", mask="<mask>")
    assert filler.filled(slots)[0] == whole(tokenizer, text)
    word = word_numbers(tokenizer, ["great"])[0]
    assert tokenizer.convert_ids_to_tokens(word) == "\u0120great"
    if not template.startswith("{mask}"):
        assert filler.filled(slots, word)[0] == whole(tokenizer, template.format("cat is dog", mask="great"))


def test_an_empty_text_leaves_its_place_empty() -> None:
    filler = Filler(Template("{0} this is {mask}", 1), TOKENIZER)
    assert filler.filled(filler.slots([["  "]])[0])[0] == whole(TOKENIZER, "this is [MASK]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{0} {1}", r"allowed: \{0\}, \{1\}, \{mask\}, each once"),
        ("{0} {mask}", r"allowed: \{0\}, \{1\}, \{mask\}, each once"),
        ("{0} {1} {mask} {mask}", "each once"),
        ("{0} {0} {1} {mask}", "each once"),
        ("{0} {2} {mask}", r"which has \{2\}; allowed: 0 to 1 and mask"),
        ("{text} {1} {mask}", r"which has \{text\}; allowed: 0 to 1 and mask, and after a colon bare, lower"),
        ("{0:upper} {1} {mask}", r"which has \{0:upper\}; allowed"),
        ("{0} {1 {mask}", r"allowed: a text with \{0\} and \{mask\} \("),
        (None, r"task.options.template is None; allowed: a text with"),
    ],
)
def test_wrong_templates(template: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Template(template, 2)


# -- cutting


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 25))
def test_the_longest_part_loses_its_end(lengths: list[int], room: int) -> None:
    parts = [list(range(length)) for length in lengths]
    found, expected = shortened(parts, room), oracle.shortened(lengths, room)
    assert (None if found is None else [*map(len, found)]) == expected
    assert found is None or all(part == old[: len(part)] for part, old in zip(found, parts, strict=True))


def test_a_sequence_keeps_template_mask_and_examples() -> None:
    filler = Filler(Template("{0} this is {mask} {1}", 2), TOKENIZER)
    (slots,) = filler.slots([["the red cat runs", "the dog"]])
    example = whole(TOKENIZER, "that horse is good")
    for room in range(15, 20):
        tokens, mask, types = filler.sequence(slots, [example, example], room + 2)
        texts = TOKENIZER.convert_ids_to_tokens(tokens)
        kept = room - 13
        first = (oracle.shortened([4, 2], kept) or [0])[0]
        assert texts[0] == "[CLS]" and len(tokens) == 15 + kept
        assert texts[1 : 1 + first] == ["the", "red", "cat", "runs"][:first]
        assert texts[1 + first : 4 + first] == ["this", "is", "[MASK]"] and mask.index(1) == 3 + first
        ends = ["[SEP]", "that", "horse", "is", "good", "[SEP]", "that", "horse", "is", "good", "[SEP]"]
        assert texts[4 + first :] == ["the", "dog"][: kept - first] + ends
        assert sum(mask) == 1 and types == [0] * (len(tokens) - 10) + [1] * 10


def test_no_room_for_the_text() -> None:
    filler = Filler(Template("{0} this is {mask} {1}", 2), TOKENIZER)
    (slots,) = filler.slots([["the red cat runs", "the dog"]])
    filler.sequence(slots, [], 7)
    with pytest.raises(DataError, match="template and examples take 5 of 6 tokens and leave no room for the text"):
        filler.sequence(slots, [], 6)


# -- label words


def test_label_words_are_single_tokens() -> None:
    assert word_numbers(TOKENIZER, ["good", "bad"]) == whole(TOKENIZER, "good bad")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["good", "great"], "has 'great', which tokenizer .* reads as '.UNK.'; allowed: a word that is one token"),
        (
            ["good", "not bad"],
            "has 'not bad', which tokenizer .* reads as 'not bad'; allowed: a word that is one token",
        ),
        (["good", "GOOD"], "has 'GOOD', which tokenizer .* reads as 'good'; allowed: a token of its own"),
    ],
)
def test_wrong_label_words(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^task.options.words {message}"):
        word_numbers(TOKENIZER, words)


def test_a_tokenizer_without_a_mask() -> None:
    from tests.tasks.kinds.test_tags import byte_level as bare

    with pytest.raises(UsageError, match="has no mask token; allowed for prompts: one that has"):
        word_numbers(bare(False), ["cat"])
