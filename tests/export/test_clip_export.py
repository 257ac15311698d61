"""CLIP and SigLIP checkpoints in, as runs, and out again; what their files say; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from dual_models import CASES, VOCAB, make, write
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.models import BPE
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip.config import Experiment
from clip.data.captions import encode_captions
from clip.data.images import center_crop
from clip.data.tokenizer import CaptionTokenizer
from clip.model.model import pixels
from core.config import load
from core.errors import UserError
from core.run import RunFolder
from export.families import DUAL_FAMILIES, dual_family_of, named_family
from export.families.dual import processor_json
from export.families.table import tensors
from export.hf import main
from export.read import import_run, open_checkpoint, read_config
from export.verify_dual import verify_dual
from export.write import export_run, shapes_of

CAPTIONS = ["A small  dog.", "two dogs, and a RED ball on a blue one over the green 7", "é"]


@pytest.fixture
def checkpoint(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    return lambda name, **options: write(name, tmp_path / "theirs", corpus, **options)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The run of a case, to read from."""

    @functools.cache
    def make_run(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "corpus").mkdir()
        import_run(write(name, folder / "theirs", folder / "corpus"), folder / "run")
        return folder / "run"

    return make_run


def assert_same_bits(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def test_every_family_has_a_case():
    assert {dual_family_of(config) for config, _ in CASES.values()} == set(DUAL_FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_configurations_go_both_ways(name, tmp_path):
    ours, theirs = CASES[name]
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_json(ours)))
    assert read_config(tmp_path) == ours
    written = dual_family_of(ours).to_json(ours)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == ours
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {tensor.name: tensor.shape for tensor in tensors(dual_family_of(ours).table, shapes_of(ours))}
    assert shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_in_and_out_again(name, imported, tmp_path, capsys):
    run, ours = imported(name), tmp_path / "ours"
    theirs = run.parent / "theirs"
    read = load(Experiment, run / "config.yaml")
    assert read.model == CASES[name][0], "without an image processor: the family's own colours"
    main(["--run", str(run), "--out", str(ours), "--verify"])
    assert "4 images by 5 captions: largest difference" in capsys.readouterr().out
    assert_same_bits(ours, theirs)
    assert sorted(path.name for path in ours.iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    card = (ours / "README.md").read_text()
    assert CASES[name][1].model_type in card.lower() and "zero-shot-image-classification" in card
    import_run(ours, tmp_path / "runs/again")
    again = load(Experiment, tmp_path / "runs/again/config.yaml")
    assert again.model == read.model
    tokenizers_of = [CaptionTokenizer.load(folder / "tokenizer") for folder in (run, tmp_path / "runs/again")]
    rows = [encode_captions(tokenizer, CAPTIONS, 13) for tokenizer in tokenizers_of]
    assert all(np.array_equal(a, b) for a, b in zip(*rows, strict=True))


def test_a_model_that_is_not_the_runs_is_told(imported, tmp_path):
    run = RunFolder.open(imported("siglip"))
    export_run(run, tmp_path / "ours")
    values = load_file(tmp_path / "ours/model.safetensors")
    values["text_model.head.weight"] += 0.1 * torch.randn(values["text_model.head.weight"].shape)
    save_file(values, tmp_path / "ours/model.safetensors", {"format": "pt"})
    assert verify_dual(run, 0, tmp_path / "ours").difference > 1e-3


def test_rounded_values_are_verified_as_rounded(imported, tmp_path, capsys):
    arguments = ["--run", str(imported("siglip")), "--out", str(tmp_path / "ours"), "--scheme", "bf16"]
    main([*arguments, "--verify"])
    assert "logits of weights rounded to bfloat16 in float32" in capsys.readouterr().out
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


@pytest.mark.parametrize(("width", "height"), [(40, 23), (15, 15), (9, 31)])
def test_the_exported_processor_makes_our_pixels(width, height):
    config, _ = CASES["clip-gelu"]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    said = {key: value for key, value in processor_json(config).items() if key != "image_processor_type"}
    theirs = CLIPImageProcessorPil(**said)(Image.fromarray(noise), return_tensors="np")["pixel_values"][0]
    ours = pixels(jnp.asarray(center_crop(Image.fromarray(noise), config.image.size))[None], config.image)[0]
    assert np.abs(np.asarray(ours) - theirs.transpose(1, 2, 0)).max() < 1e-5


def clip_tokenizer(folder):
    """As OpenAI's: its own BPE with ends of words, lower case, ids of its own around a text."""
    words = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*words, *(f"{word}</w>" for word in words)])}
    merges = [("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    assert isinstance(tokenizer.backend_tokenizer.model, BPE)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_clips_own_tokenizer(tmp_path):
    theirs = clip_tokenizer(tmp_path)
    ours = CaptionTokenizer.load(tmp_path)
    tokens, ends = encode_captions(ours, CAPTIONS, 13)
    expected = theirs(CAPTIONS, padding="max_length", max_length=13, truncation=True).input_ids
    assert tokens.tolist() == expected
    assert [row[end] for row, end in zip(tokens, ends, strict=True)] == [theirs.eos_token_id] * 3
    assert (tokens[:, 0] == theirs.bos_token_id).all()


def test_a_run_of_clips_own_tokenizer_goes_out_as_it_came(tmp_path):
    tokenizer = clip_tokenizer(tmp_path / "theirs")
    _, config = CASES["clip-quick"]
    config = type(config).from_dict(config.to_dict())
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.eos_token_id = 2  # as in OpenAI's old files
    make("clip-quick", config).save_pretrained(tmp_path / "theirs")
    main(["--import", str(tmp_path / "theirs"), "--out", str(tmp_path / "run"), "--verify"])
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "ours"), "--verify"])
    ours, theirs = ((tmp_path / side / "tokenizer.json").read_bytes() for side in ("ours", "theirs"))
    assert json.loads(ours) == json.loads(theirs)
    assert (
        json.loads((tmp_path / "ours/config.json").read_text())["text_config"]["eos_token_id"]
        == len(tokenizer) - 1
    )


def test_a_tokenizer_that_loses_text_is_for_captions_alone(tmp_path):
    from llm.tokenizer import Tokenizer

    clip_tokenizer(tmp_path)
    with pytest.raises(UserError, match="loses text"):
        Tokenizer.load(tmp_path)


OPENAI = {  # what counts in the config.json of openai/clip-vit-large-patch14: most is left to defaults
    "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
    "model_type": "clip", "projection_dim": 768, "torch_dtype": "float32", "transformers_version": None,
    "text_config": {
        "_name_or_path": "", "add_cross_attention": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
        "id2label": {"0": "LABEL_0"}, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
    },
    "text_config_dict": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "vision_config": {"hidden_size": 1024, "image_size": 999, "model_type": "clip_vision_model"},
    "vision_config_dict": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "preset"),
    [
        ({"model_type": "clip"}, "vit-b-32"),
        ({"model_type": "clip", "vision_config": {"patch_size": 16}}, "vit-b-16"),
        (OPENAI, "vit-l-14"),
        ({"model_type": "siglip", "text_config": {"vocab_size": 32000}}, "siglip-b-16"),
    ],
)
def test_published_files_leave_most_out(said, preset, tmp_path):
    from runs import ROOT

    (tmp_path / "config.json").write_text(json.dumps(said))
    if preset == "siglip-b-16":
        colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    config = load(Experiment, ROOT / f"configs/clip/{preset}.yaml").model
    assert read_config(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModel.from_config(theirs).parameters())
    assert count == sum(int(np.prod(shape)) for shape in shapes_of(config).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"rotary": True}}, "rotary is True: what that changes in a clip isn't known here"),
        ({"mystery": 1}, "mystery is 1"),
        ({"vision_config": {"num_channels": 4}}, "num_channels is 4: images here have 3 colours"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act is 'relu': supported are gelu"),
        ({"vision_config": {"image_size": "big"}}, r"'vision_config.image_size' is 'big'"),
        ({"vision_config": {"patch_size": 15}}, r"size \(224\) is not a multiple of patch_size \(15\)"),
        ({"text_config": 3}, "it must hold the keys of that tower"),
    ],
)
def test_configurations_that_are_not_ours_are_named(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | change))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_a_head_that_siglip_lacks(tmp_path):
    data = {"model_type": "siglip", "vision_config": {"vision_use_head": False}}
    with pytest.raises(UserError, match="pools with its head"):
        named_family(data, tmp_path / "config.json").from_json(data, tmp_path / "config.json")


def test_what_no_family_has_is_named():
    ours, _ = CASES["clip-gelu"]
    with pytest.raises(UserError, match=r"clip, the nearest, would need in `model` logit_bias false"):
        dual_family_of(dataclasses.replace(ours, logit_bias=True))


def test_buffers_of_old_are_passed_over_and_nothing_else(checkpoint):
    folder = checkpoint("clip-gelu")
    values = load_file(folder / "model.safetensors")
    values["text_model.embeddings.position_ids"] = torch.arange(13)[None]
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(folder).family.name == "clip"
    save_file(values | {"more": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no place for the tensor more \[3\]"):
        open_checkpoint(folder)


def test_an_end_of_text_that_transformers_would_not_find(checkpoint, tmp_path):
    import_run(checkpoint("clip-gelu"), tmp_path / "run")
    path = tmp_path / "run/tokenizer/tokenizer.json"
    said = json.loads(path.read_text())
    roles = json.loads((tmp_path / "run/tokenizer/tokenizer_config.json").read_text())
    content = next(token for token, i in said["model"]["vocab"].items() if i == 2)
    roles["eos_token"] = content
    (tmp_path / "run/tokenizer/tokenizer_config.json").write_text(json.dumps(roles))
    with pytest.raises(UserError, match="the end of text has the id 2"):
        export_run(RunFolder.open(tmp_path / "run"), tmp_path / "ours")


def test_padding_that_captions_are_not_given_is_told(checkpoint, tmp_path):
    """A SigLIP reads the last token of a row, which is padding: the model would be given another text."""
    folder = checkpoint("siglip")
    roles = json.loads((folder / "tokenizer_config.json").read_text())
    others = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    other = next(token["content"] for token in others if token["content"] != roles["eos_token"])
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"pad_token": other}))
    with pytest.raises(UserError, match="fills texts up with another token"):
        import_run(folder, tmp_path / "run")


def test_sentencepiece_alone_is_told(checkpoint, tmp_path):
    folder = checkpoint("siglip")
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    with pytest.raises(UserError, match=r"spiece\.model alone"):
        import_run(folder, tmp_path / "run")


def test_a_tokenizer_of_another_model(checkpoint, tmp_path):
    folder = checkpoint("siglip")
    clip_tokenizer(folder)
    with pytest.raises(UserError, match=rf"has 518 ids, and the model {VOCAB}"):
        import_run(folder, tmp_path / "run")
