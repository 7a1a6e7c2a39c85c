"""scripts/setup.sh leaves alone what it has not made, and leaves nothing that does not load.

Nothing is downloaded: packages of a line or two stand for the large ones, and pip itself installs them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
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


def setup(checkout, *options, **environment):
    command = ["bash", checkout / "scripts/setup.sh", *options]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


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


#: The package index's CUDA build of torch says another version of itself than its distribution has.
CUDA_TORCH = """
class Version(str):
    def __ge__(self, other):
        return other == (2, 6)

__version__ = Version("2.13.0+cu130")
"""
FOR_ANOTHER_TORCH = 'raise OSError("libtorch_cuda.so: cannot open shared object file")'
#: As torchvision's CUDA build beside a CPU torch: a module asks for operators that are not there.
TORCHVISION = {
    "torchvision/__init__.py": "from . import _meta_registrations",
    "torchvision/_meta_registrations.py": 'from torch import declared\nassert declared == ["nms", "qnms"], declared',
}
LIBRARY = """
class Library:
    def __init__(self, *_): pass
    def define(self, schema): declared.append(schema.partition("(")[0])

import types
declared = []
library = types.SimpleNamespace(Library=Library)
ops = types.SimpleNamespace(torchvision=None)
"""


def wheel(folder, name, version, files, *requires):
    """A wheel with these files, by path and content, in `folder`."""
    about = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{about}/RECORD"
    files[record] = "".join(f"{path},,\n" for path in [*files, record])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def cuda_checkout(checkout, tmp_path):
    """A checkout whose environment has torch's CUDA build; a folder has the other packages, made for that one."""
    index = tmp_path / "index"
    index.mkdir()
    wheel(index, "torch", "2.13.0", {"torch/__init__.py": CUDA_TORCH + LIBRARY})
    wheel(index, "torchaudio", "2.11.0", {"torchaudio/__init__.py": FOR_ANOTHER_TORCH})
    wheel(index, "torchvision", "0.28.0", TORCHVISION)
    wheel(index, "fairseq_fixed", "0.12.3.1", {"fairseq/__init__.py": ""}, "torch>=1.13", "torchaudio>=0.8.0")
    for name in ("core", "vision", "recipes", "build"):
        (checkout / f"requirements/{name}.txt").write_text("torch>=2.6,<3\n" if name in ("core", "vision") else "")
    (checkout / "fairseq_quant_noise").mkdir()
    for name in ("setup.py", "pyproject.toml", "fairseq_quant_noise/_version.py"):
        (checkout / name).touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    for tool in Path(sysconfig.get_path("purelib")).glob("pip*"):
        (packages_of(checkout) / tool.name).symlink_to(tool)
    unpack(checkout, "torch-2.13.0")
    stamp(checkout, "torch", "torch==2.13.0")
    stamp(checkout, "package", "torch>=2.6,<3")  # this test has none
    return checkout


def packages_of(checkout):
    (packages,) = (checkout / ".venv/lib").glob("python*/site-packages")
    return packages


def unpack(checkout, name):
    with zipfile.ZipFile(checkout.parent / f"index/{name}-py3-none-any.whl") as archive:
        archive.extractall(packages_of(checkout))


def stamp(checkout, step, inputs):
    """Mark a step as done."""
    found = subprocess.run(["cksum"], input=inputs.encode(), capture_output=True, check=True)
    (checkout / f".venv/.stamp-{step}-{found.stdout.split()[0].decode()}").touch()


def offline(checkout):
    return {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(checkout.parent / "index")}


def test_what_does_not_load_beside_torch_is_removed_or_mended(cuda_checkout):
    done = setup(cuda_checkout, "--vision", **offline(cuda_checkout), PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchaudio does not load beside this torch and was removed" in done.stdout
    assert "Its CUDA build reads and transforms images" in done.stdout
    script = "import torchvision, fairseq, importlib.util as u; print(u.find_spec('torchaudio'))"
    command = [cuda_checkout / ".venv/bin/python", "-c", script]
    seen = subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": ""})
    assert seen.stdout == "None\n", seen.stderr


def test_torchs_cuda_build_is_held_by_the_version_that_pip_knows_it_by(cuda_checkout):
    """Where an earlier set-up stopped, at torch.__version__ in its constraints, this one goes on."""
    (cuda_checkout / ".venv/constraints.txt").write_text("torch==2.13.0+cu130\n")
    unpack(cuda_checkout, "torchaudio-2.11.0")
    done = setup(cuda_checkout, **offline(cuda_checkout), PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cuda_checkout / ".venv/constraints.txt").read_text() == "torch==2.13.0\n"
    assert (packages_of(cuda_checkout) / "torchaudio").is_dir(), "it was there before, in an environment not made here"
