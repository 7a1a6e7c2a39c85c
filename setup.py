"""The packages, which pyproject.toml cannot list: those found, and configs/plans. All else is in pyproject.toml."""

from setuptools import find_packages, setup

PLANS = "fairseq_quant_noise.configs.plans"  # where a wheel has the plans; see fairseq_quant_noise/plan/shipped.py

setup(packages=[*find_packages(include=["fairseq_quant_noise*"]), PLANS], package_dir={PLANS: "configs/plans"})
