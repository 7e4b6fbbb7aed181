"""The parts of the build that pyproject.toml cannot say: where the packages lie in the repository."""

from setuptools import find_packages, setup

setup(
    # mmr1_kernels lies in kernels/, which itself must not be importable: a package of that name exists, and
    # transformers probes for it. configs/ lies beside the package and is installed inside it.
    packages=[
        *find_packages(include=["mmr1_ds", "mmr1_ds.*"]),
        *find_packages("kernels"),
        "mmr1_ds.configs",
    ],
    package_dir={"mmr1_ds": "mmr1_ds", "mmr1_ds.configs": "configs", "mmr1_kernels": "kernels/mmr1_kernels"},
    package_data={"mmr1_ds.configs": ["*.yaml", "*/*.json", "*/*.jinja"]},
)
