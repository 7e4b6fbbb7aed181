import json
from unittest import mock

import numpy as np
import pytest
from fixtures.coordinators import P, answer, make, refresh, share, train
from fixtures.launching import run_ranks
from fixtures.rank_threads import on_ranks
from safetensors.numpy import load_file, save_file

from mmr1_ds.curriculum import storage
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.errors import UserError

ONLINE = {"curriculum_refresh": "online"}
POSTERIOR = ONLINE | {"curriculum_draw": "posterior", "curriculum_mixture_ratio": 0.8}
MIXED = ONLINE | {"curriculum_metrics": ["learnability", "self-bleu"], "curriculum_metric_weights": [0.7, 0.3]}


@pytest.mark.parametrize("settings", [{}, ONLINE, POSTERIOR], ids=["full", "online", "posterior"])
def test_any_number_of_ranks_draws_and_learns_the_same(settings):
    alone = on_ranks(1, lambda control: train(make(control, **settings), range(1, 12)))[0]
    assert len({tuple(batch) for batch, _ in alone}) == 11
    for size in (2, 3):
        ranks = on_ranks(size, lambda control: train(make(control, **settings), range(1, 12)))
        for by_rank in zip(alone, *ranks, strict=True):
            assert all(batch == by_rank[0][0] for batch, _ in by_rank)
            # Sums run over groups in rank order, so the last bits of beliefs may differ.
            assert by_rank[1][1] == pytest.approx(by_rank[0][1], rel=1e-9, abs=1e-12)  # metrics: rank 0 only
            assert all(metrics == {} for _, metrics in by_rank[2:])


def test_refresh_chunks_cover_the_data_set_in_order():
    coordinator = make()
    chunks = list(coordinator.refresh_chunks())
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 2]
    assert np.concatenate(chunks).tolist() == list(range(P))


@pytest.mark.parametrize(("frequency", "expected"), [(3, [1, 4, 7]), (1, list(range(1, 10))), (0, [1, 4, 7])])
def test_when_a_refresh_is_due(frequency, expected):
    coordinator = make(curriculum_update_freq=frequency)  # an epoch is 3 steps: 23 // 6
    due = []
    for step in range(1, 10):
        if coordinator.refresh_due(step):
            due.append(step)
            refresh(coordinator, step)
        assert not coordinator.refresh_due(step)
    assert due == expected


@pytest.mark.parametrize("strategy", ["shuffle", "sequential"])
def test_no_refresh_without_curriculum(strategy):
    coordinator = make(sampling_strategy=strategy)
    history = train(coordinator, range(1, 9))
    batches = [index for batch, _ in history for index in batch]
    assert sorted(batches[:P]) == list(range(P))
    assert (batches[:P] == list(range(P))) == (strategy == "sequential")
    assert history[-1][1]["curriculum/extra_rollout_fraction"] == 0.0


def test_a_refresh_sets_the_weights():
    coordinator = make(
        curriculum_metrics=["learnability", "self-bleu"], curriculum_metric_weights=[0.7, 0.3], curriculum_momentum=0.6
    )
    normalised = []
    for step in (1, 4):
        refresh(coordinator, step)
        answers = [answer(i, step) for i in range(P)]
        scores = np.array([0.7 * a.pass_rate * (1 - a.pass_rate) + 0.3 * (1 - a.self_bleu) for a in answers])
        normalised.append((scores - scores.min()) / (scores.max() - scores.min()))
    expected = 0.01 + 0.99 * (0.6 * normalised[0] + 0.4 * normalised[1])
    np.testing.assert_allclose(coordinator.table.sampling_weights, expected, atol=1e-6)
    np.testing.assert_allclose(coordinator.table.column("pass_rate"), [a.pass_rate for a in answers], atol=1e-7)


def test_metrics_of_a_step():
    coordinator = make(rollout_batch_size=4, curriculum_mixture_ratio=0.5)
    refresh(coordinator, 1)
    batch = coordinator.next_batch(1)
    observed = [answer(index, 2) for index in batch]
    observed[0] = answer(batch[0], -6 * batch[0] % 9)  # none right
    coordinator.observe(1, observed)
    coordinator.finish_step(1, batch)
    metrics = coordinator.metrics()
    weights = coordinator.table.sampling_weights
    assert metrics["curriculum/mean_weight"] == pytest.approx(weights.mean())
    assert metrics["curriculum/std_weight"] == pytest.approx(weights.std())
    assert metrics["curriculum/min_weight"] == pytest.approx(0.01)
    assert metrics["curriculum/max_weight"] == pytest.approx(1.0)
    assert metrics["curriculum/consumed_batches"] == 1
    assert metrics["curriculum/random_position"] == 2
    assert metrics["curriculum/extra_rollout_fraction"] == pytest.approx(P * 8 / (4 * 8))
    effective = [0 < a.pass_rate < 1 for a in observed]
    assert any(effective) and not all(effective)
    assert metrics["curriculum/effective_group_fraction"] == pytest.approx(np.mean(effective))
    losses = []
    for seen in observed:
        predicted = (answer(seen.index, 1).pass_rate * 8 + 0.5) / 9
        right = round(seen.pass_rate * 8)
        losses += [-np.log(predicted)] * right + [-np.log(1 - predicted)] * (8 - right)
    assert metrics["curriculum/log_loss"] == pytest.approx(np.mean(losses))


def test_log_loss_is_absent_before_the_first_refresh():
    coordinator = make()
    batch = coordinator.next_batch(1)
    coordinator.observe(1, [answer(i, 1) for i in batch])
    coordinator.finish_step(1, batch)
    assert "curriculum/log_loss" not in coordinator.metrics()
    assert all(np.isfinite(value) for value in coordinator.metrics().values())


def test_equal_rewards_are_not_effective_whatever_the_accuracy():
    coordinator = make(rollout_batch_size=2)
    first, second = batch = coordinator.next_batch(1)
    coordinator.observe(
        1, [PromptStatistics(first, 8, 0.5, 0.3, 0.0, 0.1, 0.5), PromptStatistics(second, 8, 1.0, 0.9, 1e-30, 0.1, 0.5)]
    )
    coordinator.finish_step(1, batch)
    assert coordinator.metrics()["curriculum/effective_group_fraction"] == 0.5


@pytest.mark.parametrize("settings", [{}, MIXED, MIXED | POSTERIOR], ids=["full", "online", "posterior"])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_resume_draws_what_an_unbroken_run_draws(tmp_path, saved_on, loaded_on, settings):
    unbroken = train(make(**settings), range(1, 21))

    def first_half(control):
        coordinator = make(control, **settings)
        train(coordinator, range(1, 9))
        coordinator.save(tmp_path)

    def second_half(control):
        coordinator = make(control, **settings)
        coordinator.load(tmp_path)
        return train(coordinator, range(9, 21))

    on_ranks(saved_on, first_half)
    names = ["curriculum.json", "curriculum.safetensors", "prompt_ids.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    resumed = on_ranks(loaded_on, second_half)
    for of_rank in resumed:
        assert [batch for batch, _ in of_rank] == [batch for batch, _ in unbroken[8:]]
    if not settings or saved_on == loaded_on == 1:
        for (_, again), (_, metrics) in zip(resumed[0], unbroken[8:], strict=True):
            assert again == pytest.approx(metrics, abs=1e-12)


@pytest.mark.parametrize("links", [True, False])
def test_prompt_ids_are_written_once_a_run(tmp_path, monkeypatch, links):
    encoded = mock.Mock(wraps=storage.encode_prompt_ids)
    monkeypatch.setattr(storage, "encode_prompt_ids", encoded)
    if not links:
        monkeypatch.setattr(storage.os, "link", mock.Mock(side_effect=OSError("not on this file system")))
    coordinator, kept = make(), tmp_path / "prompt_ids.safetensors"
    kept.write_bytes(b"of another run")
    for step in (1, 2, 3):
        (tmp_path / str(step)).mkdir()
        train(coordinator, [step])
        coordinator.save(tmp_path / str(step), kept)
    assert encoded.call_count == 1
    assert kept.stat().st_nlink == (4 if links else 1)
    kept.unlink()
    for path in (tmp_path / "1").iterdir():  # an old checkpoint goes, the others stay whole
        path.unlink()
    fresh = make()
    fresh.load(tmp_path / "3")
    assert train(fresh, [4, 5]) == train(coordinator, [4, 5])


def test_a_checkpoint_with_the_ids_among_its_arrays_is_read(tmp_path):
    coordinator = make(**MIXED)
    train(coordinator, range(1, 5))
    coordinator.save(tmp_path)
    arrays, ids = tmp_path / "curriculum.safetensors", tmp_path / "prompt_ids.safetensors"
    save_file(load_file(arrays) | {f"table.{name}": array for name, array in load_file(ids).items()}, arrays)
    ids.unlink()
    numbers = json.loads((tmp_path / "curriculum.json").read_text())
    (tmp_path / "curriculum.json").write_text(json.dumps(numbers | {"format": 2}))
    fresh = make(**MIXED)
    fresh.load(tmp_path)
    assert train(fresh, range(5, 8)) == train(coordinator, range(5, 8))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("chunk_size", [7, 4])
def test_an_interrupted_refresh_goes_on(tmp_path, size, chunk_size):
    whole = make()
    train(whole, range(1, 4))
    refresh(whole, 4)

    def begin(control):
        coordinator = make(control)
        train(coordinator, range(1, 4))
        chunks = coordinator.refresh_chunks()
        for _ in range(2):
            coordinator.observe_refresh([answer(i, 4) for i in share(next(chunks), control)])
        coordinator.save(tmp_path)

    def finish(control):
        coordinator = make(control, curriculum_rollout_batch_size=chunk_size)
        coordinator.load(tmp_path)
        assert coordinator.refresh_due(4)
        left = list(coordinator.refresh_chunks())
        assert np.concatenate(left).tolist() == list(range(14, P))
        refresh(coordinator, 4)
        assert not coordinator.refresh_due(4)
        return coordinator

    on_ranks(1, begin)
    resumed = on_ranks(size, finish)[0]
    np.testing.assert_array_equal(resumed.table.sampling_weights, whole.table.sampling_weights)
    fraction = "curriculum/extra_rollout_fraction"
    assert resumed.metrics()[fraction] == pytest.approx(whole.metrics()[fraction])


@pytest.mark.parametrize("size", [1, 3])
def test_a_refresh_goes_on_from_its_own_file(tmp_path, size):
    path = tmp_path / "checkpoints" / "refresh.safetensors"
    whole = make()
    refresh(whole, 1)

    def begin(control):
        coordinator = make(control)
        assert coordinator.resume_refresh(path, "the key") == 0  # no file yet
        chunks = coordinator.refresh_chunks()
        for _ in range(2):
            coordinator.observe_refresh([answer(i, 1) for i in share(next(chunks), control)])
            coordinator.save_refresh(path, "the key")

    def finish(control):
        coordinator = make(control)
        assert coordinator.resume_refresh(path, "the key") == 14
        assert np.concatenate(list(coordinator.refresh_chunks())).tolist() == list(range(14, P))
        refresh(coordinator, 1)
        weights = coordinator.table.sampling_weights.copy() if control.rank == 0 else None
        train(coordinator, [1])
        return weights, coordinator.metrics()

    on_ranks(2, begin)
    assert make().resume_refresh(path, "another key") == 0
    damaged = tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes()[:-9])
    assert make().resume_refresh(damaged, "the key") == 0
    weights, metrics = on_ranks(size, finish)[0]
    np.testing.assert_array_equal(weights, whole.table.sampling_weights)
    train(whole, [1])
    assert metrics == pytest.approx(whole.metrics())
    assert [file.name for file in path.parent.iterdir()] == ["refresh.safetensors"]


def test_prompts_held_twice_count_once_and_by_the_lowest_rank():
    def work(control):
        coordinator = make(control)
        for chunk in coordinator.refresh_chunks():
            coordinator.observe_refresh([answer(i, control.rank) for i in chunk])  # every rank holds the whole chunk
        coordinator.finish_refresh(1)
        return coordinator

    doubled = on_ranks(2, work)[0]
    np.testing.assert_allclose(doubled.table.column("pass_rate"), [answer(i, 0).pass_rate for i in range(P)])


def test_an_unfinished_refresh_is_not_taken():
    coordinator = make()
    coordinator.observe_refresh([answer(i, 1) for i in next(iter(coordinator.refresh_chunks()))])
    with pytest.raises(AssertionError, match="16 prompts left"):
        coordinator.finish_refresh(1)


def test_another_data_set_is_refused_on_every_rank(tmp_path):
    make().save(tmp_path)
    heard = []

    def load(control):
        coordinator = make(control, fingerprint="xyz")
        try:
            coordinator.load(tmp_path)
        except UserError as error:
            heard.append((control.rank, str(error)))

    on_ranks(2, load)
    messages = dict(heard)
    assert "data set abc" in messages[0] and "data set xyz" in messages[0]
    assert "rank 0" in messages[1]


def test_other_settings_are_named_once(tmp_path, caplog):
    make().save(tmp_path)
    make(seed=6, rollout_batch_size=8).load(tmp_path)
    assert len(caplog.records) == 1
    assert "data.seed 5 -> 6, " in caplog.text or "data.seed 5 -> 6)" in caplog.text
    assert "data.rollout_batch_size 6 -> 8" in caplog.text


def test_files_of_another_format_are_refused(tmp_path):
    make().save(tmp_path)
    path = tmp_path / "curriculum.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        make().load(tmp_path)


@pytest.mark.slow
def test_two_real_processes_draw_what_one_draws(tmp_path):
    run_ranks("curriculum_draws.py", tmp_path, num_ranks=2, warm=False)
    expected = [batch for batch, _ in train(make(), range(1, 6))]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected, expected]


def test_a_refresh_goes_on_when_the_disk_does_not_take_what_it_found(tmp_path):
    (tmp_path / "a_file").write_text("")
    coordinator = make()
    coordinator.resume_refresh(tmp_path / "missing", "the key")
    for chunk in coordinator.refresh_chunks():
        coordinator.observe_refresh([answer(i, 1) for i in chunk])
        coordinator.save_refresh(tmp_path / "a_file" / "refresh.safetensors", "the key")  # no folder can be made there
    coordinator.finish_refresh(1)
    whole = make()
    refresh(whole, 1)
    np.testing.assert_array_equal(coordinator.table.sampling_weights, whole.table.sampling_weights)
