"""What MerA's tables compare, and on which splits: arms (rows), settings (columns) and what is chosen beforehand.

Table 1 compares ways to use four adapters of four tracks, and takes scale and alignment apart; table 2 ways to read a
task; table 3 tracks. All arms of a setting share splits, shots and test rows. The rate of each arm is chosen once for
all its settings, by the mean over dev shots of splits that no table shows; the single source is chosen on each
split, by its dev shots. The paper's grid (1e-5 to 1e-4 and 5 or 10 epochs) is for BERT: 40 steps at such rates do not
move adapters on a small encoder, so the rates are larger here and the epochs ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.mera_sources import SOURCES, sources_of
from peft_lightning.errors import UsageError

__all__ = ["MIXED", "PLANS", "Arm", "Plan"]

MIXED = ("imdb", "boolq", "scitail", "qnli")
"""Four sources as in section 3.1, but for its fourth, winogrande: a small encoder does not learn that (the table of
sources says how far it comes), and an adapter that has learned nothing says nothing about merging."""

_TRACKS = ("QA", "NLI", "Sentiment", "Comsense", "STS")
_HOME = {"mrpc": "STS", "mnli": "NLI", "sst2": "Sentiment"}
"""Track of each target."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row: a method and what it starts from.

    Attributes:
        name: in the files.
        title: in the tables.
        method: full, adapter, fusion, mera or zero (nothing is trained).
        preset: of the merge; single is one adapter as it is.
        scale: of the merge; None is the preset's own.
        wide: whether select keeps all neurons of the sources.
        track: which sources: mixed, a track's name, or home, the target's own.
        leaks: whether the target's own source may be among them.
        mode: head, prompt or prompt-demo.
        choices: other arms, the best of which on the dev shots of each split is this one; it is not run itself.
        main: whether it is in the main table; the others are run with the fewest shots of each task alone.
    """

    name: str
    title: str
    method: str
    preset: str = ""
    scale: str | float | None = None
    wide: bool = False
    track: str = "mixed"
    leaks: bool = False
    mode: str = "head"
    choices: tuple[str, ...] = ()
    main: bool = True

    @property
    def family(self) -> str:
        """Arms of one family have one learning rate; scales and tracks of a preset are a family."""
        return f"{self.mode}/{self.method}/{self.preset}"

    def sources(self, target: str) -> tuple[str, ...]:
        """Return the names of the sources for a target; of single all that the best is chosen from."""
        if self.method != "fusion" and self.preset in ("", "random"):
            return ()
        if self.track == "mixed":
            # the rule of the tracks holds here too; the four contain no target
            return tuple(name for name in MIXED if name != target)
        track = _HOME[target] if self.track == "home" else self.track
        if self.leaks and _HOME[target] != track:
            return ()
        return sources_of(track, target, exclude_target=not self.leaks)


_SMALL = (3e-4, 1e-3, 3e-3)
_RATES = {"full": (2e-5, 1e-4), "adapter": _SMALL, "mera": _SMALL, "fusion": _SMALL, "zero": (1e-3,)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One table.

    Attributes:
        arms: rows.
        settings: columns, (task, shots per class).
        seeds: of the splits that are reported.
        held: seeds of the splits that rates and sources are chosen on.
        rates: learning rates by method.
        epochs: over the shots.
        batch_size: rows of a step.
        max_length: tokens of a row at most.
        test_rows: the same for all.
        backbone: minilm or sctd.
        baseline: method of the arms that the others of their mode are compared with.
        rates_of: name of the plan that chooses the rates for this one too; None: it does so itself.
    """

    arms: tuple[Arm, ...]
    settings: tuple[tuple[str, int], ...]
    seeds: tuple[int, ...] = (13, 21, 42, 87, 100, 1, 2, 3, 4, 5)
    held: tuple[int, ...] = (201, 202)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: _RATES)
    epochs: int = 10
    batch_size: int = 8
    max_length: int = 128
    test_rows: int = 500
    backbone: str = "minilm"
    baseline: str = "adapter"
    rates_of: str | None = None

    def __post_init__(self) -> None:
        if both := sorted(set(self.seeds) & set(self.held)):
            raise UsageError(f"held = {self.held}: seeds {both} are reported; choose on others")

    def baseline_of(self, arm: Arm) -> Arm:
        """Return what an arm is compared with."""
        return next(a for a in self.arms if a.mode == arm.mode and self.baseline in (a.method, a.name))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The targets, in order."""
        return tuple(dict.fromkeys(task for task, _ in self.settings))

    @property
    def fewest(self) -> tuple[tuple[str, int], ...]:
        """The settings with the fewest shots of each task."""
        return tuple((task, min(count for name, count in self.settings if name == task)) for task in self.tasks)

    @property
    def run(self) -> tuple[Arm, ...]:
        """The arms that are run."""
        return tuple(arm for arm in self.arms if not arm.choices)

    @property
    def families(self) -> tuple[str, ...]:
        """Of the arms that are run: each has one learning rate."""
        return tuple(dict.fromkeys(arm.family for arm in self.run))

    @property
    def modes(self) -> dict[str, tuple[Arm, ...]]:
        """The arms that are run, by how they read a task."""
        return {
            mode: tuple(arm for arm in self.run if arm.mode == mode) for mode in dict.fromkeys(a.mode for a in self.run)
        }

    def sources(self) -> tuple[str, ...]:
        """Return every source that an arm needs, in the order of their table."""
        needed = {name for arm in self.run for task in self.tasks for name in arm.sources(task)}
        return tuple(name for name in SOURCES if name in needed)

    def tiny(self) -> Plan:
        """Return the same in a minute: two splits, one of them to choose on, one rate, few test rows."""
        rates = {method: values[-1:] for method, values in self.rates.items()}
        return replace(
            self, seeds=(13, 21), held=(201,), rates=rates, epochs=1, test_rows=24, settings=_few(self.settings)
        )


def _few(settings: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Two tasks at most, with two shots each."""
    return tuple((task, 2) for task in [*dict.fromkeys(task for task, _ in settings)][:2])


_SCALES: dict[str, str | float] = {"mean": "mean", "2": 2.0, "sum": "sum"}
_SHOWN = {"avg": "Avg", "wts": "Wts", "acts": "Acts", "acts+": "Acts+"}


def _scaled() -> tuple[Arm, ...]:
    """Avg, Wts, Acts and the refit at the scales of mean, twice the mean, sum, and the best of these on dev shots."""
    arms: list[Arm] = []
    for preset, title in _SHOWN.items():
        for name, scale in _SCALES.items():
            if name != "mean":  # which is the preset's own, and among the main arms
                shown = {"2": "2 x mean", "sum": "sum"}[name]
                arms.append(
                    Arm(
                        name=f"{preset}@{name}",
                        title=f"{title}, {shown}",
                        method="mera",
                        preset=preset,
                        scale=scale,
                        main=False,
                    )
                )
        choices = (preset, f"{preset}@2", f"{preset}@sum")
        arms.append(
            Arm(
                name=f"{preset}@dev",
                title=f"{title}, chosen on dev shots",
                method="mera",
                preset=preset,
                choices=choices,
                main=False,
            )
        )
    select = Arm(name="select@mean", title="Select, mean", method="mera", preset="select", scale="mean", main=False)
    return (*arms, select)


def _merged(name: str, title: str, **options: str | bool) -> Arm:
    return Arm(name=name, title=title, method="mera", **{"preset": name, **options})  # type: ignore[arg-type]


_ADAPTER = Arm(name="adapter", title="Adapter from scratch", method="adapter")
_FULL = Arm(name="full", title="Fine-tuning", method="full")
_FUSION = Arm(name="fusion", title="AdapterFusion", method="fusion")

_TABLE1 = Plan(
    arms=(
        Arm(name="zero", title="Zero-shot, Acts+", method="zero", preset="acts+"),
        _FULL,
        _FUSION,
        _ADAPTER,
        _merged("single", "Single, best on dev shots"),
        _merged("sum", "MerA Sum"),
        _merged("avg", "MerA Avg"),
        _merged("wts", "MerA Wts"),
        _merged("acts", "MerA Acts"),
        _merged("acts+", "Acts+ (refit to the mean)"),
        _merged("select", "Select (refit to the sum)"),
        _merged("wide", "Select all neurons, 4 r wide", preset="select", wide=True),
        *_scaled(),
    ),
    settings=(("mrpc", 10), ("mrpc", 30), ("sst2", 10), ("sst2", 30), ("mnli", 10)),
)


def _read(mode: str) -> tuple[Arm, ...]:
    arms = (_FULL, _FUSION, _ADAPTER, _merged("acts", "MerA Acts"), _merged("select", "Select"))
    return tuple(replace(arm, name=f"{mode}/{arm.name}", title=f"{arm.title}, {mode}", mode=mode) for arm in arms)


_TABLE2 = Plan(
    arms=(*_read("head"), *_read("prompt"), *_read("prompt-demo")),
    settings=(("sst2", 30),),
    backbone="sctd",
)


def _tracked(preset: str, title: str) -> tuple[Arm, ...]:
    arms = [_merged(f"{track}/{preset}", f"+{track}, {title}", preset=preset, track=track) for track in _TRACKS]
    leak = _merged(
        f"leak/{preset}", f"own track with the target's own adapter, {title}", preset=preset, track="home", leaks=True
    )
    return (*arms, leak)


_HOMELY = (("sum", "Sum"), ("avg", "Avg"), ("wts", "Wts"), ("acts+", "Acts+"))
"""Of the target's own track all presets are run, so that scale and alignment can be told apart there too."""

_TABLE3 = Plan(
    arms=(
        _ADAPTER,
        _merged("single", "+Single, best of the own track", track="home"),
        *_tracked("acts", "Acts"),
        *_tracked("select", "Select"),
        *(_merged(f"home/{preset}", f"+own track, {title}", preset=preset, track="home") for preset, title in _HOMELY),
    ),
    settings=(("mrpc", 10), ("mrpc", 20), ("mnli", 10), ("mnli", 20), ("sst2", 10)),
    rates_of="1",
)


def _untrained(name: str, title: str, preset: str = "") -> Arm:
    return Arm(name=name, title=title, method="zero", preset=preset, mode="prompt")


_ZERO = Plan(
    arms=(
        _untrained("bare", "backbone alone"),
        _untrained("random", "random adapters", "random"),
        *(_untrained(preset, f"MerA {preset}", preset) for preset in ("sum", "avg", "wts", "acts", "acts+", "select")),
    ),
    settings=(("mrpc", 10), ("sst2", 10), ("mnli", 10)),
    backbone="sctd",
    baseline="bare",
)

PLANS = {"1": _TABLE1, "2": _TABLE2, "3": _TABLE3, "zero": _ZERO}
"""By the number of the paper's table; zero is its figure 3, whose shots only calibrate a merge."""
