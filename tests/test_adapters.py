"""Laws of models in the form of others: features are the model's own, and the others are not needed for it."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import multimodal
from multimodal.adapters.clip_benchmark import CLIPBenchmarkModel
from multimodal.adapters.mteb import MTEBEncoder
from multimodal.data.shapes import Shapes

TEXTS = ["a red circle", "a blue square on a table", "two green stars", "a dog"]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> multimodal.ImageTextModel:
    return multimodal.load(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    source = Shapes(size=4, image_size=40).build(Path())
    return [source[index].inputs["image"] for index in range(4)]


@pytest.mark.slow
def test_no_other_evaluation_is_loaded_with_an_adapter():
    code = (
        "import sys, multimodal.adapters.mteb, multimodal.adapters.clip_benchmark;"
        "print(*({'mteb', 'clip_benchmark', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# --- MTEB -----------------------------------------------------------------------------------------------------------


def test_batches_of_texts_and_images_are_embedded_as_the_model_does(model, pictures):
    encoder = MTEBEncoder(model)
    texts, images = model.encode_text(TEXTS), model.encode_image(pictures)
    assert torch.equal(encoder.encode([{"text": TEXTS[:3]}, {"text": TEXTS[3:]}]), texts)
    found = encoder.encode([{"image": pictures[:3]}, {"image": [pictures[3].convert("RGBA")]}], show_progress_bar=False)
    torch.testing.assert_close(found, images)
    found = encoder.encode([{"text": TEXTS, "image": pictures, "id": list("abcd")}], prompt_type="query")
    torch.testing.assert_close(found, F.normalize(texts + images, dim=-1))
    assert encoder.encode([]).shape == (0, 16)


def test_what_is_neither_text_nor_image_is_refused(model):
    for batch in ({"audio": [0]}, {"id": ["a"]}, {"text": TEXTS, "video": TEXTS}):
        with pytest.raises(ValueError, match=f"should be texts, images, or both, got {', '.join(batch)}"):
            MTEBEncoder(model).encode([batch])


def test_similarities_are_cosines_of_tensors_and_arrays(model):
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    encoder, expected = MTEBEncoder(model), F.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(encoder.similarity(a, b), expected)
    torch.testing.assert_close(encoder.similarity(a.numpy(), b.numpy()), expected)
    torch.testing.assert_close(encoder.similarity(a[0], b), expected[:1])
    torch.testing.assert_close(encoder.similarity_pairwise(a, b), expected.diagonal())
    assert encoder.similarity(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_results_of_other_weights_or_another_precision_are_another_revision(model, tiny_run):
    same, other = (multimodal.load(tiny_run, device="cpu") for _ in range(2))
    with torch.no_grad():
        other.model.logit_scale += 1
    coarse = multimodal.load(tiny_run, device="cpu", precision="bf16")
    revisions = [MTEBEncoder(one).revision for one in (model, same, other, coarse)]
    assert revisions[0] == revisions[1]
    assert len(set(revisions)) == 3


def test_a_name_has_an_organisation(model):
    assert MTEBEncoder(model, "lab/tiny").name == "lab/tiny"
    assert MTEBEncoder(model).name == f"multimodal{model.origin}"
    with pytest.raises(ValueError, match=r"should be 'organisation/model'.*got 'tiny'"):
        MTEBEncoder(model, "tiny")


# --- CLIP_benchmark -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
def test_pixels_and_token_ids_are_embedded_as_images_and_texts_are(model, pictures, amp):
    peer = CLIPBenchmarkModel(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        images = peer.encode_image(torch.stack([peer.transform(picture) for picture in pictures]))
        texts = peer.encode_text(peer.tokenizer(TEXTS))
    torch.testing.assert_close(images, model.encode_image(pictures), rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, model.encode_text(TEXTS), rtol=0, atol=1e-6)
    assert torch.equal(peer.tokenizer(TEXTS[0]), peer.tokenizer(TEXTS[:1]))


def test_a_transform_travels_to_the_processes_that_read_images(model, pictures):
    transform = CLIPBenchmarkModel(model).transform
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(pictures[0].convert("RGBA")), transform(pictures[0]))


def test_texts_that_are_cut_are_counted(model, caplog):
    with caplog.at_level(logging.WARNING):
        CLIPBenchmarkModel(model).tokenizer(["word " * 100, "short"])
    assert "1 of 2 texts were longer than the context" in caplog.text


def test_a_model_without_texts_is_refused(tiny_run):
    model = multimodal.load(tiny_run, device="cpu")
    del model.readers["text"]
    with pytest.raises(ValueError, match="no tower that reads text"):
        CLIPBenchmarkModel(model)
