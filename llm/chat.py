"""Messages to token ids: the one place where a conversation becomes what the model reads.

A chat template is a Jinja program, as Hugging Face keeps it in `tokenizer_config.json`, so that training,
this project's server, transformers and vLLM all render a conversation alike. What a user writes stays text:
`<|eot_id|>` in a message becomes the ids of its characters and ends no turn.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from core.errors import UserError
from llm.tokenizer.bpe import BEGIN
from llm.tokenizer.tokenizer import Tokenizer

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('a role is ' + message['role'] + ': it must be system, user or assistant') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama 3's turns (its model card), with each message as it was written."""

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_NEEDED = (BEGIN, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def template_of(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's own template; `TEMPLATE` if it has none but the tokens for it; else None."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return TEMPLATE if all(token in tokenizer.special_ids for token in _NEEDED) else None


def end_of_turn_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens after which nothing more is to be read: the end of a text, and those of a turn."""
    turns = (tokenizer.special_ids.get(token) for token in TURN_ENDS)
    return [*dict.fromkeys(i for i in (tokenizer.eos_id, *turns) if i is not None)]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    template: str | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a conversation, those of transformers' `apply_chat_template` where no message spells a
    special token.

    Args:
        tokenizer: whose ids.
        messages: each with a `role` and a `content`, the earliest first.
        template: Jinja; None: `template_of(tokenizer)`.
        add_generation_prompt: whether the assistant's turn is opened at the end.

    Raises:
        UserError: if there is no template or no message, a message lacks a part, or the template refuses it.
    """
    template = template or template_of(tokenizer)
    if template is None:
        raise UserError(
            f"the tokenizer in {tokenizer.path} has no chat template, nor the tokens for the usual one "
            f"({', '.join(_NEEDED)}): set 'chat_template' in its tokenizer_config.json, or send a prompt "
            "without roles"
        )
    _check(messages)
    special = re.compile("|".join(map(re.escape, sorted(tokenizer.special_ids, key=len, reverse=True))))
    written = "".join(message["role"] + message["content"] for message in messages)
    if not tokenizer.special_ids or not special.search(written):
        return tokenizer.encode(render(tokenizer, messages, template, add_generation_prompt), markup=True)
    # What no message has breaks each special token's spelling until the template's own are found.
    marker = f"\ue000{secrets.token_hex(16)}\ue000"
    broken = [
        {k: special.sub(lambda m: m[0][:1] + marker + m[0][1:], v) for k, v in message.items()}
        for message in messages
    ]
    ids: list[int] = []
    for piece in re.split(f"({special.pattern})", render(tokenizer, broken, template, add_generation_prompt)):
        token = tokenizer.special_ids.get(piece)
        ids += tokenizer.encode(piece.replace(marker, "")) if token is None else [token]
    return ids


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    template: str,
    add_generation_prompt: bool = True,
) -> str:
    """The text that `template` makes of the messages, special tokens written out."""
    try:
        return _compiled(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            # A token that isn't there is undefined, which Jinja writes as nothing; None it would spell out.
            **{role: token for role in _ROLES if (token := tokenizer.role_token(role)) is not None},
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages: {error.message}") from None
    except Exception as error:  # a template is a program of others
        raise UserError(f"the chat template can't render these messages: {error}") from None


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise UserError("there is no message: give at least one, with a role and a content")
    for number, message in enumerate(messages):
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise UserError(f"message {number} has no '{part}' that is text: give it one")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` around the assistant's words, which tells transformers which tokens are its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """As transformers compiles it: templates come with models of others, so in a sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
