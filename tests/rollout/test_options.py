"""How vLLM is told of a run's images and videos."""

import pytest
from fixtures.data_fixtures import write_vision_model
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.rollout import options
from mmr1_ds.rollout.colocated.starting import phase_words
from mmr1_ds.rollout.options import engine_environment, engine_options, image_bounds, is_whole_after_a_sync


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Arguments of vLLM's engine on a GPU, for a family and a number of videos a prompt."""
    monkeypatch.setattr(options, "_compute_capability", lambda: "9.0")

    def options_of(family, most_videos, **data):
        model = ModelConfig(model_path=write_vision_model(tmp_path / family, family=family))
        limits = {"video_max_frames": 9, "video_max_pixels": 100 * 28 * 28, "max_prompt_length": 3000}
        data = DataConfig(**{**limits, **data})
        bounds = image_bounds(PromptEncoder(model, data), 3, most_videos)
        rollout = RolloutConfig(max_num_batched_tokens=128)
        return engine_options(rollout, model, data, on_gpu=True, images=bounds)

    return options_of


def test_without_videos_vllm_keeps_no_memory_for_them(told):
    found = told("qwen2_5_vl", 0)
    assert found["limit_mm_per_prompt"] == {"image": 3, "video": 0}
    assert found["mm_processor_kwargs"].keys() == {"images_kwargs"}
    assert found["max_num_batched_tokens"] == 128


def test_a_batch_holds_the_largest_video(told):
    found = told("qwen2_5_vl", 2)
    assert found["limit_mm_per_prompt"] == {"image": 3, "video": 2}
    assert found["max_num_batched_tokens"] == 4 * 100  # four pairs of nine frames, of 100 tokens each
    assert told("qwen2_5_vl", 2, max_prompt_length=250)["max_num_batched_tokens"] == 250
    videos = found["mm_processor_kwargs"]["videos_kwargs"]
    assert videos["size"]["longest_edge"] == 9 * 100 * 28 * 28
    assert videos["do_resize"] is videos["do_sample_frames"] is False


def test_videos_scaled_by_other_numbers_than_images_are_scaled_on_the_host(told):
    """The tiny Qwen3-VL has CLIP's numbers for images and .5 for videos; published ones have .5 for both."""
    assert "mm_device_do_normalize" not in told("qwen2_5_vl", 1)
    assert told("qwen3_vl", 1)["mm_device_do_normalize"] is False
    assert "mm_device_do_normalize" not in told("qwen3_vl", 0)


def test_images_are_bounded_as_the_run_bounds_them(told):
    """Else vLLM keeps memory for the 12.8 megapixels that the model's own processor allows."""
    size = told("qwen2_5_vl", 0, max_pixels=5 * 28 * 28)["mm_processor_kwargs"]
    assert size == {"images_kwargs": {"size": {"shortest_edge": 28 * 28, "longest_edge": 5 * 28 * 28}}}


def test_vllm_reads_no_weights_that_the_first_sync_brings(tmp_path):
    assert is_whole_after_a_sync(ModelConfig(model_path=str(save_text_model(tmp_path / "tested"))))
    assert is_whole_after_a_sync(ModelConfig(model_path=write_vision_model(tmp_path / "vision")))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "phi3"}')
    assert not is_whole_after_a_sync(ModelConfig(model_path=str(other)))


def test_the_log_tells_what_vllm_does_as_it_starts():
    on_gpu = list(phase_words(reads_weights=True, is_eager=False, on_gpu=True).values())
    assert on_gpu[0] == "loading weights" and "compiling" in on_gpu[1] and "CUDA graphs" in on_gpu[2]
    for eager in (phase_words(reads_weights=False, is_eager=True, on_gpu=here) for here in (True, False)):
        assert list(eager.values()) == ["building the model", "measuring what memory the model leaves", "warming up"]
    assert "CUDA" not in str(phase_words(reads_weights=False, is_eager=False, on_gpu=False))


def test_flashinfer_s_sampler_and_sums_are_not_compiled_at_the_start():
    """Its kernels come with no wheel; the user's own value would win."""
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER"):
        assert engine_environment(RolloutConfig(), on_gpu=True)[1][name] == "0"
        assert name not in engine_environment(RolloutConfig(), on_gpu=False)[1]
