"""What the report says: figures against figures reckoned another way, and files that a report must get over."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from fixtures.report_fixtures import BATCH, GROUP, NUM_PROMPTS, NUM_STEPS, write_run

from mmr1_ds.commands.report import command, curves, drawing
from mmr1_ds.commands.report.curriculum import calibrate, movers, transitions
from mmr1_ds.commands.report.drawing import compact, duration, percent
from mmr1_ds.commands.report.files import LineReader, Observations, last_generations, read_metrics
from mmr1_ds.commands.report.groups import group_runs
from mmr1_ds.commands.report.resource_figures import stage_seconds
from mmr1_ds.commands.report.runs import load_runs
from mmr1_ds.commands.report.series import band, evenly, smoothed, smoothing_reach
from mmr1_ds.commands.report.summary import final_figures, tiles
from mmr1_ds.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two seeds with variance-aware sampling, two without, one online that is still going."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        write_run(root / f"vas_{seed}", seed=seed)
        write_run(root / f"shuffle_{seed}", strategy="shuffle", seed=seed)
    write_run(root / "online", refresh="online", num_steps=13)
    return root


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Reading


def test_metrics_are_columns_with_gaps_for_nulls(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val/a": 0.5}\n{"step": 1, "x": null, "y": NaN}\n{"step": 3, "x": 2, "flag": true}\n')
    table = read_metrics(LineReader(path))
    assert table.steps.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(table.column("x"), [np.nan, np.nan, 2.0])
    np.testing.assert_array_equal(table.column("val/a"), [0.5, np.nan, np.nan])
    assert table.column("y") is None and table.column("flag") is None and table.column("absent") is None


def test_a_torn_last_line_is_passed_over_and_a_broken_one_before_it_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x": 1}\n{"step": 3, "x"')
    reader = LineReader(path)
    assert [line["step"] for _, line in reader] == [1, 2] and reader.num_unreadable == 0
    path.write_text('{"step": 1}\n{"ste\n[3]\n{"step": 4}\n5}\n')  # the last: written over, not yet cut
    assert [line["step"] for _, line in reader] == [1, 4] and reader.num_unreadable == 2


@pytest.mark.parametrize(
    ("steps", "held"),
    [([1, 2, 3, 2, 4], [0, 3, 4]), ([3, 4, 1], [2]), ([1, 2, 2], [0, 2]), ([1, 2, 3], [0, 1, 2]), ([], [])],
)
def test_steps_that_come_again_take_the_place_of_the_old(tmp_path, steps, held):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "x": {place}}}\n' for place, step in enumerate(steps)))
    table = read_metrics(LineReader(path))
    assert table.steps.tolist() == [steps[place] for place in held]
    assert not steps or table.column("x").tolist() == held


def test_a_resumed_run_reads_as_one_that_never_stopped(tmp_path, runs):
    resumed = Path(shutil.copytree(runs / "vas_1", tmp_path / "resumed"))
    for kind in ("metrics", "observations", "samples", "curriculum"):
        again = [line for line in rows(resumed / f"{kind}.jsonl") if line["step"] > 10]
        with (resumed / f"{kind}.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in again)
    (once,), (twice,) = load_runs([runs / "vas_1"]), load_runs([resumed])
    np.testing.assert_array_equal(once.metrics.column("reward/overall"), twice.metrics.column("reward/overall"))
    for name in ("steps", "prompts", "predicted", "pass_rates", "num_responses"):
        np.testing.assert_array_equal(getattr(once.observations, name), getattr(twice.observations, name))
    assert [look.step for look in once.looks] == [look.step for look in twice.looks] == [0, 5, 10, 15, 20]
    counts = {prompt: len(found) for prompt, found in once.samples.places.items()}
    assert counts == {prompt: len(found) for prompt, found in twice.samples.places.items()}


def test_samples_are_found_again_by_their_offsets_and_generations_are_the_last(runs):
    (run,) = load_runs([runs / "vas_1"])
    expected: dict[int, list[int]] = {}
    for row in rows(runs / "vas_1" / "samples.jsonl"):
        expected.setdefault(row["index"], []).append(row["step"])
    assert {prompt: [step for step, _ in found] for prompt, found in run.samples.places.items()} == expected
    for prompt, found in run.samples.places.items():
        assert all(run.samples.reader.at(offset)["index"] == prompt for _, offset in found)
    found = last_generations(LineReader(runs / "vas_1" / "generations.jsonl"), 3)
    assert [row["step"] for row in found] == [NUM_STEPS] * 3 and "(1)" in found[1]["prompt"]


# Axes, means, bands


def test_axes_are_those_that_were_logged(tmp_path, runs):
    (run,) = load_runs([runs / "vas_1"])
    lines = rows(runs / "vas_1" / "metrics.jsonl")
    assert run.axis("rollouts").tolist() == [line["perf/num_rollouts"] for line in lines]
    assert run.axis("seconds").tolist() == [line["perf/elapsed_seconds"] for line in lines]
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "perf/num_rollouts": 7}\n{"step": 4}\n')
    (short,) = load_runs([tmp_path])
    assert short.axis("rollouts").tolist() == [7, 7] and short.axis("seconds") is None
    assert curves.shared_axes(group_runs([run])) == ["steps", "rollouts", "seconds"]
    assert curves.shared_axes(group_runs([run, short])) == ["steps", "rollouts"]


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_smoothing_is_the_mean_of_the_neighbours_and_keeps_gaps(reach):
    values = np.array([1.0, np.nan, 4.0, 2.0, 9.0, 7.0, np.nan, 1.0])
    means = [np.nanmean(values[max(0, k - reach) : k + reach + 1]) if k not in (1, 6) else np.nan for k in range(8)]
    np.testing.assert_allclose(smoothed(values, reach), means)
    assert [smoothing_reach(count) for count in (1, 11, 12, 60, 3000)] == [0, 0, 1, 3, 40]


def test_even_choices_keep_both_ends():
    assert evenly(3, 6) == [0, 1, 2] and evenly(0, 6) == []
    assert evenly(401, 7)[0] == 0 and evenly(401, 7)[-1] == 400 and len(set(evenly(401, 7))) == 7


def test_band_of_equal_axes_is_mean_lowest_and_highest_seed(runs):
    (group,) = group_runs(load_runs([runs / "vas_1", runs / "vas_2"]))
    lines = [rows(run.run_dir / "metrics.jsonl")[::5] for run in group.runs]
    logged = np.array([[line["val/accuracy_reward"] for line in of_run] for of_run in lines])
    grid, mean, low, high = band([curves.points(run, "val/accuracy_reward", "steps") for run in group.runs])
    assert grid.tolist() == [0, 5, 10, 15, 20]
    np.testing.assert_allclose([mean, low, high], [logged.mean(0), logged.min(0), logged.max(0)])


def test_band_of_different_axes_is_over_what_all_seeds_have():
    first, second = (np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([4.0, 20.0]), np.array([2.0, 2.0]))
    grid, mean, low, high = band([first, second])
    assert grid[0] == 4 and grid[-1] == 10
    np.testing.assert_allclose(mean, (grid + 2) / 2)
    np.testing.assert_allclose(low, np.minimum(grid, 2))
    np.testing.assert_allclose(high, np.maximum(grid, 2))
    assert band([first, (np.array([11.0, 12.0]), np.array([0.0, 0.0]))]) is None


def test_pass_at_k_is_drawn_where_validations_have_it(tmp_path, runs):
    assert "Pass at k" not in {card.title for card in drawn(runs / "vas_1")}
    lines = [{"step": step, "val/pass_at_1": 0.2, "val/pass_at_4": 0.5} for step in (0, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (card,) = drawn(tmp_path)
    assert card.title == "Pass at k" and "k = 4" in card.pictures["steps"].svg


def drawn(run_dir):
    with drawing.drawing():
        return curves.draw_curves(curves.LEARNING, group_runs(load_runs([run_dir])), png=False)


# Groups


def test_runs_that_differ_in_seeds_and_names_are_one_group(runs):
    found = group_runs(load_runs([runs / name for name in ("vas_1", "shuffle_1", "vas_2", "online", "shuffle_2")]))
    assert [[run.run_dir.name for run in group.runs] for group in found] == [
        ["vas_1", "vas_2"],
        ["shuffle_1", "shuffle_2"],
        ["online"],
    ]
    assert [group.label for group in found] == [
        "sampling_strategy=curriculum, curriculum_refresh=full",
        "sampling_strategy=shuffle",  # what it does not use is not named
        "sampling_strategy=curriculum, curriculum_refresh=online",
    ]
    assert found[1].values["data.curriculum_refresh"] == "not used"


def test_labels_tell_groups_apart_whatever_the_configs_say(tmp_path, runs):
    for number, (actor, critic) in enumerate([(1e-6, 1e-5), (2e-6, 1e-5), (2e-6, 2e-5)]):
        run = Path(shutil.copytree(runs / "vas_1", tmp_path / str(number)))
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["worker"]["actor"]["optim"] = {"lr": actor}
        config["worker"]["critic"] = {"optim": {"lr": critic}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    without = Path(shutil.copytree(runs / "vas_1", tmp_path / "without_config"))
    (without / "config.yaml").unlink()
    found = group_runs(load_runs([*(tmp_path / str(number) for number in range(3)), without]))
    assert len(found) == 4 and len({group.label for group in found}) == 4
    pair = group_runs(load_runs([tmp_path / "0", tmp_path / "1"]))
    assert [group.label for group in pair] == ["lr=1e-06", "lr=2e-06"]


def test_unknown_folders_and_runs_named_twice_are_users_mistakes(tmp_path, runs):
    for given, words in (
        ([tmp_path / "absent"], "is no folder"),
        ([tmp_path], "no metrics.jsonl"),
        ([runs / "vas_1", runs / "vas_1" / ".." / "vas_1"], "named twice"),
    ):
        with pytest.raises(UserError, match=words):
            load_runs(given)
    (tmp_path / "metrics.jsonl").write_text('{"ste')
    with pytest.raises(UserError, match="no step"):
        load_runs([tmp_path])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for output in ("report.pdf", str(tmp_path)):
        with pytest.raises(UserError, match="--output"):
            command.main(parser.parse_args([str(runs / "vas_1"), "--output", output]))


# The curriculum


def test_calibration_is_that_of_all_groups_with_a_prediction(runs):
    found_runs = load_runs([runs / "online", runs / "vas_1"])
    found = calibrate([run.observations for run in found_runs])
    bins: dict[int, list[tuple[float, float, int]]] = {}
    for run in found_runs:
        for row in rows(run.run_dir / "observations.jsonl"):
            for before, after, count in zip(row["predicted"], row["pass_rates"], row["num_responses"], strict=True):
                if before is not None and after is not None:
                    bins.setdefault(min(9, int(before * 10)), []).append((before, after, count))
    assert found.bins.tolist() == sorted(bins)
    for place, number in enumerate(found.bins):
        groups = bins[number]
        responses = sum(count for *_, count in groups)
        assert found.num_groups[place] == len(groups)
        assert found.predicted[place] == pytest.approx(sum(p * n for p, _, n in groups) / responses)
        assert found.observed[place] == pytest.approx(sum(r * n for _, r, n in groups) / responses)
        chance = sum(n * p * (1 - p) for p, _, n in groups) ** 0.5 / responses
        assert found.half_band[place] == pytest.approx(1.96 * chance)


def test_calibration_of_one_is_in_the_last_bin_and_nothing_is_none():
    predicted, rates = np.array([1.0, np.nan, 0.1]), np.array([0.5, 0.5, np.nan])
    found = calibrate([Observations(np.ones(3), np.arange(3), predicted, rates, np.array([3, 8, 8]))])
    assert found.bins.tolist() == [9] and found.num_groups.tolist() == [1]
    assert found.mean_distance == 0.5 and found.half_band.tolist() == [0.0]
    assert calibrate([]) is None


def test_movers_are_ranked_by_their_change():
    prompts, steps = np.array([5, 7, 9, 5, 7, 9, 7, 8, 3, 3]), np.array([1, 1, 1, 2, 2, 2, 3, 3, 1, 3])
    rates = np.array([0.9, 0.0, np.nan, 0.2, 1.0, 0.5, 0.5, 1.0, 0.0, 1.0])
    observed = Observations(steps, prompts, rates, rates, np.full(10, 4))
    found = movers(observed, {5, 7, 8, 9}, 3)  # a prompt that got worse has moved too
    assert [(mover.prompt, round(mover.change, 6)) for mover in found] == [(5, -0.7), (7, 0.5)]
    assert found[1].pass_rates.tolist() == [0.0, 1.0, 0.5] and found[1].steps.tolist() == [1, 2, 3]
    assert [mover.prompt for mover in movers(observed, {3, 5, 7}, 2)] == [3, 5]
    assert movers(observed, set(), 8) == []


def test_transitions_are_of_consecutive_refreshes(runs):
    (run,) = load_runs([runs / "vas_1"])
    lines = rows(runs / "vas_1" / "curriculum.jsonl")
    for name in ("weight", "pass_rate"):
        found = transitions(run.looks, name)
        assert [(before, after) for before, after, _ in found] == [(0, 5), (5, 10), (10, 15), (15, 20)]
        for (_, _, counts), line, former in zip(found, lines[1:], lines[:-1], strict=True):
            assert counts.tolist() == line[f"{name}_transitions"]
            assert counts.sum(axis=1).tolist() == former[f"{name}_counts"]


# Time, tables, tiles


def test_stages_and_the_rest_add_up_to_the_step(runs):
    (run,) = load_runs([runs / "vas_1"])
    seconds = stage_seconds(run)
    inside = sum(values for name, values in seconds.items() if name not in ("testing", "refresh", "save_checkpoint"))
    np.testing.assert_allclose(inside, np.nan_to_num(run.metrics.column("timing_s/step")))
    np.testing.assert_allclose(seconds["other"][1:], 0.2)
    assert seconds["refresh"].sum() == 5 * 48


def test_table_has_runs_and_means(runs):
    names = ["vas_1", "shuffle_1", "vas_2", "shuffle_2"]
    found = final_figures(group_runs(load_runs([runs / name for name in names])))
    assert [(row.place, row.is_mean, row.cells["Run"]) for row in found] == [
        (0, True, "sampling_strategy=curriculum"),
        (0, False, "vas_1"),
        (0, False, "vas_2"),
        (1, True, "sampling_strategy=shuffle"),
        (1, False, "shuffle_1"),
        (1, False, "shuffle_2"),
    ]
    last = [rows(runs / name / "metrics.jsonl")[-1]["val/accuracy_reward"] for name in ("vas_1", "vas_2")]
    assert [row.cells["Val. accuracy"] for row in found[:3]] == [f"{x:.3f}" for x in (np.mean(last), *last)]
    extra = 5 * NUM_PROMPTS / (NUM_STEPS * BATCH)
    assert found[1].cells["Extra"] == f"{extra:.0%}" and found[4].cells["Extra"] == "0%"


def test_a_run_that_is_not_done_says_so(runs):
    first = {tile.label: tile for tile in tiles(load_runs([runs / "online"])[0])}
    assert (first["Steps"].value, first["Steps"].detail) == ("13", "of 20; still going, or stopped")
    done = {tile.label: tile for tile in tiles(load_runs([runs / "vas_1"])[0])}
    assert (done["Steps"].value, done["Steps"].detail) == ("20", "of 20")
    assert done["Rollouts"].value == f"{(NUM_STEPS * BATCH + 5 * NUM_PROMPTS) * GROUP:,}"


def test_numbers_fractions_and_durations():
    ticks = {0: "0", 0.25: "0.25", -0.5: "-0.5", 1500: "1,500", 12_500: "12.5k", 3e6: "3M", 2e-5: "2e-5"}
    assert [compact(value) for value in ticks] == [*ticks.values()]
    assert [percent(x) for x in (0, 0.125, 2.1333333)] == ["0%", "12.5%", "213.3%"]
    shown = ["0.5 s", "57.4 s", "15.9 min", "9.2 h", "4.6 days"]
    assert [duration(x) for x in (0.5, 57.4, 954, 33_000, 400_000)] == shown
