"""Sizes of a model, from its config.json alone: its class is built on torch's meta device, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmr1_ds.config import CriticModelConfig, LoraConfig, ModelConfig
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

GATED_VISION = {"qwen2_5_vl"}  # the vision tower's MLP is gated and its norms are RMS; else plain and LayerNorm


@dataclass(frozen=True)
class VisionShape:
    """A vision tower: blocks on patches, then `merge` x `merge` patches become one token of the text model."""

    num_parameters: int
    depth: int
    width: int
    mlp_width: int
    heads: int
    is_gated: bool
    merge: int
    pixels_per_token: int  # of an image, in one token of the text model
    patch_elements: int  # numbers that a patch is made of
    block_matrix: int  # entries of the matrices that every patch goes through
    merger_matrix: int  # entries of the matrices that every merged token goes through
    full_blocks: int  # blocks whose attention sees the whole image; the others see windows
    window_patches: int  # side of a window, in patches; 0: no windows


@dataclass(frozen=True)
class LinearShape:
    """Layers of linear attention (gated delta nets): a state a head, after a convolution over a few tokens."""

    layers: int
    heads: int  # of values; several share the keys of one
    key_size: int  # of a head
    value_size: int
    channels: int  # of the convolution: queries, keys and values
    kernel: int  # tokens that it sees

    @property
    def state(self) -> int:
        """Return the numbers in the states of all layers after a sequence, however long it is."""
        recurrent = self.heads * self.key_size * self.value_size
        return self.layers * (recurrent + self.channels * (self.kernel - 1))


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of a mixture."""

    layers: int  # that have experts; the others are dense
    experts: int  # of each of these layers
    chosen_each: int  # that a token goes to
    num_parameters: int  # elements of all of them

    @property
    def idle(self) -> int:
        """Return the elements that a token does not go through."""
        return self.num_parameters - self.num_parameters * self.chosen_each // self.experts


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a text model, with its vision tower where there is one."""

    name: str
    family: str
    sizes: tuple[int, ...]  # elements of each parameter; tied ones once
    hidden: int
    mlp_width: float  # mean over layers; of a mixture's, the width of all experts that a token goes to
    dense_width: int  # of the MLP of layers without experts
    layers: int
    query_width: int  # heads x head size
    key_width: int  # key-value heads x head size
    heads: int
    vocabulary: int
    has_qk_norm: bool
    layer_matrix: int  # entries of all layers' matrices that a token goes through, without embedding and output layer
    trained: int  # elements that are trained
    adapters: int  # trained elements that belong to LoRA's adapters
    vision_is_trained: bool
    vision: VisionShape | None
    linear: LinearShape | None = None
    experts: ExpertsShape | None = None

    @property
    def attention_layers(self) -> int:
        """Return the number of layers in which tokens see each other, and whose keys and values are cached."""
        return self.layers - (self.linear.layers if self.linear is not None else 0)

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)

    @property
    def num_active(self) -> int:
        """Return the parameters that a token goes through: all, but for experts that it is not sent to."""
        return self.num_parameters - (self.experts.idle if self.experts is not None else 0)

    @property
    def largest_parameter(self) -> int:
        return max(self.sizes)

    @property
    def largest_layer(self) -> int:
        """Return the elements of one decoder layer."""
        return (self.layer_matrix + self.num_parameters - self.num_active) // self.layers

    def persistent(self, threshold: float) -> int:
        """Return the elements of the parameters that ZeRO-3 keeps whole on every rank."""
        return sum(size for size in self.sizes if size <= threshold)


def policy_shape(model: ModelConfig) -> ModelShape:
    """Return the actor's shape: the whole model with its output layer. Raises: UserError for an unreadable config."""
    return _planned(model, lora=model.lora)


def critic_shape(model: CriticModelConfig) -> ModelShape:
    """Return the critic's shape: the model without its output layer; the value head, one row, is left out."""
    return _planned(model, with_head=False)


def _planned(model: ModelConfig | CriticModelConfig, **options: Any) -> ModelShape:
    config = read_config(model)
    try:
        return shape_of(config, str(model.model_path), freeze_vision_tower=model.freeze_vision_tower, **options)
    except (AttributeError, ValueError, TypeError, ZeroDivisionError) as error:  # a vision tower of another kind
        raise UserError(
            f"the sizes of {model.model_path}, a {config.model_type} model, cannot be told from its config.json "
            f"({str(error).splitlines()[0]:.100}); docs/models.md has the families that are planned"
        ) from None


def shape_of(
    config: PreTrainedConfig,
    name: str,
    lora: LoraConfig | None = None,
    freeze_vision_tower: bool = False,
    with_head: bool = True,
) -> ModelShape:
    """Return the shape of the model that transformers builds from `config`."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    has_vision = hasattr(config, "vision_config")
    family: Any = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    with torch.device("meta"):
        model = (family if with_head else AutoModel).from_config(config)
    text = config.get_text_config()
    parameters = [(path, parameter.numel()) for path, parameter in model.named_parameters()]
    head = model.get_output_embeddings() if with_head else None
    linear = list(_linear_layers(model))
    of_text = [(path, layer) for path, layer in linear if layer is not head and not _is_vision(path)]
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    trains_vision = has_vision and not freeze_vision_tower
    trained = sum(size for path, size in parameters if trains_vision or not _is_vision(path))
    adapted = 0
    if lora is not None and lora.rank > 0:
        reachable = [(path, layer) for path, layer in linear if layer is not head]
        reachable = [item for item in reachable if trains_vision or not _is_vision(item[0])]
        trained = adapted = _adapter_size(lora, reachable, name)
    experts = _experts_shape(text, model)
    # Qwen3.5's mixtures have no layer without experts, and so no such width.
    dense_width = getattr(text, "intermediate_size", 0)
    mlp_width: float = dense_width
    layer_matrix = sum(layer.in_features * layer.out_features for _, layer in of_text)
    if experts is not None:
        chosen = experts.chosen_each * getattr(text, "moe_intermediate_size", dense_width)
        chosen += getattr(text, "shared_expert_intermediate_size", 0)  # every token goes to it too
        dense = text.num_hidden_layers - experts.layers
        mlp_width = (experts.layers * chosen + dense * dense_width) / text.num_hidden_layers
        layer_matrix += experts.num_parameters - experts.idle
        layer_matrix += experts.layers * experts.experts * text.hidden_size  # the routers
    return ModelShape(
        name=name,
        family=config.model_type,
        sizes=tuple(size for _, size in parameters),
        hidden=text.hidden_size,
        mlp_width=mlp_width,
        dense_width=dense_width,
        layers=text.num_hidden_layers,
        query_width=text.num_attention_heads * head_size,
        key_width=text.num_key_value_heads * head_size,
        heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
        has_qk_norm=any(path.endswith("q_norm.weight") and not _is_vision(path) for path, _ in parameters),
        layer_matrix=layer_matrix,
        trained=trained,
        adapters=adapted,
        vision_is_trained=trains_vision,
        vision=_vision_shape(config, parameters, linear) if has_vision else None,
        linear=_linear_shape(text),
        experts=experts,
    )


def read_config(model: ModelConfig | CriticModelConfig) -> PreTrainedConfig:
    """Read the model's config.json: the built-in copy of a published model, else the folder's or the hub's.

    Raises: UserError, one line, when it cannot be read.
    """
    from transformers import AutoConfig

    path = str(model.model_path)
    if path in PUBLISHED:
        return _published(path, dict(model.override_config))
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **model.override_config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the config.json of {path} cannot be read ({reason:.150}); give a model folder that has it, or one of "
            f"{', '.join(PUBLISHED)}"
        ) from None


# --- published models ---------------------------------------------------------------------------------------------

# hidden size, MLP width, layers, heads, key-value heads, vocabulary, tied; MLP width of the vision tower
_QWEN2_5_VL = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456),
}
_QWEN3_VL: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
    "30B-A3B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
}  # fmt: skip
PUBLISHED = {
    **{f"Qwen/Qwen2.5-VL-{size}-Instruct": size for size in _QWEN2_5_VL},
    **{f"Qwen/Qwen3-VL-{size}-Instruct": size for size in _QWEN3_VL},
    "Qwen/Qwen3.5-9B": "9B",
    "Qwen/Qwen3.5-35B-A3B": "35B-A3B",
}


def _published(path: str, override: dict[str, Any]) -> PreTrainedConfig:
    from transformers import Qwen2_5_VLConfig, Qwen3_5Config, Qwen3_5MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig

    text_keys, vision_keys = (dict(override.pop(name, {})) for name in ("text_config", "vision_config"))
    if (sizes := _QWEN3_VL.get(PUBLISHED[path])) is not None:
        own = {"num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936, **sizes}
        own |= {key: override.pop(key) for key in list(override) if key in own}
        family = Qwen3VLMoeConfig if "num_experts" in sizes else Qwen3VLConfig
        own |= text_keys
        return family(
            text_config=own, vision_config={"out_hidden_size": own["hidden_size"], **vision_keys}, **override
        )
    if path == "Qwen/Qwen3.5-9B":  # the sizes of transformers' own defaults
        return Qwen3_5Config(
            text_config=text_keys, vision_config={"out_hidden_size": 4096, **vision_keys}, **override
        )
    if path == "Qwen/Qwen3.5-35B-A3B":  # likewise
        return Qwen3_5MoeConfig(
            text_config=text_keys, vision_config={"out_hidden_size": 2048, **vision_keys}, **override
        )
    hidden, mlp, layers, heads, key_value_heads, vocabulary, tied, vision_mlp = _QWEN2_5_VL[PUBLISHED[path]]
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {"hidden_size": 1280, "intermediate_size": vision_mlp, "num_heads": 16, "out_hidden_size": hidden}
    # As a folder's config.json, where keys of the text part stand beside text_config, the user's keys win.
    text |= {key: override.pop(key) for key in list(override) if key in text}
    return Qwen2_5_VLConfig(
        text_config=text | text_keys, vision_config=vision | vision_keys, tie_word_embeddings=tied, **override
    )


# --- parts of the model -------------------------------------------------------------------------------------------


def _is_vision(path: str) -> bool:
    return ".visual." in f".{path}"


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    from torch import nn

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module


def _adapter_size(lora: LoraConfig, layers: list[tuple[str, nn.Linear]], name: str) -> int:
    """Elements of the adapters: rank x (in + out) of each layer that gets one."""
    from mmr1_ds.engine.model.lora import target_layers

    chosen = set(target_layers([path for path, _ in layers], lora, name))
    return sum(lora.rank * (layer.in_features + layer.out_features) for path, layer in layers if path in chosen)


def _linear_shape(text: PreTrainedConfig) -> LinearShape | None:
    layers = (getattr(text, "layer_types", None) or []).count("linear_attention")
    if layers == 0:
        return None
    if not hasattr(text, "linear_num_value_heads"):  # a state of another kind, as Mamba's: left out of the plan
        return None
    heads, keys = text.linear_num_value_heads, text.linear_num_key_heads * text.linear_key_head_dim
    return LinearShape(
        layers=layers,
        heads=heads,
        key_size=text.linear_key_head_dim,
        value_size=text.linear_value_head_dim,
        channels=2 * keys + heads * text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
    )


def _experts_shape(text: Any, model: nn.Module) -> ExpertsShape | None:
    """None for a model whose experts, if it has any, transformers does not stack."""
    stacked = [item for path, item in model.named_parameters() if ".experts." in path and item.ndim == 3]
    if not stacked:
        return None
    layers = sum(path.endswith(".experts.down_proj") for path, _ in model.named_parameters())
    return ExpertsShape(layers, len(stacked[0]), text.num_experts_per_tok, sum(item.numel() for item in stacked))


def _vision_shape(
    config: PreTrainedConfig, parameters: list[tuple[str, int]], linear: list[tuple[str, nn.Linear]]
) -> VisionShape:
    vision = config.vision_config
    family = config.model_type
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    mlp_width = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    patch_elements = channels * vision.temporal_patch_size * vision.patch_size**2
    blocks = [layer for path, layer in linear if _is_vision(path) and ".blocks." in path]
    mergers = [layer for path, layer in linear if _is_vision(path) and ".blocks." not in path]
    windows = getattr(vision, "window_size", 0) // vision.patch_size
    full_blocks = len(vision.fullatt_block_indexes) if windows else vision.depth
    return VisionShape(
        num_parameters=sum(size for path, size in parameters if _is_vision(path)),
        depth=vision.depth,
        width=width,
        mlp_width=mlp_width,
        heads=vision.num_heads,
        is_gated=family in GATED_VISION,
        merge=vision.spatial_merge_size,
        pixels_per_token=(vision.patch_size * vision.spatial_merge_size) ** 2,
        patch_elements=patch_elements,
        block_matrix=sum(layer.in_features * layer.out_features for layer in blocks),
        merger_matrix=sum(layer.in_features * layer.out_features for layer in mergers),
        full_blocks=full_blocks,
        window_patches=windows,
    )
