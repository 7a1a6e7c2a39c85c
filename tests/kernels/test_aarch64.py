"""The kernels' forms for aarch64, compiled by a cross compiler and run by qemu-user where both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fairseq_quant_noise import kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER}, {EMULATOR}")
@pytest.mark.parametrize("processor", ["armv8-a", "armv8.2-a+dotprod"])
def test_products_on_aarch64_are_those_of_the_formula(processor, tmp_path):
    native, program = Path(kernels.__file__).parent / "native", tmp_path / "products"
    driver = Path(__file__).parents[1] / "support" / "aarch64.cpp"
    flags = ["-O1", f"-march={processor}", "-std=c++17", "-static", "-w", "-I", str(native)]
    sources = [str(driver), *map(str, sorted(native.glob("*.cpp")))]  # all of them compile, the layer too
    subprocess.run([COMPILER, *flags, "-o", str(program), *sources], check=True, timeout=300)
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
