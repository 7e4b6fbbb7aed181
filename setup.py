"""The parts of the build that pyproject.toml cannot say: where the packages lie in the repository, and the C++."""

from setuptools import Extension, find_packages, setup

setup(
    # mmr1_kernels lies in kernels/, which itself must not be importable: a package of that name exists, and
    # transformers probes for it. configs/ and launch/ lie beside the package; what it reads of them is installed
    # inside it.
    packages=[
        *find_packages(include=["mmr1_ds", "mmr1_ds.*"]),
        *find_packages("kernels"),
        "mmr1_ds.configs",
        "mmr1_ds.configs.deepspeed",
        "mmr1_ds.configs.format_prompt",
        "mmr1_ds.launch",
    ],
    package_dir={
        "mmr1_ds": "mmr1_ds",
        "mmr1_ds.configs": "configs",
        "mmr1_ds.launch": "launch",
        "mmr1_kernels": "kernels/mmr1_kernels",
    },
    package_data={
        "mmr1_ds.configs": ["*.yaml"],
        "mmr1_ds.configs.deepspeed": ["*.json"],
        "mmr1_ds.configs.format_prompt": ["*.jinja"],
        "mmr1_ds.launch": ["slurm.sbatch"],  # of `mmr1-ds launch`; the other scripts are for a checkout
        "mmr1_ds.commands.demo": ["digits.npz"],
        "mmr1_ds.commands.report": ["*.jinja", "*.css", "*.js"],
    },
    ext_modules=[
        Extension(
            "mmr1_kernels._count_ngrams",
            sources=["kernels/csrc/count_ngrams.cpp"],
            depends=["kernels/csrc/ngram_counter.h", "kernels/csrc/occurrence_table.h"],
            # No -march=native: a wheel must run on other machines than the one that built it. Counters stored as one
            # vector and soon loaded one by one cost more than they save.
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-fno-tree-slp-vectorize"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,  # without a compiler the scores are slower, not absent
        )
    ],
)
