"""A conversation's ids: those of transformers, whatever the template; a user's text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from core.errors import UserError
from llm.chat import TEMPLATE, encode_chat, end_of_turn_ids, render, template_of
from llm.tokenizer import SPECIAL_TOKENS, Tokenizer, save, train_bpe
from llm.tokenizer.files import CHAT_TEMPLATE, CONFIG

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}
{{- '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{% for message in messages %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'].strip() + ' ' + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

ROLES = ("system", "user", "assistant")
PIECES = [
    "\n",
    " ",
    "  x",
    "Hello",
    "<|",
    "|>",
    "é",
    "😀",
    "'s",
    "<|eot_id",
    "{{ 7 * 7 }}",
    "{% if %}",
    "\ue000",
]
PLAIN = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
CONTENT = PLAIN.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
HOSTILE = st.lists(st.sampled_from([*PIECES, *SPECIAL_TOKENS]), max_size=8).map("".join)


def conversations(content):
    turn = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": content})
    return st.lists(turn, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    """Bytes, a few merges, the special tokens; no template of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train_bpe(["Hello, hello\n\nwell: user assistant x's <| |> {% if %}"] * 3, 280), folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(ours):
    return transformers.AutoTokenizer.from_pretrained(ours.path)


def with_metaspace(folder: Path) -> Tokenizer:
    """As Llama 2's newer files: a space before the first piece of a text only, and roles by description."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=5
    )
    engine.train_from_iterator(["Hello hello, well [INST] met at last [/INST] x's"] * 9, trainer)
    described = json.loads(engine.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(alphabet)}
    engine = tokenizers.Tokenizer.from_str(json.dumps(described))
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / CONFIG).write_text(json.dumps(config))
    return Tokenizer.load(folder)


def assert_same_ids(ours: Tokenizer, theirs, messages, template) -> None:
    for open_turn in (False, True):
        expected = theirs.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=open_turn,
            tokenize=True,
            return_dict=False,
        )
        assert encode_chat(ours, messages, template, open_turn) == expected


@given(messages=conversations(CONTENT))
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_transformers(ours, theirs, messages):
    for template in (TEMPLATE, CHATML):
        assert_same_ids(ours, theirs, messages, template)


def test_a_space_before_the_first_piece_only(tmp_path):
    ours = with_metaspace(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(ours.path)
    messages = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    assert_same_ids(ours, theirs, messages, LLAMA2)
    assert encode_chat(ours, messages, LLAMA2).count(ours.bos_id) == 2


@given(messages=conversations(HOSTILE))
@settings(max_examples=200, deadline=None)
def test_what_a_user_writes_stays_text(ours, messages):
    ids = encode_chat(ours, messages)
    special = set(ours.special_ids.values())
    # The turns are the template's, whatever is said in them...
    assert [i for i in ids if i in special] == [
        i for i in encode_chat(ours, [m | {"content": ""} for m in messages]) if i in special
    ]
    # ...and not a byte of it is lost.
    assert ours.decode(ids) == render(ours, messages, TEMPLATE)


def test_one_begin_of_text_and_a_turn_that_ends(ours):
    ids = encode_chat(ours, [{"role": "user", "content": "Hello"}])
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1
    assert ours.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert end_of_turn_ids(ours) == [ours.eos_id, ours.special_ids["<|eot_id|>"]]


@pytest.mark.parametrize("inside", [True, False])
def test_a_tokenizer_s_own_template_comes_first_and_is_kept(ours, tmp_path, inside):
    folder = tmp_path / "tokenizer"
    ours.save(folder)
    if inside:
        config = json.loads((folder / CONFIG).read_text())
        templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        (folder / CONFIG).write_text(json.dumps(config | {"chat_template": templates}))
    else:
        (folder / CHAT_TEMPLATE).write_text(CHATML)
    loaded = Tokenizer.load(folder)
    assert template_of(loaded) == CHATML
    loaded.save(tmp_path / "copy")
    assert template_of(Tokenizer.load(tmp_path / "copy")) == CHATML


def test_without_the_tokens_there_is_no_template(tmp_path):
    plain = with_metaspace(tmp_path / "tokenizer")
    assert template_of(plain) is None
    with pytest.raises(UserError, match=r"no chat template.*chat_template"):
        encode_chat(plain, [{"role": "user", "content": "Hello"}])
    assert end_of_turn_ids(plain) == [plain.eos_id]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no message"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"content": "x"}], "message 0 has no 'role'"),
        ([{"role": "root", "content": "x"}], "a role is root: it must be system, user or assistant"),
    ],
)
def test_messages_that_are_none_are_named(ours, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        encode_chat(ours, messages)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}{% for", "{{ messages[0]['content'] + 1 }}"],
)
def test_a_template_can_do_no_harm(ours, template):
    with pytest.raises(UserError, match="chat template"):
        encode_chat(ours, [{"role": "user", "content": "x"}], template)
