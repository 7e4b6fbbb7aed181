"""The shipped run configs and DeepSpeed presets: what they resolve to, DeepSpeed's own parser, docs/presets.md."""

import json
import re

import pytest
from fixtures.dry_runs import linked_checkout, paragraphs, planned, training_arguments, write_rows
from fixtures.launching import ROOT

from mmr1_ds.config.loading import load_config
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import critic_deepspeed, reference_deepspeed, resolve_deepspeed

PRESETS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ON_A_NODE = [name for name in CONFIGS if name != "demo"]  # the demo has two ranks and makes its own data
OFFLOADED = "_offload_optimizer"
PAGE = (ROOT / "docs" / "presets.md").read_text()

# Qwen2.5-VL: hidden size, MLP width, key-value width, vocabulary (config.json of each)
SIZES = {"3B": (2048, 11008, 256, 151936), "7B": (3584, 18944, 512, 152064), "32B": (5120, 27648, 1024, 152064)}


def read(name):
    return json.loads((ROOT / "configs" / "deepspeed" / name).read_text())


def parse(content):
    """With DeepSpeed, as on 8 ranks. Refuses keys that DeepSpeed would pass over without a word."""
    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    unknown = set(content) - known - {"zero_optimization", "data_types"}
    assert not unknown, f"unknown keys {unknown}"
    DeepSpeedBF16Config(**content["bf16"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
        patch.setattr(deepspeed_config.dist, "get_world_size", lambda: 8)
        return deepspeed_config.DeepSpeedConfig(content)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("name", ON_A_NODE)
def test_deepspeed_reads_what_a_config_resolves_to(name):
    config = load_config([f"config={name}"]).config
    assert config.worker.actor.deepspeed is None or config.worker.actor.deepspeed in map(str, PRESETS)
    actor = resolve_deepspeed(config, 8, on_gpu=True)
    parsed = parse(actor)
    settings = config.worker.actor
    assert parsed.train_batch_size == settings.global_batch_size * config.worker.rollout.n
    assert parsed.train_micro_batch_size_per_gpu == settings.micro_batch_size_per_device_for_update
    assert (
        parsed.gradient_accumulation_steps * settings.micro_batch_size_per_device_for_update * 8
        == parsed.train_batch_size
    )
    assert parsed.gradient_clipping == settings.max_grad_norm
    assert parsed.zero_config.stage == 3 and parsed.bfloat16_config.enabled
    parse(critic_deepspeed(config, actor, 8, on_gpu=True))
    parse(reference_deepspeed(config, actor, on_gpu=True))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_deepspeed_reads_every_preset_on_eight_ranks(preset):
    config = load_config(["config=mmr1", f"worker.actor.deepspeed={preset.name}"]).config
    resolved = resolve_deepspeed(config, 8, on_gpu=True)
    zero = parse(resolved).zero_config
    given = resolved["zero_optimization"]
    assert zero.reduce_bucket_size == given["reduce_bucket_size"]
    assert zero.prefetch_bucket_size == given["stage3_prefetch_bucket_size"]
    assert zero.param_persistence_threshold == given["stage3_param_persistence_threshold"]
    assert zero.max_live_parameters == given["stage3_max_live_parameters"]
    assert zero.max_reuse_distance == given["stage3_max_reuse_distance"]
    assert zero.overlap_comm is given["overlap_comm"]
    on_cpu = resolve_deepspeed(config, 8, on_gpu=False)
    for engine in (on_cpu, critic_deepspeed(config, on_cpu, 8, False), reference_deepspeed(config, on_cpu, False)):
        assert parse(engine).zero_config.stage == 3


@pytest.mark.parametrize(
    "section, key", [("zero_optimization", "stage3_prefetch_bucket"), ("bf16", "enable"), (None, "gradient_cliping")]
)
def test_a_misspelt_key_is_refused(section, key):
    config = load_config(["config=mmr1_h100"]).config
    resolved = resolve_deepspeed(config, 8, on_gpu=True)
    parse(resolved)
    (resolved if section is None else resolved[section])[key] = 1
    with pytest.raises((ValueError, AssertionError), match=key):
        parse(resolved)


@pytest.mark.parametrize("name", ON_A_NODE)
def test_configs_pass_their_checks_on_eight_ranks(name):
    config = load_config([f"config={name}"]).config
    plan = check_config(config, world_size=8)
    assert plan.micro_batches_per_rank * plan.micro_batch_size * 8 == config.worker.actor.global_batch_size * 8


def test_the_paper_s_refresh_is_the_paper_s_config_s_alone():
    refresh = {name: load_config([f"config={name}"]).config.data.curriculum_refresh for name in ON_A_NODE}
    assert refresh.pop("mmr1") == "full" and set(refresh.values()) == {"online"}


@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_the_optimizer_s_offload_is_the_plain_preset_with_one_section_more(gpu):
    plain, offloaded = read(f"zero3_{gpu}.json"), read(f"zero3_{gpu}{OFFLOADED}.json")
    added = offloaded["zero_optimization"].pop("offload_optimizer")
    assert added == {"device": "cpu", "pin_memory": True} and offloaded == plain

    def resolved(*argv):
        return resolve_deepspeed(load_config([f"config=mmr1_{gpu}", *argv]).config, 8, on_gpu=True)

    by_file = resolved(f"worker.actor.deepspeed=zero3_{gpu}{OFFLOADED}.json")
    assert by_file == resolved("worker.actor.offload.offload_optimizer=true")  # as the page says


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_the_buffers_hold_for_every_model(gpu, model):
    """What docs/presets.md says of the sizes."""
    hidden, mlp, key_value, vocabulary = SIZES[model]
    matrix = hidden * mlp
    layer = 3 * matrix + 2 * hidden * hidden + 2 * hidden * key_value
    zero = read(f"zero3_{gpu}.json")["zero_optimization"]
    assert zero["reduce_bucket_size"] >= matrix
    assert zero["stage3_prefetch_bucket_size"] >= matrix
    assert zero["stage3_max_live_parameters"] >= vocabulary * hidden + layer
    assert zero["stage3_max_reuse_distance"] >= layer
    assert zero["stage3_param_persistence_threshold"] < hidden * hidden
    assert f"{layer / 1e6:.1f}e6" in PAGE and f"{matrix / 1e6:.1f}e6" in PAGE
    assert f"{vocabulary * hidden / 1e6:.1f}e6" in PAGE


def test_the_page_names_every_preset_and_its_numbers():
    for preset in PRESETS:
        assert f"`{preset.name}`" in PAGE
        assert f"`{preset.name}`" in (ROOT / "configs" / "deepspeed" / "README.md").read_text()
    columns = [read(f"zero3_{name}.json")["zero_optimization"] for name in ("h100", "b200", "offload")]
    for key in columns[0]:
        if key == "stage":
            continue
        row = re.search(rf"^\| `{key}` \| (\S+) \| (\S+) \| (\S+) \|", PAGE, re.MULTILINE)
        assert row, key
        assert [json.loads(cell) for cell in row.groups()] == [zero[key] for zero in columns], key


def test_the_page_s_table_is_what_the_configs_say():
    rows = re.findall(r"^\| (\d+B) \| 8 x (\w+) \| `(\w+)` \| `(\w+\.json)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert {(model, gpu) for model, gpu, *_ in rows} == {(model, gpu) for model in SIZES for gpu in ("H100", "B200")}
    for model, gpu, name, preset, optimizer in rows:
        config = load_config([f"config={name}"]).config
        assert config.worker.actor.deepspeed.endswith(f"/{preset}")
        assert gpu.lower() in name and (OFFLOADED in preset) == (optimizer == "host")
        assert ("32B" in config.worker.actor.model.model_path) == (model == "32B")


def test_the_page_s_commands_run(tmp_path):
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = paragraphs(block)
    assert len(commands) == 6
    data, folder = write_rows(tmp_path), linked_checkout(tmp_path)
    for command, model in zip(commands, 2 * ["3B", "7B", "32B"], strict=True):
        plan = planned([*training_arguments(command, folder), f"data.train_files={data}"])
        assert f"Qwen/Qwen2.5-VL-{model}-Instruct" in plan
        assert re.search(r"ranks +8 = 1 node", plan), plan
