"""A recipe that is told to end takes with it what it has started, and goes on from there when it is run again."""

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATH = "/usr/bin:/bin"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: A program in every place that recipes start one from; `work` sleeps, and where QUICK is set it returns.
RECIPE = """
set -euo pipefail
. {root}/recipes/lib.sh
work() {{ [ -n "${{QUICK:-}}" ] || sleep 300; }}
deeper() {{ work; }}
inner() {{ deeper | cat; }}
lane() {{ step "lane $1" "$OUT/.lane-$1" inner; }}
piped() {{ logged "$OUT/log" deeper; }}
both() {{
  side_by_side 4 "a: lane a" "b: lane b" "c: step piped $OUT/.piped piped" \\
    "d: quietly $OUT/d/log env LEVEL=2 bash $0"
}}
if [ -n "${{LEVEL:-}}" ]; then step "called" "$OUT/.called" work; exit 0; fi
step "everything" "$OUT/.everything" both
work
"""
STAMPS = {".lane-a", ".lane-b", ".piped", ".called", ".everything"}

#: Sourced by every bash before its script: trainings that never end, and no set-up and no corpus before them.
STAND_INS = """
fairseq-train() { sleep 300; }
python() { :; }
bash() { case "$1" in scripts/setup.sh | */prepare.sh) ;; *) command bash "$@" ;; esac; }
"""


def heed_signals() -> None:
    """A shell cannot trap what it was started to ignore, as programs in the background do."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Running:
    """A program, and all processes that descend from it: they have its mark in their environment."""

    def __init__(self, *command, **environment) -> None:
        self.mark = f"MARK={uuid.uuid4()}".encode()
        name, _, value = self.mark.decode().partition("=")
        env = {"PATH": PATH, name: value, **{key: str(value) for key, value in environment.items()}}
        self.program = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_signals,
        )

    def alive(self, program="") -> list[str]:
        """The command lines of its processes that run now; those of `program` alone."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is a zombie, or somebody else's
                continue
        return [line for line in found if line.startswith(program)]

    def wait_for(self, sleeping: int) -> None:
        """Until so many sleep."""
        self.until(lambda: len(self.alive("sleep 300")) == sleeping, 30)

    def until(self, reached, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, self.alive()
            time.sleep(0.05)

    def end(self) -> int:
        """Its exit code, once it has ended; nothing that it started is alive soon after."""
        code = self.program.wait(timeout=30)
        self.until(lambda: not self.alive(), 5)
        return code

    def kill(self) -> None:
        """What is left of it."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue
        self.program.communicate()


@pytest.fixture
def start():
    """Starts a program; what is left of it after the test is killed."""
    started = []

    def run(*command, **environment):
        started.append(Running(*command, **environment))
        return started[-1]

    yield run
    for running in started:
        running.kill()


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.sh"
    path.write_text(RECIPE.format(root=ROOT))
    (tmp_path / "out/d").mkdir(parents=True)
    return path


def stamps(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_ends_all_that_a_recipe_has_started_and_it_can_go_on(start, recipe, number):
    out = recipe.parent / "out"
    running = start("bash", recipe, OUT=out)
    running.wait_for(4)
    running.program.send_signal(number)
    assert running.end() == 128 + number
    assert stamps(out) == set()
    assert start("bash", recipe, OUT=out, QUICK=1).end() == 0
    assert stamps(out) == STAMPS


def test_a_run_that_fails_ends_those_beside_it(start, recipe):
    text = recipe.read_text().replace('"d: quietly', '"d: sleep 1; exit 5" "e: quietly')
    recipe.write_text(text)
    running = start("bash", recipe, OUT=recipe.parent / "out")
    assert running.end() == 5
    assert "error: d failed, so the recipe stops" in running.program.stdout.read()


def test_what_ignores_a_signal_is_killed(start, recipe):
    recipe.write_text(recipe.read_text().replace("|| sleep 300", "|| (trap '' TERM; sleep 300; sleep 300)"))
    running = start("bash", recipe, OUT=recipe.parent / "out")
    running.wait_for(4)
    running.program.terminate()
    assert running.end() == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_the_quickstart_leaves_no_training_behind(start, tmp_path, number):
    stand_ins = tmp_path / "stand_ins.sh"
    stand_ins.write_text(STAND_INS)
    running = start("bash", "recipes/quickstart.sh", BASH_ENV=stand_ins, OUT=tmp_path / "out", PROGRESS_SECONDS=600)
    running.wait_for(2)
    running.program.send_signal(number)
    assert running.end() == 128 + number
    assert not list((tmp_path / "out").glob(".trained*"))


def test_a_recipe_that_ends_says_its_exit_code_and_gets_its_arguments(tmp_path):
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(f'. {ROOT}/recipes/lib.sh\nprintf "%s\\n" "$@"\nexit 7\n')
    done = subprocess.run(["bash", recipe, "a b", "", "*"], capture_output=True, text=True, env={"PATH": PATH})
    assert (done.returncode, done.stdout) == (7, "a b\n\n*\n")
