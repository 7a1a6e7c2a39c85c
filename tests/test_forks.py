"""forks.py: a forked program is like one that was started afresh."""

import json
import os
import subprocess
import sys
import time

import forks
import pytest
from toys import python

SEES = """
import json, os, sys
known = "fairseq_quant_noise" in sys.modules
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("GIVEN"), known, sys.stdin.read()]))
print("said", file=sys.stderr)
sys.exit(7)
"""


def test_it_has_the_arguments_the_folder_the_environment_and_the_streams_and_gives_its_code(tmp_path):
    env = {**os.environ, "GIVEN": "of the caller"}
    done = [python("-c", SEES, "a b", "*", fresh=f, env=env, cwd=tmp_path, input="in") for f in (True, False)]
    assert json.loads(done[1].stdout) == [["-c", "a b", "*"], str(tmp_path), "of the caller", False, "in"]
    assert [(d.stdout, d.stderr, d.returncode) for d in done] == 2 * [(done[0].stdout, "said\n", 7)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", None),
    ],
)
def test_its_exit_code(code, expected):
    done = python("-c", code, fresh=False)
    assert done.returncode == (forks.KILLED if expected is None else expected)
    assert ("ZeroDivisionError" in done.stderr) == ("1 / 0" in code)


def test_it_ends_with_its_caller():
    line = forks.command("python", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    caller = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    program = int(caller.stdout.readline())
    caller.kill()
    caller.communicate()
    for _ in range(500):
        if not os.path.exists(f"/proc/{program}"):
            return
        time.sleep(0.01)
    pytest.fail("it is still there")


def test_a_shell_script_forks_what_it_starts(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(
        "set -e\ncommand -v fairseq-train >/dev/null\nGIVEN=1 python - x <<'END' | cat\n"
        "import os, sys; print('torch' in sys.modules, sys.argv, os.environ['GIVEN'])\nEND\n"
        "fairseq-quant-noise verify /nowhere 2>/dev/null || echo $?\n"
    )
    env = {"PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "BASH_ENV": forks.shell()}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.stdout == "True ['-', 'x'] 1\n2\n", done.stderr
