"""Any text encoder of Hugging Face, by name or from a local folder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from multimodal.parts import Augment, Operational
from multimodal.towers.hf_tokenizer import HFTokenizer
from multimodal.towers.projection import Projection, projection
from multimodal.towers.text import TextEncoder, TextPreprocessor, TextTower

CONFIG = "architecture.json"
NOT_DATA = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config", "custom_pipelines")
"""Entries of a Hugging Face configuration that can make it fetch or run something."""

Pool = Literal["mean", "max", "cls", "pooler", "last"]


class HFTextPreprocessor(TextPreprocessor):
    """Also keeps the architecture, so that a checkpoint is opened without the hub."""

    def __init__(self, text: TextPreprocessor, architecture: dict[str, Any], saved: bool) -> None:
        super().__init__(text.encoding, text.context_length, text.too_long)
        self.architecture, self.saved = architecture, saved

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
        places = torch.arange(inputs.shape[1], device=inputs.device)
        mask = (inputs != self.pad) | (places == 0)
        if self.end_is_pad:  # then the first of the padding is the end token
            mask = mask | (places == (places * mask).amax(1, keepdim=True) + 1)
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
            places = torch.arange(mask.shape[1], device=mask.device)
            last = torch.where(mask, places, 0).amax(1)
            return hidden[torch.arange(len(hidden), device=mask.device), last]
        if self.pool == "max":
            return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def depths(self) -> list[list[nn.Parameter]]:
        lists = [module for module in self.net.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=len, default=nn.ModuleList())
        inside = {id(p) for p in blocks.parameters()}
        embeddings = {id(p) for m in self.net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        named = [(name, p) for name, p in self.net.named_parameters() if id(p) not in inside]
        first = [p for name, p in named if id(p) in embeddings or "embedding" in name.lower()]
        rest = {id(p) for p in first}
        groups = [first, *(list(block.parameters()) for block in blocks)]
        groups[-1] += [p for _, p in named if id(p) not in rest]
        return groups


class HFText(TextTower):
    """A Hugging Face encoder (BERT, RoBERTa, the encoder of T5, ...); none of its repository's own code is run."""

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
            return HFTextPreprocessor(text, json.loads((saved / CONFIG).read_text()), saved=True)
        return HFTextPreprocessor(text, self._architecture(), saved=False)

    def _architecture(self) -> dict[str, Any]:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"name: '{self.name}' is no local folder and cannot be had from the hub ({reason}); "
                "a folder with config.json works without a network"
            ) from None
        described: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return described

    def build(self, preprocessor: HFTextPreprocessor, embed_dim: int) -> HFTextEncoder:
        net = self._net(preprocessor)
        self._check(net, preprocessor)
        if self.grad_checkpointing:
            net.gradient_checkpointing_enable()
        encoding = preprocessor.encoding
        width = next(
            int(getattr(net.config, key)) for key in ("hidden_size", "d_model", "dim") if hasattr(net.config, key)
        )
        made = projection(self.projection, width, embed_dim)
        return HFTextEncoder(net, made, width, self.pool, encoding.pad, encoding.end == encoding.pad)

    def _net(self, preprocessor: HFTextPreprocessor) -> Any:
        from transformers import AutoModel

        config = _plain_config(preprocessor.architecture)
        if preprocessor.saved or not self.pretrained:
            net: Any = AutoModel.from_config(config, trust_remote_code=False, attn_implementation="eager")
        else:
            try:
                net = AutoModel.from_pretrained(
                    self.name,
                    config=config,
                    trust_remote_code=False,
                    use_safetensors=True,
                    attn_implementation="eager",
                )
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"pretrained: no safetensors weights of '{self.name}' can be had ({reason})") from None
        net = net.encoder if getattr(config, "is_encoder_decoder", False) else net
        if self.pool != "pooler" and getattr(net, "pooler", None) is not None:
            net.pooler = None  # it would have no gradient
        return net.train()

    def _check(self, net: Any, preprocessor: HFTextPreprocessor) -> None:
        encoding, rows = preprocessor.encoding, net.get_input_embeddings().num_embeddings
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


def _plain_config(architecture: dict[str, Any]) -> Any:
    """The configuration without what could make transformers fetch or run something."""
    from transformers import AutoConfig

    kept = {k: v for k, v in architecture.items() if k not in NOT_DATA and not k.startswith("_")}
    kind = kept.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError("the stored architecture of the text tower has no model_type")
    try:
        return AutoConfig.for_model(kind, **kept)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the stored architecture of the text tower is not known to transformers: {error}") from None
