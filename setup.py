"""Package metadata. The dependencies, their bounds and the reasons are in requirements/, one a line."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    """The lines of requirements/`name`.txt without comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [wanted for line in lines if (wanted := line.split("#")[0].strip())]


def version() -> str:
    """`__version__` of the package, read and not imported: torch may not be there yet."""
    text = (ROOT / "fairseq_quant_noise" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('fairseq_quant_noise/__init__.py has no line `__version__ = "..."`; add it')
    return found[1]


def readme() -> str:
    """README.md, or nothing while there is none."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


setup(
    name="fairseq-quant-noise",
    version=version(),
    description="Quant-Noise training, iPQ and int4/int8 quantization for fairseq and PyTorch",
    long_description=readme(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["fairseq_quant_noise*"]),
    package_data={
        "fairseq_quant_noise": ["py.typed"],
        "fairseq_quant_noise.kernels": ["native/*"],
        "fairseq_quant_noise.report": ["*.css"],
    },
    install_requires=requirements("core"),
    extras_require={
        "recipes": requirements("recipes"),
        "vision": requirements("vision"),
        "cluster": requirements("cluster"),
        "dev": [line for name in ("recipes", "vision", "cluster", "dev") for line in requirements(name)],
    },
    entry_points={"console_scripts": ["fairseq-quant-noise = fairseq_quant_noise.cli.main:main"]},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
