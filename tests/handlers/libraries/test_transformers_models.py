"""What holds for every model of transformers: its configuration, what is refused, and what follows the weights."""

from __future__ import annotations

import copy

import pytest
import torch

import timm_resize
from tests.helpers.transformers_models import CASES, SWIN, VIT

hf = pytest.importorskip("transformers", reason="transformers is not installed")


def configs(model):
    """Return every configuration that a module of a model holds."""
    found = (v for m in model.modules() for v in m.__dict__.values() if isinstance(v, hf.PreTrainedConfig))
    return list({id(config): config for config in found}.values())


def test_one_configuration_for_all():
    """After a resize all modules share one changed copy, whose parts are the towers' own; the old one is as it was."""
    model = CASES["clip"].model()
    old = model.config
    timm_resize.resize_(model, 96)
    assert model.config is not old
    assert old.vision_config.image_size == 64
    assert model.config.vision_config.image_size == 96
    assert model.config.vision_config is model.vision_model.config
    assert model.config.text_config is model.text_model.config
    assert len(configs(model)) == 3


def test_all_or_nothing():
    """Where a write fails, weights, attributes and the configuration are the very ones that were there."""
    model = CASES["beit"].model()
    before, state = model.config, copy.deepcopy(model.state_dict())
    other = torch.optim.AdamW(model.parameters())
    other.state[model.embeddings.cls_token] = {"exp_avg": torch.zeros(1, 1, 16)}
    with pytest.raises(timm_resize.ResizeError):
        timm_resize.resize_(model, 96, optimizer=other, ema=torch.nn.Linear(1, 1))
    assert model.config is before
    assert before.image_size == 64
    assert configs(model) == [before]
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_a_plan_is_stale_once_the_configuration_was_written_to():
    """What a caller writes to it between plan and use would be lost."""
    model = CASES["vit-classifier"].model()
    plan = timm_resize.plan_resize(model, 96)
    model.config.hidden_dropout_prob = 0.5
    with pytest.raises(timm_resize.StalePlanError):
        timm_resize.resize_(model, plan)


@torch.no_grad()
def test_several_sizes():
    """MultiSize and at_size run a size as a resize does, and leave the model and its configuration alone."""
    model = CASES["swin-classifier"].model()
    resized = copy.deepcopy(model)
    timm_resize.resize_(resized, (96, 64))
    x = torch.randn(1, 3, 96, 64)
    multi, before = timm_resize.MultiSize(model), model.config
    torch.testing.assert_close(multi(x).logits, resized(x).logits, rtol=0, atol=0)
    assert multi.at((96, 64)).config.image_size == (96, 64)
    with timm_resize.at_size(model, (96, 64)):
        assert model.config.image_size == (96, 64)
        torch.testing.assert_close(model(x).logits, resized(x).logits, rtol=0, atol=0)
    assert model.config is before
    assert before.image_size == 64


@torch.no_grad()
def test_images_by_name():
    """MultiSize finds the images among words, wherever they stand."""
    case = CASES["clip"]
    model = case.model()
    multi, resized = timm_resize.MultiSize(model), copy.deepcopy(model)
    timm_resize.resize_(resized, 96)
    words, x = torch.tensor([[1, 4, 2]]), torch.randn(1, 3, 96, 96)
    want = resized(words, x).logits_per_image
    for got in (multi(words, x), multi(input_ids=words, pixel_values=x)):
        torch.testing.assert_close(got.logits_per_image, want, rtol=0, atol=0)
    with pytest.raises(timm_resize.ResizeError, match="no images"):
        multi()


def test_blocks_get_back_what_a_forward_took():
    """Swin's forward drops shift and window of a block whose map is one window; a resize gives those of a new model."""
    case = CASES["swin"]
    model = case.model()
    timm_resize.resize_(model, 32)
    case.run(model, (32, 32))
    assert model.encoder.layers[1].blocks[1].shift_size == 0
    timm_resize.resize_(model, 64)
    assert model.encoder.layers[1].blocks[1].shift_size == SWIN["window_size"] // 2


@pytest.mark.parametrize("asked", [{"interpolation": "bilinear"}, {"antialias": True}, {"interpolation": "nearest"}])
def test_what_the_caller_asks_for(asked):
    """Interpolation and antialias of the caller's are used where the library's own are the default."""
    model = CASES["vit"].model()
    positions = model.embeddings.position_embeddings.detach()[0, 1:].T.reshape(1, 16, 4, 4)
    timm_resize.resize_(model, (96, 48), **asked)
    mode, smooth = asked.get("interpolation", "bicubic"), asked.get("antialias", False)
    want = torch.nn.functional.interpolate(positions, (6, 3), mode=mode, antialias=smooth)
    torch.testing.assert_close(model.embeddings.position_embeddings[0, 1:].T.reshape(1, 16, 6, 3), want)


def test_a_list_stays_one():
    """A configuration from a file has its size as a list, and so has a new model."""
    config = hf.ViTConfig(**{**VIT, "image_size": [64, 32]})
    model = hf.ViTModel(config)
    timm_resize.resize_(model, 96)
    assert model.config.image_size == [96, 96]
    assert model.embeddings.patch_embeddings.image_size == [96, 96]


def test_optimizer_and_average_follow():
    """The optimizer's momentum is resampled with the positions, and so is an averaged copy, configuration included."""
    model = CASES["deit-classifier"].model().train()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 64, 64)).logits.sum().backward()
    optimizer.step()
    average.update_parameters(model)
    timm_resize.resize_(model, 96, optimizer=optimizer, ema=average)
    positions = model.deit.embeddings.position_embeddings
    assert optimizer.state[positions]["exp_avg"].shape == positions.shape == (1, 38, 16)
    assert average.module.config.image_size == 96
    assert torch.equal(average.module.deit.embeddings.position_embeddings, positions)


@pytest.mark.parametrize("name", ["vit", "beit-shared-classifier", "clip", "swinv2"])
def test_state_dicts(name):
    """A state dict of one size is fitted to a model of another, as a resize would do it."""
    case = CASES[name]
    model, larger = case.model(), case.cls(case.sized(case.config(), case.sizes[0]))
    out = timm_resize.resize_state_dict(model.state_dict(), larger)
    larger.load_state_dict(out)
    timm_resize.resize_(model, case.sizes[0])
    assert all(map(torch.equal, model.state_dict().values(), larger.state_dict().values()))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_windows_are_the_configurations(name):
    """What timm's models do with windows has no place in a configuration with one number, and is refused."""
    for asked in ({"window_policy": "scale"}, {"window_size": 8}):
        with pytest.raises(timm_resize.ResizeError, match=f"{next(iter(asked))}="):
            timm_resize.resize_(CASES[name].model(), 96, **asked)


def test_swin_has_no_table_for_a_map_below_a_window():
    """A size whose last map is smaller than a window is refused, as forward fails there; a backbone's pads."""
    with pytest.raises(timm_resize.InvalidSizeError, match="smaller than window_size=4"):
        timm_resize.resize_(CASES["swin-classifier"].model(), 16)
    backbone = CASES["swin-backbone"].model()
    timm_resize.resize_(backbone, 16)
    CASES["swin-backbone"].run(backbone, (16, 16))


def test_a_masked_autoencoders_loss_needs_whole_patches():
    """Its encoder drops pixels past the last patch; what pretrains it cuts the image, and is refused."""
    with pytest.raises(timm_resize.InvalidSizeError, match="Use 32 or 48"):
        timm_resize.resize_(CASES["mae-pretraining"].model(), 42)


@torch.no_grad()
def test_models_without_a_size():
    """A class that nobody taught is let through where nothing in it has a size."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    model = hf.ResNetForImageClassification(config).eval()
    timm_resize.resize_(model, (96, 64))
    assert model(torch.randn(1, 3, 96, 64)).logits.shape == (1, 2)
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=64, num_labels=2)
    model = hf.ConvNextForImageClassification(config)
    timm_resize.resize_(model, (96, 64))
    assert model.config.image_size == (96, 64)


def test_models_that_nobody_taught():
    """Another class with something of a size in it is refused, by the name of what that is."""
    tiny = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    yolos = hf.YolosModel(hf.YolosConfig(**tiny, image_size=[64, 64], num_detection_tokens=2))
    with pytest.raises(timm_resize.UnsupportedModelError, match="position_embeddings depends on config.image_size"):
        timm_resize.resize_(yolos, 96)
    bert = hf.BertModel(hf.BertConfig(**tiny, vocab_size=8))
    with pytest.raises(timm_resize.UnsupportedModelError, match="no handler"):
        timm_resize.resize_(bert, 96)
    vision, text = hf.CLIPVisionConfig(**VIT), hf.LlamaConfig(**tiny, vocab_size=8, num_key_value_heads=2)
    llava = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(timm_resize.UnsupportedModelError, match="what else in a LlavaForConditionalGeneration does"):
        timm_resize.resize_(llava, 96)
    siglip2 = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**tiny, num_patches=16))
    with pytest.raises(timm_resize.UnsupportedModelError, match="max_num_patches"):
        timm_resize.resize_(siglip2, 96)


def test_trainer_checkpoints(tmp_path):
    """Training goes on at the new size, and from the checkpoint that Trainer saved there."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = CASES["vit-classifier"].model()
    timm_resize.resize_(model, 96)
    images = [{"pixel_values": torch.randn(3, 96, 96), "labels": i % 3} for i in range(4)]
    settings = {"output_dir": tmp_path, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    settings |= {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "remove_unused_columns": False}
    args = hf.TrainingArguments(**settings, max_steps=1)
    hf.Trainer(model, args, train_dataset=images).train()
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert opened.config.image_size == 96
    args = hf.TrainingArguments(**settings, max_steps=2)
    resumed = hf.Trainer(opened, args, train_dataset=images)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2
