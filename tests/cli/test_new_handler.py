"""`timm-resize new-handler`: the file is a handler, as far as the shapes of builds tell one."""

from __future__ import annotations

import ast

import pytest
import timm
import torch

import timm_resize
from tests.helpers.oracle import assert_same_structure
from timm_resize.cli import main


def source(capsys, *argv):
    """Return the printed file, once it has been read as Python."""
    assert main(["new-handler", *argv]) == 0
    out = capsys.readouterr().out
    ast.parse(out)
    return out


def test_the_file_is_a_handler(capsys):
    """ViT's has nothing that forms do not tell: it runs as printed, and makes what stock builds."""
    text = source(capsys, "vit_tiny_patch16_224", "--model-kwargs", "depth=1")
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    was = model.pos_embed.detach().clone()
    with timm_resize.registry.override(type(model), type(model.patch_embed)):
        exec(compile(text, "my_handler.py", "exec"), {"__name__": "my_handler"})
        timm_resize.resize_(model, (208, 304))
    assert_same_structure(model, timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(208, 304)))
    want = timm.layers.resample_abs_pos_embed(was, new_size=[13, 19], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, want, atol=1e-6)


def test_what_no_form_says_is_left_open(capsys):
    """BEiT's table has three rows of the class token; how its index is filled, the shapes do not say."""
    text = source(capsys, "beit_base_patch16_224", "--model-kwargs", "depth=1", "embed_dim=48", "num_heads=3")
    owner = "model.blocks[0].attn"
    rule = "ctx.rel_pos_table(grid_1(old), grid_1(new), suffix=3)"
    assert f'yield from ctx.parameter({owner}, "relative_position_bias_table", {rule})  # (732, 3) ->' in text
    assert f'yield from ctx.buffer({owner}, "relative_position_index", ..., Rebuild(..., (...,)))' in text


def test_no_img_size(capsys):
    """ResNet's constructor takes none, and nothing of it depends on the size."""
    text = source(capsys, "resnet18", "--model-kwargs", "layers=(1,1,1,1)", "channels=(8,8,8,8)")
    assert "nothing depends on the size" in text
    assert "yield from ()" in text


def test_tokens_that_a_linear_layer_reads_and_writes(capsys):
    """Mixer's first token layer reads the tokens of 32 pixels, the second writes them."""
    text = source(capsys, "mixer_s32_224", "--model-kwargs", "mlp_ratio=(0.125,0.25)")
    for layer, kind in (("fc1", "reader"), ("fc2", "writer")):
        start = (
            f'ctx.parameter(model.blocks[...].mlp_tokens.{layer}, "weight", ctx.token_{kind}(grid_1(old), grid_1(new)))'
        )
        assert start in text


@pytest.mark.parametrize("name", ["visformer_tiny", "levit_128s"])
def test_rows_that_do_alike_stand_once(capsys, name):
    """The file is Python; `[...]` stands for the numbers of blocks."""
    assert "yield from ctx." in source(capsys, name)


def test_an_unknown_model(capsys):
    """One line says what is wrong."""
    assert main(["new-handler", "no_such_model"]) == 2
    assert "no_such_model" in capsys.readouterr().err
