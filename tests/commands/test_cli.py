"""The command line: options and settings in any order, an example in each help."""

import itertools
import shlex

import pytest

from mmr1_ds.commands import cli

OPTIONS = {
    "train": [],
    "eval": [],
    "serve": ["--port", "8001"],
    "launch": ["--time", "90", "--submit"],
    "plan": ["--gpu", "h200", "--assume", "num_prompts=7"],
    "data": ["--show", "1", "--decode"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_and_settings_come_in_any_order(command):
    assert {name for name, known in cli.COMMANDS.items() if known.takes_settings} == set(OPTIONS)
    parts = [["config=demo"], OPTIONS[command], ["data.seed=2", "trainer.logger=[]"]]
    expected = vars(cli.parse([command, *itertools.chain(*parts)]))
    for order in itertools.permutations(parts):
        found = vars(cli.parse([command, *itertools.chain(*order)]))
        assert sorted(found.pop("settings")) == sorted(expected["settings"])
        assert found == {name: value for name, value in expected.items() if name != "settings"}


def test_export_takes_its_folder_last():
    found = cli.parse(["export", "config=a.yaml", "--dtype", "bf16", "data.seed=2", "out"])
    assert (found.source, found.out, found.dtype) == (["config=a.yaml", "data.seed=2"], "out", "bf16")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_has_an_example_that_is_read(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    example = " ".join(capsys.readouterr().out.rpartition("example: ")[2].split())
    assert ended.value.code == 0 and example == f"mmr1-ds {command} {cli.COMMANDS[command].example}"
    assert cli.parse(shlex.split(example)[1:]).command == command


def test_a_setting_with_dashes_is_told_in_one_line(capsys):
    assert cli.main(["plan", "config=demo", "--worker.rollout.n=4", "--gpu=h100"]) == 2
    expected = "mmr1-ds: error: --worker.rollout.n: settings have no dashes; write worker.rollout.n=4\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("words", [[], ["no_such"], ["plan", "--no-such"], ["launch", "config=demo"]])
def test_what_is_not_understood_ends_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("usage: mmr1-ds")
