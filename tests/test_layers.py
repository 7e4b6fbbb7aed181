"""Imports point down: each module may import from its own package and from the layers below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

# From the bottom up. A name covers the module or the package with everything in it.
LAYERS = [
    ["mmr1_kernels", "mmr1_ds.errors"],
    ["mmr1_ds.redaction", "mmr1_ds.extras"],
    [
        "mmr1_ds.config",
        "mmr1_ds.records",
        "mmr1_ds.launch_environment",
        "mmr1_ds.deadlines",
        "mmr1_ds.progress",
        "mmr1_ds.environment",
        "mmr1_ds.stages",
    ],
    ["mmr1_ds.writers", "mmr1_ds.live_report"],
    [
        "mmr1_ds.distributed",
        "mmr1_ds.launch_guard",
        "mmr1_ds.preemption",
        "mmr1_ds.config_schema",
        "mmr1_ds.config_critic",
        "mmr1_ds.logging",
        "mmr1_ds.config_reference",
    ],
    ["mmr1_ds.data", "mmr1_ds.rewards", "mmr1_ds.curriculum", "mmr1_ds.checkpoint"],
    ["mmr1_ds.input_files", "mmr1_ds.config_upstream", "mmr1_ds.engine"],
    ["mmr1_ds.response_files", "mmr1_ds.response_tokens"],
    ["mmr1_ds.config_loading", "mmr1_ds.config_ranges", "mmr1_ds.config_servers", "mmr1_ds.rollout"],
    ["mmr1_ds.sampling"],
    ["mmr1_ds.config_checks", "mmr1_ds.deepspeed_config", "mmr1_ds.collect", "mmr1_ds.metrics"],
    ["mmr1_ds.batches", "mmr1_ds.samples"],
    ["mmr1_ds.experience", "mmr1_ds.partial_batches"],
    ["mmr1_ds.plan", "mmr1_ds.planning", "mmr1_ds.trainer", "mmr1_ds.demo", "mmr1_ds.survey"],
    ["mmr1_ds.composition", "mmr1_ds.report"],
    ["mmr1_ds.train"],
    ["mmr1_ds.score", "mmr1_ds.serve", "mmr1_ds.export", "mmr1_ds.submit"],
    ["mmr1_ds.cli"],
]
LIGHT = ["errors", "config", "records", "config_loading", "config_checks", "deepspeed_config", "plan", "distributed"]
LIGHT += ["logging", "curriculum.coordinator", "curriculum.scores", "rewards.pool", "rewards.scoring", "train", "cli"]
LIGHT += ["score", "serve", "submit", "report.command", "survey.command"]


def modules() -> dict[str, Path]:
    found = {}
    for root, package in ((ROOT, "mmr1_ds"), (ROOT / "kernels", "mmr1_kernels")):
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, while_running: bool = False) -> set[str]:
    """Every module named in an import of the file, also inside functions; and in type-checking blocks unless told."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if while_running and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                found.add(member if member in MODULES else node.module or "")
    return found


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
