"""`timm-resize new-handler`: the file is Python, and its rules are those that the shapes leave."""

from __future__ import annotations

import ast

import pytest

from timm_resize.cli import main


def lines(capsys, *argv):
    """Return the printed file's lines, once it has been read as Python."""
    assert main(["new-handler", *argv]) == 0
    out = capsys.readouterr().out
    ast.parse(out)
    return [line.strip() for line in out.splitlines()]


def test_a_position_embedding(capsys):
    """ViT has one flat table with one prefix token: 14*20 + 1 rows, then 16*24 + 1."""
    text = lines(capsys, "vit_tiny_patch16_224", "--model-kwargs", "depth=1")
    rule = 'yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, new, prefix=1, dim=1))'
    assert f"{rule}  # (1, 281, 192) -> (1, 385, 192)" in text
    assert sum("ctx.parameter" in line for line in text) == 1
    assert "yield from ctx.attribute(model.patch_embed, grid_size=...)  # (14, 20) -> (16, 24)" in text


def test_a_bias_table_and_its_index(capsys):
    """BEiT has a table over 27*39 offsets and three rows of the class token, and an index over 281 tokens."""
    text = lines(capsys, "beit_base_patch16_224", "--model-kwargs", "depth=1")
    owner = "model.blocks[0].attn"
    rule = f'yield from ctx.parameter({owner}, "relative_position_bias_table", ctx.rel_pos_table(old, new, suffix=3))'
    assert f"{rule}  # (1056, 12) -> (1460, 12)" in text  # 27*39 + 3, 31*47 + 3
    assert any(
        line.startswith(f'yield from ctx.buffer({owner}, "relative_position_index", (385, 385), Re') for line in text
    )


def test_no_img_size(capsys):
    """ResNet's constructor takes none: the file says so, and only checks the size."""
    text = lines(capsys, "resnet18")
    assert "takes no img_size" in text[0]
    assert not any("ctx.parameter" in line for line in text)


def test_tokens_that_a_linear_layer_reads_and_writes(capsys):
    """Mixer's first token layer reads the 7x10 tokens of 32 pixels, the second writes them."""
    text = lines(capsys, "mixer_s32_224")
    for layer, kind in (("fc1", "reader"), ("fc2", "writer")):
        start = f'yield from ctx.parameter(model.blocks[0].mlp_tokens.{layer}, "weight", ctx.token_{kind}(old, new))'
        assert any(line.startswith(start) for line in text)


@pytest.mark.parametrize("name", ["visformer_tiny", "swin_tiny_patch4_window7_224"])
def test_the_file_is_python(capsys, name):
    """Whatever differs."""
    assert any("yield from ctx." in line for line in lines(capsys, name))


def test_an_unknown_model(capsys):
    """One line says what is wrong."""
    assert main(["new-handler", "no_such_model"]) == 2
    assert "timm has no model no_such_model" in capsys.readouterr().err
