"""What rank 0 does for all ranks: its result and its mistake are every rank's."""

import pytest
from fixtures.rank_threads import Ranks, on_ranks

from mmr1_ds.cluster.agreement import by_rank_0
from mmr1_ds.errors import UserError


@pytest.mark.parametrize("refuses", [False, True])
def test_what_rank_0_finds_or_refuses_is_every_rank_s(refuses):
    def work(control):
        ranks = Ranks(control)

        def action():
            assert ranks.rank == 0
            if refuses:
                raise UserError("no such table")
            return {"prompts": 7}

        try:
            return by_rank_0(ranks, "read", action)
        except UserError as error:
            return str(error)

    assert on_ranks(3, work) == ["no such table" if refuses else {"prompts": 7}] * 3
