"""List the packages, which pyproject.toml cannot: those found, and configs/plans. All else is in pyproject.toml."""

from tempfile import TemporaryDirectory

from setuptools import find_packages, setup

PLANS = "fairseq_quant_noise.configs.plans"  # where a wheel has the plans; see fairseq_quant_noise/plan/shipped.py

# Not in the checkout's build/: setuptools would leave it there, and put modules that are gone by then into new wheels.
with TemporaryDirectory() as folder:
    setup(
        packages=[*find_packages(include=["fairseq_quant_noise*"]), PLANS],
        package_dir={PLANS: "configs/plans"},
        options={"build": {"build_base": folder}},
    )
