"""What the model whose parameters are here makes of a text, as pieces of the page."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import TYPE_CHECKING

from core.errors import UserError
from llm.generate import encode_prompt
from llm.inspect import LONGEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from core.module import Params
    from llm.inspect.lens import Inspection
    from llm.model.config import ModelConfig
    from llm.tokenizer.tokenizer import Tokenizer

LIKELIEST = 10  # next tokens shown
_KEPT = 4  # inspections: a reader turns from layer to layer of one text


class Inside:
    """A model whose parameters are here, for `llm.inspect`; `url` is where it is served too."""

    def __init__(
        self, url: str, config: ModelConfig, params: Params, tokenizer: Tokenizer, dtype: str = "float32"
    ) -> None:
        self.url, self.tokenizer = url, tokenizer
        self._config, self._params, self._dtype = config, params, dtype
        self.inspect = lru_cache(_KEPT)(self._inspect)

    @property
    def views(self) -> list[str]:
        """What `picture` can show."""
        return ["where each head looks", *(f"layer {i}" for i in range(self._config.num_layers))]

    def _inspect(self, text: str) -> Inspection:
        """Raises `UserError` for a text that is too short or too long."""
        from llm.inspect.lens import inspect

        ids = encode_prompt(self.tokenizer, text)
        most = min(self._config.max_length, LONGEST)
        if not 2 <= len(ids) <= most:
            raise UserError(
                f"The text has {len(ids)} token{'s' * (len(ids) != 1)} with the one that begins every text: "
                f"give one of 2 to {most}."
            )
        likeliest = min(LIKELIEST, self._config.vocab_size)
        return inspect(self._config, self._params, ids, likeliest, self._dtype)

    def picture(self, text: str, view: str) -> str:
        """The attention maps of a layer, or what they come to for each head, as HTML."""
        from llm.inspect import pictures
        from llm.inspect.labels import token_labels
        from llm.inspect.lens import head_figures

        inspection = self.inspect(text)
        if view not in self.views[1:]:
            return as_image(pictures.plot_heads(head_figures(inspection.attention)), self.views[0])
        maps = inspection.attention[self.views.index(view) - 1]
        titles = [f"head {head}" for head in range(len(maps))]
        labels = token_labels(self.tokenizer, inspection.tokens)
        return as_image(
            pictures.plot_attention(maps, titles, labels, min(4, len(maps))), f"attention maps of {view}"
        )


def as_image(figure: Figure, meaning: str) -> str:
    """A figure as HTML that needs no file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{meaning}" src="data:image/png;base64,{data}">'
    return f'<div class="t2t-figure">{image}</div>'
