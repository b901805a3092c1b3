"""The laws of a text tower hold for each family of Hugging Face encoders, or it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_text import built, make_tokenizer, tower
from transformers import AutoConfig, AutoModel

from multimodal import lengths
from multimodal.data.augment import Keep
from multimodal.lengths import by_length
from multimodal.towers import hf_network
from multimodal.towers.hf_text import HFText
from multimodal.towers.hf_tokenizer import HFTokenizer

LAYERS = 3
SMALL = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
BERT = {**SMALL, "max_position_embeddings": 40, "pad_token_id": 0}
ROBERTA = {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1}
T5 = {"num_layers": LAYERS, "num_heads": 2, "d_model": 32, "d_ff": 64, "d_kv": 16, "pad_token_id": 0}
MARKS = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
BART = {"d_model": 32, "encoder_layers": LAYERS, "encoder_ffn_dim": 64, "encoder_attention_heads": 2} | {
    "decoder_layers": 5,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
GROUPED = {**BERT, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": {"n_layers": LAYERS, "n_heads": 2, "dim": 32, "hidden_dim": 64, "max_position_embeddings": 40},
    "modernbert": {**BERT, **MARKS, "global_attn_every_n_layers": 2, "local_attention": 8},
    "electra": {**BERT, "embedding_size": 16},
    "albert": {**BERT, "embedding_size": 16},
    "mpnet": ROBERTA,
    "deberta": {**BERT, **RELATIVE},
    "deberta-v2": {**BERT, **RELATIVE, "position_buckets": 8, "share_att_key": True},
    "t5": T5,
    "umt5": T5,
    "bart": BART,
    "xlm": {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 2, "max_position_embeddings": 40},
    "clip_text_model": {**BERT, "bos_token_id": 2, "eos_token_id": 3},
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "ernie": BERT,
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 2, "n_positions": 40},
    "m2m_100": BART,
    "mbart": BART,
    "mt5": T5,
    "rembert": {**BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    "roberta-prelayernorm": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
}
CAUSAL = ("clip_text_model", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Whose first token sees only itself."""
TEXTS = ("a cat", "a photo of a dog")
ROBERTAS = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
POOLERS = ("albert", "bert", "camembert", "data2vec-text", "ernie", "mpnet", "rembert", *ROBERTAS)


def part(kind: str, place: Path, changes: dict[str, Any] | None = None, **knobs: Any) -> HFText:
    """A tower of a random network of a family, with a tokenizer in its manner of padding."""
    described = {**FAMILIES.get(kind, {}), "vocab_size": 30, **(changes or {})}
    AutoConfig.for_model(kind, **described).save_pretrained(place)
    words = make_tokenizer("roberta" if described.get("pad_token_id") == 1 else "bert", place / "tokenizer")
    tokenizer = HFTokenizer(name=str(words), clean="whitespace", strip_sep=False)
    return tower(place, **{"tokenizer": tokenizer, **knobs})


def randomise(module: torch.nn.Module) -> None:
    """All weights, also those of padding."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_has_one_depth_and_each_layer_its_own(kind: str, tmp_path: Path) -> None:
    _, module = built(part(kind, tmp_path))
    depths = module.depths()
    placed = [id(p) for parameters in depths for p in parameters]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in module.net.parameters()}
    assert len(depths) == 1 + (1 if kind == "albert" else LAYERS)  # which has one layer, again and again
    assert id(module.net.get_input_embeddings().weight) in {id(p) for p in depths[0]}
    sizes = [sum(p.numel() for p in parameters) for parameters in depths[1:-1]]
    assert all(size > 2000 for size in sizes)


def test_a_single_layer_is_one_block(tmp_path: Path) -> None:
    """The two sub-layers of T5's block are a longer list than that of its blocks. The last norm is with the block."""
    _, module = built(part("t5", tmp_path, {"num_layers": 1}))
    assert len(module.depths()) == 2
    assert id(module.net.final_layer_norm.weight) in {id(p) for p in module.depths()[-1]}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last", "pooler"])
def test_padding_does_not_change_a_caption(kind: str, pool: Any, tmp_path: Path) -> None:
    described = part(kind, tmp_path, pool=pool, context_length=8)
    if pool == "pooler" and kind not in POOLERS:
        with pytest.raises(ValueError, match="has no pooler"):
            built(described)
        return
    short, module = built(described)
    randomise(module)
    long = part(kind, tmp_path, context_length=30).preprocessor(list, Keep(), None)
    few, many = (module(torch.stack([cut(text, None) for text in TEXTS])) for cut in (short, long))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-6 if kind == "xlm" else 1e-10)  # XLM attends in float32
    if pool != "cls" or kind not in CAUSAL:
        assert not torch.allclose(few[0], few[1], atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_captions_cut_to_their_lengths_are_read_and_learnt_as_padded_ones(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "OVERHEAD", 1)
    preprocessor, module = built(part(kind, tmp_path, context_length=30))
    randomise(module)
    ids = torch.stack([preprocessor(words, None) for words in ("a photo of a dog", "a cat", "the red dog", "a cat")])
    made = []
    for features in (module(ids), by_length(module, ids, module.lengths(ids))):
        module.zero_grad()
        features.square().sum().backward()
        made.append((features, [p.grad for p in module.net.parameters()]))
    tolerance = 1e-5 if kind == "xlm" else 1e-10  # it attends in float32
    torch.testing.assert_close(*made, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_learns(kind: str, tmp_path: Path) -> None:
    preprocessor, module = built(part(kind, tmp_path))
    module(torch.stack([preprocessor(text, None) for text in TEXTS])).sum().backward()
    assert [name for name, p in module.net.named_parameters() if p.grad is None] == []


def test_every_family_that_is_taken_is_tried_here() -> None:
    assert set(FAMILIES) == set(hf_network.FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_kept_of_an_architecture_makes_the_same_network(kind: str, tmp_path: Path) -> None:
    described = part(kind, tmp_path)
    preprocessor, module = built(described)
    (tmp_path / "saved").mkdir()
    preprocessor.save(tmp_path / "saved")
    again, other = built(described, tmp_path / "saved")
    whole = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).double().eval()
    whole = whole.encoder if whole.config.is_encoder_decoder else whole
    for net in (other.net, whole):
        net.load_state_dict(module.net.state_dict(), strict=net is other.net)
    tokens = torch.stack([again(text, None) for text in TEXTS])
    torch.testing.assert_close(other(tokens), module(tokens), rtol=0, atol=0)
    module.net, before = whole, module(tokens)
    torch.testing.assert_close(module(tokens), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_tower_is_first_outlined_without_memory(kind: str, tmp_path: Path) -> None:
    described = part(kind, tmp_path)
    preprocessor, module = built(described)
    with torch.device("meta"):
        outline = described.build(preprocessor, 24, saved=True)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (module, outline)]
    assert shapes[0] == shapes[1]
    assert all(tensor.is_meta for tensor in outline.state_dict().values())


@pytest.mark.parametrize("kind", ["fnet", "mobilebert", "clip", "siglip_text_model", "vit", "timm_wrapper"])
def test_what_is_not_known_to_be_a_text_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    """FNet and MobileBERT hear padding behind its mask, others have no text, or fetch a second network."""
    described = part("bert", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architecture": "hf-hub:evil/x"}))
    with pytest.raises(ValueError, match=f"model_type '{kind}' is none of the text encoders known here"):
        built(described)
