"""Every architecture with every kind of adapter: it trains and equals the formulas, or is refused with the reason."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModel, GPT2Config

from peft_lightning import AdapterConfig, SparseAdapterModule
from peft_lightning.backbones.build import as_backbone_config, build_backbone
from peft_lightning.backbones.families import FAMILIES
from peft_lightning.errors import UsageError
from peft_lightning.layers.adapters import KINDS, attach_adapters
from tests.families import CELLS, REFUSED, backbone_setting, inputs
from tests.reference.adapted import oracle
from tests.toy import data, trainer

cells = pytest.mark.parametrize(("family", "kind"), CELLS, ids=lambda part: str(part))


def plain(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(as_backbone_config(backbone_setting(family, **changes)))


def adapted(family: str, kind: str, **changes: Any) -> nn.Module:
    """A backbone with adapters that matter: LoRA's B does not stay at zero."""
    model = plain(family, **changes)
    adapters = attach_adapters(model, AdapterConfig(kind=kind, bottleneck=3, init_std=0.3, name="one"))
    model.requires_grad_(False)
    for adapter in adapters.values():
        adapter.requires_grad_(True)
        for name, parameter in adapter.named_parameters():
            if name == "lora_B" or name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model


def new_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".one." in name or ".sparse." in name}


def run(model: nn.Module) -> Tensor:
    output: Tensor = model(**inputs()).last_hidden_state
    return output


@cells
def test_trains_twenty_steps_and_equals_the_formulas(family: str, kind: str) -> None:
    settings: dict[str, Any] = {"adapter": {"kind": kind, "bottleneck": 4, "init_std": 0.1}, "head_dropout": 0.0}
    settings |= {"backbone": backbone_setting(family), "optim": {"lr": 1e-2}}
    module = SparseAdapterModule("toy_sentiment", **settings)
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    untouched = copy.deepcopy(module.backbone)
    trainer(max_steps=20).fit(module, datamodule=data())
    tensors = new_tensors(module.backbone)
    assert tensors and all(not torch.equal(tensor, before[f"backbone.{name}"]) for name, tensor in tensors.items())
    module.eval()
    without = plain(family).eval()
    without.load_state_dict({n: t for n, t in module.backbone.state_dict().items() if n in without.state_dict()})
    expected = run(oracle(without, tensors, kind, module.adapter.factor))
    assert_close(run(module.backbone), expected, rtol=1e-4, atol=1e-5)
    assert (run(untouched.eval()) - expected).abs().max() > 1e-3
    frozen = {n for n in before if n.startswith("backbone.") and n.removeprefix("backbone.") in without.state_dict()}
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in frozen)


@cells
def test_gradients_are_those_of_the_formulas(family: str, kind: str) -> None:
    model = adapted(family, kind).eval()
    tensors = new_tensors(model)
    output = run(model)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((output * direction).sum(), list(tensors.values()))
    expected = torch.autograd.grad(
        (run(oracle(plain(family).eval(), tensors, kind, KINDS[kind])) * direction).sum(), list(tensors.values())
    )
    for name, a, b in zip(tensors, got, expected, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@cells
def test_a_deep_copy_has_adapters_of_its_own(family: str, kind: str) -> None:
    model = adapted(family, kind).eval()
    twin = copy.deepcopy(model)
    before = run(model)
    assert_close(run(twin), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in new_tensors(twin).values():
            parameter.mul_(-2)
    assert_close(run(model), before, rtol=0, atol=0)
    assert (run(twin) - before).abs().max() > 1e-3


@cells
def test_gradient_checkpointing_changes_nothing(family: str, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(family, kind, gradient_checkpointing=checkpointing).train()
        output = run(model)
        tensors = list(new_tensors(model).values())
        gradients.append(torch.autograd.grad(output.square().sum(), tensors))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


_FAST = {("bert", kind) for kind in KINDS} | {("bart", "parallel")}


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*cell, marks=() if cell in _FAST else pytest.mark.slow, id="-".join(cell)) for cell in CELLS],
)
def test_compiles_without_graph_breaks(family: str, kind: str) -> None:
    torch._dynamo.reset()
    model = adapted(family, kind).eval()
    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs()).last_hidden_state
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    tensors = list(new_tensors(model).values())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), REFUSED)
def test_what_is_refused_says_why(family: str, kind: str) -> None:
    with pytest.raises(UsageError, match=f"adapter.kind = '{kind}' on a backbone of type '{family}': prefixes enter"):
        attach_adapters(plain(family), AdapterConfig(kind=kind))


def test_an_unknown_architecture_is_refused() -> None:
    gpt = AutoModel.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(UsageError, match="type 'gpt2': adapters and pruning know their way in bert, roberta"):
        attach_adapters(gpt, AdapterConfig())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lora_goes_where_it_is_told(family: str) -> None:
    model = plain(family)
    layers = list(FAMILIES[family].layers(model.config))
    default = attach_adapters(plain(family), AdapterConfig(kind="lora", bottleneck=2))
    assert len(default) == 2 * len(layers)
    everywhere = attach_adapters(model, AdapterConfig(kind="lora", bottleneck=2, target=".*"))
    linears = {name for name, part in plain(family).named_modules() if isinstance(part, nn.Linear)}
    inside = {name for name in linears if any(name.startswith(f"{layer}.") for layer in layers)}
    cross = {name for name in inside if ".encoder_attn." in name}
    assert {name.partition(".loras.")[0] for name in everywhere} == inside - cross


def test_a_target_that_matches_nothing_lists_the_sites() -> None:
    with pytest.raises(
        UsageError, match=r"target = 'nowhere' matches no site; there are: layers\.0\.self_attn\.o_proj"
    ):
        attach_adapters(plain("llama"), AdapterConfig(target="nowhere"))


def test_mam_divides_its_weights_equally_and_needs_sdpa() -> None:
    adapters = attach_adapters(plain("bert"), AdapterConfig(kind="mam", bottleneck=5))
    sizes = {"prefixes": 0, "adapters": 0}
    for path, adapter in adapters.items():
        sizes[path.split(".")[-2]] += sum(p.numel() for p in adapter.parameters() if p.ndim == 2)
    assert sizes["prefixes"] == sizes["adapters"] == 2 * 2 * 5 * 16
    with pytest.raises(UsageError, match="backbone.attention = 'eager': prefixes"):
        attach_adapters(plain("bert", attention="eager"), AdapterConfig(kind="mam"))


def test_mam_looks_both_ways() -> None:
    setting = backbone_setting("bert")
    setting["config"]["is_decoder"] = True
    with pytest.raises(UsageError, match="is_decoder = True: prefixes"):
        attach_adapters(build_backbone(as_backbone_config(setting)), AdapterConfig(kind="mam"))


def test_a_pickled_mam_works_in_another_process(tmp_path: Path) -> None:
    model = adapted("bert", "mam").eval()
    with open(tmp_path / "model", "wb") as file:
        torch.save({"model": model, "inputs": inputs(), "output": run(model).detach()}, file)
    script = (
        "import sys, torch\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    kept = torch.serialization.load(file, weights_only=False)\n"
        "got = kept['model'](**kept['inputs']).last_hidden_state\n"
        "torch.testing.assert_close(got, kept['output'])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=True, timeout=100)


@pytest.mark.parametrize(("family", "kind"), [("bert", "houlsby"), ("bart", "parallel"), ("llama", "lora")])
def test_a_second_adapter_adds_to_the_first(family: str, kind: str) -> None:
    model = adapted(family, kind).eval()
    before = run(model)
    attach_adapters(model, AdapterConfig(kind=kind, bottleneck=2, name="two", scaling=0.0))
    assert_close(run(model), before)


def test_two_pfeiffer_adapters_do_not_compose() -> None:
    model = adapted("bert", "pfeiffer")
    with pytest.raises(UsageError, match=r"adapter.kind = 'pfeiffer': encoder\.layer\.0 has one already"):
        attach_adapters(model, AdapterConfig(kind="pfeiffer", name="two"))


def test_bf16_backbone_keeps_fp32_adapters() -> None:
    for family, kind in CELLS:
        model = adapted(family, kind, dtype="bfloat16")
        output = run(model)
        assert output.dtype == torch.bfloat16
        assert all(tensor.dtype == torch.float32 for tensor in new_tensors(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adapter"}, "adapter.kind = 'adapter': must be one of houlsby, pfeiffer, parallel, lora, mam"),
        ({"bottleneck": 0}, "adapter.bottleneck = 0: must be at least 1"),
        ({"nonlinearity": "sigmoid"}, "adapter.nonlinearity = 'sigmoid': must be one of relu"),
        ({"init_std": 0.0}, r"adapter.init_std = 0\.0: must be above 0"),
        ({"init_std": float("inf")}, "adapter.init_std = inf: must be of type float, and finite"),
        ({"scaling": float("nan")}, r"adapter.scaling = nan: must be of type float \| None, and finite"),
        ({"bottleneck": 4.0}, r"adapter.bottleneck = 4\.0: must be of type int"),
        ({"bottleneck": True}, "adapter.bottleneck = True: must be of type int"),
        ({"target": 3}, r"adapter.target = 3: must be of type str \| None"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdapterConfig(**options)


def test_adapters_after_cross_attention_follow_the_formulas() -> None:
    model, without = plain("bart").eval(), plain("bart").eval()
    adapters = attach_adapters(model, AdapterConfig(bottleneck=3, init_std=0.3, name="one", cross=True))
    default = attach_adapters(plain("bart"), AdapterConfig(bottleneck=3, name="one"))
    assert set(adapters) - set(default) == {"decoder.layers.0.encoder_attn.out_proj.adapters.one"}
    assert set(default) < set(adapters)
    tensors = new_tensors(model)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.3)
    partial = {name: tensor for name, tensor in tensors.items() if "encoder_attn" not in name}
    assert_close(run(model), run(oracle(without, tensors, "houlsby", 1.0)), rtol=1e-4, atol=1e-5)
    assert (run(model) - run(oracle(plain("bart").eval(), partial, "houlsby", 1.0))).abs().max() > 1e-3
    got = torch.autograd.grad(run(model).square().sum(), list(tensors.values()))
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_cross_attention_that_is_not_there(family: str) -> None:
    with pytest.raises(UsageError, match=f"adapter.cross = True on a backbone of type '{family}': must be bart"):
        attach_adapters(plain(family), AdapterConfig(cross=True))


def test_cross_is_for_houlsby_only() -> None:
    with pytest.raises(UsageError, match="adapter.cross = True: adapter.kind must be houlsby, not 'lora'"):
        AdapterConfig(kind="lora", cross=True)
