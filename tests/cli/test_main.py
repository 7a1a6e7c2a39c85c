"""The table of verbs: their help, and what it does not wait for."""

import subprocess
import sys

import pytest

from fairseq_quant_noise.cli.main import _VERBS, function, main


@pytest.mark.parametrize("name", _VERBS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    example = printed.partition("example: ")[2]
    assert "fairseq-quant-noise" in example
    assert name in example


def test_the_help_of_a_verb_is_its_functions():
    assert {name: verb.summary for name, verb in _VERBS.items()} == {name: function(name).__doc__ for name in _VERBS}


@pytest.mark.parametrize("arguments", [["--help"], ["user-dir"], ["plan", "--help"], ["nothing"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    code = f"import sys; sys.modules['torch'] = None; from fairseq_quant_noise.cli.main import main; main({arguments})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch" not in done.stderr
    assert done.returncode == (2 if arguments == ["nothing"] else 0)


def test_the_table_of_verbs_is_the_designs():
    assert {"user-dir", "plan", "quantize", "export", "inspect", "verify", "to-dense"} <= set(_VERBS)
