"""Imports point down: each module may import from its own package and from the layers below."""

import subprocess
import sys

import pytest
from fixtures.imports import MODULES, imports
from fixtures.launching import environment

# From the bottom up. A name covers the module or the package with everything in it.
LAYERS = [
    ["mmr1_kernels", "mmr1_ds.errors", "mmr1_ds.records"],
    ["mmr1_ds.config"],
    ["mmr1_ds.exits", "mmr1_ds.cluster", "mmr1_ds.curriculum", "mmr1_ds.data", "mmr1_ds.rewards"],
    ["mmr1_ds.algorithm", "mmr1_ds.rollout", "mmr1_ds.preflight", "mmr1_ds.monitoring"],
    ["mmr1_ds.engine"],
    ["mmr1_ds.loop"],
    ["mmr1_ds.train"],
    ["mmr1_ds.commands"],
]
LIGHT = ["errors", "records", "config", "config.loading", "preflight.checks", "preflight.deepspeed", "preflight.plan"]
LIGHT += ["cluster.ranks", "monitoring.logger", "curriculum.coordinator", "rewards.pool", "rewards.scoring", "train"]
LIGHT += ["rollout.base", "loop.batches", "loop.collector", "commands.cli", "commands.score.command", "commands.serve"]
LIGHT += ["commands.launch", "commands.report.command", "commands.data.command"]


def layer(module: str) -> tuple[int, str] | None:
    """Index of the layer and the name in it that covers the module."""
    for index, names in enumerate(LAYERS):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return index, name
    return None


def test_every_module_has_a_layer():
    assert [name for name in MODULES if name != "mmr1_ds" and layer(name) is None] == []


def test_imports_point_down():
    wrong = []
    for module, path in MODULES.items():
        own = layer(module)
        for imported in imports(path):
            other = layer(imported)
            if own is None or other is None or other[1] == own[1]:
                continue
            if other[0] >= own[0]:
                wrong.append(f"{module} (layer {own[0]}) imports {imported} (layer {other[0]})")
    assert wrong == []


def test_no_circles_inside_a_package():
    graph = {
        name: {other for other in imports(path, while_running=True) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circular import: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("library", "package"),
    [("deepspeed", "mmr1_ds.engine"), ("peft", "mmr1_ds.engine"), ("vllm", "mmr1_ds.rollout")],
)
def test_each_engine_library_is_imported_in_one_place(library, package):
    users = [
        name
        for name, path in MODULES.items()
        if any(imported.split(".")[0] == library for imported in imports(path)) and not name.startswith(package)
    ]
    assert users == []


def test_the_kernels_import_nothing_of_the_package():
    known = {"mmr1_kernels", "numpy", "torch", "triton", "rapidfuzz"}
    for name, path in MODULES.items():
        if name.startswith("mmr1_kernels"):
            foreign = {module.split(".")[0] for module in imports(path)} - known - sys.stdlib_module_names
            assert foreign == set(), name


def test_light_modules_import_nothing_heavy():
    program = "\n".join(f"import mmr1_ds.{name}" for name in LIGHT)
    program += "\nimport sys; heavy = {'torch', 'transformers', 'deepspeed', 'vllm', 'datasets'} & set(sys.modules)"
    program += "\nsys.exit(f'imported {heavy}' if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
