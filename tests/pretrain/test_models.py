"""The trunk: towers run once for what is asked, exact trimming, initialisation from a seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import UserError
from pretrain.models.request import FeatureRequest
from pretrain.models.trunk import Trunk, build_trunk
from pretrain.recipe import ModelRecipe, TextRecipe

TEXT = TextRecipe(width=64, layers=3, heads=2, context=24, vocab=100)
SMALL = ModelRecipe(
    image="vit_xsmall_patch16_clip_224",
    image_size=48,
    image_kwargs={"depth": 2},
    text=TEXT,
    embed_dim=32,
)
IMAGE, CAPTION = FeatureRequest("image", "crop"), FeatureRequest("text", "caption")


def tokens(lengths: list[int], context: int = 24, seed: int = 0) -> torch.Tensor:
    """Captions of these lengths, start 98 and end 99 included, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(lengths), context, dtype=torch.int64)
    for row, length in zip(out, lengths):
        row[:length] = torch.randint(1, 98, (length,), generator=generator)
        row[0], row[length - 1] = 98, 99
    return out


def images(n: int, size: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    built = build_trunk(SMALL, seed=1).eval()
    for (
        name,
        p,
    ) in built.named_parameters():  # CLIP's text initialisation is so small that errors would hide in it
        if name.startswith("text.") and p.ndim == 2:
            p.data.mul_(4)
    return built


def dense_text(trunk: Trunk, ids: torch.Tensor) -> torch.Tensor:
    """The text tower as the papers have it: every place of the context, an additive mask where it is causal."""
    tower = trunk.text
    n, length = ids.shape
    mask = torch.full((length, length), float("-inf")).triu(1) if tower.blocks[0].causal else 0
    x = tower.token_embedding(ids) + tower.positional_embedding[:length]
    for block in tower.blocks:
        q, k, v = block.qkv(block.norm1(x)).view(n, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        x = x + block.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.fc2(block.act(block.fc1(block.norm2(x))))
    x = tower.norm(x)
    if tower.pool == "max":
        return tower.projection(torch.stack([row[: own.argmax() + 1].amax(0) for row, own in zip(x, ids)]))
    return tower.projection(x[torch.arange(n), ids.argmax(-1)] if tower.pool == "eot" else x[:, -1])


KINDS = {
    "clip": {},
    "siglip": {"causal": False, "pool": "last", "projection_bias": True, "activation": "gelu_tanh", "norm_eps": 1e-6},
    "causal, last": {"pool": "last"},
    "pyramid": {"pool": "max"},
    "both ways, max": {"causal": False, "pool": "max"},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Trunk:
    """A trunk with each kind of text tower, in fp64, biases off zero, weights large enough to show errors."""
    text = TextRecipe(**TEXT.model_dump() | KINDS[request.param])
    built = build_trunk(SMALL.model_copy(update={"text": text}), seed=3).double()
    for p in built.text.parameters():
        p.data = p.data.mul_(4) if p.ndim == 2 else p.data.add_(torch.randn(p.shape, dtype=p.dtype))
    return built


def text_gradients(trunk: Trunk, features: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    trunk.zero_grad(set_to_none=True)
    (features * weight).sum().backward()
    return {n: p.grad for n, p in trunk.text.named_parameters()}


def test_every_kind_of_text_tower_equals_the_dense_one_where_texts_are_absent_too(kind: Trunk) -> None:
    ids, weight = tokens([5, 12, 2, 24, 9]), torch.randn(5, 32, dtype=torch.float64)
    ids[[0, 3]] = 0
    present = ids.any(1)
    found, dense = kind({CAPTION: ids})[CAPTION], dense_text(kind, ids[present])
    assert torch.equal(found[~present], torch.zeros(2, 32, dtype=torch.float64))
    torch.testing.assert_close(found[present], dense, rtol=1e-10, atol=1e-12)
    expected = text_gradients(kind, dense, weight[present])
    for name, grad in text_gradients(kind, found, weight).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_where_every_text_is_absent_features_and_gradients_are_zero(kind: Trunk) -> None:
    found = kind({CAPTION: tokens([5, 7]) * 0})[CAPTION]
    assert torch.equal(found, torch.zeros(2, 32, dtype=torch.float64))
    assert all(not grad.any() for grad in text_gradients(kind, found, torch.ones(2, 32)).values())


def test_absent_texts_cost_nothing(trunk: Trunk) -> None:
    ran: list[tuple[int, ...]] = []
    handles = [m.register_forward_hook(lambda _m, x, _y: ran.append(tuple(x[0].shape))) for m in trunk.text.blocks]
    ids = tokens([5, 12, 24])
    ids[2] = 0
    trunk({CAPTION: ids})
    for handle in handles:
        handle.remove()
    assert set(ran) == {(17, 64)}


@pytest.mark.parametrize("lengths", [[5, 12, 2, 24], [3], [7, 7, 7]])
def test_packed_text_tower_equals_the_dense_one(trunk: Trunk, lengths: list[int]) -> None:
    ids = tokens(lengths)
    packed, dense = trunk({CAPTION: ids})[CAPTION], dense_text(trunk, ids)
    assert (packed - dense).abs().max() < 1e-5 * dense.abs().max()


def test_gradients_of_the_packed_text_tower_equal_the_dense_ones() -> None:
    double = build_trunk(SMALL, seed=3).double()
    ids, weight = tokens([5, 12, 2, 9]), torch.randn(4, 32, dtype=torch.float64)
    grads = []
    for feature in (double({CAPTION: ids})[CAPTION], dense_text(double, ids)):
        double.zero_grad()
        (feature * weight).sum().backward()
        grads.append({n: p.grad.clone() for n, p in double.text.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-9, atol=1e-11, msg=name)


def test_what_stands_behind_the_end_of_a_caption_changes_nothing(trunk: Trunk) -> None:
    ids = tokens([5, 12, 9])
    noisy = ids.clone()
    noisy[0, 5:], noisy[2, 9:] = 7, 42
    with torch.no_grad():
        assert torch.equal(trunk({CAPTION: ids})[CAPTION], trunk({CAPTION: noisy})[CAPTION])


def test_a_caption_longer_than_the_context_is_refused(trunk: Trunk) -> None:
    with pytest.raises(UserError, match=r"30 tokens.*context of 24"):
        trunk({CAPTION: tokens([5], context=30)})


def test_a_tower_that_reads_its_padding_refuses_captions_without_it() -> None:
    text = TextRecipe(**TEXT.model_dump() | KINDS["siglip"])
    with pytest.raises(UserError, match=r"20 tokens.*context of 24"):
        build_trunk(SMALL.model_copy(update={"text": text}), seed=0)({CAPTION: tokens([5], context=20)})


def test_several_views_at_once_equal_separate_calls(trunk: Trunk) -> None:
    other, title = FeatureRequest("image", "other"), FeatureRequest("text", "title")
    inputs = {
        IMAGE: images(3),
        CAPTION: tokens([4, 9]),
        other: images(2, seed=5),
        title: tokens([12, 3], seed=5),
    }
    with torch.no_grad():
        together = trunk(inputs)
        for request, x in inputs.items():
            torch.testing.assert_close(together[request], trunk({request: x})[request], rtol=1e-4, atol=1e-5)
    assert list(together) == list(inputs)
    assert together[IMAGE].shape == (3, 32)
    assert together[other].shape == (2, 32)


def test_one_view_is_run_once_however_much_is_asked_of_it(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = trunk.image.forward
    monkeypatch.setattr(trunk.image, "forward", lambda x, outputs: (calls.append(len(x)), inner(x, outputs))[1])
    pooled = FeatureRequest("image", "crop", output="pooled")
    found = trunk({IMAGE: images(2), pooled: images(2)})
    assert calls == [2]
    torch.testing.assert_close(trunk.image.projection(found[pooled]), found[IMAGE])


def test_tokens_of_a_block_come_with_the_end_of_the_tower(trunk: Trunk) -> None:
    block = FeatureRequest("image", "crop", from_layer=1)
    with torch.no_grad():
        found = trunk({block: images(2), IMAGE: images(2)})
        assert found[block].shape == (2, 1 + 9, trunk.image.backbone.embed_dim)
        last = trunk.image.backbone.norm(found[block])[:, 0]
        torch.testing.assert_close(trunk.image.projection(last), found[IMAGE])


def test_pixels_are_normalised_inside(trunk: Trunk) -> None:
    x = images(2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SMALL.mean, SMALL.std))
    with torch.no_grad():
        expected = trunk.image.projection(trunk.image.backbone((x.float() / 255 - mean) / std))
        torch.testing.assert_close(trunk({IMAGE: x})[IMAGE], expected, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_trunk(SMALL, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = build_trunk(SMALL, seed=1).state_dict(), build_trunk(SMALL, seed=2).state_dict()
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(first["text.blocks.0.qkv.weight"], other["text.blocks.0.qkv.weight"])


def test_vit_and_text_start_as_clip_does() -> None:
    state = build_trunk(SMALL, seed=0).state_dict()
    width = state["image.projection.weight"].shape[1]
    expected = {
        "image.backbone.pos_embed": width**-0.5,
        "image.projection.weight": width**-0.5,
        "image.backbone.blocks.0.attn.qkv.weight": (6 / (4 * width)) ** 0.5 / 3**0.5,
        "text.token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "text.blocks.1.qkv.weight": 64**-0.5,
        "text.blocks.1.proj.weight": 64**-0.5 * 6**-0.5,
        "text.blocks.1.fc1.weight": 128**-0.5,
        "text.projection.weight": 64**-0.5,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.06), name


def test_clip_resnet_starts_with_silent_residual_branches() -> None:
    model = ModelRecipe(image="resnet50_clip", image_size=64, text=None, embed_dim=16)
    trunk = build_trunk(model, seed=0).eval()
    last = [p for n, p in trunk.named_parameters() if n.endswith("conv3_1x1.bn.weight")]
    assert len(last) == 16
    assert not any(p.any() for p in last)
    pool = trunk.image.backbone.head
    assert pool.q.weight.std().item() == pytest.approx(2048**-0.5, rel=0.05)
    pooled = FeatureRequest("image", "crop", output="pooled")
    with torch.no_grad():
        found = trunk({IMAGE: images(2, 64), pooled: images(2, 64)})
    assert found[IMAGE].shape == (2, 16)
    torch.testing.assert_close(pool.proj(found[pooled]), found[IMAGE])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_any_timm_tower_serves_image_only(name: str) -> None:
    kwargs = {"depth": 1} if name.startswith("vit") else {}
    trunk = build_trunk(ModelRecipe(image=name, image_size=64, image_kwargs=kwargs, text=None, embed_dim=8), seed=0)
    assert trunk.text is None
    assert trunk({IMAGE: images(2, 64)})[IMAGE].shape == (2, 8)
    with pytest.raises(UserError, match=r"model\.text: null"):
        trunk({CAPTION: tokens([4])})


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "resnet50_clip"])
def test_without_a_projection_the_embedding_is_the_pooled_features(name: str) -> None:
    kwargs = {"depth": 1} if name.startswith("vit") else {}
    model = ModelRecipe(image=name, image_size=64, image_kwargs=kwargs, text=None, embed_dim=None)
    trunk = build_trunk(model, seed=0).eval()
    pooled = FeatureRequest("image", "crop", output="pooled")
    with torch.no_grad():
        found = trunk({IMAGE: images(2, 64), pooled: images(2, 64)})
    assert torch.equal(found[IMAGE], found[pooled])
    assert found[IMAGE].shape == (2, trunk.embed_dim) == (2, trunk.pooled_dim)
    assert not [n for n, _ in trunk.named_parameters() if "proj" in n and "attn" not in n and "patch_embed" not in n]


def test_a_trunk_knows_its_widths(trunk: Trunk) -> None:
    assert (trunk.embed_dim, trunk.pooled_dim) == (32, trunk.image.backbone.embed_dim)
    clip = build_trunk(ModelRecipe(image="resnet50_clip", image_size=64, text=None, embed_dim=16), seed=0)
    assert (clip.embed_dim, clip.pooled_dim) == (16, 2048)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model = SMALL.model_copy(update={"text": TEXT.model_copy(update={"dropout": 0.5})})
    trunk = build_trunk(model, seed=0)

    def run() -> torch.Tensor:
        return trunk({CAPTION: tokens([5, 9])})[CAPTION]

    assert not torch.equal(run(), run())
    trunk.eval()
    plain = build_trunk(SMALL, seed=0).eval()
    assert torch.equal(run(), plain({CAPTION: tokens([5, 9])})[CAPTION])


def test_bf16_autocast_stays_near_fp32() -> None:
    trunk = build_trunk(SMALL, seed=0).eval()
    inputs = {IMAGE: images(4), CAPTION: tokens([5, 12, 3, 9])}
    with torch.no_grad():
        exact = trunk(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = trunk(inputs)
    for request, x in exact.items():
        assert coarse[request].dtype == torch.bfloat16
        assert F.cosine_similarity(x, coarse[request].float()).min() > 0.999


def test_no_parameter_is_a_scalar(trunk: Trunk) -> None:
    assert all(p.ndim > 0 for p in trunk.parameters())


def test_quick_gelu_reaches_both_towers() -> None:
    trunk = build_trunk(SMALL.model_copy(update={"activation": "quick_gelu"}), seed=0)
    activations = {type(m).__name__ for m in trunk.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "vit_base_patch32_clip_242"}, "vit_base_patch32_clip_224"),
        ({"image_kwargs": {"dept": 2}}, "image_kwargs.*dept"),
        ({"image": "vit_base_patch32_clip_quickgelu_224"}, "model.activation"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused_with_the_key(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_trunk(SMALL.model_copy(update=change), seed=0)


def test_images_of_another_size_are_refused(trunk: Trunk) -> None:
    with pytest.raises(UserError, match=r"64x64.*image_size"):
        trunk({IMAGE: images(1, 64)})
    with pytest.raises(UserError, match=r"blocks \[9\]"):
        trunk({FeatureRequest("image", "crop", from_layer=9): images(1)})
