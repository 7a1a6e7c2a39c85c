"""scripts/setup.sh leaves alone what it has not made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    here = tmp_path / "checkout"
    here.mkdir()
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, here / name)
    return here


def setup(checkout):
    command = ["bash", checkout / "scripts/setup.sh"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_an_environment_that_is_linked_is_used_and_never_removed(checkout, tmp_path):
    """It may be that of another checkout, with its stamp in it."""
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    (env / ".stamp-venv-1").touch()
    python = env / "bin/python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *pip*) exit 7 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (checkout / ".venv").symlink_to(env)
    done = setup(checkout)
    assert done.stdout.startswith("[1/5] using the environment that is already in .venv\n")
    assert done.returncode != 0, "nothing could be installed"
    assert python.exists()
    assert (env / ".stamp-venv-1").exists()


def test_a_link_to_no_environment_is_refused_with_the_cure(checkout, tmp_path):
    (checkout / ".venv").symlink_to(tmp_path / "nowhere")
    done = setup(checkout)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: .venv is a link to {tmp_path / 'nowhere'}, where there is no environment: remove the link\n"
    )
