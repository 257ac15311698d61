"""The contrastive step of each framework, in a process of its own: for `clip_training.py`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step_worker import time_steps
from benchmarks.worker import serve
from clip.model.config import CLIPConfig
from core import devices
from core.config import parse
from core.options import MeshConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=5e-4, beta2=0.98, epsilon=1e-6, weight_decay=0.2, schedule="constant"
)


def start(spec: dict[str, Any]):
    """Facts about the devices, and what answers `steps`."""
    config = parse(CLIPConfig, spec["model"])
    framework = jax_worker if spec["variant"] == "ours" else torch_worker
    facts, step = framework(spec, config, random_batch(config, spec["batch"]))
    return facts, lambda steps: time_steps(step, steps)


def random_batch(config: CLIPConfig, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [B, S, S, 3] of bytes, tokens [B, T] and where each row's end of text is."""
    rng, text = np.random.default_rng(0), config.text
    images = rng.integers(0, 256, (size, config.image.size, config.image.size, 3)).astype(np.uint8)
    tokens = rng.integers(0, text.vocab_size - 1, (size, text.length)).astype(np.int32)
    ends = rng.integers(text.length // 2, text.length, size).astype(np.int32)
    tokens[np.arange(text.length) >= ends[:, None]] = text.vocab_size - 1
    return images, tokens, ends


def jax_worker(
    spec: dict[str, Any], config: CLIPConfig, arrays
) -> tuple[dict[str, Any], Callable[[], float]]:
    devices.prepare()
    import jax

    from clip.config import TrainConfig
    from clip.data.batches import Batch
    from clip.gradients import clamp, gradients
    from clip.model.model import blueprint
    from core.mesh import make_mesh, shardings
    from core.optim import make_optimizer
    from core.state import init_state, jit_step, make_step, state_shardings
    from llm.model.transformer import Compute

    train = TrainConfig(steps=1000, dtype=spec["dtype"], **spec["train"])
    compute = Compute(train.dtype, spec["attention"], train.remat, scan_layers=spec["scan_layers"])
    model, mesh = blueprint(config, compute), make_mesh(MeshConfig())
    optimizer, key = make_optimizer(OPTIMIZER, train.steps, model.decay, model.axes), jax.random.key(0)

    def of_step(params, batch, scale, number):
        return gradients(model, train, params, batch, jax.random.fold_in(key, number), scale)

    with jax.set_mesh(mesh):
        state = init_state(model, train, optimizer, mesh, seed=0)
        if not Path(spec["weights"]).exists():
            flat = jax.tree_util.tree_flatten_with_path(jax.device_get(state.params))[0]
            names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
            np.savez(spec["weights"], **{name: x for name, (_, x) in zip(names, flat, strict=True)})
        batch = jax.device_put(Batch(*arrays), shardings(mesh, ("act_batch",)))
        where = state_shardings(model, train, optimizer, mesh)
        step = jit_step(make_step(of_step, train, optimizer, clamp), where, ("act_batch",), mesh)
        program = step.lower(state, batch).compile()
    if spec.get("hlo"):
        Path(spec["hlo"]).write_text(program.as_text())

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    kind = jax.devices()[0].device_kind
    return {"device_kind": kind, "devices": jax.device_count(), "parameters": model.count}, run


def torch_worker(
    spec: dict[str, Any], config: CLIPConfig, arrays
) -> tuple[dict[str, Any], Callable[[], float]]:
    import torch
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPModel

    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    if device == "cpu":
        devices.keep_freed_memory()  # as ours does: it is no merit of the framework
    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does by default
    end = config.text.vocab_size - 1
    text = tower(config.text) | {
        "vocab_size": config.text.vocab_size, "max_position_embeddings": config.text.length,
        "eos_token_id": end, "bos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    image = tower(config.image) | {"image_size": config.image.size, "patch_size": config.image.patch_size}
    model = CLIPModel(
        TheirConfig(
            text_config=text, vision_config=image, projection_dim=config.embed_dim, attn_implementation="sdpa"
        )
    )
    weights = {
        name: torch.tensor(w) for name, w in hugging_face_names(np.load(spec["weights"]), config).items()
    }
    names = set(dict(model.named_parameters()))
    assert names == set(weights), names ^ set(weights)
    model.load_state_dict(weights, strict=False)
    model = model.to(device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = OPTIMIZER.beta1, OPTIMIZER.beta2
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.learning_rate, betas=betas, eps=OPTIMIZER.epsilon, fused=True
    )
    images, tokens = torch.tensor(arrays[0], device=device), torch.tensor(arrays[1], device=device).long()
    mean, std = (torch.tensor(x, device=device) for x in (config.image.mean, config.image.std))
    forward = torch.compile(model) if spec["variant"] == "compiled" else model

    def step() -> float:
        pixels = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        # autocast keeps the weights in float32, as ours does
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            loss = forward(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
        return loss.item()  # waits for the device

    return {"parameters": sum(p.numel() for p in parameters)}, step


def tower(config) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim, "intermediate_size": config.mlp_dim, "hidden_act": config.activation,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
    }  # fmt: skip


def hugging_face_names(weights, config: CLIPConfig) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the layouts of `CLIPModel`."""
    found = {
        "logit_scale": weights["logit_scale"],
        "text_model.embeddings.token_embedding.weight": weights["text.embedding"],
        "text_model.embeddings.position_embedding.weight": weights["text.positions"],
        "vision_model.embeddings.class_embedding": weights["image.token"],
        "vision_model.embeddings.patch_embedding.weight": weights["image.patches.kernel"].transpose(
            3, 2, 0, 1
        ),
        "vision_model.embeddings.position_embedding.weight": weights["image.positions"],
        "visual_projection.weight": weights["image.projection.kernel"].T,
        "text_projection.weight": weights["text.projection.kernel"].T,
    }
    norms = {
        "text.norm": "text_model.final_layer_norm",
        "image.norm_in": "vision_model.pre_layrnorm",
        "image.norm": "vision_model.post_layernorm",
    }
    for ours, theirs in norms.items():
        found |= {f"{theirs}.weight": weights[f"{ours}.scale"], f"{theirs}.bias": weights[f"{ours}.bias"]}
    layer = {
        "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    for side, theirs, tower in (("text", "text_model", config.text), ("image", "vision_model", config.image)):
        for i in range(tower.num_layers):
            for ours, name in layer.items():
                path, to = f"{side}.blocks.{ours}", f"{theirs}.encoder.layers.{i}.{name}"
                found[f"{to}.bias"] = weights[f"{path}.bias"][i].reshape(-1)
                if "norm" in ours:
                    found[f"{to}.weight"] = weights[f"{path}.scale"][i]
                else:
                    kernel = weights[f"{path}.kernel"][i]
                    rows = kernel.shape[0] if ours != "attention.out" else kernel.shape[0] * kernel.shape[1]
                    found[f"{to}.weight"] = kernel.reshape(rows, -1).T
    return found


if __name__ == "__main__":
    serve(functools.partial(start, json.loads(sys.argv[1])))
