"""Families as tables: each parameter once on both sides, configurations both ways, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import CASES, NEOX_OURS, OURS, make

from core.config import load
from core.errors import UserError
from export.families import FAMILIES, family_of, named_family
from export.families.table import Row, Tensor, tensors
from export.write import shapes_of
from llm.config import Experiment
from llm.model.config import ModelConfig, MoEConfig, Sparsity

CONFIGS = Path(__file__).parents[2] / "configs/llm"
EXPORTED = [p for p in sorted(CONFIGS.glob("*.yaml")) if p.stem not in ("base-pretrain", "quickstart-sparse")]
FAMILY_OF = {
    "largest": "llama", "llama": "llama", "mistral": "mistral", "mixtral": "mixtral", "pythia": "gpt_neox",
    "quickstart": "qwen3", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3-30b-a3b": "qwen3_moe",
}  # fmt: skip
HERE = Path("folder/config.json")


def on_disk(model, folder) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers writes; in memory it has experts in one."""
    from safetensors import safe_open

    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_every_family_has_a_case():
    assert {family_of(config) for config, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_stands_once_on_both_sides(name, tmp_path):
    config, _ = CASES[name]
    table, shapes = family_of(config).table, shapes_of(config)
    found = tensors(table, shapes)
    assert {tensor.name: tensor.shape for tensor in found} == on_disk(make(name), tmp_path)
    assert len({tensor.name for tensor in found}) == len(found)
    held = [(path, tensor.at) for tensor in found for path in tensor.row.paths]
    assert len(set(held)) == len(held)
    assert {path for path, _ in held} == set(shapes)
    sizes = [np.prod(tensor.piece, dtype=int) * len(tensor.row.paths) for tensor in found]
    assert sum(sizes) == sum(np.prod(shape, dtype=int) for shape in shapes.values())


def test_a_table_that_forgets_or_repeats_a_parameter_is_wrong():
    table, shapes = family_of(OURS).table, shapes_of(OURS)
    with pytest.raises(ValueError, match=r"once: \['norm.scale'\]"):
        tensors([row for row in table if row.ours != "norm.scale"], shapes)
    with pytest.raises(ValueError, match=r"once: \['norm.scale'\]"):
        tensors([*table, Row("norm.scale", "twice", "d -> d")], shapes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_row_gives_back_the_bits(family):
    rng, sizes = np.random.default_rng(0), dict(zip("vdhgkfe", (7, 5, 3, 2, 4, 6, 9), strict=True))
    for row in family.table:
        letters = [axis for axis in row.axes.split(" -> ")[0].split() if axis != "c"]
        tensor = Tensor(row.theirs, row, (), tuple(sizes[axis] for axis in letters))
        pieces = [rng.standard_normal(tensor.piece).astype(np.float32) for _ in row.paths]
        theirs = tensor.to_theirs(pieces)
        assert theirs.shape == tensor.shape and theirs.flags.c_contiguous
        for piece, again in zip(pieces, tensor.to_ours(theirs), strict=True):
            assert piece.tobytes() == again.tobytes(), row.theirs


def test_neox_has_query_key_and_value_of_a_head_side_by_side():
    row = next(row for row in family_of(NEOX_OURS).table if "query_key_value.bias" in row.theirs)
    tensor = Tensor("", row, (), (2, 3))  # heads, head dimension
    q, k, v = (np.arange(6).reshape(2, 3) + 10 * i for i in range(3))
    assert tensor.to_theirs([q, k, v]).tolist() == [
        *(0, 1, 2), *(10, 11, 12), *(20, 21, 22),
        *(3, 4, 5), *(13, 14, 15), *(23, 24, 25),
    ]  # fmt: skip


def served(config: ModelConfig) -> ModelConfig:
    """What a `config.json` has of ours: not how a router is trained."""
    if config.moe is None:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router_z_loss=0.0, capacity=None))


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.stem)
def test_every_configuration_of_ours_comes_back(path):
    config = load(Experiment, path).model
    written = json.loads(json.dumps(family_of(config).to_json(config)))
    family = named_family(written, HERE)
    assert family.from_json(written, HERE) == served(config)
    prefix = max((known for known in FAMILY_OF if path.stem.startswith(known)), key=len)
    assert family.name == FAMILY_OF[prefix]


PLAIN = dataclasses.replace(OURS, bias="none")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            {"sparsity": Sparsity(4, 2, 0)},
            r"llama, the nearest, would need in `model` sparsity null \(it is set\)",
        ),
        ({"norm": "layer"}, r"norm rms \(it is layer\)"),
        ({"rope_fraction": 0.4}, r"rope_fraction 1.0 \(it is 0.4\)"),
        ({"parallel_residual": True}, r"parallel_residual false \(it is true\)"),
        ({"qk_norm": True, "bias": "qkv"}, r"qwen2, the nearest, would need in `model` qk_norm false"),
        ({"bias": "all", "window": 4}, r"window null \(it is 4\)"),
        ({"moe": MoEConfig(4, 2, shared_mlp_dim=8)}, r"mixtral.*moe.shared_mlp_dim 0 \(it is 8\)"),
        (
            {"moe": MoEConfig(4, 2, normalize_top_k=False)},
            r"mixtral.*moe.normalize_top_k true \(it is false\)",
        ),
        ({"moe": MoEConfig(4, 2), "bias": "qkv"}, r"bias none \(it is qkv\)"),
    ],
)
def test_a_model_that_no_family_has_is_refused_by_name(change, wanted):
    with pytest.raises(UserError, match=wanted):
        family_of(dataclasses.replace(PLAIN, **change))


def test_a_neox_of_another_shape_is_refused_by_name():
    with pytest.raises(UserError, match=r"gpt_neox.*num_heads / num_kv_heads 1 \(it is 3\)"):
        family_of(dataclasses.replace(NEOX_OURS, num_kv_heads=2))
    with pytest.raises(UserError, match=r"gpt_neox.*num_heads x head_dim / embed_dim 1 \(it is 2.0\)"):
        family_of(dataclasses.replace(NEOX_OURS, head_dim=16))


LLAMA2 = {  # as meta-llama/Llama-2-7b-hf has it
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PYTHIA = {  # as EleutherAI/pythia-160m has it
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
    "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
QWEN2 = {  # as Qwen/Qwen2-7B has it, which has a window in its config and doesn't use it
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN2_MOE = QWEN2 | {"model_type": "qwen3_moe", "moe_intermediate_size": 768}
LLAMA31 = LLAMA2 | {  # as meta-llama/Llama-3.1-8B has it
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 128001, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(LLAMA2, "llama2-7b"), (LLAMA31, "llama3.1-8b"), (PYTHIA, "pythia-160m"), (QWEN2, "qwen2-7b")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_configurations_are_those_of_ours(theirs, ours):
    assert (
        named_family(theirs, HERE).from_json(theirs, HERE) == load(Experiment, CONFIGS / f"{ours}.yaml").model
    )


def scaled(**scaling) -> dict:
    return LLAMA2 | {"rope_scaling": scaling}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LLAMA2 | {"model_type": "gemma2"}, "model_type is 'gemma2': supported are llama, mistral"),
        (LLAMA2 | {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized"),
        (LLAMA2 | {"hidden_act": "gelu"}, "hidden_act is 'gelu': a llama is supported with 'silu' alone"),
        (LLAMA2 | {"attention_bias": True}, "attention_bias is True: supported where mlp_bias, here False"),
        (scaled(type="linear", factor=2.0), "rope type is 'linear': supported are"),
        (scaled(type="yarn", factor=2.0, attention_factor=1.0), "attention_factor"),
        (scaled(type="yarn", factor=2.0, mscale=0.7), "rope_parameters.mscale is 0.7"),
        (scaled(rope_type="llama3", factor=2.0), "'low_freq_factor' is missing"),
        (
            LLAMA2 | {"rope_scaling": {"type": "linear"}, "rope_parameters": {"type": "yarn"}},
            "rope_parameters says otherwise",
        ),
        (LLAMA2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: this family is supported"),
        (LLAMA2 | {"logit_scale": 0.5}, "logit_scale is 0.5: what that changes in a llama isn't known here"),
        (LLAMA2 | {"hidden_size": None}, "the required key 'hidden_size' is missing"),
        (LLAMA2 | {"hidden_size": "wide"}, "'hidden_size' is 'wide': input should be a valid integer"),
        (PYTHIA | {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        (PYTHIA | {"attention_bias": False}, "attention_bias is False"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 9}, "all layers must have the"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is false"),
        (QWEN2_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN2_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
    ],
)  # fmt: skip
def test_what_a_config_says_and_ours_cannot_is_refused_by_name(data, message):
    with pytest.raises(UserError, match=message):
        named_family(data, HERE).from_json(data, HERE)


def test_a_window_in_every_layer_is_taken_however_it_is_said():
    windowed = QWEN2 | {"use_sliding_window": True, "sliding_window": 99}
    for said in ({"max_window_layers": 0}, {"layer_types": ["sliding_attention"] * 28}):
        assert named_family(windowed, HERE).from_json(windowed | said, HERE).window == 99
    assert named_family(windowed, HERE).from_json(windowed | {"max_window_layers": 28}, HERE).window is None
