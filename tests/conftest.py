"""Fixtures that every test may use; torch keeps to one thread. The helpers' folder is on the path by pyproject.toml."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def _declare_torchvision_operators():
    """For torchvision's CUDA build beside a CPU torch: here, and in every program that a test starts."""
    folder = Path(__file__).parents[1] / "scripts/torchvision_operators"
    spec = importlib.util.spec_from_file_location("torchvision_operators", folder / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


_declare_torchvision_operators()
# fairseq's programs give the root logger the standard output of the moment, which pytest has closed by the next test.
logging.raiseExceptions = False


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """fairseq and a corpus; imported here, so that tests of the core run without fairseq."""
    from lm_fixture import Lab

    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def runs(lab):
    """Training runs that several tests look at, each done when it is first asked for."""
    from lm_fixture import Runs

    return Runs(lab)


@pytest.fixture
def flattens():
    """fairseq's FP16Optimizer can flatten here, on a CPU."""
    from half import can_flatten

    with can_flatten():
        yield


@pytest.fixture
def flat():
    """fairseq's FP16Optimizer flattens in every run of the test, as on a GPU."""
    from half import flattening

    with flattening():
        yield


@pytest.fixture
def fp32_products(monkeypatch):
    """Products with integer weights are in fp32 here, and in every program that the test starts, as on a GPU."""
    from fairseq_quant_noise.kernels import cpu

    monkeypatch.setenv(cpu.SWITCH, "reference")
    monkeypatch.setattr(cpu, "library", lambda: None)
