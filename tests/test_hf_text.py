"""The laws of Hugging Face text towers and tokenizers: those of open_clip, masked, and opened without the hub."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder as Theirs
from tokenizers import Tokenizer as Vocabulary
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast, RobertaConfig

from multimodal.data.augment import Keep
from multimodal.offline import offline
from multimodal.parts import BadSample
from multimodal.towers.hf_text import CONFIG, HFText, HFTextEncoder
from multimodal.towers.hf_tokenizer import FACTS, VOCABULARY, HFTokenizer
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "two", "and", "the"]
TEXTS = ["a photo of a cat", "", "the  red\tdog and two blue cat", "a cat " * 40, "A &amp; Photo, of: the DOG!"]
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def special(kind: str) -> dict[str, str]:
    if kind == "bert":
        return {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind == "roberta":
        return {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"eos_token": "<|end|>", "unk_token": "<unk>"}


def make_tokenizer(kind: str, folder: Path) -> Path:
    """A local folder with a tokenizer of that kind."""
    marks = special(kind)
    vocabulary = {word: place for place, word in enumerate([*marks.values(), *WORDS, "&", ",", ":", "!"])}
    made = Vocabulary(models.WordLevel(vocabulary, unk_token=marks["unk_token"]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "gpt2":
        single, tokens = "$A <|end|>", [("<|end|>", 0)]
    else:
        start, end = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
        single, tokens = f"{start} $A {end}", [(start, vocabulary[start]), (end, vocabulary[end])]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)
    return folder


def make_config(kind: str, folder: Path) -> Any:
    made: Any
    if kind == "bert":
        made = BertConfig(vocab_size=30, max_position_embeddings=40, pad_token_id=0, **SMALL)
    elif kind == "roberta":
        made = RobertaConfig(vocab_size=30, max_position_embeddings=42, pad_token_id=1, **SMALL)
    else:
        made = GPT2Config(vocab_size=30, n_positions=40, n_layer=2, n_head=2, n_embd=32, pad_token_id=0)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_config(request.param, tmp_path)
    return make_tokenizer(request.param, tmp_path)


def no_captions() -> list[str]:
    raise AssertionError("the captions are not wanted here")


def tower(folder: Path, **changes: Any) -> HFText:
    name = str(folder)
    tokenizer = HFTokenizer(name=name, clean="whitespace", strip_sep=False)
    knobs = {"name": name, "pretrained": False, "pool": "mean", "projection": "mlp", "context_length": 20}
    return HFText(**{**knobs, "tokenizer": tokenizer, **changes})


def built(part: HFText, saved: Path | None = None, embed_dim: int = 24) -> tuple[TextPreprocessor, HFTextEncoder]:
    torch.manual_seed(0)
    preprocessor = part.preprocessor(no_captions, Keep(), saved)
    return preprocessor, part.build(preprocessor, embed_dim, saved is not None).double().eval()


def ids(preprocessor: TextPreprocessor) -> Tensor:
    return torch.stack([preprocessor(text, None) for text in TEXTS])


@pytest.mark.parametrize("folder", ["bert", "roberta", "gpt2"], indirect=True)
@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_tokens_are_those_of_open_clip(folder: Path, clean: Any) -> None:
    part = HFTokenizer(name=str(folder), clean=clean, strip_sep=False)
    preprocessor = TextPreprocessor(part.build(no_captions, None), 12)
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=12, clean=clean)
    if theirs.tokenizer.pad_token is None:
        theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    assert torch.equal(ids(preprocessor), theirs(TEXTS))
    assert preprocessor.num_truncated == 1


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_the_end_token_may_be_stripped(folder: Path) -> None:
    part = HFTokenizer(name=str(folder), clean="whitespace", strip_sep=True)
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=12, strip_sep_token=True)
    assert torch.equal(ids(TextPreprocessor(part.build(no_captions, None), 12)), theirs(TEXTS))


@pytest.mark.parametrize("folder", ["bert", "roberta"], indirect=True)
@pytest.mark.parametrize(("pool", "pooler"), [("mean", "mean_pooler"), ("pooler", "cls_pooler"), ("cls", None)])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_the_tower_is_that_of_open_clip(folder: Path, pool: Any, pooler: str | None, projection: Any) -> None:
    preprocessor, ours = built(tower(folder, pool=pool, projection=projection))
    kind = "roberta" if "roberta" in (folder / "config.json").read_text() else "bert"
    theirs = Theirs(
        str(folder),
        24,
        pooler_type=pooler or "cls_last_hidden_state_pooler",
        proj_type=projection,
        pretrained=False,
    )
    theirs.transformer.load_state_dict(ours.net.state_dict(), strict=False)
    theirs.proj.load_state_dict(ours.projection.state_dict())
    tokens = ids(preprocessor)
    assert (tokens == (1 if kind == "roberta" else 0)).any()
    torch.testing.assert_close(ours.projection(ours(tokens)), theirs.double().eval()(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("folder", ["bert", "roberta", "gpt2"], indirect=True)
@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_padding_does_not_change_a_caption(folder: Path, pool: Any) -> None:
    short, module = built(tower(folder, pool=pool, context_length=8))
    long = tower(folder, pool=pool, context_length=30).preprocessor(no_captions, Keep(), None)
    for text in TEXTS[:2]:
        few, many = (module(preprocessor(text, None)[None]) for preprocessor in (short, long))
        torch.testing.assert_close(few, many, rtol=0, atol=1e-10)
    first, second = (module(short(text, None)[None]) for text in ("a cat", "a dog"))
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("folder", ["bert", "gpt2"], indirect=True)
def test_a_saved_tower_is_opened_without_its_folder(folder: Path, tmp_path: Path) -> None:
    preprocessor, module = built(tower(folder))
    saved = tmp_path / "saved"
    saved.mkdir()
    preprocessor.save(saved)
    elsewhere = tower(Path("nowhere"), pretrained=True)
    again, other = built(elsewhere, saved)
    other.load_state_dict(module.state_dict())
    assert torch.equal(ids(again), ids(preprocessor))
    assert torch.equal(other(ids(again)), module(ids(again)))


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """What a checkpoint keeps of a tower."""
    preprocessor, _ = built(tower(folder))
    place = tmp_path / "saved"
    place.mkdir()
    preprocessor.save(place)
    return place


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_of_a_stored_architecture_only_its_familys_own_plain_fields_are_read(folder: Path, saved: Path) -> None:
    rewrite(
        saved / CONFIG,
        auto_map={"AutoModel": "evil--evil.Model", "AutoConfig": "evil--evil.Config"},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
        quantization_config={"quant_method": "bitsandbytes"},
        text_config={"attn_implementation": "someone/kernel"},
        backbone="evil/backbone",
        name_or_path="someone/else",
        dtype="bfloat16",
        torch_dtype="float16",
    )
    _, module = built(tower(folder), saved)
    assert module.net.config._attn_implementation == "sdpa"
    assert module.net.config.name_or_path == ""
    for name in ("text_config", "auto_map", "quantization_config", "backbone"):
        assert not hasattr(module.net.config, name)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no values by name"),
        ("", "not sound JSON"),
        ("[" * 100_000, "not sound JSON"),
        ("{}", "model_type None is none of the text encoders known here"),
        ('{"model_type": ["bert"]}', "is none of the text encoders known here"),
        ('{"model_type": "../evil"}', "is none of the text encoders known here"),
        ('{"model_type": "vit"}', "model_type 'vit' is none of"),
        ('{"model_type": "timm_wrapper", "architecture": "hf-hub:evil/x"}', "'timm_wrapper' is none of"),
        ('{"model_type": "detr", "backbone": "evil/x", "use_timm_backbone": true}', "'detr' is none of"),
        ('{"model_type": "dpt", "backbone": "evil/x"}', "'dpt' is none of"),
        ('{"model_type": "maskformer", "backbone": "/etc"}', "'maskformer' is none of"),
        ('{"model_type": "bert", "hidden_size": {"evil": 1}}', "hidden_size is not a plain value"),
        ('{"model_type": "bert", "num_hidden_layers": 1000000000000}', "number above 10,000,000"),
        ('{"model_type": "bert", "hidden_act": "evil"}', "no network that can be built"),
        ('{"model_type": "bert", "hidden_size": "32"}', "no network that can be built"),
        ('{"model_type": "bert", "hidden_size": -1}', "no network that can be built"),
        ('{"model_type": "bert", "num_attention_heads": 0}', "no network that can be built"),
        ('{"model_type": "bert", "num_attention_heads": 7}', "no network that can be built"),
    ],
)
def test_a_damaged_architecture_is_refused_by_the_name_of_its_file(
    folder: Path, saved: Path, text: str, message: str
) -> None:
    (saved / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=rf"saved/architecture\.json.*{message}"):
        built(tower(folder), saved)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": "evil"}, "clean: "),
        ({"vocab_size": "x"}, "vocab_size: "),
        ({"vocab_size": 1}, "the vocabulary has 18 ids, told are 1"),
        ({"vocab_size": 10**13}, "the vocabulary has 18 ids"),
        ({"pad": 10**9}, "1000000000 for padding"),
        ({"pad": -5}, "pad: "),
        ({"pad": "x"}, "pad: "),
        ({"sep": -1}, "sep: "),
        ({"strip_sep": 1}, "strip_sep: "),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_damaged_facts_of_a_tokenizer_are_refused_by_the_name_of_their_file(
    folder: Path, saved: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(saved / FACTS, **changes)
    with pytest.raises(ValueError, match=rf"saved/tokenizer_facts\.json.*{message}"):
        built(tower(folder), saved)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
@pytest.mark.parametrize("text", ["{}", "", "[]", "[" * 100_000, '{"model": {"type": "BPE"}}'])
def test_a_damaged_vocabulary_is_refused_by_the_name_of_its_file(folder: Path, saved: Path, text: str) -> None:
    (saved / VOCABULARY).write_text(text)
    with pytest.raises(ValueError, match=r"saved/tokenizer\.json is not a sound vocabulary"):
        built(tower(folder), saved)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
@pytest.mark.parametrize("name", [CONFIG, FACTS, VOCABULARY])
def test_what_is_missing_of_a_saved_tower_is_named(folder: Path, saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        built(tower(folder), saved)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_are_float32_whatever_the_hub_says(folder: Path, tmp_path: Path, pretrained: bool) -> None:
    _, module = built(tower(folder))
    module.bfloat16().net.save_pretrained(folder)
    rewrite(folder / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    part = tower(folder, pretrained=pretrained)
    preprocessor = part.preprocessor(no_captions, Keep(), None)
    fresh = part.build(preprocessor, 24)
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    (tmp_path / "kept").mkdir()
    preprocessor.save(tmp_path / "kept")
    assert "dtype" not in (tmp_path / "kept" / CONFIG).read_text()


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_a_stripped_end_is_no_end(folder: Path) -> None:
    """What stands for it may be padding, or the start of every text: pool=end would read a wrong place."""
    knobs = {"vocab_size": 30, "width": 16, "layers": 1, "heads": 1, "mlp_ratio": 2.0, "context_length": 12}
    for strip in (False, True):
        tokenizer = HFTokenizer(name=str(folder), clean="whitespace", strip_sep=strip)
        part = TextTransformer(**knobs, tokenizer=tokenizer)
        preprocessor = part.preprocessor(no_captions, Keep(), None)
        assert (preprocessor.encoding.end is None) == strip
        if strip:
            with pytest.raises(ValueError, match="pool=end needs a tokenizer that marks the end"):
                part.build(preprocessor, 16)


@pytest.mark.parametrize("folder", ["bert", "roberta", "gpt2"], indirect=True)
def test_every_parameter_has_one_depth(folder: Path) -> None:
    _, module = built(tower(folder))
    depths = module.depths()
    assert len(depths) == 3
    placed = [id(p) for parameters in depths for p in parameters]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in module.net.parameters()}


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_weights_of_a_local_folder_are_taken(folder: Path, tmp_path: Path) -> None:
    _, module = built(tower(folder))
    module.float().net.save_pretrained(folder)
    torch.manual_seed(1)
    _, other = built(tower(folder, pretrained=True))
    for name, weight in module.net.state_dict().items():
        assert torch.equal(other.net.state_dict()[name].float(), weight)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="no safetensors weights"):
        built(tower(folder, pretrained=True))


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("bert", {"context_length": 41}, "context_length 41 is more than the 40 places"),
        ("roberta", {"context_length": 41}, "context_length 41 is more than the 40 places"),
        ("gpt2", {"pool": "cls"}, "pool=cls needs a tokenizer that starts texts with a class token"),
        ("gpt2", {"pool": "pooler"}, "has no pooler"),
        ("bert", {"projection": "none"}, r"projection=none needs model\.embed_dim=32"),
    ],
    indirect=["folder"],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(tower(folder, **changes))


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_a_tokenizer_larger_than_the_table_is_refused(folder: Path) -> None:
    BertConfig(vocab_size=5, max_position_embeddings=40, **SMALL).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"18 tokens, the table of .* only 5"):
        built(tower(folder))


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_a_name_that_cannot_be_had_is_told_with_what_to_do(folder: Path) -> None:
    with offline(), pytest.raises(ValueError, match=r"tokenizer\.name: 'nobody/nothing'.* works without a network"):
        built(tower(Path("nobody/nothing")))
    tokenizer = HFTokenizer(name=str(folder), clean="none", strip_sep=False)
    with offline(), pytest.raises(ValueError, match=r"name: 'nobody/nothing'.* works without a network"):
        built(tower(Path("nobody/nothing"), tokenizer=tokenizer))


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_too_long_captions_may_be_refused(folder: Path) -> None:
    preprocessor, _ = built(tower(folder, too_long="refuse"))
    with pytest.raises(BadSample, match="82 tokens, more than context_length=20"):
        preprocessor(TEXTS[3], None)
