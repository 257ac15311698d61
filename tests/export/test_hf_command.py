"""`python -m export.hf` as its user meets it: what it writes, what it refuses, and no halves left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hf_models import write
from runs import ROOT
from safetensors.torch import load_file, save_file

import export.write
from core.errors import UserError
from core.run import RunFolder
from export.hf import main
from export.read import import_run, open_checkpoint
from export.verify import verify
from export.write import export_run
from llm.chat import TEMPLATE
from llm.tokenizer import save, train_bpe


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint of theirs; copy it before changing it."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "corpus").mkdir()
    return write("qwen3-tied", folder / "theirs", folder / "corpus")


@pytest.fixture(scope="module")
def run(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "imported"
    import_run(original, folder)
    (folder / "summary.json").write_text('{"heldout_loss": 1.25, "parameters": 40000}')
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    main(["--run", str(run), "--out", str(folder)])
    return folder


@pytest.fixture
def changed(original, tmp_path):
    """A copy of the checkpoint with other tensors or another config.json."""

    def change(tensors=lambda tensors: None, **config):
        folder = shutil.copytree(original, tmp_path / "changed")
        values = load_file(folder / "model.safetensors")
        tensors(values)
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        said = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(said))
        return folder

    return change


def test_what_it_writes(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    card = (exported / "README.md").read_text()
    assert "| heldout_loss | 1.25 |" in card and "embed_dim: 48" in card and "Qwen3ForCausalLM" in card
    assert "lm_head.weight" not in load_file(exported / "model.safetensors"), "a tied head stands once"


def test_what_older_readers_look_for(exported):
    said = json.loads((exported / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 10000.0
    assert said["torch_dtype"] == said["dtype"] == "float32"
    assert (said["max_position_embeddings"], said["head_dim"], said["tie_word_embeddings"]) == (64, 10, True)


def test_a_conversation_ends_and_is_rendered_as_in_training(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    generation = transformers.GenerationConfig.from_pretrained(exported)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert generation.eos_token_id == ends
    assert (
        not generation.do_sample and generation.temperature in (None, 1.0) and generation.top_p in (None, 1.0)
    )
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("The").input_ids[0] == tokenizer.bos_token_id != tokenizer("The").input_ids[1]


def test_a_tokenizer_keeps_the_template_it_came_with(changed, tmp_path):
    folder = changed()
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    import_run(folder, tmp_path / "run")
    export_run(RunFolder.open(tmp_path / "run"), tmp_path / "ours")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


def test_a_model_that_is_not_the_runs_is_told(run, tmp_path, monkeypatch, capsys):
    values = export.write._values

    def off_by_a_thousandth(*arguments):
        return (value * np.float32(1.001) for value in values(*arguments))

    monkeypatch.setattr(export.write, "_values", off_by_a_thousandth)
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run), "--out", str(tmp_path / "ours"), "--verify"])
    assert ended.value.code == 1
    assert "is not the model of" in capsys.readouterr().err


def test_other_tokens_are_told(run, tmp_path):
    export_run(RunFolder.open(run), tmp_path / "ours")
    (tmp_path / "ours/tokenizer.json").unlink()
    save(train_bpe(["the other text, the other tokens"], 270), tmp_path / "ours")
    with pytest.raises(UserError, match="the tokenizer is not exported right"):
        verify(RunFolder.open(run), 0, tmp_path / "ours")


def test_what_stands_is_not_written_over(run, original, exported):
    with pytest.raises(UserError, match="exists already: name another folder with --out"):
        main(["--run", str(run), "--out", str(exported)])
    with pytest.raises(UserError, match="exists already"):
        main(["--import", str(original), "--out", str(run)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere", "--out", "x"], "nowhere holds no run"),
        (["--import", "nowhere", "--out", "x"], "nowhere is no folder"),
        (["--import", str(ROOT), "--out", "x"], r"no config.json"),
        (["--import", "x", "--out", "y", "--scheme", "bf16"], "--scheme is for an export"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_checkpoint_without_its_weights(changed, tmp_path):
    folder = changed()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle, which can run any code"):
        import_run(folder, tmp_path / "run")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


NORM, LAYER, HEAD = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"lacks the tensor model.norm.weight \[48\]$"),
        (lambda t: rename(t, LAYER, "up"), rf"lacks the tensor {LAYER} \[52, 48\]"),
        (lambda t: t.update({LAYER: t[LAYER].T.contiguous()}), rf"{LAYER} is \[48, 52\], .* \[52, 48\]"),
        (lambda t: t.update(more=torch.zeros(3)), r"config.json has no place for the tensor more \[3\]"),
        (lambda t: t.update({HEAD: t["model.embed_tokens.weight"] + 1}), f"{HEAD} differs"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), f"{NORM} is I8: supported are F32, BF16, F16"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(changed, change, message):
    folder = changed(change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_a_tied_head_may_be_stored_again_and_buffers_of_old_are_passed_over(changed):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    assert open_checkpoint(changed(add)).config.tied_head


def test_a_head_that_config_does_not_tie(changed):
    with pytest.raises(UserError, match=r"lacks the tensor lm_head.weight.*must say tie_word_embeddings"):
        open_checkpoint(changed(tie_word_embeddings=False))


def test_a_tokenizer_of_another_model(changed, tmp_path):
    folder = changed()
    (folder / "tokenizer.json").unlink()
    save(train_bpe([("a text of many words: " + str(list(range(300)))) * 9], 300), folder)
    with pytest.raises(UserError, match=r"has 300 ids, and the model 271: they don't belong together"):
        import_run(folder, tmp_path / "run")


def test_what_fails_on_the_way_leaves_nothing(run, tmp_path, monkeypatch):
    values = export.write._values

    def some(*arguments):
        yield from list(values(*arguments))[:3]
        raise RuntimeError("on the way")

    monkeypatch.setattr(export.write, "_values", some)
    with pytest.raises(RuntimeError, match="on the way"):
        main(["--run", str(run), "--out", str(tmp_path / "ours")])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(run, small_disk):
    (small_disk / "ballast").write_bytes(bytes((6 << 20) - 40 * 4096))
    done = python("-m", "export.hf", "--run", str(run), "--out", str(small_disk / "ours"))
    assert done.returncode == 2
    assert f"the disk is full while writing {small_disk}/.ours.unfinished/model.safetensors" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


KILLED = """
import os, signal, sys
import export.shards
from export.hf import main
write, left = export.shards._write_all, iter(range(3))
def write_some(*arguments):
    next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
export.shards._write_all = write_some
main(sys.argv[1:])
"""


def test_a_killed_export_leaves_nothing_by_that_name(run, tmp_path):
    arguments = ["--run", str(run), "--out", str(tmp_path / "ours")]
    done = python("-c", KILLED, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".ours.unfinished"]
    main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_help_needs_no_jax():
    program = (
        "import sys; from export.hf import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    done = python("-c", program)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
    assert "--import FOLDER" in done.stdout


def test_an_export_needs_neither_torch_nor_transformers(run, tmp_path):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors')))\n"
        "from export.hf import main; main(sys.argv[1:])"
    )
    arguments = ["--run", str(run), "--out", str(tmp_path / "ours")]
    done = python("-c", program, *arguments)
    assert done.returncode == 0, done.stderr


def test_verifying_names_what_it_needs_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"--verify needs transformers: pip install -e '.\[export\]'"):
        main(["--run", str(run), "--out", str(tmp_path / "ours"), "--verify"])
    assert not (tmp_path / "ours").exists()
