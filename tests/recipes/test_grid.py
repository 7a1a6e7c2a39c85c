"""A grid of settings that was stopped goes on with what is missing, also where two processes share it."""

import json
from dataclasses import asdict, dataclass

from recipes import grid


@dataclass(frozen=True)
class Setting:
    kind: str
    seed: int


SETTINGS = [Setting(kind, seed) for kind in "ab" for seed in (1, 2)]


def test_a_setting_with_a_line_is_not_done_again(tmp_path, capsys):
    lines = tmp_path / "runs.jsonl"
    assert list(grid.missing(SETTINGS, lines)) == SETTINGS
    grid.add({**asdict(SETTINGS[1]), "ppl": 7.5}, lines)
    assert json.loads(lines.read_text()) == {"kind": "a", "seed": 2, "ppl": 7.5}
    assert "7.5" in capsys.readouterr().out
    assert list(grid.missing(SETTINGS, lines)) == [SETTINGS[0], *SETTINGS[2:]]


def test_what_another_process_has_done_meanwhile_is_left_out(tmp_path):
    lines, done = tmp_path / "runs.jsonl", []
    for setting in grid.missing(SETTINGS, lines):
        done.append(setting)
        if setting == SETTINGS[0]:
            grid.add(asdict(SETTINGS[2]), lines)
    assert done == [SETTINGS[0], SETTINGS[1], SETTINGS[3]]
