"""The laws of towers: what they see, how they read, and that they are those of CLIP."""

import pickle
import string
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from tokenizers import Tokenizer as Vocabulary
from tokenizers import normalizers
from torch import Tensor, nn

from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.model import Model
from multimodal.parts import TowerModule
from multimodal.towers.byte_bpe import END, FILE, PAD, START, ByteBPE
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.images import ImageEncoder, ImagePreprocessor
from multimodal.towers.resnet import ResNet
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer
from multimodal.towers.vit import ViT

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGES: dict[str, Any] = {"image_size": 32, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
VIT: dict[str, Any] = {"patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0, "patch_dropout": 0.0}
TEXT: dict[str, Any] = {"context_length": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
SECTION = ModelSection(embed_dim=24, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)

CAPTIONS = [
    "a photo of a cat",
    "",
    " ",
    "A Photo of TWO dogs, and 3 cats!",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600",
    "it's the cat's & the dog's &amp; mine",
    "word " * 200,
    "tabs\tand\nlines   and spaces",
    "\u0130stanbul e\u0301",
]


class Normalised(ImageEncoder):
    """No network behind the normalisation."""

    def depths(self) -> list[list[nn.Parameter]]:
        return [[]]


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def no_captions() -> list[str]:
    raise AssertionError("the captions are not wanted here")


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (31, 50), (300, 100), (33, 32), (5, 7), (1, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_is_evaluated_as_open_clip_does_to_the_last_bit(
    mode: str, size: tuple[int, int], interpolation: str
) -> None:
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, interpolation=interpolation)
    image = picture(mode, size)
    pixels = ImagePreprocessor(32, interpolation, Keep())(image, None)
    assert pixels.dtype == torch.uint8
    ours = Normalised(nn.Identity(), nn.Identity(), 0, MEAN, STD)(pixels[None])[0]
    assert torch.equal(ours, theirs(image))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1", "LA", "I;16", "F"])
def test_an_image_of_any_mode_is_read(mode: str) -> None:
    image = Image.new(mode, (40, 50))
    assert ImagePreprocessor(32, "bicubic", Keep())(image, None).shape == (3, 32, 32)


def test_an_image_that_keeps_is_seen_in_training_as_in_evaluation() -> None:
    preprocessor, image = ImagePreprocessor(32, "bicubic", Keep()), picture("RGB", (50, 40))
    assert torch.equal(preprocessor(image, Random(0)), preprocessor(image, None))


def test_pixels_of_float64_are_normalised_in_float64() -> None:
    encoder = Normalised(nn.Identity(), nn.Identity(), 0, MEAN, STD).double()
    assert encoder(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).dtype == torch.float64


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_length", [77, 12])
def test_clip_tokens_are_those_of_open_clip(context_length: int) -> None:
    preprocessor = TextPreprocessor(ClipBPE().build(no_captions, None), context_length)
    theirs = open_clip.SimpleTokenizer(context_length=context_length)
    assert preprocessor.encoding.vocab_size == 49408
    for caption in CAPTIONS:
        ids = preprocessor(caption, None)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, theirs([caption])[0])


def learnt(vocab_size: int = 400, clean: Any = "none") -> Any:
    captions = [f"a photo of a {colour} cat" for colour in ("red", "green", "blue")] * 5
    return ByteBPE(vocab_size=vocab_size, max_captions=1000, clean=clean).build(lambda: captions, None)


@pytest.mark.parametrize("caption", [c for c in CAPTIONS if len(c) < 100] + [string.printable[:60]])
def test_learnt_tokens_say_any_text_in_lower_case(caption: str) -> None:
    import unicodedata

    encoding = learnt()
    said = " ".join(unicodedata.normalize("NFC", caption).lower().split())
    assert encoding.decode(torch.tensor(encoding(caption))) == said


def test_learnt_tokens_are_of_the_cleaned_text_if_asked() -> None:
    plain, cleaned = learnt(), learnt(clean="whitespace")
    assert cleaned("it\u2019s a  cat &amp;amp; a dog ") == plain("it's a cat & a dog")
    assert plain("cat &amp; dog") != plain("cat & dog")


def test_what_is_learnt_is_learnt_from_cleaned_captions() -> None:
    part = ByteBPE(vocab_size=400, max_captions=1000, clean="whitespace")
    assert len(part.build(lambda: ["&lt;&lt;&lt;&lt;"] * 100, None)("<<<<")) == 3


def test_a_caption_that_spells_marks_has_the_same_tokens_after_pickling() -> None:
    encoding = learnt()
    caption = f"{PAD} a cat {END}{START}"
    assert not {encoding.pad, encoding.start, encoding.end} & set(encoding(caption)[1:-1])
    assert pickle.loads(pickle.dumps(encoding))(caption) == encoding(caption)


def test_a_vocabulary_kept_before_white_space_was_single_gives_the_tokens_that_it_gave(tmp_path: Path) -> None:
    encoding = learnt()
    before = Vocabulary.from_str(encoding.vocabulary.to_str())
    before.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    (tmp_path / FILE).write_text(before.to_str())
    again = ByteBPE(vocab_size=400, max_captions=1000).build(no_captions, tmp_path)
    before.encode_special_tokens = True
    for caption in CAPTIONS:
        assert again(caption) == [encoding.start, *before.encode(caption).ids, encoding.end]
    assert again("a  cat") != encoding("a  cat")


def test_the_end_token_has_the_highest_id_and_is_kept_where_the_text_is_cut() -> None:
    encoding = learnt()
    preprocessor = TextPreprocessor(encoding, 8)
    for caption in CAPTIONS:
        ids = preprocessor(caption, None)
        assert ids.shape == (8,)
        assert ids[0] == encoding.vocab_size - 2
        end = int(ids.argmax())
        assert ids[end] == encoding.vocab_size - 1
        assert not ids[end + 1 :].any()
        assert ids[:end].bool().all()
    assert preprocessor("word " * 200, None).argmax() == 7


def test_what_is_learnt_is_not_larger_than_asked_and_shortens_what_it_was_learnt_from() -> None:
    words = ["".join(Random(seed).choices(string.ascii_lowercase, k=6)) for seed in range(200)]
    small, large = (ByteBPE(vocab_size=size, max_captions=1000).build(lambda: words, None) for size in (300, 400))
    assert (small.vocab_size, large.vocab_size) == (300, 400)
    lengths = [sum(len(encoding(word)) for word in words) for encoding in (small, large)]
    assert lengths[1] < lengths[0] < 200 * 9


def test_only_so_many_captions_are_learnt_from() -> None:
    captions = ["aa"] * 10 + ["zzzz"] * 100
    encoding = ByteBPE(vocab_size=400, max_captions=10).build(lambda: captions, None)
    assert len(encoding("aa")) < len(encoding("zz"))


def test_a_saved_vocabulary_gives_the_same_tokens(tmp_path: Path) -> None:
    encoding = learnt()
    encoding.save(tmp_path)
    again = ByteBPE(vocab_size=400, max_captions=1000).build(no_captions, tmp_path)
    assert again.vocab_size == encoding.vocab_size
    assert all(again(caption) == encoding(caption) for caption in CAPTIONS)


def test_the_same_captions_teach_the_same_vocabulary() -> None:
    assert learnt().vocabulary.to_str() == learnt().vocabulary.to_str()


def test_a_caption_that_spells_the_end_token_does_not_end_there() -> None:
    encoding = learnt()
    assert encoding("a <end_of_text> cat").count(encoding.end) == 1


def test_one_of_several_captions_is_drawn_in_training_and_the_first_in_evaluation() -> None:
    preprocessor = TextPreprocessor(learnt(), 24)
    captions = ("one", "two", "three")
    ids = {caption: tuple(preprocessor(caption, None).tolist()) for caption in captions}
    assert tuple(preprocessor(captions, None).tolist()) == ids["one"]
    drawn = {tuple(preprocessor(captions, Random(seed)).tolist()) for seed in range(50)}
    assert drawn == set(ids.values())


# --- features -------------------------------------------------------------------------------------------------------


def clip(vision: dict[str, Any]) -> CLIP:
    """Open_clip's own model of both towers."""
    torch.manual_seed(0)
    vision_cfg = CLIPVisionCfg(image_size=32, **vision)
    text_cfg = CLIPTextCfg(context_length=16, vocab_size=300, width=32, layers=2, heads=2)
    return CLIP(24, vision_cfg, text_cfg).eval()


def with_weights(module: TowerModule, weights: dict[str, Tensor], projection: Tensor | None) -> Model:
    """Our model of one tower, with theirs for weights; every weight is used."""
    module.net.load_state_dict(weights)  # type: ignore[union-attr,operator]
    model = Model({"tower": module}, SECTION).eval()
    if projection is not None:
        model.towers["tower"].projection.weight.data.copy_(projection.T)  # type: ignore[union-attr,operator]
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels: Tensor) -> Tensor:
    return (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_the_vision_transformer_is_that_of_open_clip(pixels: Tensor, pool: Any) -> None:
    theirs = clip({"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": pool})
    weights = theirs.visual.state_dict()
    projection = weights.pop("proj")
    tower = ViT(**IMAGES, **VIT, pool=pool)
    model = with_weights(tower.build(tower.preprocessor(no_captions, Keep(), None), 24), weights, projection)
    expected = theirs.encode_image(normalised(pixels), normalize=True)
    torch.testing.assert_close(model.encode("tower", pixels), expected, rtol=0, atol=1e-5)


def test_the_residual_network_is_that_of_open_clip(pixels: Tensor) -> None:
    theirs = clip({"layers": (1, 1, 1, 1), "width": 16, "head_width": 64})
    tower = ResNet(**IMAGES, layers=(1, 1, 1, 1), width=16, heads=8)
    module = tower.build(tower.preprocessor(no_captions, Keep(), None), 24)
    model = with_weights(module, theirs.visual.state_dict(), None)
    expected = theirs.encode_image(normalised(pixels), normalize=True)
    torch.testing.assert_close(model.encode("tower", pixels), expected, rtol=0, atol=1e-5)


class _Words:
    """Stands for an encoding of 300 tokens."""

    vocab_size, pad, end = 300, 0, 299


def text_tower() -> tuple[CLIP, Model]:
    theirs = clip({"layers": 1, "width": 32, "head_width": 16, "patch_size": 8})
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("visual.", "logit_scale"))}
    projection = weights.pop("text_projection")
    tower = TextTransformer(**TEXT, tokenizer=ByteBPE(vocab_size=300, max_captions=1))
    module = tower.build(TextPreprocessor(_Words(), 16), 24)  # type: ignore[arg-type]
    return theirs, with_weights(module, weights, projection)


def tokens() -> Tensor:
    """Three texts of several lengths, padded with 0."""
    ids = torch.randint(1, 298, (3, 16), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((16, 5, 2)):
        ids[row, 0], ids[row, length - 1], ids[row, length:] = 298, 299, 0
    return ids


def test_the_text_transformer_is_that_of_open_clip() -> None:
    theirs, model = text_tower()
    expected = theirs.encode_text(tokens(), normalize=True)
    torch.testing.assert_close(model.encode("tower", tokens()), expected, rtol=0, atol=1e-5)


def test_what_follows_the_end_of_a_text_does_not_change_its_features() -> None:
    _, model = text_tower()
    padded = tokens()
    other = padded.clone()
    other[1, 5:], other[2, 2:] = 7, 123
    torch.testing.assert_close(model.encode("tower", padded), model.encode("tower", other), rtol=0, atol=1e-6)
    other[1, 3] = (other[1, 3] + 1) % 298
    assert not torch.allclose(model.encode("tower", padded)[1], model.encode("tower", other)[1], atol=1e-4)


def test_features_have_unit_norm_and_the_scale_is_the_one_asked_for(pixels: Tensor) -> None:
    tower = ViT(**IMAGES, **VIT, pool="tok")
    model = Model({"image": tower.build(tower.preprocessor(no_captions, Keep(), None), 24)}, SECTION)
    x = model({"image": pixels})["image_features"]
    assert x.shape == (3, 24)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(F.cosine_similarity(x, x), torch.ones(3))
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias is None


def test_the_count_of_parameters_leaves_none_out(pixels: Tensor) -> None:
    tower = ViT(**IMAGES, **VIT, pool="tok")
    model = Model({"image": tower.build(tower.preprocessor(no_captions, Keep(), None), 24)}, SECTION)
    counts = model.num_parameters()
    assert counts["total"] == counts["image"] + 1 == sum(p.numel() for p in model.parameters())


def test_patches_are_dropped_in_training_only(pixels: Tensor) -> None:
    tower = ViT(**IMAGES, **{**VIT, "patch_dropout": 0.5}, pool="tok")
    module = tower.build(tower.preprocessor(no_captions, Keep(), None), 24)
    assert not torch.equal(module.train()(pixels), module.train()(pixels))
    assert torch.equal(module.eval()(pixels), module.eval()(pixels))


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_drop_path_leaves_out_branches_of_whole_samples_in_training_only(kind: str, pixels: Tensor) -> None:
    def module(drop_path: float) -> TowerModule:
        torch.manual_seed(0)
        if kind == "vit":
            image = ViT(**IMAGES, **{**VIT, "layers": 5}, pool="tok", drop_path=drop_path)
            return image.build(image.preprocessor(no_captions, Keep(), None), 24)
        words = ByteBPE(vocab_size=300, max_captions=1)
        text = TextTransformer(**{**TEXT, "layers": 5}, tokenizer=words, drop_path=drop_path)
        return text.build(TextPreprocessor(_Words(), 16), 24)  # type: ignore[arg-type]

    dropping, plain = module(0.8), module(0.0)
    inputs = pixels if kind == "vit" else tokens()
    assert dropping.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(dropping.eval()(inputs), plain.eval()(inputs))
    assert not torch.equal(dropping.train()(inputs), plain.train()(inputs))

    for place, block in enumerate(dropping.net.transformer.resblocks):  # type: ignore[union-attr,arg-type]
        rate = 0.8 * place / 4
        for branch in (block.ls_1, block.ls_2):
            made = branch(torch.ones(4000, 2, 3))
            assert ((made == made[:, :1, :1]).all(-1).all(-1)).all(), "a sample is left out as a whole"
            assert (made == 0).float().mean().item() == pytest.approx(rate, abs=0.03)
            assert made.mean().item() == pytest.approx(1, abs=0.15)
