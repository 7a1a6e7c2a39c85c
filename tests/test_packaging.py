"""The built wheel in an environment that has what it requires and nothing else: no fairseq, no checkout.

The environment is new; the requirements, with theirs, are linked into it, so that nothing is downloaded.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from fairseq_quant_noise import __version__
from fairseq_quant_noise.networks.registry import build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("fairseq_quant_noise", "configs", "requirements")
LM = {"_name": "transformer_lm", "decoder_layers": 1, "decoder_embed_dim": 64, "decoder_ffn_embed_dim": 64}
LM |= {"decoder_attention_heads": 2, "share_decoder_input_output_embed": True}
STORY = """
import sys
import torch
from torch import nn
from fairseq_quant_noise import attach_noise, detach_noise, load, quantize_, save

def network():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

noise = {"noise": [{"match": "[02]", "p": 0.2, "block_size": 4}]}
model, x = network(), torch.randn(16, 8)
attach_noise(model, noise)
model(x).sum().backward()
detach_noise(model)
quantize_(model, "small_int8")
save(model, "model.safetensors", "small_int8")
assert torch.equal(load("model.safetensors", into=network())(x), model.eval()(x))
print(__import__("fairseq_quant_noise").__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the source distribution, as an index has both."""
    here = tmp_path_factory.mktemp("built")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, here / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, here / "source")
    run(here / "source", sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(here)!r})")
    (source,) = here.glob("*.tar.gz")
    pip(here, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", here, source)
    (wheel,) = here.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def env(built):
    """An environment with the wheel, in which pip found everything that the wheel requires."""
    folder = built.parent / "env"
    run(built.parent, sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (about,) = importlib.metadata.distributions(path=[str(built)])
    for name in required(about.requires, set()):
        link(importlib.metadata.distribution(name), packages)
    pip(built.parent, "--python", folder / "bin/python", "install", "--no-index", built)
    return folder


def run(folder, *command):
    """What it prints, run in a folder, with nothing of the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(folder, *arguments):
    run(folder, sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def required(requirements, seen):
    """The names of these distributions that are installed here, and of what they require in turn; extras apart."""
    for requirement in requirements or ():
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        if "extra ==" not in requirement and name not in seen and has(name):
            seen.add(name)
            required(importlib.metadata.requires(name), seen)
    return seen


def has(name):
    try:
        return importlib.metadata.distribution(name) is not None
    except importlib.metadata.PackageNotFoundError:  # for another system
        return False


def link(distribution, packages):
    """A distribution's folders and modules, linked into `packages`."""
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (packages / top).exists():
            (packages / top).symlink_to(Path(distribution.locate_file(top)).resolve())


def test_the_environment_has_the_requirements_alone(env):
    names = "fairseq", "omegaconf", "hydra", "timm", "sentencepiece"
    script = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert run(env, env / "bin/python", "-c", script) == "[]\n"


def test_plan_runs_on_a_checkpoint_with_a_plan_of_the_wheel(env):
    model = build("transformer_lm", LM, 1000)
    content = {"model": model.state_dict(), "cfg": {"model": LM, "task": {}, "criterion": {}}}
    torch.save(content, env / "checkpoint.pt")
    command = ["plan", "--path", "checkpoint.pt", "--plan", "small", "--json"]
    table = json.loads(run(env, env / "bin/fairseq-quant-noise", *command))
    assert table["dense_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert {row["scheme"] for row in table["tensors"]} == {"pq", "dense"}


def test_a_build_in_the_checkout_leaves_nothing_there_and_takes_nothing_from_an_older_one(built):
    source = built.parent / "source"
    old = source / "build/lib/fairseq_quant_noise/old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    run(source, sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('wheels')")
    (wheel,) = source.glob("wheels/*.whl")
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(built) as other:
        assert sorted(archive.namelist()) == sorted(other.namelist())
    assert [path for path in source.rglob("build/**/*") if path.is_file()] == [old]


def test_what_needs_fairseq_says_so_in_a_line(env):
    command = [
        env / "bin/python",
        "-m",
        "fairseq_quant_noise",
        "plan",
        "--arch",
        "quant_noise_transformer_lm_small",
        "--plan",
        "small",
    ]
    done = subprocess.run(
        [*map(str, command)], cwd=env, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    line = "error: --arch: needs fairseq, which is not installed; install fairseq-fixed, or give --path CKPT instead\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_the_plain_api_runs(env):
    where = run(env, env / "bin/python", "-c", STORY)
    assert Path(where.strip()).is_relative_to(env)


def test_the_wheel_says_what_it_is(built):
    (about,) = importlib.metadata.distributions(path=[str(built)])
    assert about.version == __version__
    assert about.metadata["License-Expression"] == "MIT"
    assert about.metadata["Author"] == "The fairseq_quant_noise authors"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about.metadata["Requires-Python"] == project["requires-python"]


def test_each_file_of_requirements_is_in_the_metadata(built):
    (about,) = importlib.metadata.distributions(path=[str(built)])
    for name in ("core", "recipes", "vision", "cluster", "transformers", "onnx", "dev"):
        lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
        wanted = {re.match(r"[\w.-]+", line)[0] for line in lines if re.match(r"\w", line)}
        extra = "" if name == "core" else f'; extra == "{name}"'
        found = {
            re.match(r"[\w.-]+", r)[0] for r in about.requires if r.endswith(extra) and bool(extra) == ("extra" in r)
        }
        assert wanted <= found if name == "dev" else wanted == found, name
