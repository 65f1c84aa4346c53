import pytest
import torch
from transformers import Sam3Config, Sam3Model

from sam3_runner import loading
from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.meta_keys import POINT_KINDS, PYRAMID, VIDEO_ONLY, clicks_from_meta, from_meta
from tests.sam3_runner.meta_checkpoint import clicks_to_meta, to_meta


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


@pytest.fixture(scope="module")
def clicks() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return loading.unset_click_model(Checkpoint.open(DEMO_CHECKPOINT).config, {}).state_dict()


def test_every_tensor_that_answers_clicks_has_a_name_in_sam3_pt_and_comes_back_from_it(clicks):
    theirs = clicks_to_meta(clicks)

    assert {name.split(".")[1] for name in theirs if not name.startswith(PYRAMID)} == {
        "no_mem_embed",
        "sam_prompt_encoder",
        "sam_mask_decoder",
    }
    assert len(theirs) == len(clicks) + 3  # four kinds of points
    renamed = clicks_from_meta(theirs)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in clicks.items()
    }


def test_kinds_of_points_become_rows_in_their_order():
    rows = torch.randn(4, 3)
    kinds = dict(zip(reversed(POINT_KINDS), rows.flip(0).split(1), strict=True))

    assert torch.equal(clicks_from_meta(kinds)["prompt_encoder.point_embed.weight"], rows)


@pytest.mark.parametrize(
    "shapes", [[(1, 3)] * 3, [(1, 3)] * 3 + [(1, 4)], [(3,)] * 4], ids=["one missing", "misshapen", "flat"]
)
def test_kinds_of_points_that_make_no_table_keep_their_names(shapes):
    kinds = {name: torch.zeros(shape) for name, shape in zip(POINT_KINDS, shapes, strict=False)}

    assert clicks_from_meta(kinds) == kinds


@pytest.mark.parametrize("pattern", VIDEO_ONLY)
def test_what_only_a_video_needs_is_left_out(pattern):
    assert clicks_from_meta({pattern.replace("**", "layers.0.weight"): torch.zeros(1)}) == {}


@pytest.mark.parametrize(
    "name",
    [
        "tracker.novelty",
        "tracker.transformer",
        "tracker.sam_mask_decoder.conv_s2.weight",
        "tracker.sam_mask_decoder.conv_s1.running_mean",
        "tracker.sam_prompt_encoder.point_embeddings.4.weight",
    ],
)
def test_what_no_table_of_the_tracker_knows_keeps_its_name_for_the_loader_to_report(name):
    tensor = torch.zeros(1)

    assert clicks_from_meta({name: tensor}) == {name: tensor}


def test_the_detector_does_not_answer_clicks(tensors):
    assert clicks_from_meta(to_meta(tensors)) == {}
