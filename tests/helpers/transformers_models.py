"""Small models of transformers, one for each class that has handlers, and how the library runs them at other sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64}
VIT = {**TINY, "patch_size": 16}
DINO = {**TINY, "patch_size": 16, "mlp_ratio": 2}
TEXT = {"vocab_size": 32, "max_position_embeddings": 8, "num_hidden_layers": 1, "hidden_size": 16}
TEXT |= {"num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 16, "eos_token_id": 2}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
MAE = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
MAE |= {"decoder_intermediate_size": 16}
STAGES = {"out_features": ["stage1", "stage2"]}
NECK = {"neck_hidden_sizes": [4, 4], "fusion_hidden_size": 4}


def dinov2() -> hf.PreTrainedConfig:
    return hf.Dinov2Config(**{**DINO, "patch_size": 14, "image_size": 56}, **STAGES, reshape_hidden_states=False)


@dataclass(frozen=True)
class Case:
    """A class of the library, small.

    Attributes:
        cls: The model class.
        config: Makes its configuration, the same each time.
        path: Where the configuration has its image size.
        oblong: Whether the library can express sizes that are not square.
        flag: Whether its forward takes `interpolate_pos_encoding`; otherwise it takes any image as it is.
        exact: Whether a resized model computes what the library makes of the unresized one there.
        inputs: What its forward takes beside the image.
        patch: Pixels of a patch.
    """

    cls: type[hf.PreTrainedModel]
    config: Callable[[], hf.PreTrainedConfig]
    path: str = "image_size"
    oblong: bool = True
    flag: bool = True
    exact: bool = True
    inputs: dict[str, Any] = field(default_factory=dict)
    patch: int = 16

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """A larger, a smaller, and where they can be expressed two that are not square."""
        p = self.patch
        native = self.native[0]
        squares = [(native + 2 * p, native + 2 * p), (native - 2 * p, native - 2 * p)]
        return [*squares, (native + 2 * p, native), (native, native + 4 * p)] if self.oblong else squares

    @property
    def native(self) -> tuple[int, int]:
        size = self.get(self.config())
        return size, size

    def get(self, config: hf.PreTrainedConfig) -> Any:
        for name in self.path.split("."):
            config = getattr(config, name)
        return config

    def sized(self, config: hf.PreTrainedConfig, size: tuple[int, int]) -> hf.PreTrainedConfig:
        """Return a copy of a configuration with the size written into it by hand."""
        out = owner = copy.deepcopy(config)
        *parts, last = self.path.split(".")
        for name in parts:
            owner = getattr(owner, name)
        setattr(owner, last, size[0] if size[0] == size[1] else size)
        return out

    def model(self) -> nn.Module:
        """Return the model in evaluation mode with weights that are all different."""
        model = self.cls(self.config()).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in filter(lambda p: p.requires_grad, model.parameters()):  # not what is computed
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
        return model

    @torch.no_grad()
    def run(self, model: nn.Module, size: tuple[int, int], interpolate: bool = False) -> list[torch.Tensor]:
        """Return every floating tensor that the model makes of one image."""
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        more = {k: v(size) if callable(v) else v for k, v in self.inputs.items()}
        if interpolate and self.flag:
            more["interpolate_pos_encoding"] = True
        found = model(pixel_values=images, **more)
        return [t for v in found.values() for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, torch.Tensor)]


def noise(size: tuple[int, int]) -> torch.Tensor:
    """Return the noise that chooses the patches that MAE masks."""
    return torch.arange(size[0] // 16 * (size[1] // 16)).mul(7).remainder(5).float()[None]


def two_towers(config: type, vision: type, text: type) -> Callable[[], hf.PreTrainedConfig]:
    text_config = text(**TEXT)
    vision_config = vision(**VIT, projection_dim=16) if config is hf.CLIPConfig else vision(**VIT)
    extra = {"projection_dim": 16} if config is hf.CLIPConfig else {}
    return lambda: config(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **extra)


WORDS = {"input_ids": torch.tensor([[1, 4, 2]])}
LABELS = {"num_labels": 3}
SQUARE = {"oblong": False}
ANY_IMAGE = {"flag": False}

CASES = {
    "vit": Case(hf.ViTModel, lambda: hf.ViTConfig(**VIT)),
    "vit-classifier": Case(hf.ViTForImageClassification, lambda: hf.ViTConfig(**VIT, **LABELS)),
    "vit-simmim": Case(hf.ViTForMaskedImageModeling, lambda: hf.ViTConfig(**VIT), oblong=False),
    "deit": Case(hf.DeiTModel, lambda: hf.DeiTConfig(**VIT)),
    "deit-classifier": Case(hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**VIT, **LABELS)),
    "deit-teacher": Case(hf.DeiTForImageClassificationWithTeacher, lambda: hf.DeiTConfig(**VIT, **LABELS)),
    "deit-simmim": Case(hf.DeiTForMaskedImageModeling, lambda: hf.DeiTConfig(**VIT), oblong=False),
    "dinov2": Case(hf.Dinov2Model, lambda: hf.Dinov2Config(**DINO), **SQUARE, **ANY_IMAGE),
    "dinov2-classifier": Case(
        hf.Dinov2ForImageClassification, lambda: hf.Dinov2Config(**DINO, **LABELS), **SQUARE, **ANY_IMAGE
    ),
    "dinov2-backbone": Case(hf.Dinov2Backbone, lambda: hf.Dinov2Config(**DINO, **STAGES), **SQUARE, **ANY_IMAGE),
    "dinov2-registers": Case(
        hf.Dinov2WithRegistersModel, lambda: hf.Dinov2WithRegistersConfig(**DINO), **SQUARE, **ANY_IMAGE
    ),
    "dinov2-registers-classifier": Case(
        hf.Dinov2WithRegistersForImageClassification,
        lambda: hf.Dinov2WithRegistersConfig(**DINO, **LABELS),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "dinov2-registers-backbone": Case(
        hf.Dinov2WithRegistersBackbone, lambda: hf.Dinov2WithRegistersConfig(**DINO, **STAGES), **SQUARE, **ANY_IMAGE
    ),
    "dinov3": Case(hf.DINOv3ViTModel, lambda: hf.DINOv3ViTConfig(**VIT), **ANY_IMAGE),
    "dinov3-backbone": Case(hf.DINOv3ViTBackbone, lambda: hf.DINOv3ViTConfig(**VIT, **STAGES), **ANY_IMAGE),
    "beit": Case(hf.BeitModel, lambda: hf.BeitConfig(**VIT, use_relative_position_bias=True), **SQUARE, **ANY_IMAGE),
    "beit-shared-classifier": Case(
        hf.BeitForImageClassification,
        lambda: hf.BeitConfig(
            **VIT, **LABELS, use_shared_relative_position_bias=True, use_absolute_position_embeddings=True
        ),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "beit-plain": Case(hf.BeitModel, lambda: hf.BeitConfig(**VIT), **ANY_IMAGE),
    "beit-backbone": Case(
        hf.BeitBackbone, lambda: hf.BeitConfig(**VIT, **STAGES, use_relative_position_bias=True), **SQUARE, **ANY_IMAGE
    ),
    "beit-mim": Case(
        hf.BeitForMaskedImageModeling,
        lambda: hf.BeitConfig(**VIT, vocab_size=8, use_mask_token=True, use_relative_position_bias=True),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "data2vec": Case(
        hf.Data2VecVisionModel,
        lambda: hf.Data2VecVisionConfig(**VIT, use_relative_position_bias=True, use_absolute_position_embeddings=True),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "data2vec-shared-classifier": Case(
        hf.Data2VecVisionForImageClassification,
        lambda: hf.Data2VecVisionConfig(**VIT, **LABELS, use_shared_relative_position_bias=True),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "clip": Case(
        hf.CLIPModel,
        two_towers(hf.CLIPConfig, hf.CLIPVisionConfig, hf.CLIPTextConfig),
        path="vision_config.image_size",
        inputs=WORDS,
        **SQUARE,
    ),
    "clip-vision": Case(hf.CLIPVisionModel, lambda: hf.CLIPVisionConfig(**VIT), **SQUARE),
    "clip-projected": Case(
        hf.CLIPVisionModelWithProjection, lambda: hf.CLIPVisionConfig(**VIT, projection_dim=8), **SQUARE
    ),
    "clip-classifier": Case(
        hf.CLIPForImageClassification,
        two_towers(hf.CLIPConfig, hf.CLIPVisionConfig, hf.CLIPTextConfig),
        path="vision_config.image_size",
        **SQUARE,
    ),
    "siglip": Case(
        hf.SiglipModel,
        two_towers(hf.SiglipConfig, hf.SiglipVisionConfig, hf.SiglipTextConfig),
        path="vision_config.image_size",
        inputs=WORDS,
        **SQUARE,
    ),
    "siglip-vision": Case(hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**VIT), **SQUARE),
    "siglip-classifier": Case(
        hf.SiglipForImageClassification,
        two_towers(hf.SiglipConfig, hf.SiglipVisionConfig, hf.SiglipTextConfig),
        path="vision_config.image_size",
        **SQUARE,
    ),
    "swin": Case(hf.SwinModel, lambda: hf.SwinConfig(**SWIN, use_absolute_embeddings=True)),
    "swin-classifier": Case(hf.SwinForImageClassification, lambda: hf.SwinConfig(**SWIN, **LABELS)),
    "swin-simmim": Case(hf.SwinForMaskedImageModeling, lambda: hf.SwinConfig(**SWIN, encoder_stride=8), oblong=False),
    "swin-backbone": Case(hf.SwinBackbone, lambda: hf.SwinConfig(**SWIN, **STAGES), flag=False),
    "swinv2": Case(hf.Swinv2Model, lambda: hf.Swinv2Config(**SWIN), exact=False),
    "swinv2-classifier": Case(hf.Swinv2ForImageClassification, lambda: hf.Swinv2Config(**SWIN, **LABELS), exact=False),
    "swinv2-simmim": Case(
        hf.Swinv2ForMaskedImageModeling, lambda: hf.Swinv2Config(**SWIN, encoder_stride=8), oblong=False, exact=False
    ),
    "swinv2-backbone": Case(hf.Swinv2Backbone, lambda: hf.Swinv2Config(**SWIN, **STAGES), flag=False, exact=False),
    "mae": Case(hf.ViTMAEModel, lambda: hf.ViTMAEConfig(**VIT, **MAE), inputs={"noise": noise}, **SQUARE),
    "mae-pretraining": Case(
        hf.ViTMAEForPreTraining, lambda: hf.ViTMAEConfig(**VIT, **MAE), inputs={"noise": noise}, exact=False, **SQUARE
    ),
    "vitdet": Case(
        hf.VitDetModel,
        lambda: hf.VitDetConfig(
            **DINO,
            pretrain_image_size=48,
            window_size=2,
            window_block_indices=[0],
            use_relative_position_embeddings=True,
        ),
        **ANY_IMAGE,
    ),
    "vitdet-backbone": Case(
        hf.VitDetBackbone, lambda: hf.VitDetConfig(**DINO, **STAGES, use_relative_position_embeddings=True), **ANY_IMAGE
    ),
    "dpt": Case(
        hf.DPTForDepthEstimation,
        lambda: hf.DPTConfig(
            **VIT, **NECK, is_hybrid=False, backbone_out_indices=[0, 1], reassemble_factors=[2, 1], backbone_config=None
        ),
        **SQUARE,
        **ANY_IMAGE,
    ),
    "dpt-hybrid": Case(
        hf.DPTForDepthEstimation,
        lambda: hf.DPTConfig(
            **{**VIT, "num_hidden_layers": 4},
            **{**NECK, "neck_hidden_sizes": [8, 8, 4, 4]},
            is_hybrid=True,
            backbone_config=hf.BitConfig(
                embedding_size=8,
                hidden_sizes=[8, 8, 8],
                depths=[1, 1, 1],
                out_features=["stage1", "stage2", "stage3"],
                num_groups=4,
            ),
            backbone_featmap_shape=[1, 8, 4, 4],
            backbone_out_indices=[0, 1, 2, 3],
            reassemble_factors=[1, 1, 1, 0.5],
        ),
        exact=False,
        **SQUARE,
        **ANY_IMAGE,
    ),
    "dpt-beit": Case(
        hf.DPTForDepthEstimation,
        lambda: hf.DPTConfig(
            **NECK,
            is_hybrid=False,
            reassemble_factors=[2, 1],
            backbone_config=hf.BeitConfig(
                **VIT, **STAGES, use_relative_position_bias=True, reshape_hidden_states=False
            ),
        ),
        path="backbone_config.image_size",
        **SQUARE,
        **ANY_IMAGE,
    ),
    "dpt-dinov2": Case(
        hf.DPTForDepthEstimation,
        lambda: hf.DPTConfig(**NECK, is_hybrid=False, reassemble_factors=[2, 1], backbone_config=dinov2()),
        path="backbone_config.image_size",
        patch=14,
        **SQUARE,
        **ANY_IMAGE,
    ),
    "depth-anything": Case(
        hf.DepthAnythingForDepthEstimation,
        lambda: hf.DepthAnythingConfig(
            **NECK, reassemble_hidden_size=16, reassemble_factors=[2, 1], head_hidden_size=4, backbone_config=dinov2()
        ),
        path="backbone_config.image_size",
        patch=14,
        **SQUARE,
        **ANY_IMAGE,
    ),
}
