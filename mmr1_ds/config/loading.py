"""Read `config=FILE key=value ...` into one typed configuration.

A later source wins: the files a file names under `defaults:` in their order, then the file itself, then the command
line. Files are looked up as given, then beside the file that names them, then among the configs of the project.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmr1_ds.config.keys import (
    elements_fit,
    holds_mapping,
    in_words,
    in_yaml,
    is_optional,
    is_text,
    leaf_types,
    nearest,
    sections,
)
from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.redaction import shown, without_secrets
from mmr1_ds.config.remarks import remarks
from mmr1_ds.config.schema import RunConfig, names_a_file
from mmr1_ds.config.unused import without_effect
from mmr1_ds.config.upstream import OF_OTHERS, Translation, ours, replace_example_files, translate, upstream_keys
from mmr1_ds.config.user_files import FUNCTION_KEYS
from mmr1_ds.errors import UserError, first_line

COMMAND_LINE = "the command line"
LOCAL_RANK = ("--local_rank=", "--local-rank=")  # the deepspeed launcher adds it; the rank comes from the environment
USAGE = "usage: python -m mmr1_ds.train [config=FILE ...] [key=value ...] ['list=[a,b]' ...]\n"
_FUNCTION_KEYS = ("worker.reward.reward_function", *FUNCTION_KEYS)  # path/file.py:function, or a word
_HOME_KEYS = (
    "worker.actor.model.model_path", "worker.actor.model.tokenizer_path", "data.image_dir", "data.curriculum_prior",
    "trainer.run_dir", "trainer.load_checkpoint_path", "trainer.save_checkpoint_path", "trainer.pass_rates",
)  # fmt: skip
_OLD_NUMBER = re.compile(r"[-+]?(?:0[0-7_]+|[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")  # octal; of base 60
_PATH_KEYS = ("data.format_prompt", "worker.actor.deepspeed", *_FUNCTION_KEYS)


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and the warnings for its reader."""

    config: RunConfig
    warnings: tuple[str, ...]  # one line each
    given: frozenset[str] = frozenset()  # keys that the user's files and the command line set, in our names


def config_folders() -> list[Path]:
    """Return where the project's own configs lie: inside the package when installed, beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Read `config=FILE key=value 'list=[a,b]'` and everything the file names.

    A leading ~ in a path becomes the home folder. --help writes the usage and exits, as argparse does.
    Raises: UserError, one line, for an unknown key, a wrong type, a missing or unreadable file, a cycle.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(USAGE)
        sys.exit(0)
    files, overrides = _split_arguments(argv)
    merged: dict[str, Any] = {}
    translations = []
    for file in files:
        translations += _read_with_defaults(find_config(file, Path.cwd()), ())
    translations.append(_translated(overrides, COMMAND_LINE))
    for translation in translations:
        for key, value in translation.values.items():
            _merge(merged, key, value)
    if merged.get("data.shuffle") is False:
        merged.setdefault("data.sampling_strategy", "sequential")  # EasyR1 has no other word for it
    if merged.get("data.curriculum_refresh") == "online":
        # What trained best at equal rollouts (docs/vas_figures.md); the schema's defaults are the paper's.
        merged.setdefault("data.curriculum_mixture_ratio", 0.8)
        merged.setdefault("data.curriculum_replacement", False)
    if "worker.actor.dtype" in merged and merged.get("worker.rollout.dtype", "auto") == "auto":
        merged["worker.rollout.dtype"] = merged["worker.actor.dtype"]
    notes = replace_example_files(merged, config_folders())
    config = _typed(merged)
    _expand_home(config)
    given = frozenset(key for one in translations if not one.is_ours for key in one.values)
    # The last translation is the command line's.
    offloads = dict.fromkeys(key for one in translations[:-1] if not one.is_ours for key in one.offloads)
    presets = {key: value for one in translations if one.is_ours for key, value in one.values.items()}
    lines = (*without_effect(config, given), *remarks(config, given, offloads, presets))
    return LoadedConfig(config, (*_warnings(translations, notes), *lines), given)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal one, but for secrets.

    Values under names that mean a secret (api_key, password, *_token ...) are written as `***`.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(without_secrets(asdict(config)))))


def _escaped(value: Any) -> Any:
    """Escape `${` in texts, so that reading them back is no interpolation; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    # Before an interpolation OmegaConf reads \\ as one backslash and \${ as ${.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _expand_home(config: RunConfig) -> None:
    """Expand a leading ~, which the shell leaves alone in key=~/path, and vLLM and transformers do not know."""
    for key in _HOME_KEYS:
        name, _, field = key.rpartition(".")
        if (path := value_at(config, key)) is not None:
            setattr(value_at(config, name), field, os.path.expanduser(path))
    data = config.data
    data.train_files, data.val_files = _files_at_home(data.train_files), _files_at_home(data.val_files)


def _files_at_home(files: Any) -> Any:
    if isinstance(files, str):  # names, comma separated
        return ",".join(os.path.expanduser(name.strip()) for name in files.split(","))
    return [os.path.expanduser(name) if isinstance(name, str) else name for name in files] if files else files


def _warnings(translations: Sequence[Translation], notes: Sequence[str]) -> tuple[str, ...]:
    ignored = dict.fromkeys(key for translation in translations for key in translation.ignored)
    lines = [f"ignored keys: {', '.join(ignored)}"] if ignored else []
    return (*lines, *dict.fromkeys(note for translation in translations for note in translation.notes), *notes)


# --- the command line ---------------------------------------------------------------------------------------------


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns: the files of config=, and the overrides (dotted key -> value)."""
    files: list[str] = []
    overrides: dict[str, Any] = {}
    for argument in argv:
        if argument.startswith(LOCAL_RANK):
            continue
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            check_no_dashes(argument)
            given = f"{key}={shown(key, text)}" if equals else argument
            raise UserError(f"argument {given!r} is not of the form key=value; write data.seed=1 or config=FILE")
        if key == "config":
            files.append(text)
        else:
            overrides |= _flatten({key: _parse_value(key, text)})
    return files, overrides


def check_no_dashes(argument: str) -> None:
    """Raises: UserError for a setting with dashes before it, as other programs have them."""
    dashed, equals, text = argument.partition("=")
    key = dashed.lstrip("-")
    if equals and dashed != key and (key == "config" or "." in key):
        raise UserError(f"{dashed}: settings have no dashes; write {key}={shown(key, text)}")


def _parse_value(key: str, text: str) -> Any:
    """Read a word of the command line: the text itself where the key holds text, YAML elsewhere."""
    hint = leaf_types().get(ours(key))
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if hint is not None and is_text(hint) and not quoted and "${" not in text:
        return None if is_optional(hint) and text in ("", "null", "~") else text
    try:
        _check_numbers(yaml.compose(text, Loader=yaml.SafeLoader), key, COMMAND_LINE)
        value = _yaml_value(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={shown(key, text)} is not readable as YAML: {first_line(error)}") from None
    if (joined := _joined_key(value)) is not None:
        raise UserError(f"{key}: {joined} has no value; write a space behind the colon, as in '{{{joined}: 1}}'")
    return value


def _joined_key(value: Any) -> str | None:
    """The beginning of a key like `weight:0.2`, which YAML reads as one word without a value; None without any."""
    if isinstance(value, list):
        return next(filter(None, map(_joined_key, value)), None)
    if not isinstance(value, dict):
        return None
    for name, part in value.items():
        if part is None and isinstance(name, str) and ":" in name.strip(":"):
            return name.partition(":")[0]
    return _joined_key([*value.values()])


def _yaml_value(text: str) -> Any:
    """Parse one value with OmegaConf's YAML rules (1e-3 is a number)."""
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return cast(dict[str, Any], parsed)["value"]


def _check_numbers(node: yaml.Node | None, key: str, where: str) -> None:
    """Raises: UserError for a number that nobody means as YAML 1.1 reads it."""
    if isinstance(node, yaml.ScalarNode) and node.style is None and _OLD_NUMBER.fullmatch(node.value):
        given, read = shown(key, node.value), shown(key, str(yaml.safe_load(node.value)))
        raise UserError(
            f"{key}={given} in {where}: YAML reads it as {read}; write a plain number, or text in quotes"
        )
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_numbers(item, key, where)
    elif isinstance(node, yaml.MappingNode):
        for name, item in node.value:
            _check_numbers(item, f"{key}.{name.value}".removeprefix("."), where)


# --- files --------------------------------------------------------------------------------------------------------


def find_config(name: str, beside: Path) -> Path:
    """Find the file `name`: as given, in the folder `beside`, or among the project's configs; .yaml may be left out.

    Raises: UserError that lists where it was searched for and the known names.
    """
    folders = [Path.cwd(), beside, *config_folders()]
    for folder in folders:
        for suffix in ("", ".yaml", ".yml"):
            path = folder / os.path.expanduser(name + suffix)
            if os.path.isfile(path):  # Path.is_file raises for a name over 255 characters
                return path.resolve()
    known = sorted({path.stem for folder in config_folders() for path in folder.glob("*.yaml")})
    raise UserError(f"config file {name} not found in {_listed(folders)}; the project's own are: {', '.join(known)}")


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(str(folder) for folder in folders))


def _read_with_defaults(path: Path, chain: tuple[Path, ...]) -> list[Translation]:
    """Return the file's sources in the order they are merged: what it names under `defaults:`, then itself."""
    if path in chain:
        loop = " -> ".join(file.name for file in (*chain[chain.index(path) :], path))
        raise UserError(f"defaults form a cycle: {loop}; remove one of them")
    content = _read_yaml(path)
    names = content.pop("defaults", None) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"defaults in {path} must be a list of config names, like [mmr1_b200], got {names}")
    own = _translated(_flatten(content), str(path))
    own.is_ours = path.parent in [folder.resolve() for folder in config_folders()]
    _anchor_paths(own.values, path.parent)
    sources: list[Translation] = []
    for name in names:
        if name == "_self_":  # Hydra's word for the place of the file itself
            sources.append(own)
        else:
            sources += _read_with_defaults(find_config(name, path.parent), (*chain, path))
    return sources if "_self_" in names else [*sources, own]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        _check_numbers(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), "", str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not readable as YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must hold sections (data, algorithm, worker, trainer)")
    return cast(dict[str, Any], content)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted keys. A mapping that is a value (override_config, deepspeed) stays whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        hint = leaf_types().get(ours(name))
        if isinstance(value, Mapping) and not (hint is not None and holds_mapping(hint)):
            flat |= _flatten(value, name + ".")
        elif value is not None or name not in sections():  # a section with nothing in it reads as null
            flat[name] = value
    return flat


def _translated(flat: Mapping[str, Any], where: str) -> Translation:
    """Read one source in our names. Raises: UserError for an unknown key."""
    translation = translate(flat, where)
    for key, value in translation.values.items():
        if key not in leaf_types() and _mapping_above(key) is None:
            _refuse_key(key, value, where)
    return translation


def _merge(merged: dict[str, Any], key: str, value: Any) -> None:
    """Let a later source's key win. Mappings that are values merge key by key, everything else is replaced.

    An empty mapping replaces as well: `key={}` empties it.
    """
    target = key if key in leaf_types() else _mapping_above(key)
    assert target is not None  # _translated saw to it
    if target != key:
        for part in reversed(key[len(target) + 1 :].split(".")):
            value = {part: value}
        if isinstance(merged.get(target), str):
            raise UserError(f"{key}: {target} is the file {merged[target]}; change it there, or give a mapping instead")
    before = merged.get(target)
    if isinstance(before, dict) and isinstance(value, dict) and value:
        value = _merged_mappings(before, value)
    merged[target] = value


def _merged_mappings(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(before)
    for key, value in after.items():
        old = both.get(key)
        both[key] = _merged_mappings(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Make relative paths that lie beside their file, or among the project's configs, absolute."""
    for key in _PATH_KEYS:
        value = values.get(key)
        if not isinstance(value, str) or "\n" in value or "${" in value:
            continue
        if key in _FUNCTION_KEYS and not names_a_file(value):
            continue
        name, colon, function = value.rpartition(":") if key in _FUNCTION_KEYS else (value, "", "")
        path = Path(os.path.expanduser(name))
        if not name or path.is_absolute() or os.path.isfile(path):  # Path.is_file raises for a long inline template
            continue
        for parent in (folder, *config_folders()):
            if os.path.isfile(parent / path):
                values[key] = f"{(parent / path).resolve()}{colon}{function}"
                break


# --- types --------------------------------------------------------------------------------------------------------


@cache
def _defaults() -> DictConfig:
    """The schema as OmegaConf sees it, which takes a tenth of a second."""
    return OmegaConf.structured(RunConfig)


def _typed(values: Mapping[str, Any]) -> RunConfig:
    tree = copy.deepcopy(_defaults())
    for key, value in values.items():
        _assign(tree, key, value)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'a value'}: {first_line(error)}") from None
    assert isinstance(config, RunConfig)
    return config


def _assign(tree: DictConfig, key: str, value: Any) -> None:
    hint = leaf_types()[key]
    if not elements_fit(hint, value):
        raise UserError(f"{key}={value}: expected {in_words(hint)}")
    try:
        OmegaConf.update(tree, key, value, merge=False)
    except OmegaConfBaseException:
        raise UserError(f"{key}={in_yaml(value)}: expected {in_words(hint)}, got {_kind(value)}") from None


def _mapping_above(key: str) -> str | None:
    """The key that holds a mapping which `key` reaches into, as model.override_config.hidden_size does."""
    for name, hint in leaf_types().items():
        if key.startswith(name + ".") and holds_mapping(hint):
            return name
    return None


def _refuse_key(key: str, value: Any, where: str) -> None:
    if key in sections():
        raise UserError(f"{key}={in_yaml(value)} in {where}: {key} is a section; give its keys, like {_first_key(key)}")
    for name, hint in leaf_types().items():
        if key.startswith(name + "."):
            raise UserError(f"{key} in {where}: {name} holds no further keys, it is {in_words(hint)}")
    close = OF_OTHERS.get(key) or nearest(key, [*leaf_types(), *upstream_keys()])
    advice = f"did you mean {close}?" if close else f"the sections are {_sections()}"
    raise UserError(f"unknown key {key} in {where}; {advice}")


def _first_key(section: str) -> str:
    return next(name for name in leaf_types() if name.startswith(section + "."))


def _sections() -> str:
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in leaf_types()))


def _kind(value: Any) -> str:
    """Return the type of a given value, in words."""
    names = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a mapping")
