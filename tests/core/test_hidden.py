"""Tensors that are not where a handler looks: followed where that is exact, refused with the call that undoes it."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer, ResBlock
from torch import nn
from torch.nn.utils import parametrizations, prune

import timm_resize
from tests.helpers.oracle import first, image, redraw_


class Peft:
    """PEFT; a test that asks for anything of it is skipped where it is not installed."""

    def __getattr__(self, name):
        return getattr(pytest.importorskip("peft", reason="peft is not installed"), name)


peft = Peft()

TINY = {
    "mixer_s32_224": {"mlp_ratio": (0.125, 0.25)},
    "vit_tiny_patch16_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 1, 1)},
    "levit_128s": {"depth": (1, 1, 1)},
    "crossvit_9_240": {"depth": [[1, 1, 0]], "embed_dim": [32, 32], "num_heads": [2, 2]},
}
"""What makes them small; a Mixer of stride 32 has 7x7 tokens."""

WIDE = (160, 288)
"""5x9 tokens."""


@functools.cache
def built(name):
    model = redraw_(timm.create_model(name, num_classes=3, **TINY.get(name, {}))).eval()
    if hasattr(model, "blocks") and isinstance(model.blocks, nn.Sequential):
        model.blocks = model.blocks[:2]
    return model


def build(name="mixer_s32_224"):
    """Return a small model, the caller's own."""
    return copy.deepcopy(built(name))


def vit():
    return build("vit_tiny_patch16_224")


def resized(model, size=WIDE, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(model, size, **options)
    return model


def refused(model, words, size=WIDE):
    """The resize is an UnsupportedModelError with these words, and nothing has changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(timm_resize.UnsupportedModelError) as caught:
        timm_resize.resize_(model, size)
    assert words in str(caught.value), str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def adapted(model, targets, **kwargs):
    """Adapt a model with adapters that are not zero."""
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config).eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload().eval()


@torch.no_grad()
def same_outputs(a, b, size=WIDE, tolerance=1e-5):
    torch.testing.assert_close(first(a(image(size))), first(b(image(size))), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("mixer_s32_224", ["fc1", "fc2"]), ("resmlp_12_224", ["linear_tokens"]), ("gmlp_ti16_224", ["gate.proj"])],
)
def test_lora_on_layers_over_tokens(name, targets):
    """An adapted model, resized and merged, is the merged model resized: also with biases, and for two adapters."""
    model = adapted(build(name), targets, lora_bias=True)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        want = resized(merged(model))
        got = resized(copy.deepcopy(model))
        same_outputs(got, want)
        same_outputs(got.merge_and_unload(), want)


def test_lora_of_a_patch_projection():
    """Its adapter's kernel goes with the patch size; the one that leads back to channels is of one pixel."""
    model = adapted(vit(), ["patch_embed.proj"])
    want = resized(merged(model), 64, patch_size=8)
    got = resized(model, 64, patch_size=8)
    part = got.base_model.model.patch_embed.proj
    assert part.lora_A["default"].weight.shape[2:] == (8, 8)
    assert part.lora_B["default"].weight.shape[2:] == (1, 1)
    same_outputs(got, want, (64, 64))


def test_adapters_that_are_merged_at_the_moment_come_out_again():
    """Merged into the base weight while the model is resized, they can be taken out of it afterwards."""
    model = adapted(build(), ["fc1", "fc2"])
    bare = resized(copy.deepcopy(model).unload())
    model.merge_adapter()
    resized(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        same_outputs(model, bare, tolerance=1e-4)


def test_momentum_and_a_way_back_of_adapters():
    """Adapters are parameters like others: their momentum follows, and there and back restores every bit."""
    model = adapted(build(), ["fc1"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9)
    model(image((224, 224))).sum().backward()
    optimizer.step()
    down = model.base_model.model.blocks[0].mlp_tokens.fc1.lora_A["default"].weight
    resized(model, optimizer=optimizer)
    assert optimizer.state[down]["momentum_buffer"].shape == down.shape == (2, 45)
    resized(model, 224)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"fan_in_fan_out": True}])
def test_adapters_that_no_map_follows(kwargs):
    """DoRA divides by the norm of a row of all tokens; a weight stored the other way round is not ours to turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(build(), ["fc1"], **kwargs)
        for module in model.modules():
            if hasattr(module, "fan_in_fan_out"):
                module.fan_in_fan_out = kwargs.get("fan_in_fan_out", False)
    refused(model, "fc1.base_layer is adapted by a Linear of PEFT, which no map of its weight follows exactly. Call")
    refused(model, "Call merge_and_unload() of the PEFT model, resize what it returns, then adapt that.")


def test_other_tuners_of_peft():
    """Factors of IA3 scale the tokens of a layer: what stands in their place at another size nobody knows."""
    model = peft.get_peft_model(build(), peft.IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]))
    refused(model, "is adapted by a Linear of PEFT")
    refused(peft.get_peft_model(build(), peft.LoHaConfig(target_modules=["fc1"])), "merge_and_unload()")


def test_every_copy_of_modules_to_save():
    """The original and each adapter's copy of a module go where the module goes; each runs at the new size."""
    model = build()
    kwargs = {"target_modules": ["mlp_channels.fc1"], "modules_to_save": ["mlp_tokens"]}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **kwargs)).eval()
    wrapped.add_adapter("other", peft.LoraConfig(r=2, **kwargs))
    copies = wrapped.base_model.model.blocks[0].mlp_tokens
    with torch.no_grad():
        for module in copies.modules_to_save.values():
            module.fc1.weight.neg_()
    want = resized(model).blocks[0].mlp_tokens.fc1.weight
    resized(wrapped)
    assert torch.equal(copies.original_module.fc1.weight, want)
    for name, module in copies.modules_to_save.items():
        wrapped.set_adapter(name)
        torch.testing.assert_close(module.fc1.weight, -want, rtol=0, atol=0)
        assert module.fc1.in_features == 45
        assert wrapped(image(WIDE)).shape == (1, 3)
    with wrapped.disable_adapter():
        same_outputs(wrapped, model)


def test_modules_to_save_around_what_a_handler_visits():
    """A whole window attention is kept twice: the table, the index and the window of both follow."""
    model = build("swin_tiny_patch4_window7_224")
    config = peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["attn"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    resized(wrapped, (160, 288))
    resized(model, (160, 288))
    attn = wrapped.base_model.model.layers[0].blocks[0].attn
    want = model.layers[0].blocks[0].attn
    for module in (attn.original_module, attn.modules_to_save["default"]):
        assert module.window_size == want.window_size
        assert torch.equal(module.relative_position_bias_table, want.relative_position_bias_table)
        assert torch.equal(module.relative_position_index, want.relative_position_index)
    same_outputs(wrapped, model)


class Lora(nn.Module):
    """An adapter written by hand, around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class LoraLinear(nn.Linear):
    """An adapter written by hand, in a subclass: only its own forward knows what A and B are."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("size", [WIDE, (112, 448)], ids=["other count", "as many tokens"])
def test_adapters_by_hand(size):
    """Refused with what to do; a subclass is found by running its forward, also where as many tokens hide it."""
    model = build("resmlp_12_224")
    model.blocks[1].linear_tokens = Lora(model.blocks[1].linear_tokens)
    words = "blocks.1.linear_tokens.weight is not there: its module is a Lora, which holds other layers. Put the plain"
    refused(model, words, size)
    model = build("resmlp_12_224")
    model.blocks[1].linear_tokens = LoraLinear(model.blocks[1].linear_tokens)
    refused(model, "blocks.1.linear_tokens is a LoraLinear, which does not compute what a torch.nn.Linear", size)


def test_adapters_by_hand_where_no_token_counts():
    """On a layer over channels they do not depend on the size."""
    model = vit()
    model.blocks[0].attn.qkv = Lora(model.blocks[0].attn.qkv)
    model.blocks[0].mlp.fc1 = LoraLinear(model.blocks[0].mlp.fc1)
    other = copy.deepcopy(model)
    other.pos_embed.data = timm.layers.resample_abs_pos_embed(other.pos_embed.data, [10, 18], num_prefix_tokens=1)
    other.patch_embed.strict_img_size = False
    same_outputs(resized(model), other)


def pruned(module, name):
    prune.l1_unstructured(module, name, 0.25)


NORMS = {
    pruned: "Call torch.nn.utils.prune.remove(module, {!r}) first, resize, then change it again.",
    nn.utils.weight_norm: "Call torch.nn.utils.remove_weight_norm(module, {!r}) first",
    nn.utils.spectral_norm: "Call torch.nn.utils.remove_spectral_norm(module, {!r}) first",
    parametrizations.weight_norm: "Call torch.nn.utils.parametrize.remove_parametrizations(module, {!r}) first",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "words"), NORMS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_values_that_are_computed_in_each_forward(change, words):
    """Refused on a layer over tokens, with the call that undoes it; left alone on one over channels."""
    model = build()
    change(model.blocks[1].mlp_tokens.fc1, "weight")
    refused(model, f"MlpMixer: blocks.1.mlp_tokens.fc1.weight {'is' if change is pruned else ''}")
    refused(model, words.format("weight"))
    model = build()
    bare = copy.deepcopy(model)
    change(model.blocks[1].mlp_channels.fc1, "weight")
    with torch.no_grad():
        model(image((224, 224)))  # the value that the next forward computes
    if change is pruned:
        bare.blocks[1].mlp_channels.fc1.weight.data = model.blocks[1].mlp_channels.fc1.weight.data.clone()
    if change is not nn.utils.spectral_norm:
        same_outputs(resized(model), resized(bare), tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "find", "tensor"),
    [
        ("vit_tiny_patch16_224", lambda m: m, "pos_embed"),
        ("levit_128s", lambda m: m.stages[0].blocks[0].attn, "attention_biases"),
        ("swin_tiny_patch4_window7_224", lambda m: m.layers[0].blocks[0].attn, "relative_position_bias_table"),
    ],
)
def test_pruned_embeddings_and_tables(name, find, tensor):
    """resize(original * mask) is no original * mask again: refused with the call that undoes it."""
    model = build(name)
    pruned(find(model), tensor)
    refused(model, f"{tensor} is pruned, and a mask has no place at another size. Call torch.nn.utils.prune.remove")


def test_a_buffer_in_a_parameters_place():
    """A frozen position embedding, kept as a buffer, goes the way of the parameter, there and back."""
    model, frozen = vit(), vit()
    table = frozen.pos_embed.data.clone()
    del frozen.pos_embed
    frozen.register_buffer("pos_embed", table.clone())
    multi = timm_resize.MultiSize(copy.deepcopy(frozen))
    small = timm_resize.resize_state_dict(frozen.state_dict(), resized(copy.deepcopy(model)))
    resized(model), resized(frozen)
    assert "pos_embed" in frozen._buffers
    for got in (frozen.pos_embed, multi.at(WIDE).pos_embed, small["pos_embed"]):
        assert torch.equal(got, model.pos_embed)
    resized(frozen, 224)
    assert torch.equal(frozen.pos_embed, table)
    with timm_resize.at_size(frozen, WIDE):
        assert torch.equal(frozen.pos_embed, model.pos_embed)
    assert torch.equal(frozen.pos_embed, table)


def test_a_parameter_in_a_buffers_place():
    """One that is not trained is rebuilt as the buffer is; one that is trained has values nobody may throw away."""
    model = build("swin_tiny_patch4_window7_224")
    want = resized(copy.deepcopy(model), 288).layers[0].blocks[1].attn_mask
    block = model.layers[0].blocks[1]
    mask = block.attn_mask
    del block.attn_mask
    block.attn_mask = nn.Parameter(mask.clone(), requires_grad=False)
    assert torch.equal(resized(copy.deepcopy(model), 288).layers[0].blocks[1].attn_mask, want)
    assert torch.equal(timm_resize.MultiSize(model).at(288).layers[0].blocks[1].attn_mask, want)
    block.attn_mask.requires_grad_(True)
    refused(model, "attn_mask is a Parameter that is trained, where a SwinTransformerBlock has a buffer", 288)
    eva = timm.create_model("eva02_tiny_patch14_224", depth=1, embed_dim=48, num_heads=3)
    table = eva.rope.pos_embed
    del eva.rope.pos_embed
    eva.rope.pos_embed = nn.Parameter(table, requires_grad=False)  # what fills it knows buffers alone
    refused(eva, "rope.pos_embed is a Parameter where a RotaryEmbeddingCat has a buffer, which each size", (112, 448))


def test_a_tensor_that_is_neither():
    """A plain tensor in a parameter's place is named."""
    model = vit()
    table = model.pos_embed.data
    del model.pos_embed
    model.pos_embed = table
    refused(model, "VisionTransformer: pos_embed is a plain tensor, which no optimizer and no file sees. Register it")


def test_absent_by_design():
    """A ViT without positions is resized; a Mixer without its weight is not."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, pos_embed="none")
    assert resized(model).pos_embed is None
    model = build()
    model.blocks[0].mlp_tokens.fc2.weight = None
    with pytest.raises(timm_resize.ResizeError, match=r"blocks\.0\.mlp_tokens\.fc2\): its 'weight' is None\. Put the"):
        timm_resize.plan_resize(model, WIDE)


def test_ties_within_a_model():
    """Tied where both go the same way, mapped once; tied where nobody asks, refused where forward does not follow."""
    model = build()
    model.blocks[1].mlp_tokens.fc1.weight = model.blocks[0].mlp_tokens.fc1.weight
    plan = timm_resize.plan_resize(model, WIDE)
    assert [c.path for c in plan if c.name == "weight" and "fc1" in c.path] == ["blocks.0.mlp_tokens.fc1"]
    bare = copy.deepcopy(model)
    bare.blocks[1].mlp_tokens.fc1.weight = nn.Parameter(bare.blocks[0].mlp_tokens.fc1.weight.detach().clone())
    same_outputs(resized(model), resized(bare))
    assert model.blocks[1].mlp_tokens.fc1.weight is model.blocks[0].mlp_tokens.fc1.weight
    square = MlpMixer(img_size=224, patch_size=16, num_blocks=1, embed_dim=196, block_layer=ResBlock, mlp_ratio=1)
    square.blocks[0].mlp_channels.fc1, square.blocks[0].mlp_channels.fc2 = nn.Linear(196, 196), nn.Linear(196, 196)
    square.blocks[0].mlp_channels.fc1.weight = square.blocks[0].linear_tokens.weight
    refused(square, "is not followed by blocks.0.mlp_channels.fc1, a Linear, fails (RuntimeError: ")


def test_tables_tied_over_different_grids():
    """One Parameter for two grids can follow neither."""
    model = build("crossvit_9_240")
    model.pos_embed_1 = model.pos_embed_0
    refused(model, "pos_embed_0 and pos_embed_1 are one Parameter, and only one of them", 288)


def test_a_parameter_of_two_models():
    """Resized in one model it would be of the wrong size in the other: refused, whoever else knows of it or not."""
    a, b = vit(), vit()
    optimizer = torch.optim.AdamW(a.parameters())
    a(image((224, 224))).sum().backward()
    optimizer.step()
    resized(a, 64, optimizer=optimizer)
    resized(a, 224, optimizer=optimizer)  # held by an optimizer, but by no other module
    b.pos_embed = a.pos_embed
    with pytest.raises(timm_resize.UnsupportedModelError, match="pos_embed is also the Parameter 'pos_embed' of a"):
        timm_resize.resize_(a, 64, optimizer=optimizer)
    with pytest.raises(timm_resize.UnsupportedModelError, match="is also"), timm_resize.at_size(a, 64):
        pass
    assert a.pos_embed.shape == b.pos_embed.shape == (1, 197, 192)
    b.pos_embed = nn.Parameter(a.pos_embed.detach().clone())
    multi = timm_resize.MultiSize(a)
    multi(image((64, 64)))  # shares with the model, and is its copy
    resized(a, 96)


def test_a_mask_takes_its_type_from_a_wrapped_layer():
    """What a rebuilt buffer is to be like may be inside a wrapper: Swin v2's coordinates are like `proj.weight`."""
    model = timm.create_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 1, 1))
    attn = model.double().layers[0].blocks[0].attn
    attn.proj = Lora(attn.proj)
    resized(model, 320)
    assert attn.relative_coords_table.dtype == torch.float64
    assert attn.relative_coords_table.shape == (1, 19, 19, 2)


def test_a_mask_takes_its_type_from_beside_a_layer_that_is_gone():
    """Swin's masks are like `norm1.weight`, which an Identity in its place has not."""
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 1), embed_dim=16, num_heads=(1, 1))
    block = model.double().layers[0].blocks[1]
    block.norm1 = nn.Identity()
    resized(model, 256)
    assert block.attn_mask.shape == (64, 64, 64)
    assert block.attn_mask.dtype == torch.float64
