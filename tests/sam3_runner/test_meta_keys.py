import pytest
import torch
from transformers import Sam3Config, Sam3Model

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.meta_keys import from_meta
from tests.sam3_runner.meta_checkpoint import to_meta


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    config = Sam3Config.from_dict(Checkpoint.open(DEMO_CHECKPOINT).config)
    with torch.device("meta"):
        return Sam3Model(config).state_dict()


def test_every_tensor_of_the_model_has_a_name_in_sam3_pt_and_comes_back_from_it(tensors):
    renamed = from_meta(to_meta(tensors))

    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


def test_fused_projections_become_views_of_their_rows():
    fused = torch.arange(18.0).view(9, 2)

    renamed = from_meta({"detector.transformer.decoder.layers.4.ca_text.in_proj_weight": fused})

    stem = "detr_decoder.layers.4.text_cross_attn"
    assert list(renamed) == [f"{stem}.q_proj.weight", f"{stem}.k_proj.weight", f"{stem}.v_proj.weight"]
    assert torch.equal(torch.cat(list(renamed.values())), fused)
    storage = fused.untyped_storage().data_ptr()
    assert {part.untyped_storage().data_ptr() for part in renamed.values()} == {storage}


def test_text_projection_is_turned_and_the_class_token_has_no_position():
    projection, positions = torch.randn(4, 2), torch.randn(1, 10, 4)

    renamed = from_meta(
        {
            "detector.backbone.language_backbone.encoder.text_projection": projection,
            "detector.backbone.vision_backbone.trunk.pos_embed": positions,
        }
    )

    turned, kept = renamed.values()
    assert torch.equal(turned, projection.T)
    assert torch.equal(kept, positions[:, 1:])
    assert turned.data_ptr() == projection.data_ptr()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tracker.maskmem_tpos_enc", id="tracker"),
        pytest.param("detector.backbone.vision_backbone.trunk.blocks.31.attn.freqs_cis", id="rotary table"),
        pytest.param(
            "detector.backbone.vision_backbone.sam2_convs.1.dconv_2x2.weight", id="tracker's pyramid"
        ),
        pytest.param("detector.geometry_encoder.points_pool_project.bias", id="point prompts"),
    ],
)
def test_what_the_model_has_no_place_for_is_left_out(name):
    assert from_meta({name: torch.zeros(3)}) == {}


@pytest.mark.parametrize(
    "name, shape",
    [
        pytest.param("detector.transformer.decoder.instance_query_embed.weight", (3, 2), id="unknown module"),
        pytest.param("detector.transformer.decoder.norm.running_mean", (3,), id="unknown kind"),
        pytest.param("detector.transformer.decoder.layers.x.norm1.weight", (3,), id="no number"),
        pytest.param("backbone.vision_backbone.trunk.pos_embed", (1, 10, 4), id="no prefix"),
        pytest.param("detector.backbone.vision_backbone.trunk.pos_embed", (10,), id="flat positions"),
        pytest.param("detector.backbone.language_backbone.encoder.text_projection", (), id="scalar"),
        pytest.param("detector.segmentation_head.cross_attend_prompt.in_proj_bias", (), id="scalar, fused"),
        pytest.param(
            "detector.segmentation_head.cross_attend_prompt.in_proj_bias", (4,), id="no three parts"
        ),
    ],
)
def test_what_no_table_knows_keeps_its_name_for_the_loader_to_report(name, shape):
    tensor = torch.zeros(shape)

    assert from_meta({name: tensor}) == {name: tensor}
