"""Every exit status of the table has a command that ends with it, and a line that says why."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import peft_lightning.cli.doctor
from peft_lightning.cli.exit_codes import EXIT_CODES
from peft_lightning.cli.main import main
from peft_lightning.errors import CheckpointError, DataError, PeftLightningError, UsageError
from peft_lightning.stopping import Terminated
from peft_lightning.study.tables import generated, markdown_table

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[int, list[list[str]]] = {
    0: [["--version"], ["--help"], ["doctor", "--help"]],
    1: [
        ["test", "--ckpt_path", "absent.ckpt"],
        ["export", "--ckpt_path", "absent", "--format", "peft", "--out", "out"],
    ],
    2: [
        ["fitt"],
        ["fit", "--config", "absent.yaml"],
        ["fit", "--import", "no_such_module"],
        ["test"],
        ["doctor", "--ghost"],
        ["study", "--config", "absent.yaml", "--output", "out"],
        ["import", "--from", "x"],
    ],
    130: [["doctor"]],
    138: [["doctor"]],
    143: [["doctor"]],
}


def stopped(code: int) -> Callable[[list[str]], None]:
    """A command that a signal ends."""

    def ends(words: list[str]) -> None:
        raise Terminated(signal.Signals(code - 128))

    return ends


@pytest.mark.parametrize("code", EXIT_CODES)
def test_a_command_for_each(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    if code > 128:
        monkeypatch.setattr(peft_lightning.cli.doctor, "run_doctor", stopped(code))
    for words in COMMANDS[code]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == code, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-lightning: error: ")]
        assert len(lines) == (1 if code in (1, 2) else 0), words


def test_each_error_has_a_status_of_the_table() -> None:
    kinds = [PeftLightningError, UsageError, DataError, CheckpointError]
    assert {kind.exit_code for kind in kinds} == {1, 2}
    assert UsageError.exit_code == 2


def test_the_table_is_in_the_help_and_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for code, what in EXIT_CODES.items():
        assert re.search(rf"^  {code} +{re.escape(what)}$", shown, re.MULTILINE)
    table = markdown_table([{"exit status": code, "means": what} for code, what in EXIT_CODES.items()])
    assert generated((ROOT / "README.md").read_text(encoding="utf-8"), "exit codes") in (None, table)
