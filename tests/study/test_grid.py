"""What a study's YAML means, and what is refused in one line that names the option."""

from __future__ import annotations

from typing import Any

import pytest

from peft_lightning import PruneLoRAModule, SparseAdapterModule
from peft_lightning.errors import UsageError
from peft_lightning.study.cells import Cell, cells_of
from peft_lightning.study.grid import merged_settings, read_grid
from tests.study.helpers import SPARSE, grid_of


def cells(methods: dict[str, Any], **changes: Any) -> list[Cell]:
    return cells_of(read_grid(grid_of("nowhere", methods, **changes)))


def test_every_combination_is_a_cell_once() -> None:
    entry = merged_settings(SPARSE, {"variants": {"wide": {"adapter": {"bottleneck": 16}}, "as it is": {}}})
    zero = {**SPARSE, "epochs": [0]}
    found = cells({"a": entry, "zero": zero}, lr=[1e-3, 5e-3], epochs=[5, 10], data={"shots": [10, 30]})
    assert len(found) == 2 * 2 * (2 * 2 * 2 + 1)
    assert len({tuple(cell.key.values()) for cell in found}) == len(found)
    first = found[0].key
    assert first == {
        "method": "a", "variant": "wide", "task": "toy_sentiment", "shots": 10, "seed": 13, "lr": 1e-3, "epochs": 5,
    }  # fmt: skip
    untrained = [cell for cell in found if cell.method == "zero"]
    assert {(cell.lr, cell.epochs) for cell in untrained} == {(None, 0)}
    assert {cell.arguments["adapter"]["bottleneck"] for cell in found if cell.variant == "wide"} == {16}


def test_steps_take_the_place_of_epochs() -> None:
    zero, long = {**SPARSE, "epochs": [0]}, {**SPARSE, "steps": [7, 9]}
    found = cells({"m": SPARSE, "zero": zero, "long": long}, epochs=None, steps=[5], lr=[1e-3, 5e-3], seeds=[1])
    assert [(c.method, c.epochs, c.steps, c.lr) for c in found] == [
        ("m", None, 5, 1e-3), ("m", None, 5, 5e-3), ("zero", 0, None, None),
        ("long", None, 7, 1e-3), ("long", None, 7, 5e-3), ("long", None, 9, 1e-3), ("long", None, 9, 5e-3),
    ]  # fmt: skip
    assert found[0].key["steps"] == 5 and "steps" not in found[2].key
    assert found[0].title.endswith("lr 0.001  5 steps")
    (plain,) = cells({"m": SPARSE}, epochs=None, lr=[1e-3], seeds=[1])
    assert (plain.epochs, plain.steps) == (10, None)


def test_arguments_go_over_the_method_s_own_defaults() -> None:
    prune = {"class_path": "PruneLoRAModule", "init_args": {"optim": {"weight_decay": 0.5}}}
    (cell,) = cells({"p": prune}, seeds=[7], lr=[0.25])
    module: Any = cell.module()
    plain = PruneLoRAModule(task="toy_sentiment", backbone=cell.arguments["backbone"])
    assert isinstance(module, PruneLoRAModule)
    assert (module.seed, module.max_length, module.optim.lr, module.optim.weight_decay) == (7, 16, 0.25, 0.5)
    assert (module.optim.betas, module.optim.warmup) == (plain.optim.betas, plain.optim.warmup)
    (cell,) = cells({"p": {**prune, "epochs": [0]}}, seeds=[7])
    assert cell.module().optim.lr == plain.optim.lr


def test_tasks_and_methods_refine_what_they_share() -> None:
    method = merged_settings(
        SPARSE,
        {
            "lr": [0.5],
            "precision": "bf16-mixed",
            "init_args": {"backbone": {"dtype": "bfloat16"}},
            "variants": {"x": {"head": "linear"}},
            "per_task": {
                "pairs": {
                    "init_args": {"adapter": {"bottleneck": 3}},
                    "variants": {"y": {"head": "dense"}, "z": {}},
                }
            },
        },
    )
    tasks = {"sst": {"task": "toy_sentiment", "shots": [1]}, "pairs": {"task": "toy_pairs", "shots": [2, 3]}}
    found = cells({"m": method}, tasks=tasks, seeds=[1])
    assert [(c.task, c.shots, c.variant) for c in found] == [
        ("sst", 1, "x"), ("pairs", 2, "y"), ("pairs", 2, "z"), ("pairs", 3, "y"), ("pairs", 3, "z"),
    ]  # fmt: skip
    assert {c.lr for c in found} == {0.5} and {c.precision for c in found} == {"bf16-mixed"}
    modules: list[Any] = [cell.module() for cell in found]
    assert [module.adapter.bottleneck for module in modules] == [8, 3, 3, 3, 3]
    assert [module.head_style for module in modules] == ["linear", "dense", "dense", "dense", "dense"]
    assert {module.backbone_config.dtype for module in modules} == {"bfloat16"}
    assert modules[1].task.name == "toy_pairs"


def test_a_task_may_be_spelt_out() -> None:
    row = {"name": "mine", "text": ["a"], "labels": ["no", "yes"]}
    (cell,) = cells({"m": SPARSE}, tasks={"own": {"task": row}}, seeds=[1])
    assert cell.task == "own" and cell.module().task.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, r"study has no option 'sedes' \(did you mean 'seeds'\?\); allowed: backbone, "),
        ({"seeds": [1, 1]}, r"study.seeds = \[1, 1\]: must be a list of different whole numbers, at least 0"),
        ({"seeds": [-1]}, r"study.seeds = \[-1\]"),
        ({"seeds": []}, r"study.seeds = \[\]"),
        ({"seeds": 3}, r"study.seeds = 3: must be of type list"),
        ({"lr": [0]}, r"study.lr = \[0\]: must be a list of different numbers above 0"),
        ({"lr": [float("inf"), "x"]}, r"study.lr = .*'x'"),
        ({"epochs": [1.5]}, r"study.epochs = \[1.5\]: must be a list of different whole numbers"),
        ({"epochs": [], "lr": [1e-3]}, r"study.epochs = \[\]: must be a list"),
        ({"epochs": None, "steps": [0]}, r"study.steps = \[0\]: must be a list of different whole numbers, at least 1"),
        ({"steps": [5]}, r"study.epochs = \[10\], study.steps = \[5\]: give one of them"),
        ({"side_by_side": 0}, r"study.side_by_side = 0: must be at least 1"),
        ({"select": "first"}, r"study.select = 'first': must be one of last, best"),
        ({"precision": "16"}, r"study.precision = '16': must be 32-true or bf16-mixed"),
        ({"device": "tpu"}, r"study.device = 'tpu': must be one of auto, cpu, cuda"),
        ({"tasks": []}, r"study.tasks is empty"),
        ({"tasks": ["sst2", "sst2"]}, r"study.tasks = .*: must name each task once"),
        ({"tasks": [3]}, r"study.tasks has 3"),
        ({"tasks": ["nothing"]}, r"task is 'nothing'; allowed: "),
        ({"tasks": {"sst2": 3}}, r"tasks.sst2 = 3: must be a mapping"),
        ({"tasks": {"sst2": {"shot": [3]}}}, r"data of sst2 has no option 'shot' \(did.*\); allowed: task, root"),
        ({"data": {"shots": [0]}}, r"data.shots = \[0\]: must be a list of different whole numbers, at least 1"),
        ({"data": {"batch_size": 0}}, r"data.batch_size = 0: must be at least 1"),
        ({"methods": {"m": {"class_path": "Nothing"}}}, r"methods.m: class_path = 'Nothing': must be FineTuneModule, "),
        ({"methods": {"m": {"class_path": "SCTDPretrainModule"}}}, r"must be a subclass of .*module.TaskModule"),
        ({"methods": {"m": {"class": "x"}}}, r"methods.m has no option 'class' \(.*\); allowed: class_path, "),
        ({"methods": {"n": {}}}, r"methods.n: .*class_path"),
        ({"methods": {"m": {"init_args": {"adaptor": 1}}}}, r"SparseAdapterModule has no argument 'adaptor' here \("),
        ({"methods": {"m": {"variants": {"x": {"optm": {"lr": 1.0}}}}}}, r"no argument 'optm' .*mean 'optim'.*; allow"),
        ({"methods": {"m": {"init_args": {"seed": 1}}}}, r"no argument 'seed' .*it follows from the grid's seeds"),
        ({"methods": {"m": {"variants": {"x": 3}}}}, r"arguments of SparseAdapterModule = 3: must be a mapping"),
        ({"methods": {"m": {"per_task": {"mrpc": {}}}}}, r"methods.m.per_task has 'mrpc'; allowed: toy_sentiment"),
        ({"methods": {"m": {"per_task": {"toy_sentiment": {"lr": 3}}}}}, r"per_task.toy_sentiment has no option 'lr'"),
        ({"methods": {"m": {"per_task": {"toy_sentiment": {"variants": 3}}}}}, r"variants = 3: must be a mapping"),
        ({"methods": {"m": {"epochs": [-1]}}}, r"methods.m: method.epochs = \[-1\]"),
        ({"backbone": {"name": "x", "dtype": "float64"}}, r"backbone.dtype = 'float64'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        values = merged_settings(grid_of("nowhere", {"m": SPARSE}), changes)
        if "tasks" in changes:
            values["tasks"] = changes["tasks"]
        read_grid(values)
    assert "\n" not in str(caught.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UsageError, match=r"study: .*'methods'"):
        read_grid({"backbone": "x", "tasks": ["mrpc"]})
    with pytest.raises(UsageError, match=r"study = 3: must be a mapping"):
        read_grid(3)


def test_a_wrong_value_of_a_method_names_method_and_variant() -> None:
    entry = {**SPARSE, "variants": {"bad": {"adapter": {"kind": "none"}}}}
    (cell,) = cells({"m": entry}, seeds=[1])
    with pytest.raises(UsageError, match=r"methods.m \(bad\): adapter.kind = 'none'"):
        cell.module()
    assert cell.kind is SparseAdapterModule
    (cell,) = cells({"m": {**SPARSE, "init_args": {"optim": {"weight_dekay": 0.1}}}}, seeds=[1])
    with pytest.raises(UsageError, match=r"methods.m .*no option 'weight_dekay' \(did .*'weight_decay'\?\); allow"):
        cell.module()
