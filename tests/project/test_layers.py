"""Imports point down between the floors of the house, and make no circle; the house stays as small as it is."""

import re
import subprocess
import sys

import pytest
from fixtures.imports import BENCHMARKS, MODULES, circles, floors, imports, module_graph, room, room_graph
from fixtures.launching import ROOT, environment

# From the top down: a room imports from the rows below its own, and from no neighbour in its row.
FLOORS = [
    {"benchmarks"},
    {"commands"},  # the programs a person starts
    {"train"},  # one rank, from arguments to exit code
    {"loop"},  # the algorithm, step by step
    {"engine"},  # how a policy is held and updated
    {"algorithm", "rollout", "preflight", "monitoring"},
    {"cluster", "curriculum", "data", "rewards"},
    {"config"},
    {"errors", "records", "io", "mmr1_kernels"},
]
FLOOR_OF = {name: len(FLOORS) - number for number, names in enumerate(FLOORS) for name in names}
LIGHT = """
    errors records config config.loading preflight.checks preflight.deepspeed preflight.plan cluster.ranks
    monitoring.logger curriculum.coordinator rewards.pool rewards.scoring rollout.base loop.batches loop.collector train
    commands.cli commands.launch commands.serve commands.score.command commands.report.command commands.data.command
"""
# The composition root: what a run starts from, its models, its loop. All else takes its own sections of the config.
COMPOSITION = {f"mmr1_ds.loop.{name}" for name in ("composition", "starting", "engines")}
PARTS = {"engine", "algorithm", "rollout", "monitoring", "curriculum", "data", "rewards", "cluster", "loop"}


def test_every_room_is_on_a_floor():
    assert room_graph(module_graph()).keys() == FLOOR_OF.keys()


def test_imports_point_down():
    wrong = [
        f"{module} imports {imported}"
        for module, others in module_graph().items()
        for imported in others
        if module != "mmr1_ds" and imported != "mmr1_ds" and room(module) != room(imported)
        if FLOOR_OF[room(imported)] >= FLOOR_OF[room(module)]
    ]
    assert wrong == []


def test_no_circles():
    """Between modules, inside a room and across, imports for type checking included; so between rooms."""
    assert circles(module_graph()) == []
    assert circles(room_graph(module_graph())) == []


def test_a_circle_is_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circles(graph) == ["b -> c -> b"]
    assert floors({"a": {"b", "d"}, "b": {"d"}, "d": set()}) == {"d": 1, "b": 2, "a": 3}


def test_the_house_stays_small():
    rooms = room_graph(module_graph())
    assert len(rooms) <= 20
    assert max(floors(rooms).values()) <= 10
    assert sum(map(len, rooms.values())) <= 90  # arrows between rooms
    package = ROOT / "mmr1_ds"
    assert len([path for path in package.glob("*.py") if path.name != "__init__.py"]) <= 4
    assert len(list(package.glob("*/__init__.py"))) <= 12


def test_parts_take_their_own_section_of_the_configuration():
    named = {
        module
        for module, path in MODULES.items()
        if room(module) in PARTS and module not in COMPOSITION
        if re.search(r"\bRunConfig\b", path.read_text())
    }
    assert named == set()


@pytest.mark.parametrize(("library", "owner"), [("deepspeed", "engine"), ("peft", "engine"), ("vllm", "rollout")])
def test_each_engine_library_is_imported_in_one_room(library, owner):
    users = {
        room(name)
        for name, path in MODULES.items()
        if any(imported.split(".")[0] == library for imported in imports(path))
    }
    assert users <= {owner}


def test_the_kernels_import_nothing_of_the_package():
    known = {"mmr1_kernels", "numpy", "torch", "triton", "rapidfuzz"}
    for name, path in MODULES.items():
        if name.startswith("mmr1_kernels"):
            foreign = {module.split(".")[0] for module in imports(path)} - known - sys.stdlib_module_names
            assert foreign == set(), name


@pytest.mark.parametrize(
    "program",
    ["\n".join(f"import mmr1_ds.{name}" for name in LIGHT.split()),
     "import contextlib\nfrom mmr1_ds.commands import cli\nwith contextlib.suppress(SystemExit): cli.main(['--help'])"],
    ids=["modules", "help"],
)  # fmt: skip
def test_light_modules_and_the_help_import_nothing_heavy(program):
    program += "\nimport sys; heavy = {'torch', 'transformers', 'deepspeed', 'vllm', 'datasets'} & set(sys.modules)"
    program += "\nsys.exit(f'imported {heavy}' if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What each of these leaves out beside that, in this order: what a module imports is there for those after it.
BARE = {
    "curriculum.scores": "numpy mmr1_kernels",
    "rewards.math": "numpy sympy math_verify",
    "rewards.pool": "numpy",
    "monitoring.logger": "numpy wandb tensorboard tqdm rich",
    "data.dataset": "pyarrow jinja2",
}


def test_some_modules_import_even_less():
    program = "import importlib, sys\n" + "".join(
        f"importlib.import_module('mmr1_ds.{name}'); assert not {set(left.split())} & set(sys.modules), {name!r}\n"
        for name, left in BARE.items()
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_stands_in_a_folder_that_the_table_lists():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    folders = {path.parent.name for path in BENCHMARKS.values()} - {"benchmarks"}
    assert {name for name in folders if f"`{name}/`" not in table} == set()
    named = set(re.findall(r"python (benchmarks/\S+\.py)", table))
    assert {name for name in named if not (ROOT / name).is_file()} == set()
    assert [path for path in (ROOT / "benchmarks").glob("*.py") if path.name != "gpu_check.py"] == []
