"""The networks of the world model: encoders of frames, predictors of latents, and their ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vicreg_jepa.models.dynamics import GRUDynamics, MLPDynamics
from vicreg_jepa.models.dynamics_transformer import ConditionedBlock, TransformerDynamics
from vicreg_jepa.models.frames import ConvFrames, Keypoints, ViTFrames
from vicreg_jepa.ops import choose, published

from vicreg_kernels import AdaLN

LATENT, CONDITION = 12, 5
KERNELS = ("fused", "reference")


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """With other weights than those that begin as "nothing changes"."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def transformer(tokens: int, history: int, kernels: str = "fused") -> TransformerDynamics:
    ops = choose.named(kernels)
    return TransformerDynamics(LATENT, CONDITION, 32, 2, 2, ops, tokens=tokens, history=history)


PREDICTORS = {
    "mlp": lambda: MLPDynamics(LATENT, CONDITION, 24, 2),
    "mlp with waves": lambda: MLPDynamics(LATENT, CONDITION, 24, 2, 6, frequency=0.1),
    "gru": lambda: GRUDynamics(LATENT, CONDITION, 24, 2),
    "transformer": lambda: transformer(1, 3),
    "one_frame": lambda: transformer(2, 1),
    "tokens": lambda: transformer(3, 4),
    "reference": lambda: transformer(3, 4, "reference"),
}


# ------------------------------------------------------------------------------ encoders


def encoder(kind: str, size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "conv":
        return ConvFrames(2, size, 8, LATENT, keypoints=3)
    attend = choose.named("fused").attend(None, None)
    return ViTFrames(2, size, 32, LATENT, depth=1, heads=2, patch=8, attend=attend)


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_a_frame_is_encoded_by_itself_with_its_last_pixel(kind, size):
    frames = torch.rand(5, 2, size, size, dtype=torch.float64)  # a pixel moves a latent by 1e-6
    encode = encoder(kind, size).double()
    latents = encode(frames)
    torch.testing.assert_close(encode(frames[3:4]), latents[3:4], rtol=1e-10, atol=1e-10)
    frames[3, :, -1, -1] += 1.0  # also the pixel past the last whole patch
    moved_by = (encode(frames) - latents).abs().amax(dim=1)
    assert moved_by[3] > 1e-8
    assert moved_by[:3].max() < 1e-10


def test_the_edge_of_a_frame_that_is_enlarged_goes_on():
    """65 pixels in patches of 8 are 72, whose last 7 rows and columns repeat the last one."""
    frames, whole, larger = torch.rand(2, 2, 65, 65), encoder("vit", 65), encoder("vit", 72)
    place = torch.arange(72).clamp(max=64)
    torch.testing.assert_close(whole(frames), larger(frames[:, :, place][:, :, :, place]))


def test_a_keypoint_is_the_place_of_what_its_channel_marks():
    points = Keypoints(1, 2)
    with torch.no_grad():
        points.scores.weight.copy_(torch.tensor([50.0, 0.0]).view(2, 1, 1, 1))
    maps = torch.zeros(1, 1, 5, 9)
    maps[0, 0, 1, 6] = 1.0
    places = points(maps)[0]  # x of both points, then y of both
    torch.testing.assert_close(places, torch.tensor([0.5, 0.0, -0.5, 0.0]))


def test_sharp_keypoints_see_a_small_thing_before_any_training():
    """A dot of a few pixels hardly moves the points of a flat distribution."""
    moved = []
    for sharpness in (3.0, 30.0):
        torch.manual_seed(0)
        points = Keypoints(1, 16, sharpness)
        maps = torch.zeros(2, 1, 25, 25)
        maps[0, 0, 12, 4], maps[1, 0, 12, 20] = 1.0, 1.0
        left, right = points(maps).detach()[:, :16]
        moved.append(float((left - right).abs().amax()))
    assert moved[0] < 0.1 < 1.0 < moved[1]


@pytest.mark.parametrize("depth", [1, 4])
def test_keypoints_are_read_from_the_map_that_is_asked_for(depth):
    encode = ConvFrames(2, 32, 16, LATENT, 3, keypoint_map=depth)
    assert encode.keypoints.scores.in_channels == (2, 4, 8, 16, 16)[depth]
    frames = torch.rand(2, 2, 32, 32)
    maps = encode.normalised(frames)
    for convolution in encode.convolutions[:depth]:
        maps = torch.nn.functional.gelu(convolution(maps))
    torch.testing.assert_close(encode.features(frames)[:, -6:], encode.keypoints(maps))


# ------------------------------------------------------------------------------ predictors


def test_waves_learn_a_narrow_wall_sooner():
    """Steps along a line with walls, each as wide as a 60th of it: what 200 steps of training leave
    of the error, with waves and without.
    """
    left = []
    for waves in (0, 64):
        torch.manual_seed(0)
        predictor = MLPDynamics(1, 1, 64, 2, waves, frequency=10.0)
        optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
        for _ in range(200):
            place, acted = 3.0 * torch.rand(256, 1, 1), torch.rand(256, 1, 1)
            blocked = (place % 0.3) > 0.25
            loss = (predictor.one_step(place, acted) - place - acted * ~blocked).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left.append(loss.item())
    assert left[1] < 0.5 * left[0]


@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_rollout_is_the_repeated_one_step(name, seen):
    """Its memory holds all that a pass over all frames so far computes again."""
    torch.manual_seed(0)
    predictor = moved(PREDICTORS[name]())
    start, actions = torch.randn(2, seen, LATENT), torch.randn(2, seen + 6, CONDITION)
    latents = start
    for count in range(seen, seen + 7):
        following = predictor.one_step(latents, actions[:, :count])
        latents = torch.cat((latents, following[:, -1:]), dim=1)
    rollout = predictor.unroll(start, actions)
    assert rollout.shape == (2, 7, LATENT)
    torch.testing.assert_close(rollout, latents[:, seen:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_prediction_knows_no_later_frame_or_action(name):
    torch.manual_seed(0)
    predictor = moved(PREDICTORS[name]())
    latents, actions = torch.randn(2, 6, LATENT), torch.randn(2, 6, CONDITION)
    before = predictor.one_step(latents, actions)
    latents[:, 4:] += 1.0
    actions[:, 4:] += 1.0
    after = predictor.one_step(latents, actions)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-6)
    actions[:, 3] += 1.0  # of the frame itself
    assert not torch.allclose(predictor.one_step(latents, actions)[:, 3], after[:, 3], atol=1e-3)


def test_a_transformer_sees_its_history_alone():
    """Two blocks of three frames see five."""
    predictor = moved(transformer(2, 3))
    latents, actions = torch.randn(1, 8, LATENT), torch.randn(1, 8, CONDITION)
    before = predictor.one_step(latents, actions)
    latents[:, 2] += 1.0
    apart = (predictor.one_step(latents, actions) - before).abs().amax(dim=(0, 2))
    assert (apart > 1e-4).tolist() == [False, False, True, True, True, True, True, False]


def test_a_block_is_that_of_the_module_of_adaptive_layer_norm():
    """vk.AdaLN around attention within frames and the MLP."""
    block, module = (
        moved(ConditionedBlock(32, 2, CONDITION, 1, choose.named("fused"))),
        AdaLN(32, 5),
    )
    module.linear.load_state_dict(block.condition.state_dict())
    x, condition = torch.randn(2, 4, 3, 32), torch.randn(2, 4, CONDITION)

    def attention(tokens: Tensor) -> Tensor:
        return block.attn(tokens.flatten(0, 1)).view_as(tokens)

    expected = module(x, condition, attention, block.mlp)
    torch.testing.assert_close(block(x, condition, None)[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, x, atol=0.1)


def test_the_tokens_of_a_frame_have_places():
    """Exchanged parts of a latent do not just exchange the parts of its change."""
    predictor = moved(transformer(2, 3))
    latents, actions = torch.randn(1, 3, LATENT), torch.randn(1, 3, CONDITION)
    exchanged = latents.roll(LATENT // 2, dims=-1)
    change = predictor.one_step(latents, actions) - latents
    other = predictor.one_step(exchanged, actions) - exchanged
    assert (other.roll(LATENT // 2, dims=-1) - change).abs().max() > 1e-2


def test_a_step_of_a_rollout_takes_one_frame_through_the_blocks():
    predictor = transformer(2, 4)
    frames = []
    for block in predictor.blocks:
        block.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0].shape[1]))
    predictor.unroll(torch.randn(1, 3, LATENT), torch.randn(1, 12, CONDITION))
    assert frames == [2, 2] + [1, 1] * 10


@pytest.mark.parametrize("name", PREDICTORS)
def test_training_begins_near_nothing_changes(name):
    latents = torch.randn(4, 3, LATENT)
    change = PREDICTORS[name]().one_step(latents, torch.randn(4, 3, CONDITION)) - latents
    assert 0 < change.square().mean().sqrt() < 0.1


def test_a_rollout_needs_a_frame_and_an_action():
    for seen, acted in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"actions: got {acted} for {seen} observed frames"):
            MLPDynamics(LATENT, CONDITION, 8, 1).unroll(
                torch.randn(2, seen, LATENT), torch.randn(2, acted, CONDITION)
            )


# ------------------------------------------------------------------------------ ops


def gradients(function, *tensors: Tensor) -> list[Tensor]:
    leaves = [z.clone().requires_grad_() for z in tensors]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def both(function, *tensors: Tensor) -> None:
    fused, plain = (gradients(function(choose.named(name)), *tensors) for name in KERNELS)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_fused_and_reference_ops_of_the_transformer_agree():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 4, 3, 32).unbind(0)
    shift, scale = torch.randn(2, 2, 4, 32).unbind(0)
    both(lambda ops: ops.modulated_layer_norm, x, shift, scale)
    both(lambda ops: ops.gated_residual, x, y, shift)
    q, k, v = torch.randn(3, 2, 2, 12, 16).unbind(0)  # four frames of three tokens
    both(lambda ops: lambda *qkv: ops.attend_history(*qkv, 3, 2), q, k, v)
    both(lambda ops: lambda *qkv: ops.attend_history(*qkv, 3, 4), q[:, :, 9:], k, v)


@pytest.mark.parametrize("kernels", KERNELS)
def test_terms_of_groups_are_the_mean_of_each_groups(kernels):
    z = torch.randn(3, 6, 4)
    together = choose.named(kernels).variance_covariance(z, None)
    each = torch.tensor([published.variance_covariance(group) for group in z])
    torch.testing.assert_close(torch.stack(together), each.mean(dim=0))


def test_a_block_begins_as_the_identity():
    block = ConditionedBlock(32, 2, CONDITION, 3, choose.named("fused"))
    x = torch.randn(2, 4, 3, 32)
    assert torch.equal(block(x, torch.randn(2, 4, CONDITION), None)[0], x)
