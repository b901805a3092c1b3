"""Laws of comparing with CLIP_benchmark: where it and we measure the same thing, the numbers are equal.

uv run --with-requirements tests/peers/clip_benchmark.txt python -m pytest tests/test_clip_benchmark_peer.py
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peer_data import TEMPLATE, FewPictures, readme_block
from torch.utils.data import DataLoader, Dataset

import multimodal
from multimodal.adapters.clip_benchmark import CLIPBenchmarkModel
from multimodal.evals.ranking import Matches, rank_metrics, ranked
from multimodal.evals.retrieval import Retrieval
from multimodal.evals.zero_shot import ZeroShot, accuracies, class_embeddings
from multimodal.parts import Sources

pytest.importorskip(
    "clip_benchmark",
    reason="runs with: uv run --with-requirements tests/peers/clip_benchmark.txt "
    "python -m pytest tests/test_clip_benchmark_peer.py",
)

from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval


class Rows(Dataset):
    """Images, or their features, each with its label or captions."""

    def __init__(self, images, targets, classes=()):
        self.images, self.targets, self.classes = images, targets, classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def captioned(rows, batch_size=8):
    """As CLIP_benchmark's own loader: a list of captions for each image."""
    return DataLoader(
        rows, batch_size, collate_fn=lambda some: (torch.stack([x for x, _ in some]), [y for _, y in some])
    )


class Table:
    """A model whose images are features already, and whose texts are rows of a table."""

    def __init__(self, texts):
        self.texts, self.rows = texts, {}

    def tokenizer(self, texts):
        return torch.tensor([self.rows.setdefault(text, len(self.rows)) for text in texts])

    def encode_image(self, images):
        return images

    def encode_text(self, tokens):
        return self.texts[tokens]


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def model(tiny_run):
    return multimodal.load(tiny_run, device="cpu")


# --- equal features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_classes", [3, 7])
def test_accuracies_are_those_of_clip_benchmark(seed, num_classes):
    texts, images = unit(num_classes, 2, 8, seed=seed), unit(90, 8, seed=seed + 100)
    labels = torch.randint(num_classes - 1, (90,), generator=torch.Generator().manual_seed(seed))  # one class is absent
    names, model = [str(number) for number in range(num_classes)], Table(texts.flatten(0, 1))
    loader = DataLoader(Rows(images, labels, names), 32)
    theirs = zeroshot_classification.evaluate(
        model, loader, model.tokenizer, names, ["a {c}", "the {c}"], "cpu", amp=False
    )
    ours = accuracies(images @ class_embeddings(texts).T, labels)
    assert ours["top1"].value == pytest.approx(theirs["acc1"])
    assert ours["mean_per_class"].value == pytest.approx(theirs["mean_per_class_recall"])
    if num_classes >= 5:
        assert ours["top5"].value == pytest.approx(theirs["acc5"])
    else:
        assert ours["top5"].value == 1
        assert theirs["acc5"] != theirs["acc5"]  # not a number


@pytest.mark.parametrize("seed", range(4))
def test_recalls_are_those_of_clip_benchmark(seed):
    owners = torch.arange(30).repeat_interleave(1 + torch.arange(30) % 5)
    images, texts = unit(30, 8, seed=seed), unit(len(owners), 8, seed=seed + 100)
    texts = F.normalize(texts + 0.5 * images[owners], dim=-1)
    captions = [[str(place) for place in (owners == image).nonzero().flatten().tolist()] for image in range(30)]
    model = Table(texts)
    theirs = zeroshot_retrieval.evaluate(
        model, captioned(Rows(images, captions)), model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    matches = Matches.of(owners, torch.arange(30), torch.arange(len(owners)))
    for theirs_is, queries, items, right in (
        ("text", images, texts, matches),
        ("image", texts, images, matches.reversed),
    ):
        ours = rank_metrics(*ranked(queries, items, right), right.counts, len(items))
        for k in (1, 5, 10):
            assert ours[f"r{k}"].value == pytest.approx(theirs[f"{theirs_is}_retrieval_recall@{k}"], abs=1e-6)
        assert 0 < ours["r1"].value < 1


# --- a model, pictures and words ------------------------------------------------------------------------------------


def test_zero_shot_classification_of_a_model_is_that_of_clip_benchmark(model):
    data, peer = FewPictures(), CLIPBenchmarkModel(model)
    part = ZeroShot(every="never", dataset=data, templates=[TEMPLATE, "a {}"], class_names=None)
    ours = part.build(Sources(Path()))(model.encoder).metrics
    source = data.build(Path())
    pixels = [peer.transform(source[index].inputs["image"]) for index in range(len(source))]
    rows = Rows(pixels, [source.label(index) for index in range(len(source))], source.class_names)
    templates = [template.replace("{}", "{c}") for template in part.templates]
    theirs = zeroshot_classification.evaluate(
        peer, DataLoader(rows, 16), peer.tokenizer, source.class_names, templates, "cpu", amp=False
    )
    found = [float(ours[name]) for name in ("top1", "top5", "mean_per_class")]
    assert found == pytest.approx([theirs["acc1"], theirs["acc5"], theirs["mean_per_class_recall"]])


def test_retrieval_of_a_model_is_that_of_clip_benchmark(model):
    data, peer = FewPictures(), CLIPBenchmarkModel(model)
    part = Retrieval(every="never", dataset=data, max_samples=None, duplicates="wrong")
    ours = part.build(Sources(Path()))(model.encoder).metrics
    source = data.build(Path())
    pixels = [peer.transform(source[index].inputs["image"]) for index in range(len(source))]
    rows = Rows(pixels, [list(source.captions(index)) for index in range(len(source))])
    theirs = zeroshot_retrieval.evaluate(
        peer, captioned(rows), peer.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    for k in (1, 5, 10):
        assert float(ours[f"i2t_r{k}"]) == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert float(ours[f"t2i_r{k}"]) == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)


def test_the_example_of_the_readme_runs(tiny_run, tmp_path, monkeypatch, capsys):
    source = FewPictures().build(Path())
    for index in range(len(source)):
        folder = tmp_path / "photos" / source.class_names[source.label(index)]
        folder.mkdir(parents=True, exist_ok=True)
        source[index].inputs["image"].save(folder / f"{index}.png")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes_tiny").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    exec(readme_block("CLIPBenchmarkModel"), {})
    assert {"acc1", "acc5", "mean_per_class_recall"} <= eval(capsys.readouterr().out).keys()
