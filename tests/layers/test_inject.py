"""Sites are chosen by name, and children are added once."""

from __future__ import annotations

import pytest
from torch import nn

from peft_lightning.errors import UsageError
from peft_lightning.layers.inject import add_child, select_sites

SITES = ["encoder.layer.0.attention.output", "encoder.layer.0.output", "encoder.layer.1.attention.output"]


def test_select_sites() -> None:
    assert select_sites(SITES, r"layer\.0\.") == SITES[:2]
    with pytest.raises(UsageError, match=r"target = 'decoder' matches no site; there are: encoder\.layer\.0"):
        select_sites(SITES, "decoder")
    with pytest.raises(UsageError, match="not a regular expression"):
        select_sites(SITES, "(")


def test_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert add_child(model, "0", "adapters", "one", nn.Linear(2, 2)) == "0.adapters.one"
    assert add_child(model, "0", "adapters", "two", nn.Linear(2, 2)) == "0.adapters.two"
    assert isinstance(model.get_submodule("0.adapters.two"), nn.Linear)
    with pytest.raises(UsageError, match="0 already has an adapter of this name"):
        add_child(model, "0", "adapters", "one", nn.Linear(2, 2))
    assert add_child(model, "0", "adapters", "sst-2", nn.Linear(2, 2)) == "0.adapters.sst-2"
    for name in ("a.b", "", "train", "keys", "type"):
        with pytest.raises(UsageError, match=f"adapter.name = '{name}': must hold no dot and be no attribute"):
            add_child(model, "0", "adapters", name, nn.Linear(2, 2))
