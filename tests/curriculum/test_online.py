"""The online refresh through the coordinator: what it draws, learns, saves; and the edges of both refreshes."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures.coordinators import B, N, P, answer, make, refresh, share, train
from fixtures.rank_threads import SingleProcess, on_ranks

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.estimator import probe_budget
from mmr1_ds.curriculum.online import OnlineTable
from mmr1_ds.curriculum.prompt_ids import encode_prompt_ids
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.errors import UserError

ONLINE = {"curriculum_refresh": "online"}
POSTERIOR = ONLINE | {"curriculum_draw": "posterior", "curriculum_mixture_ratio": 0.8}
CANDIDATES = ONLINE | {"curriculum_draw": "candidates", "curriculum_candidates": 2}


def outcome(index, pass_rate, num_responses=N, self_bleu=0.2, is_probe=False):
    return PromptStatistics(
        int(index),
        num_responses,
        pass_rate,
        pass_rate,
        pass_rate * (1 - pass_rate),
        self_bleu,
        0.5,
        is_probe=is_probe,
    )


def table(num_prompts=P, categories=None, **settings):
    data = DataConfig(rollout_batch_size=B, **settings)
    return OnlineTable([f"p{i}" for i in range(num_prompts)], "abc", categories or [""] * num_prompts, data, N)


def saved(table):
    return encode_prompt_ids(table.prompt_ids) | table.columns()


@pytest.mark.parametrize("settings", [ONLINE, POSTERIOR, CANDIDATES], ids=["proportional", "posterior", "candidates"])
def test_a_resume_on_as_many_ranks_is_exact_to_the_bit(tmp_path, settings):
    whole, first, second = (make(**settings) for _ in range(3))
    train(whole, range(1, 25))
    train(first, range(1, 10))
    first.save(tmp_path)
    second.load(tmp_path)
    train(second, range(10, 25))
    for name, values in whole.table.columns().items():
        np.testing.assert_array_equal(second.table.columns()[name], values, err_msg=name)
    assert second.table.numbers() == whole.table.numbers()
    assert second.metrics() == whole.metrics()


def test_a_saved_table_finds_its_prompts_in_another_order():
    first = table(5)
    first.finish_step(1, [outcome(i, i / 4) for i in range(5)], np.arange(5))
    again = OnlineTable(["p3", "p0", "p4", "p1", "p2"], "abc", [""] * 5, DataConfig(rollout_batch_size=B), N)
    again.load(saved(first), first.numbers(), "abc")
    np.testing.assert_array_equal(again.sampling_weights, first.sampling_weights[[3, 0, 4, 1, 2]])


def test_no_refresh_is_ever_due_and_probes_keep_to_their_share():
    coordinator = make(curriculum_probe_fraction=0.2, **ONLINE)
    for step in range(1, 41):
        assert not coordinator.refresh_due(step)
        batch = coordinator.next_batch(step)
        probes = coordinator.next_probes(step)[0]
        assert len(set(probes.tolist())) == len(probes) and not set(probes) & set(batch)
        of_probes = [answer(i, step, coordinator.num_probe_responses, is_probe=True) for i in probes]
        coordinator.observe(step, [answer(i, step) for i in batch] + of_probes)
        coordinator.finish_step(step, batch)
        spent = coordinator.metrics()["curriculum/extra_rollout_fraction"] * step * B * N
        allowed = probe_budget(step, 40, P, B, N, 0.2)
        assert allowed - coordinator.num_probe_responses < spent <= allowed
    assert probe_budget(40, 40, P, B, N, 0.2) == pytest.approx(0.2 * 40 * B * N)


def test_no_probes_where_none_are_wanted():
    for settings in (ONLINE | {"curriculum_probe_fraction": 0.0}, {}, {"sampling_strategy": "shuffle"} | ONLINE):
        coordinator = make(**settings)
        coordinator.next_batch(1)
        assert len(coordinator.next_probes(1)[0]) == 0


def test_probes_go_to_the_prompts_not_seen_for_longest():
    coordinator = make(curriculum_probe_fraction=0.6, curriculum_mixture_ratio=0.0, **ONLINE)
    train(coordinator, [1])
    seen = coordinator.table.columns()["last_seen"]
    never = np.flatnonzero(seen == -1)
    batch = coordinator.next_batch(2)
    probes = coordinator.next_probes(2)[0]
    left = set(never) - set(batch)
    assert len(probes) > 0 and (left <= set(probes) or set(probes) <= left)  # those never seen come first


def test_what_varies_is_drawn_more():
    ours = table()
    for step in range(1, 6):
        ours.finish_step(step, [outcome(i, 0.5 if i < 5 else i % 2) for i in range(P)], np.arange(P))
    weights = ours.sampling_weights
    assert weights[:5].min() > 3 * weights[5:].max()
    assert 0 < weights.min() and weights.max() <= 1 and not weights.flags.writeable


def test_a_category_teaches_about_prompts_never_seen():
    ours = table(40, ["dead" if i % 2 else "alive" for i in range(40)])
    ours.finish_step(1, [outcome(i, 0.5 if i % 2 == 0 else 0.0) for i in range(20)], np.arange(20))
    weights = ours.sampling_weights
    assert weights[20::2].min() > 1.5 * weights[21::2].max()


def test_diversity_counts_as_asked_for():
    only_bleu = table(curriculum_metrics=["self-bleu"], curriculum_metric_weights=[2.0])
    assert set(only_bleu.sampling_weights) == {1.0}
    only_bleu.finish_step(1, [outcome(i, 0.5, self_bleu=i / P) for i in range(1, P)], np.arange(1, P))
    weights = only_bleu.sampling_weights
    score = 2.0 * (1 - np.arange(1, P) / P)
    expected = 0.01 + 0.99 * (np.append(score.mean(), score) - score.min()) / (score.max() - score.min())
    np.testing.assert_allclose(weights, expected, atol=1e-6)  # the first was never seen: the mean
    only_bleu.finish_step(2, [outcome(3, 0.5, 4, self_bleu=0.0, is_probe=True)], np.arange(0))
    np.testing.assert_array_equal(only_bleu.sampling_weights, weights)  # a few responses are no measure of diversity


def test_what_all_have_in_common_does_not_flatten_the_weights():
    mixed = table(curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[0.8, 0.2])
    for step in range(1, 9):
        mixed.finish_step(step, [outcome(i, 0.5 if i < 12 else 0.0, self_bleu=0.3) for i in range(P)], np.arange(P))
    weights = mixed.sampling_weights
    assert weights[:12].sum() / weights.sum() > 0.95


def test_two_groups_of_a_prompt_count_the_same_in_any_order():
    groups = [outcome(3, 0.1, self_bleu=0.1), outcome(3, 0.7, self_bleu=0.7), outcome(5, 0.5)]
    tables = [table(curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[1, 1]) for _ in "ab"]
    for ours, observed in zip(tables, (groups, groups[::-1]), strict=True):
        ours.finish_step(1, observed, np.array([3, 3, 5]))
    np.testing.assert_array_equal(tables[0].sampling_weights, tables[1].sampling_weights)
    assert tables[0].columns()["diversity"][3] == pytest.approx(0.6)


def test_a_floor_of_one_is_uniform_for_mixed_scores():
    mixed = table(
        curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[1, 1], curriculum_weight_floor=1.0
    )
    mixed.finish_step(1, [outcome(i, i / P, self_bleu=i / P) for i in range(P)], np.arange(P))
    assert set(mixed.sampling_weights) == {1.0}


def test_log_loss_is_of_the_prediction_made_before_the_step():
    coordinator = make(curriculum_probe_fraction=0.0, **ONLINE)
    train(coordinator, [1, 2, 3])
    predicted = coordinator.table.predicted_pass_rates(np.arange(P)).copy()
    ((batch, metrics),) = train(coordinator, [4])
    observed = [answer(i, 4) for i in batch]
    rates, expected = np.array([o.pass_rate for o in observed]), predicted[batch]
    losses = -(rates * np.log(expected) + (1 - rates) * np.log1p(-expected))
    assert metrics["curriculum/log_loss"] == pytest.approx(losses.mean())


def test_other_categories_are_refused(tmp_path):
    first = table(6, list("aabbcc"))
    for categories in (list("aabbdd"), [""] * 6):
        with pytest.raises(UserError, match="gives other categories than the checkpoint's curriculum has; keep it"):
            table(6, categories).load(saved(first), first.numbers(), "abc")


def test_other_metric_weights_forget_the_diversity():
    metrics = {"curriculum_metrics": ["learnability", "self-bleu"]}
    first = table(curriculum_metric_weights=[1.0, 0.1], **metrics)
    first.finish_step(1, [outcome(i, 0.5) for i in range(P)], np.arange(P))
    for weight, kept in ((0.1, True), (5.0, False)):
        again = table(curriculum_metric_weights=[1.0, weight], **metrics)
        again.load(saved(first), first.numbers(), "abc")
        assert np.isnan(again.columns()["diversity"]).all() == (not kept)


def test_a_longer_run_does_not_spend_its_savings_at_once(tmp_path):
    first = make(**ONLINE)
    train(first, range(1, 21))
    first.save(tmp_path)
    longer = make(**ONLINE)
    longer.num_steps = 1000
    longer.load(tmp_path)
    longer.next_batch(21)
    assert len(longer.next_probes(21)[0]) * longer.num_probe_responses <= 0.175 * B * N + longer.num_probe_responses


def test_outcome_and_diversity_add_up():
    mixed = table(curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[1.0, 0.5])
    mixed.finish_step(1, [outcome(i, 0.5, self_bleu=0.0 if i < 3 else 1.0) for i in range(P)], np.arange(P))
    weights = mixed.sampling_weights
    # Three prompts at the top, 20 at the bottom, whatever the common part.
    np.testing.assert_allclose(weights[:3], 1.0)
    np.testing.assert_allclose(weights[3:], 0.01, atol=1e-6)


@pytest.mark.parametrize("settings", [ONLINE, {}])
@pytest.mark.parametrize("rate", [0.0, 1.0, 0.5])
def test_all_equal_scores_are_uniform(settings, rate):
    coordinator = make(**settings)
    for step in (1, 2):
        if coordinator.refresh_due(step):
            for chunk in coordinator.refresh_chunks():
                coordinator.observe_refresh([outcome(i, rate) for i in chunk])
            coordinator.finish_refresh(step)
        batch = coordinator.next_batch(step)
        coordinator.observe(step, [outcome(i, rate) for i in range(P)])
        coordinator.finish_step(step, batch)
    weights = coordinator.table.sampling_weights
    assert weights.min() > 0.5 * weights.max()
    if settings == {}:
        assert set(weights) == {1.0}


@pytest.mark.parametrize("settings", [ONLINE, {}, POSTERIOR, CANDIDATES, {"curriculum_draw": "candidates"}])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("num_prompts", [1, 4, P])
def test_any_mixture_and_any_size(settings, ratio, num_prompts):
    coordinator = make(num_prompts=num_prompts, **(settings | {"curriculum_mixture_ratio": ratio}))
    history = train(coordinator, range(1, 8))
    for batch, metrics in history:
        assert len(batch) == B and set(batch) <= set(range(num_prompts))
        assert all(np.isfinite(value) for value in metrics.values())
    if ratio == 0.0 and num_prompts == P:
        assert len({index for batch, _ in history[:3] for index in batch}) == 3 * B


@pytest.mark.parametrize("settings", [ONLINE, {}])
def test_unknown_accuracies(settings):
    coordinator = make(**settings)
    nan = float("nan")
    if coordinator.refresh_due(1):
        for chunk in coordinator.refresh_chunks():
            coordinator.observe_refresh([outcome(i, nan) for i in chunk])
        coordinator.finish_refresh(1)
    for step in range(1, 4):
        batch = coordinator.next_batch(step)
        wanted = np.concatenate([batch, coordinator.next_probes(step)[0]])
        coordinator.observe(step, [outcome(i, nan) for i in wanted])
        coordinator.finish_step(step, batch)
    weights = coordinator.table.sampling_weights
    assert np.isfinite(weights).all() and weights.min() > 0
    metrics = coordinator.metrics()
    assert "curriculum/log_loss" not in metrics and all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("settings", [ONLINE, {}])
def test_ids_that_repeat_resume_in_the_same_order(tmp_path, settings):
    def twins():
        data = DataConfig(rollout_batch_size=B, sampling_strategy="curriculum", curriculum_update_freq=3, **settings)
        return Coordinator(data, ["same"] * P, [""] * P, "abc", N, 40, SingleProcess())

    unbroken = train(twins(), range(1, 9))
    first, second = twins(), twins()
    train(first, range(1, 5))
    first.save(tmp_path)
    second.load(tmp_path)
    assert train(second, range(5, 9)) == unbroken[4:]


def test_a_checkpoint_of_the_other_refresh_is_refused(tmp_path):
    make().save(tmp_path)
    with pytest.raises(UserError, match=r"a refresh of kind full, the run asks for online: keep data.curriculum_ref"):
        make(**ONLINE).load(tmp_path)


def test_too_many_categories_are_named():
    with pytest.raises(UserError, match=r"data.category_key=None has more than 65535 values"):
        table(70_000, [str(i) for i in range(70_000)])


def test_the_table_takes_at_most_32_bytes_a_prompt():
    ours = table(1000)
    columns = [array for array in ours.columns().values() if len(array) == 1000]
    category, weights = 2, ours.sampling_weights.itemsize
    assert sum(array.itemsize for array in columns) + category + weights <= 32
    full = make(num_prompts=1000)
    refresh(full, 1)
    assert sum(array.itemsize for array in full.table.columns().values()) + full.table.sampling_weights.itemsize <= 32


def test_probes_are_shared_by_the_ranks():
    def probes(control):
        coordinator = make(control, **ONLINE)
        coordinator.next_batch(1)
        return share(coordinator.next_probes(1)[0], control).tolist()

    assert sorted(sum(on_ranks(3, probes), [])) == sorted(on_ranks(1, probes)[0])  # noqa: RUF017


def test_unscored_responses_say_nothing():
    whole, part = table(), table()
    whole.finish_step(1, [outcome(2, 0.4, num_responses=5)], np.array([2]))
    unscored = dataclasses.replace(outcome(2, 0.4, num_responses=8), num_unscored=3)
    part.finish_step(1, [unscored], np.array([2]))
    np.testing.assert_array_equal(part.predicted_pass_rates(np.arange(P)), whole.predicted_pass_rates(np.arange(P)))
    full = table()
    full.finish_step(1, [outcome(2, 0.4, num_responses=8)], np.array([2]))
    assert full.predicted_pass_rates(np.array([2])) != whole.predicted_pass_rates(np.array([2]))


def test_a_resumed_run_leaves_out_the_prompts_of_steps_begun_ahead(tmp_path):
    """Step 2 was drawn when step 1 was saved: no probe of step 3 may be one of its prompts."""
    first = make(curriculum_probe_fraction=1.0, **ONLINE)
    batch, ahead = first.next_batch(1), first.next_batch(2)
    first.observe(1, [answer(i, 1) for i in batch])
    first.finish_step(1, batch)
    first.save(tmp_path)
    second = make(curriculum_probe_fraction=1.0, **ONLINE)
    second.load(tmp_path)
    taken = {*ahead.tolist(), *first.next_batch(3).tolist()}
    assert second.next_batch(3).tolist() and len(taken) < P
    probes = second.next_probes(3)[0].tolist()
    assert probes == first.next_probes(3)[0].tolist() != [] and not taken & set(probes)


def test_posterior_draws_what_beliefs_allow_for_and_no_prompt_underway():
    coordinator = make(**(POSTERIOR | {"curriculum_mixture_ratio": 1.0}))
    for step in range(1, 13):  # the first eight prompts are at 1/2, the others dead; each is seen
        coordinator.next_batch(step)
        observed = [outcome(i, 0.5 if i < 8 else 0.0) for i in range(P)]
        coordinator.observe(step, observed)
        coordinator.finish_step(step, np.arange(P))
    first = coordinator.next_batch(13).tolist()
    assert len(set(first)) == B and set(first) <= set(range(8))
    again, ahead = coordinator.next_batch(13).tolist(), coordinator.next_batch(14).tolist()
    assert set(first) | set(again) >= set(range(8)) and len({*first, *again, *ahead}) == 3 * B


def test_sampled_scores_follow_the_belief():
    """u at m + noise sqrt(V) / 2, and diversity as measured."""
    whole = table(curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[2.0, 0.5])
    whole.finish_step(1, [outcome(2, 0.75), outcome(5, 0.25, self_bleu=0.6)], np.array([2, 5]))
    noise = np.linspace(-2, 2, P, dtype=np.float32)
    mean, variance = whole._filter.belief(slice(None))
    rates = 1 / (1 + np.exp(-(mean + noise * np.sqrt(variance) / 2)))
    diversity = np.full(P, 0.5 * (0.8 + 0.4) / 2)
    diversity[[2, 5]] = 0.5 * 0.8, 0.5 * 0.4
    assert whole.sampled_scores(noise) == pytest.approx(2 * rates * (1 - rates) + diversity, abs=1e-5)
    assert whole.unseen_steps()[[2, 5]].tolist() == [1, 1] and whole.unseen_steps()[3] > 10**9


def test_another_rule_than_the_checkpoints_is_told(tmp_path, caplog):
    first = make(**ONLINE)
    train(first, range(1, 3))
    first.save(tmp_path)
    state = json.loads((tmp_path / "curriculum.json").read_text())
    del state["settings"]["data.curriculum_draw"]  # as earlier versions left it
    (tmp_path / "curriculum.json").write_text(json.dumps(state))
    make(**ONLINE).load(tmp_path)
    assert not caplog.records
    make(**POSTERIOR).load(tmp_path)
    assert "data.curriculum_draw proportional -> posterior" in caplog.text
