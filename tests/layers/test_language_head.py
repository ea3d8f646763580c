"""The head without weights, and the search: as slow loops over whole passes have it, with every adapter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BartConfig, BartForConditionalGeneration, T5Config

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import UsageError
from peft_lightning.layers.adapters import KINDS, AdapterConfig, attach_adapters, refusal
from peft_lightning.layers.language_head import LanguageHead, Writer
from peft_lightning.layers.pruned_heads import attention_sites, prune_units
from tests.families import OPTIONS, backbone_setting, inputs
from tests.reference.generate import greedy, likeliest_of_two, texts

ATTACHED = [None, *(kind for kind in KINDS if refusal("bart", kind) is None)]
attached = pytest.mark.parametrize("kind", ATTACHED)


def bart(kind: str | None = None, *, seed: int = 0, dtype: str = "float32", **options: Any) -> Any:
    """A tiny random BART in evaluation mode, with adapters that matter."""
    torch.manual_seed(seed)
    setting = backbone_setting("bart", dtype=dtype)
    setting["config"] |= options
    backbone = build_backbone(BackboneConfig(**setting))
    if kind is not None:
        shape: dict[str, Any] = {"bottleneck": 3, "init_std": 0.3, "target": ".", "cross": kind == "houlsby"}
        adapters = attach_adapters(backbone, AdapterConfig(kind=kind, **shape))
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def writer(backbone: nn.Module) -> Writer:
    return Writer(backbone, LanguageHead(backbone))


def run(backbone: Any) -> Tensor:
    batch = inputs()
    hidden: Tensor = backbone(**batch, decoder_input_ids=batch["input_ids"]).last_hidden_state
    return hidden


# -- the head


def test_logits_are_those_of_transformers() -> None:
    backbone = bart()
    whole = BartForConditionalGeneration(backbone.config).eval()
    whole.model.load_state_dict(backbone.state_dict())
    batch = inputs()
    expected = whole(**batch, decoder_input_ids=batch["input_ids"]).logits
    assert_close(LanguageHead(backbone)(run(backbone)), expected)


def test_nothing_is_registered_and_everything_is_followed() -> None:
    backbone = bart()
    head = LanguageHead(backbone)
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    assert not head.state_dict() and not list(head.parameters()) and [*head.modules()] == [head]
    assert set(both.state_dict()) == {f"backbone.{name}" for name in backbone.state_dict()}
    hidden = run(backbone).detach()
    twin = copy.deepcopy(both)
    both.to(torch.float64)
    assert head(hidden).dtype == torch.float64 and twin["head"](hidden).dtype == torch.float32
    before = twin["head"](hidden)
    embedding = nn.Embedding(*backbone.shared.weight.shape)
    backbone.set_input_embeddings(embedding)
    assert_close(head(hidden), hidden @ embedding.weight.T)
    assert_close(twin["head"](hidden), before, rtol=0, atol=0)


def test_the_embedding_trains_where_the_backbone_does() -> None:
    backbone = bart().requires_grad_(False)
    hidden = torch.randn(2, 3, 16, requires_grad=True)
    LanguageHead(backbone)(hidden).sum().backward()
    assert_close(hidden.grad, backbone.shared.weight.sum(0).expand(2, 3, -1))
    assert backbone.shared.weight.grad is None
    backbone.requires_grad_(True)
    LanguageHead(backbone)(hidden).sum().backward()
    assert_close(backbone.shared.weight.grad, hidden.detach().sum((0, 1)).expand(40, -1))


def test_states_of_another_type() -> None:
    backbone = bart(dtype="bfloat16")
    assert LanguageHead(backbone)(torch.randn(1, 2, 16)).dtype == torch.bfloat16


# -- what is refused


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (backbone_setting("bert"), r"'bert': writing needs an encoder-decoder \(bart\); an encoder alone cannot write"),
        (backbone_setting("llama"), "'llama': .*; a decoder alone would read text and summary as one sequence"),
        (
            {"config": {"model_type": "bert", "is_decoder": True, **OPTIONS["bert"]}, "tokenizer": "toy"},
            "a decoder alon",
        ),
    ],
)
def test_what_cannot_write(setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        LanguageHead(build_backbone(BackboneConfig(**setting)))


def test_other_heads_are_refused() -> None:
    class Other(nn.Module):
        config: Any = T5Config()

    with pytest.raises(UsageError, match="'t5': .*the head is known of bart only"):
        LanguageHead(Other())
    with pytest.raises(UsageError, match="'bart': .*tie_word_embeddings is false"):
        LanguageHead(bart(tie_word_embeddings=False))


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_file_with_a_bias_is_refused(bias: float, tmp_path: Path) -> None:
    whole = BartForConditionalGeneration(BartConfig(vocab_size=40, **OPTIONS["bart"]))
    whole.final_logits_bias[0, 3] = bias
    whole.save_pretrained(tmp_path)
    backbone = build_backbone(BackboneConfig(name=str(tmp_path)))
    if bias:
        with pytest.raises(UsageError, match="its final_logits_bias is not zero, as BART's is"):
            LanguageHead(backbone)
    else:
        LanguageHead(backbone)


# -- the search


@attached
def test_greedy_search_equals_whole_passes(kind: str | None) -> None:
    backbone, batch = bart(kind), inputs()
    write = writer(backbone)
    for shortest in (0, 5):
        expected = [greedy(backbone, ids, 8, shortest) for ids in texts(batch)]
        assert write(batch, longest=8, shortest=shortest) == expected
    # an end that comes up: what a text has in its third place
    other = copy.deepcopy(backbone)
    other.config.eos_token_id = expected[0][2]
    ended = [greedy(other, ids, 8, 0) for ids in texts(batch)]
    assert writer(other)(batch, longest=8) == ended
    assert len(ended[0]) < 3 and max(len(tokens) for tokens in expected) == 8
    late = [greedy(other, ids, 8, 5) for ids in texts(batch)]
    assert writer(other)(batch, longest=8, shortest=5) == late
    assert all(len(tokens) >= 5 for tokens in late)


@pytest.mark.parametrize("layers", [{}, {"encoder_layers": 1, "decoder_layers": 3}])
@attached
def test_keeping_keys_and_values_changes_nothing(kind: str | None, layers: dict[str, Any]) -> None:
    backbone, batch = bart(kind, **layers), inputs()
    write = writer(backbone)
    for beams in (1, 3):
        found = [
            write(batch, longest=9, shortest=2, beams=beams, no_repeat_ngram=2, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert found[0] == found[1]
        assert all(2 <= len(tokens) <= 9 for tokens in found[0]) and len(set(map(tuple, found[0]))) > 1


@pytest.mark.parametrize("left", [(), (1,)])
def test_attention_with_fewer_heads_or_none_writes_the_same(left: tuple[int, ...]) -> None:
    """What no head keeps has no length that a position could be counted from."""
    backbone, batch = bart(), inputs()
    paths = [path for path in attention_sites(backbone) if path.startswith("decoder.")]
    prune_units(backbone, dict.fromkeys(paths, left), {})
    expected = [greedy(backbone, ids, 8) for ids in texts(batch)]
    assert writer(backbone)(batch, longest=8) == expected and len(expected[0]) == 8


def test_a_wide_search_finds_the_best_of_all() -> None:
    for seed in (0, 1):
        backbone, batch = bart(seed=seed), inputs(rows=1)
        ids = texts(batch)[0]
        backbone.config.eos_token_id = greedy(backbone, ids, 1)[0]  # to end at once is likely
        penalties = (0.0, 1.0, 3.0)
        expected = [likeliest_of_two(backbone, ids, penalty) for penalty in penalties]
        write = writer(backbone)
        found = [write(batch, longest=2, beams=40, length_penalty=penalty)[0] for penalty in penalties]
        assert found == expected and found[0] == [] != found[2]


def test_no_sequence_is_written_twice() -> None:
    backbone, batch = bart(), inputs()
    once = writer(backbone)(batch, longest=30, beams=2, no_repeat_ngram=2)
    free = writer(backbone)(batch, longest=30, beams=2)
    repeated = [len(pairs) - len(set(pairs)) for pairs in (list(zip(t, t[1:], strict=False)) for t in (*once, *free))]
    assert repeated[:3] == [0, 0, 0] and max(repeated[3:]) > 0


def test_the_backbone_is_the_very_one_and_stays_as_it_was() -> None:
    backbone, batch = bart("houlsby"), inputs()
    config, state = backbone.config.to_dict(), torch.random.get_rng_state()
    write = writer(backbone)
    before = write(batch, longest=6, beams=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert backbone.config.to_dict() == config and not backbone.training
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".adapters." in name:
                parameter.mul_(-3)
    assert write(batch, longest=6, beams=2) != before
    for other in (copy.deepcopy(write), pickle.loads(pickle.dumps(write))):
        assert other.backbone is not backbone
        assert other(batch, longest=6, beams=2) == write(batch, longest=6, beams=2)


def test_modes_of_running() -> None:
    backbone, batch = bart("lora"), inputs()
    with torch.inference_mode():
        write = writer(backbone)
        expected = write(batch, longest=6, beams=2)
    assert write(batch, longest=6, beams=2) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert all(len(tokens) <= 6 for tokens in write(batch, longest=6, beams=2))
    assert len(writer(bart("lora", dtype="bfloat16"))(batch, longest=6, beams=2)) == 3


def test_a_compiled_backbone_writes_without() -> None:
    backbone, batch = bart(), inputs()
    expected = writer(backbone)(batch, longest=6)
    calls: list[Any] = []

    def refuse(graph: Any, example: Any) -> Any:
        calls.append(graph)
        return graph.forward

    backbone.compile(backend=refuse)
    assert writer(backbone)(batch, longest=6) == expected and not calls
    run(backbone)
    assert calls
