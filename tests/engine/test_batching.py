"""Padded batches of mixed prompts, against transformers' own processor and a model called on one prompt at a time."""

import numpy as np
import pytest
import torch
from fixtures.tiny_models import make_prompt, save_vision_model

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.batching import collate

MIXED = range(9)  # prompts with 0, 2, 3, 0, 1, 2, 0, 4 and 1 images
TEXT_ONLY = (0, 3, 6)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def family(request, tmp_path_factory):
    """(model, encoder): a tiny model of random weights and its prompt encoder."""
    from transformers import AutoModelForImageTextToText

    folder = str(save_vision_model(tmp_path_factory.mktemp(request.param), family=request.param))
    limits = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PromptEncoder(ModelConfig(model_path=folder), limits)


def pairs_of(encoder, indices):
    prompts = [make_prompt(encoder, i, with_image=i % 3 != 0, most_images=4) for i in indices]
    return [(prompt, np.arange(20, 21 + 5 * prompt.index % 13, dtype=np.int32)) for prompt in prompts]


def alone(encoder, prompt, response):
    """The processor's answer to the prompt's text and images, with the response behind it."""
    text = encoder.tokenizer.decode(prompt.token_ids)
    inputs = dict(encoder.processor(text=[text], images=list(prompt.images) or None, return_tensors="pt"))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor(response)[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if prompt.images:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(response))], dim=1)
    else:
        del inputs["mm_token_type_ids"]
    return inputs


@pytest.mark.parametrize("indices", [MIXED, TEXT_ONLY], ids=["mixed", "text only"])
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_prompt_alone(family, indices):
    model, encoder = family
    pairs = pairs_of(encoder, indices)
    expected = []
    for prompt, response in pairs:
        logprobs = model(**alone(encoder, prompt, response)).logits[0, -1 - len(response) : -1].log_softmax(-1)
        expected.append(logprobs.gather(-1, torch.tensor(response).long()[:, None])[:, 0])

    batch = collate(pairs, encoder, CPU)
    hidden = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions,
        use_cache=False,
        **batch.vision,
    ).last_hidden_state
    logprobs = model.lm_head(hidden[batch.rows, batch.columns]).log_softmax(-1)

    assert len(batch.input_ids) == len(pairs) + (indices is TEXT_ONLY)  # a blank image makes the tower run
    torch.testing.assert_close(
        logprobs.gather(-1, batch.targets[:, None])[:, 0], torch.cat(expected), atol=2e-5, rtol=0
    )


def multimodal_positions(token_ids, image_token_id, sizes):
    """Time, height and width of every token, each image a grid of `sizes` (rows, columns) of tokens.

    Source: arXiv 2409.12191, section 2.1: text counts up in all three; an image stands still in time; what follows
    it starts one past its largest position.
    """
    positions, start, sizes, token_ids = [], 0, iter(sizes), list(token_ids)
    while len(positions) < len(token_ids):
        if token_ids[len(positions)] == image_token_id:
            rows, columns = next(sizes)
            positions += [(start, start + row, start + column) for row in range(rows) for column in range(columns)]
            start += max(rows, columns)
        else:
            positions.append((start,) * 3)
            start += 1
    return torch.tensor(positions).T


@torch.no_grad()
def test_positions_of_a_padded_batch_are_those_of_the_paper(family):
    _, encoder = family
    pairs = pairs_of(encoder, MIXED)
    batch = collate(pairs, encoder, CPU)

    side = encoder.pixel_limits.factor
    for row, (prompt, response) in enumerate(pairs):
        length = int(batch.attention_mask[row].sum())
        sizes = [(image.height // side, image.width // side) for image in prompt.images]
        expected = multimodal_positions(batch.input_ids[row, :length], encoder.image_token_id, sizes)
        assert torch.equal(batch.positions[:, row, :length], expected)
        image_tokens = sum(rows * columns for rows, columns in sizes)
        assert length == len(prompt.token_ids) - len(sizes) + image_tokens + len(response)
