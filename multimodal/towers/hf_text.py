"""Text encoders of Hugging Face, by name or from a local folder."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from multimodal.parts import Augment, Operational
from multimodal.towers import hf_network
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.kept import read_mapping
from multimodal.towers.projection import Projection, projection
from multimodal.towers.text import TextEncoder, TextPreprocessor, TextTower, end_of

CONFIG = "architecture.json"

Pool = Literal["mean", "max", "cls", "pooler", "last"]


class HFTextPreprocessor(TextPreprocessor):
    """Also keeps the architecture, so that a checkpoint is opened without the hub."""

    def __init__(self, text: TextPreprocessor, architecture: dict[str, Any], origin: str) -> None:
        super().__init__(text.encoding, text.context_length, text.too_long)
        self.architecture, self.origin = architecture, origin

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / CONFIG).write_text(json.dumps(self.architecture, indent=2, sort_keys=True))


class HFTextEncoder(TextEncoder):
    """The network is the encoder of transformers; padding is masked, so it does not change a text's features."""

    def __init__(
        self, net: nn.Module, projection: nn.Module, width: int, pool: Pool, pad: int, end_is_pad: bool
    ) -> None:
        super().__init__(net, projection, width)
        self.pool, self.pad, self.end_is_pad = pool, pad, end_is_pad

    def forward(self, inputs: Tensor) -> Tensor:
        """From int64 [n, L] to [n, W]."""
        return self.features(inputs, self.mask(inputs))

    def mask(
        self,
        inputs: Tensor,  # int64 [n, L]
    ) -> Tensor:  # bool [n, L]
        """Where the tokens of texts are, rather than padding."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        mask = (inputs != self.pad) | (places == 0)
        if self.end_is_pad:  # then the first of the padding is the end token
            mask = mask | (places == end_of(mask)[:, None])
        return mask

    def lengths(self, inputs: Tensor) -> Tensor:
        """To the last token."""
        return end_of(self.mask(inputs))

    def features(
        self,
        inputs: Tensor,  # int64 [n, L]
        mask: Tensor,  # bool [n, L]
    ) -> Tensor:  # [n, W]
        """Of texts, whatever is beside them where there is no mask."""
        output = self.net(input_ids=inputs, attention_mask=mask.long())
        pooled: Tensor = output.pooler_output if self.pool == "pooler" else self._pool(output.last_hidden_state, mask)
        return pooled

    def _pool(
        self,
        hidden: Tensor,  # [n, L, W]
        mask: Tensor,  # bool [n, L]
    ) -> Tensor:  # [n, W]
        if self.pool == "cls":
            return hidden[:, 0]
        if self.pool == "last":
            return hidden[torch.arange(hidden.shape[0], device=mask.device), end_of(mask) - 1]
        if self.pool == "max":
            return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def depths(self) -> list[list[nn.Parameter]]:
        """A layer is what lists of layers hold at its place; one that is used again and again is one block."""
        lists = list(_outer_lists(self.net))
        count = len(max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=[]))
        layers = [
            [p for modules in lists if len(modules) == count for p in modules[place].parameters()]
            for place in range(count)
        ]
        inside = {id(p) for layer in layers for p in layer}
        embeddings = {id(p) for m in self.net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        named = [(name, p) for name, p in self.net.named_parameters() if id(p) not in inside]
        first = [p for name, p in named if id(p) in embeddings or "embedding" in name.lower()]
        placed = {id(p) for p in first}
        groups = [first, *layers]
        groups[-1] += [p for _, p in named if id(p) not in placed]
        return groups


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of modules that are in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outer_lists(child)


class HFText(TextTower):
    """A Hugging Face encoder (BERT, RoBERTa, the encoder of T5, ...: `hf_network.FAMILIES`), in float32.

    None of its repository's own code is run.
    """

    name: str = Field(min_length=1)
    """On the hub, or a local folder with config.json."""
    pretrained: bool
    """Start from its weights (safetensors only), or from random ones of the same architecture."""
    pool: Pool
    """What stands for the caption: mean or maximum of tokens, the class token, the network's pooler, or the last."""
    projection: Projection
    """How the shared space is reached."""
    grad_checkpointing: Operational[bool] = False
    """Compute blocks a second time in the backward pass instead of keeping what they made: slower, with less memory."""

    def preprocessor(
        self, captions: Callable[[], Iterable[str]], augment: Augment, saved: Path | None
    ) -> HFTextPreprocessor:
        tokenizer = self.tokenizer
        if isinstance(tokenizer, HFTokenizer) and tokenizer.name is None:
            tokenizer = tokenizer.model_copy(update={"name": self.name})
        text = TextPreprocessor(tokenizer.build(captions, saved), self.context_length, self.too_long)
        if saved is not None:
            origin = str(saved / CONFIG)
            return HFTextPreprocessor(text, hf_network.plain(read_mapping(saved / CONFIG), origin), origin)
        return HFTextPreprocessor(text, hf_network.describe(self.name), f"name: '{self.name}'")

    def build(self, preprocessor: HFTextPreprocessor, embed_dim: int, saved: bool = False) -> HFTextEncoder:
        encoding = preprocessor.encoding
        pretrained = self.pretrained and not saved
        net, width = hf_network.build(self.name, preprocessor.architecture, pretrained, preprocessor.origin)
        self._check(net, encoding)
        if self.pool != "pooler" and getattr(net, "pooler", None) is not None:
            net.pooler = None  # it would have no gradient
        made = projection(self.projection, width, embed_dim)
        if self.grad_checkpointing:
            net.gradient_checkpointing_enable()
        return HFTextEncoder(net, made, width, self.pool, encoding.pad, encoding.end == encoding.pad).train()

    def _check(self, net: Any, encoding: Any) -> None:
        rows = net.get_input_embeddings().num_embeddings
        if encoding.vocab_size > rows:
            raise ValueError(f"the tokenizer has {encoding.vocab_size} tokens, the table of {self.name} only {rows}")
        places = getattr(net.config, "max_position_embeddings", None)
        positions = next((m for name, m in net.named_modules() if name.endswith("position_embeddings")), None)
        offset = getattr(positions, "padding_idx", None)
        if places is not None and offset is not None:
            places -= offset + 1  # RoBERTa counts from there
        if places is not None and places > 0 and self.context_length > places:
            raise ValueError(f"context_length {self.context_length} is more than the {places} places of {self.name}")
        if self.pool == "cls" and getattr(encoding, "first", None) is None:
            raise ValueError("pool=cls needs a tokenizer that starts texts with a class token: pool=mean or last")
        if self.pool == "pooler" and getattr(net, "pooler", None) is None:
            raise ValueError(f"pool=pooler: {self.name} has no pooler: pool=cls or mean")
