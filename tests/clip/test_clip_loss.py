"""Contrastive losses: values and gradients against `transformers`, over meshes, and in pieces."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose
from programs import largest_array

from clip.loss import sigmoid_loss, softmax_loss
from core.mesh import make_mesh
from core.options import MeshConfig

ROWS, EMBED = 56, 16
FORMS = [("dense", 1), ("local", 1), ("chunked", 5), ("chunked", 1024)]  # of 5, the last one is padded
MESHES = [
    {"data": 1},
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 1, "tensor": 2},
]


def unit(rng, rows: int = ROWS) -> tuple[jax.Array, jax.Array]:
    """Images, and captions that are near them."""
    image = rng.normal(size=(rows, EMBED))
    text = image + rng.normal(size=image.shape)
    return tuple(jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (image, text))


@functools.cache
def arguments(kind: str):
    vectors = unit(np.random.default_rng(0))
    rest = (jnp.float32(14.0),) if kind == "softmax" else (jnp.float32(10.0), jnp.float32(-10.0))
    return *vectors, *rest


def differentiated(kind: str, **options):
    """Loss, accuracy and all gradients of a multiple of the loss, as a step with loss scaling has it."""
    function = softmax_loss if kind == "softmax" else sigmoid_loss

    def scaled(args):
        loss, accuracy = function(*args, **options)
        return 3 * loss, (loss, accuracy)

    return jax.jit(jax.grad(scaled, has_aux=True))


@functools.cache
def reference(kind: str):
    """By the formula over the whole matrix, in float64 and without a mesh; and its gradients."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    image, text, scale, *bias = (
        torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arguments(kind)
    )
    logits = scale * image @ text.T
    if kind == "softmax":
        own = torch.arange(ROWS)
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    else:
        signs = 2 * torch.eye(ROWS) - 1
        loss = -logsigmoid(signs * (logits + bias[0])).sum() / ROWS
    gradients = torch.autograd.grad(3 * loss, (image, text, scale, *bias))
    accuracy = (logits.argmax(1) == torch.arange(ROWS)).double().mean()
    return [x.numpy() for x in gradients], (loss.item(), accuracy.item())


def on_mesh(sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.set_mesh(make_mesh(MeshConfig(**sizes), devices))


def assert_same(got, expected, tolerance=1e-5):
    (gradients, values), (their_gradients, their_values) = got, expected
    assert_allclose(values, their_values, rtol=1e-6)
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize(("negatives", "chunk"), FORMS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_without_a_mesh(kind, negatives, chunk):
    got = differentiated(kind, negatives=negatives, chunk=chunk)(arguments(kind))
    assert_same(got, reference(kind))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(("negatives", "chunk"), FORMS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_on_meshes(kind, negatives, chunk, sizes):
    with on_mesh(sizes):
        got = differentiated(kind, negatives=negatives, chunk=chunk)(arguments(kind))
    assert_same(got, reference(kind))


def test_a_gather_without_gradient_would_be_seen():
    """What the tests above are for: such a gather leaves the loss as it is, and its gradients far off."""

    def stopped(axes, image, text, scale):
        everyone = lambda x: jax.lax.stop_gradient(jax.lax.all_gather(x, axes, tiled=True))  # noqa: E731
        first = jax.lax.axis_index(axes) * len(image)
        own = (first + jnp.arange(len(image)))[:, None] == jnp.arange(ROWS)
        losses = [
            jax.nn.logsumexp(logits, 1) - jnp.where(own, logits, 0).sum(1)
            for logits in (scale * image @ everyone(text).T, scale * text @ everyone(image).T)
        ]
        return jax.lax.pmean(jnp.mean(losses[0] + losses[1]) / 2, axes)

    rows, one = PartitionSpec("data"), PartitionSpec()
    with on_mesh({"data": 8}):
        shared = jax.shard_map(functools.partial(stopped, "data"), in_specs=(rows, rows, one), out_specs=one)
        loss, gradients = jax.jit(jax.value_and_grad(lambda args: 3 * shared(*args)))(arguments("softmax"))
    expected, (right, _) = reference("softmax")
    assert_allclose(loss, 3 * right, rtol=1e-6)
    for mine, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert np.linalg.norm(mine - theirs) > 0.2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_without_a_derivative_it_is_the_same_number(kind):
    function = softmax_loss if kind == "softmax" else sigmoid_loss
    with on_mesh({"data": 2, "fsdp": 4}):
        got = jax.jit(functools.partial(function, negatives="chunked", chunk=4))(*arguments(kind))
    assert_allclose(got, reference(kind)[1], rtol=1e-6)


@pytest.mark.parametrize("sizes", [None, {"data": 8}], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_chunks_never_form_whole_rows(kind, sizes):
    """Nor does a device of several have all vectors. Of 512 rows of 16, in columns of 8."""
    rows, chunk = 512, 8
    args = tuple(jax.ShapeDtypeStruct((rows, EMBED), jnp.float32) for _ in range(2))
    args += tuple(jax.ShapeDtypeStruct((), jnp.float32) for _ in arguments(kind)[2:])

    def largest(negatives):
        if sizes is None:
            return compiled(negatives)
        with on_mesh(sizes):
            return compiled(negatives)

    def compiled(negatives):
        step = differentiated(kind, negatives=negatives, chunk=chunk)
        if sizes is not None:
            places = tuple(
                jax.NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec("data")) for _ in "ab"
            )
            one = jax.NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
            given = (*places, *[one] * (len(args) - 2))
            step = jax.jit(step, in_shardings=(given,), out_shardings=(given, one))
        return largest_array(step.lower(args).compile().as_text())

    devices = 8 if sizes else 1
    mine = rows // devices
    assert largest("chunked") <= mine * max(EMBED, chunk)
    assert largest("local") >= mine * rows


def test_sigmoid_starts_from_few_hits_and_grows_with_no_batch():
    """At a factor of 10 and a bias of -10 unrelated pairs cost next to nothing, so that a batch of twice as
    many has the same loss for each image; were the sum divided by the pairs, it would be half.
    """
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2 * ROWS, 512))
    text = image + rng.normal(size=image.shape)
    image, text = (jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (image, text))
    half, whole = (float(sigmoid_loss(image[:n], text[:n], 10.0, -10.0).loss) for n in (ROWS, 2 * ROWS))
    own = np.log1p(np.exp(-(10 * (np.asarray(image) * np.asarray(text)).sum(1) - 10)))
    assert_allclose([half, whole], own.mean(), rtol=0.02)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_transformers(kind):
    """Loss and gradients of `CLIPModel` and `SiglipModel` at the vectors their towers gave."""
    import torch

    model, inputs = tiny_clip() if kind == "softmax" else tiny_siglip()
    out = model(**inputs, return_loss=True)
    theirs = out.image_embeds, out.text_embeds
    gradients = torch.autograd.grad(out.loss, (*theirs, *dict(head(model)).values()))
    vectors = tuple(jnp.asarray(x.detach().numpy()) for x in theirs)
    logs = tuple(jnp.asarray(x.detach().numpy()).reshape(()) for _, x in head(model))

    def loss(image, text, log_scale, *bias):
        function = softmax_loss if kind == "softmax" else sigmoid_loss
        return function(image, text, jnp.exp(log_scale), *bias).loss

    ours, our_gradients = jax.value_and_grad(loss, tuple(range(2 + len(logs))))(*vectors, *logs)
    assert_allclose(ours, out.loss.item(), rtol=1e-5)
    for mine, expected in zip(our_gradients, gradients, strict=True):
        expected = expected.numpy().reshape(mine.shape)
        assert_allclose(mine, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 0.1))


def head(model):
    return [(name, x) for name, x in model.named_parameters() if name in ("logit_scale", "logit_bias")]


def tiny_clip():
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48}
    config = CLIPConfig(
        text_config=text, vision_config=shape | {"image_size": 16, "patch_size": 8}, projection_dim=24
    )
    return CLIPModel(config), inputs()


def tiny_siglip():
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=shape | {"vocab_size": 50, "max_position_embeddings": 8},
        vision_config=shape | {"image_size": 16, "patch_size": 8},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model, inputs()


def inputs():
    import torch

    tokens = torch.randint(0, 48, (6, 8))
    tokens[:, -1] = 49
    return {"input_ids": tokens, "pixel_values": torch.randn(6, 3, 16, 16)}
