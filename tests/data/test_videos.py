"""Videos from rows to what the model takes: which frames, their tokens and positions, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.data_fixtures import image, load, png, rope_index, user_text, write_jsonl, write_kind, write_vision_model
from fixtures.videos import grey_of, write_video
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.images import ImageSource, PixelLimits
from mmr1_ds.data.positions import spatial_positions
from mmr1_ds.data.videos import Clip, VideoLimits, VideoSource
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt

PAD = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE_PAD = "<|vision_start|><|image_pad|><|vision_end|>"
SMALL = {"video_max_frames": 6, "video_max_pixels": 84 * 84}


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp("vision"))


def source(folder, **more):
    return VideoSource(ImageSource(str(folder), **more), fps=2.0)


def greys(frames):
    """The grey of each frame, of its right half: what write_video paints there."""
    return [round(float(frame[:, frame.shape[1] // 2 :].mean())) for frame in frames]


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "ts"])
def test_frames_are_those_of_their_places(tmp_path, suffix):
    """Of 8 seconds with a key frame in each: some are found by the index, some one after the other."""
    path = write_video(tmp_path / f"a.{suffix}", num_frames=40)
    clip = source(tmp_path).open(path, "row 0")
    assert (clip.num_frames, clip.fps, clip.width, clip.height) == (40, 5.0, 96, 64)
    for places in ((0, 39), (3, 4, 5, 21, 22, 38), range(40), (0, 0)):
        frames = clip.read(places, (28, 56))
        assert frames.shape == (len(places), 56, 28, 3) and frames.dtype == np.uint8
        np.testing.assert_allclose(greys(frames), [grey_of(place) for place in places], atol=4)
    with open(path, "rb") as file:
        held = source(tmp_path).open({"bytes": file.read(), "path": None}, "row 0")
    np.testing.assert_array_equal(held.read((3, 39), (28, 28)), clip.read((3, 39), (28, 28)))


def test_a_video_is_turned_upright(tmp_path):
    clip = source(tmp_path).open(write_video(tmp_path / "a.mp4", turned=90), "row")
    assert (clip.width, clip.height) == (64, 96)
    (frame, *_) = clip.read((9, 9), (64, 96))
    assert sorted([frame[:20].mean(), frame[-20:].mean()])[0] < 5 < grey_of(9) - 5  # the black quarter is a row now


def test_a_list_of_images_is_a_video(tmp_path):
    frames = [image(40, 30, seed) for seed in range(5)]
    clip = source(tmp_path).open(frames, "row")
    assert (clip.num_frames, clip.fps, clip.width, clip.height) == (5, 2.0, 40, 30)
    np.testing.assert_array_equal(clip.read((4, 0), (40, 30)), [np.asarray(frames[4]), np.asarray(frames[0])])
    assert source(tmp_path).open({"frames": frames, "fps": 0.5}, "row").fps == 0.5
    with pytest.raises(UserError, match="row 3: frame 1 of a video has 41 x 30 pixels, the first has 40 x 30"):
        source(tmp_path).open([frames[0], image(41, 30)], "row 3")
    with pytest.raises(UserError, match=r"row 3: 'gone.png' cannot be read as an image"):
        source(tmp_path).open(["gone.png"], "row 3")


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 30), (2, 30), (3, 1), (7, 3), (100, 25), (401, 29.97), (9000, 25)])
def test_frames_are_chosen_as_the_processor_does(num_frames, fps):
    """Qwen3-VL's own, an even number of them: models see them in pairs."""
    limits = VideoLimits(2.0, 16, PixelLimits.of(28, 784, 10**6, None, None))
    places = limits.places(Clip(num_frames, fps, 28, 28, lambda *_: np.empty(0)))
    assert len(places) % 2 == 0 and len(places) <= 16
    if num_frames > 1:
        processor = Qwen3VLVideoProcessor(max_frames=16, min_frames=4)
        wanted = processor.sample_frames(VideoMetadata(num_frames, fps), fps=2.0)
        assert len(places) == len(wanted) // 2 * 2
        if len(wanted) % 2 == 0:
            assert list(places) == wanted.tolist()
    else:
        assert places == (0, 0)


# --- what cannot be read --------------------------------------------------------------------------------------------


def broken(folder):
    whole = write_video(folder / "whole.mp4", movflags="faststart")
    content = open(whole, "rb").read()
    (folder / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{whole}\n")
    (folder / "still.mp4").write_bytes(png(28, 28))


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ("cut.mp4", "'cut.mp4' cannot be read as a video .the file is cut off"),
        ("empty.mp4", "'empty.mp4' cannot be read as a video .the file is empty"),
        ("noise.mp4", "'noise.mp4' cannot be read as a video .of no format that is read"),
        ("list.mp4", "'list.mp4' cannot be read as a video .of no format that is read"),
        ("still.mp4", "'still.mp4' cannot be read as a video .of no format that is read"),
        ("gone.mp4", "'gone.mp4' cannot be read as a video .No such file"),
        ("../out.mp4", "lies outside the folder of the data"),
        ("https://host/a.mp4", "the video 'https://host/a.mp4' is not fetched"),
        ({"video": "whole.mp4", "max_pixels": 784}, "a video has max_pixels of its own"),
        ({"video": "whole.mp4", "fps": 1.0}, "a video has fps of its own"),
    ],
)
def test_a_video_that_cannot_be_read_names_its_row(tmp_path, vision_model, video, words):
    broken(tmp_path)
    rows = [{"prompt": "p", "answer": "1", "videos": None}, {"prompt": "p", "answer": "1", "videos": [video]}]
    with pytest.raises(UserError, match=rf"a.jsonl row 1 .*{words}"):
        load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)


def test_a_video_with_too_many_pixels_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"row 2: a video of 96 x 64 pixels is over data.max_image_pixels=6000"):
        source(tmp_path, max_pixels=6000).open(path, "row 2")


def test_frames_that_are_missing_behind_the_header_are_an_error(tmp_path):
    """A file whose index promises more than its stream holds; a few at the end may be missing."""
    clip = source(tmp_path).open(write_video(tmp_path / "a.mkv"), "row 2")
    assert len(clip.read((0, 21), (28, 28))) == 2
    with pytest.raises(UserError, match=r"row 2: .*a.mkv' cannot be read as a video .it ends before second 6"):
        clip.read((0, 30), (28, 28))


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<video>what, <image>?", f"{PAD}what, {IMAGE_PAD}?"),
        ("what?", f"{IMAGE_PAD}{PAD}what?"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "video"}]}],
         f"{IMAGE_PAD}?{PAD}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["path", "bytes", "frames"])
def test_rows_with_a_video_and_an_image(tmp_path, vision_model, prompt, text, form):
    path = write_video(tmp_path / "a.mp4", num_frames=11)
    video = {
        "path": "a.mp4",
        "bytes": {"bytes": open(path, "rb").read(), "path": None},
        "frames": [[{"bytes": png(96, 64, seed)} for seed in range(4)]],
    }[form]
    row = {"prompt": prompt, "answer": "1", "videos": video, "images": [{"bytes": png(28, 28)}]}
    dataset = load(write_kind("parquet", tmp_path, [row]), vision_model, **SMALL)
    assert (dataset.max_images, dataset.max_videos) == (1, 1)
    found = dataset[0]
    assert user_text(dataset, 0) == text
    (frames,) = [video.frames for video in found.videos]
    assert frames.shape == (4, 56, 84, 3)
    assert len(dataset.encoder.expand(found).input_ids) == found.num_tokens
    with pytest.raises(UserError, match=r"row 0 .*the prompt has a video and servers take none"):
        dataset.check_no_videos("servers take none")


def test_parts_of_messages_carry_their_videos(tmp_path, vision_model):
    for name, frames in (("a.mp4", 8), ("b.mp4", 20)):
        write_video(tmp_path / name, num_frames=frames)
    parts = [
        {"type": "video", "video": "b.mp4"}, {"type": "text", "text": " or "}, {"type": "video"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
    ]  # fmt: skip
    row = {"prompt": [{"role": "user", "content": parts}], "answer": "1", "videos": ["b.mp4"]}
    dataset = load(write_jsonl(tmp_path / "a.jsonl", [row]), vision_model, **SMALL)
    assert user_text(dataset, 0) == f"{PAD} or {PAD}{PAD}"
    assert [video.num_frames for video in dataset[0].videos] == [20, 20, 8]


def test_markers_and_videos_must_be_as_many(tmp_path, vision_model):
    write_video(tmp_path / "a.mp4")
    for prompt, videos in (("<video><video>", ["a.mp4"]), ("<video>", [])):
        rows = [{"prompt": prompt, "answer": "1", "videos": videos}]
        with pytest.raises(UserError, match=r"row 0 .*<video> markers and the row \d videos; make them equal"):
            load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)


def test_ids_and_fingerprints_tell_videos_and_their_settings_apart(tmp_path, vision_model):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    rows = [{"prompt": "p", "answer": "1", "videos": video} for video in ("a.mp4", "b.mp4")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = load(path, vision_model)
    assert len({prompt_id.split("#")[0] for prompt_id in dataset.prompt_ids}) == 2
    assert load(path, vision_model).fingerprint == dataset.fingerprint
    assert load(path, vision_model, video_fps=1.0).fingerprint != dataset.fingerprint


# --- what the model takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_expand_equals_the_processor(tmp_path, family):
    """Two videos around an image: tokens, the times between frames among them, patches and positions.

    transformers' positions are ours while no video is longer in time than it is high and wide.
    """
    model = write_vision_model(tmp_path / "model", family=family)
    data = DataConfig(min_pixels=None, max_pixels=None, video_max_frames=4, video_max_pixels=150 * 150)
    encoder = PromptEncoder(ModelConfig(model_path=model), data)
    clips = [
        Clip(23, fps, 170, height, lambda places, size: np.stack([np.asarray(image(*size, seed=i)) for i in places]))
        for fps, height in ((25.0, 140), (12.5, 100))
    ]
    token_ids, images, videos = encoder.encode("a<video>b<image>c<video>d?", [image(60, 90)], "row", clips)
    prompt = Prompt(0, "id", token_ids, images, "7", videos=videos)
    expected = encoder.processor(
        text=[encoder.tokenizer.decode(token_ids)],
        images=list(images),
        videos=[video.frames for video in videos],
        return_tensors="pt",
        videos_kwargs={
            "do_resize": False,
            "do_sample_frames": False,
            "video_metadata": [VideoMetadata(**video.metadata) for video in videos],
        },
    )

    inputs = encoder.expand(prompt)

    types = expected["mm_token_type_ids"][0]
    assert torch.equal(inputs.input_ids == encoder.image_token_id, types > 0)
    assert torch.equal(inputs.input_ids[types == 0], expected["input_ids"][0][types == 0])
    patches = expected["video_grid_thw"].prod(dim=1).tolist()
    first, last = expected["pixel_values_videos"].split(patches)
    assert torch.equal(inputs.pixel_values, torch.cat([first, expected["pixel_values"], last]))
    grids = [expected["video_grid_thw"][:1], expected["image_grid_thw"], expected["video_grid_thw"][1:]]
    assert torch.equal(inputs.image_grid_thw, torch.cat(grids))
    assert torch.equal(inputs.positions, rope_index(model, expected))
    lengths = [encoder.num_video_tokens(clip) for clip in clips]
    assert len(inputs.input_ids) == len(token_ids) + sum(lengths) - 2 + encoder.num_image_tokens(60, 90) - 1


def test_a_template_without_a_place_for_videos_is_named(tmp_path):
    model = write_vision_model(tmp_path / "model")
    encoder = PromptEncoder(ModelConfig(model_path=model), DataConfig())
    encoder.processor.chat_template = encoder.processor.chat_template.replace("'video'", "'film'").replace(
        "{{ part['text'] }}", "{{ part.get('text', '') }}"
    )
    clip = Clip(4, 2.0, 56, 56, lambda places, size: np.zeros((len(places), *size[::-1], 3), np.uint8))
    with pytest.raises(UserError, match="row 3: the model's chat template has no place for videos"):
        encoder.encode("<video>?", [], "row 3", [clip])


def test_text_goes_on_behind_a_video_that_is_longer_in_time_than_high_and_wide():
    """By hand: two letters, three pairs of frames of one token 2.6 positions apart, a letter, an image of 1 x 2."""
    is_seen = np.array([0, 0, 1, 1, 1, 0, 1, 1, 0], dtype=bool)
    found = spatial_positions(is_seen, [(3, 1, 1, 2.6), (1, 1, 2, 1.0)])
    assert found.tolist() == [
        [0, 1, 2, 4, 7, 8, 9, 9, 11],
        [0, 1, 2, 2, 2, 8, 9, 9, 11],
        [0, 1, 2, 2, 2, 8, 9, 10, 11],
    ]
    assert spatial_positions(np.zeros(2, dtype=bool), []).tolist() == [[0, 1]] * 3
