"""What must hold between the keys of the rollout servers."""

import pytest
from fixtures.configs import check, refused

SERVER = "worker.rollout.engine=server"
AHEAD = "worker.rollout.max_staleness_steps=1"
QUEUE = "worker.rollout.shared_queue=true"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([AHEAD], "engine=auto samples on the ranks themselves"),
        (["worker.rollout.server_urls=['http://a:1']"], "server_urls needs engine=server, got engine=auto"),
        ([SERVER, "worker.actor.offload_states=true"], "worker.actor.offload_states=true"),
        ([SERVER, "worker.rollout.max_num_seqs=4"], "worker.rollout.n=5 is over max_num_seqs=4"),
        ([SERVER, "worker.rollout.max_in_flight=4"], "max_in_flight=4 is under the responses to one prompt"),
        ([SERVER, "worker.rollout.server_urls=['node7:8000']"], "is not an address like http://node7:8000"),
        ([SERVER, "worker.rollout.server_urls=['http://k3y@node7:80']"], "http://node7 is not an address"),
        ([SERVER, "worker.rollout.server_urls=['http://node7/v1']"], "without path or credentials"),
        ([SERVER, "worker.rollout.server_urls=['http://a:1','http://a:1']"], "names a server twice"),
        (
            [SERVER, "worker.rollout.server_urls=['http://node7:1']", "worker.rollout.weight_transfer=shared_memory"],
            "weight_transfer=shared_memory needs the servers on rank 0's machine, node7",
        ),
        ([SERVER, "worker.rollout.num_servers=2", "worker.rollout.server_devices=[6]"], "need 2 different ones"),
        ([SERVER, "worker.rollout.num_servers=2", "worker.rollout.server_devices=[6,6]"], "need 2 different ones"),
        ([SERVER, "worker.rollout.server_devices=[1]"], "[1] are the GPUs of ranks"),
        ([SERVER, "worker.rollout.weight_swap=never"], "must be boundary or in_flight, got never"),
        ([SERVER, AHEAD, "worker.rollout.partial=8"], "both let responses come from older policies"),
        (["worker.rollout.partial=512"], "cuts nothing, data.max_response_length is 512"),
        (["worker.rollout.partial=8", "algorithm.online_filtering=true"], "draws whole batches"),
        (["worker.rollout.partial=8", "worker.rollout.engine=hf"], "engine=hf cannot resume a response"),
        ([QUEUE, SERVER], "share the requests of all anyway; leave it out"),
        ([QUEUE, "worker.rollout.engine=hf"], "samples every token on all ranks at once; set it to false"),
        ([QUEUE, "worker.rollout.partial=8"], "with worker.rollout.partial=8 the rank that began a response"),
        (
            [QUEUE, "algorithm.online_filtering=true", "algorithm.filter_stop=true"],
            "algorithm.filter_stop=true stops a rank at its share of the batch",
        ),
    ],
)
def test_contradictions_are_refused_by_name(valid, arguments, expected):
    message = refused(valid, *arguments)
    assert expected in message and "k3y" not in message


def test_servers_on_loopback_are_out_of_reach_of_other_nodes(valid):
    nodes = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", SERVER]
    assert "server_host=127.0.0.1 cannot be reached from the other 1 node(s)" in refused(valid, *nodes)
    check(valid, *nodes, "worker.rollout.server_host=10.1.2.3")


@pytest.mark.parametrize(
    "arguments",
    [
        [SERVER, AHEAD],
        [SERVER, "worker.rollout.tensor_parallel_size=3"],  # of the servers' GPUs, not of the ranks
        [SERVER, "worker.rollout.num_servers=2", "worker.rollout.server_devices=[2,5]"],
        [SERVER, "worker.rollout.server_devices=[1]", "worker.rollout.weight_transfer=ipc"],
        [SERVER, "worker.rollout.server_urls=['http://localhost:1']", "worker.rollout.weight_transfer=shared_memory"],
        [SERVER, "worker.rollout.partial=8"],
        ["worker.rollout.partial=8"],
        [QUEUE, "algorithm.online_filtering=true", "worker.rollout.tensor_parallel_size=2"],
    ],
)
def test_what_goes_together_is_accepted(valid, arguments):
    check(valid, *arguments)
