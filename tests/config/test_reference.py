"""The configuration reference: complete, and what the page shows."""

from dataclasses import fields, is_dataclass

import pytest
from fixtures.launching import ROOT

from mmr1_ds.commands import cli
from mmr1_ds.config import RunConfig
from mmr1_ds.config.reference import markdown, sections


def names(section, prefix: str = "") -> set[str]:
    found = set()
    for field in fields(section):
        value = getattr(section, field.name)
        found |= names(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return found


def test_every_key_has_a_line_and_every_line_a_key():
    keys = [key for section in sections() for key in section.keys]
    assert {key.name for key in keys if key.default != "..."} == names(RunConfig())
    assert len({key.name for key in keys}) == len(keys)
    assert all(key.meaning for key in keys), [key.name for key in keys if not key.meaning]
    assert all(section.meaning for section in sections())


def test_the_page_is_the_reference():
    path = ROOT / "docs" / "configuration.md"
    assert path.read_text() == markdown(), "write it anew: make docs"


def test_keys_are_printed(capsys):
    assert cli.main(["keys", "actor.optim.betas"]) == 0
    assert capsys.readouterr().out == (
        "worker.actor.optim.betas=[0.9, 0.999]  # decay of the two moments; each in [0, 1)\n"
    )
    assert cli.main(["keys"]) == 0
    assert "data.seed=1  # seed of the order and the draws; 0 or more\n" in capsys.readouterr().out
    assert cli.main(["keys", "Order and the draws"]) == 0
    assert capsys.readouterr().out == "data.seed=1  # seed of the order and the draws; 0 or more\n"
    assert cli.main(["keys", "no_such"]) == 2
    assert "no key has 'no_such' in its name" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data.curriculum_metrics", "trainer.logger"])
def test_a_comment_behind_several_lines_is_found(key):
    (line,) = [item for section in sections() for item in section.keys if item.name == key]
    assert line.meaning and line.default.startswith("[")
