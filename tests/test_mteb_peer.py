"""Laws of comparing with MTEB: where it and we measure the same thing, the numbers are equal.

uv run --with-requirements tests/peers/mteb.txt python -m pytest tests/test_mteb_peer.py
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peer_data import TEMPLATE, FewPictures, readme_block

import multimodal
from multimodal.adapters.mteb import MTEBEncoder
from multimodal.evals.ranking import Matches, rank_metrics, ranked
from multimodal.evals.retrieval import Retrieval
from multimodal.evals.sts import TextSimilarity
from multimodal.evals.winoground import winoground_hits
from multimodal.evals.zero_shot import ZeroShot
from multimodal.parts import Sources

pytest.importorskip(
    "mteb",
    reason="runs with: uv run --with-requirements tests/peers/mteb.txt python -m pytest tests/test_mteb_peer.py",
)

import mteb
from datasets import Dataset, DatasetDict
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS, AbsTaskZeroShotClassification
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

ROUNDED = 1e-5
"""mteb gives five digits."""
EVERYTHING = 1000
"""More than there are items."""


def metadata(kind, name, main_score, modalities, category):
    return TaskMetadata(
        type=kind,
        name=name,
        main_score=main_score,
        modalities=modalities,
        category=category,
        description="made in a test",
        dataset={"path": "none/none", "revision": "none"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )


def pictures(source):
    return [source[index].inputs["image"] for index in range(len(source))]


class LocalRetrieval(AbsTaskRetrieval):
    """Images and captions of `FewPictures`."""

    k_values = (1, 5, 10, EVERYTHING)

    def load_data(self, *args, **kwargs):
        source = FewPictures().build(Path())
        images = {"id": [f"i{index}" for index in range(len(source))], "image": pictures(source)}
        pairs = [
            (f"i{index}", f"c{index}-{place}", caption)
            for index in range(len(source))
            for place, caption in enumerate(source.captions(index))
        ]
        texts = {"id": [key for _, key, _ in pairs], "text": [caption for *_, caption in pairs]}
        sides = [images, texts] if self.metadata.category == "i2t" else [texts, images]
        right = {}
        for image, caption, _ in pairs:
            query, item = (image, caption) if self.metadata.category == "i2t" else (caption, image)
            right.setdefault(query, {})[item] = 1
        queries, corpus = (Dataset.from_dict(side) for side in sides)
        split = {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class ImagesToTexts(LocalRetrieval):
    metadata = metadata("Any2AnyRetrieval", "LocalI2T", "ndcg_at_10", ["image", "text"], "i2t")


class TextsToImages(LocalRetrieval):
    metadata = metadata("Any2AnyRetrieval", "LocalT2I", "ndcg_at_10", ["image", "text"], "t2i")


class LocalZeroShot(AbsTaskZeroShotClassification):
    metadata = metadata("ZeroShotClassification", "LocalZeroShot", "accuracy", ["image", "text"], "i2t")

    def load_data(self, *args, **kwargs):
        source = FewPictures().build(Path())
        labels = [source.label(index) for index in range(len(source))]
        self.dataset = DatasetDict({"test": Dataset.from_dict({"image": pictures(source), "label": labels})})
        self.data_loaded = True

    def get_candidate_labels(self):
        return [TEMPLATE.replace("{}", name) for name in FewPictures().build(Path()).class_names]


class LocalPairs(AbsTaskImageTextPairClassification):
    """Two images and two captions, as in Winoground."""

    metadata = metadata("Compositionality", "LocalPairs", "accuracy", ["image", "text"], "i2t")
    images_column_names = ("image_0", "image_1")
    texts_column_names = ("caption_0", "caption_1")

    def load_data(self, *args, **kwargs):
        source = FewPictures().build(Path())
        images, texts = pictures(source), [source.captions(index)[0] for index in range(len(source))]
        columns = {f"image_{side}": images[side::2] for side in (0, 1)}
        columns |= {f"caption_{side}": texts[side::2] for side in (0, 1)}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


PAIRS = [
    (place * 7 % 26 / 5, caption, f"{place % 4} things, {caption[::-1] if place % 3 else caption[:12]}")
    for place in range(26)
    for caption in FewPictures().build(Path()).captions(place)[:1]
]


class LocalSTS(AbsTaskSTS):
    metadata = metadata("STS", "LocalSTS", "cosine_spearman", ["text"], "t2t")

    def load_data(self, *args, **kwargs):
        columns = dict(zip(("score", "sentence1", "sentence2"), map(list, zip(*PAIRS, strict=True)), strict=True))
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


@pytest.fixture(scope="module")
def model(tiny_run):
    return multimodal.load(tiny_run, device="cpu")


def scores(model, task):
    """Of mteb's own program, without a cache."""
    found = mteb.evaluate(MTEBEncoder(model), task(), cache=None, co2_tracker=False, show_progress_bar=False)
    (one,) = found.task_results[0].scores["test"]
    return one


def values(part, model, root=Path()):
    return {name: float(one) for name, one in part.build(Sources(root))(model.encoder).metrics.items()}


def test_a_model_is_an_encoder_of_texts_and_images_and_nothing_else(model):
    encoder = MTEBEncoder(model, "lab/tiny")
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(encoder, CrossEncoderProtocol | SearchProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.revision, meta.embed_dim) == ("lab/tiny", encoder.revision, 16)
    assert meta.modalities == ["text", "image"]
    assert type(meta).model_validate(dict(meta)) == meta


# --- equal features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_counted_as_mteb_counts_them(seed):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(30).repeat_interleave(1 + torch.arange(30) % 5)
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(len(owners), 8, generator=generator) + 0.5 * images[owners], dim=-1)
    matches = Matches.of(owners, torch.arange(30), torch.arange(len(owners)))
    for queries, items, right in ((images, texts, matches), (texts, images, matches.reversed)):
        ours = {
            name: one.value
            for name, one in rank_metrics(*ranked(queries, items, right), right.counts, len(items)).items()
        }
        mask, found = right.right(torch.arange(len(queries))), (queries @ items.T).double()
        theirs = calculate_retrieval_scores(
            {f"q{i}": {f"d{j}": value for j, value in enumerate(row)} for i, row in enumerate(found.tolist())},
            {f"q{i}": {f"d{j}": 1 for j in row.nonzero().flatten().tolist()} for i, row in enumerate(mask)},
            [1, 5, 10, EVERYTHING],
        )
        assert ours["ndcg10"] == pytest.approx(theirs.ndcg["NDCG@10"], abs=ROUNDED)
        assert ours["mrr"] == pytest.approx(theirs.mrr[f"MRR@{EVERYTHING}"], abs=ROUNDED)
        for k in (1, 5, 10):
            assert ours[f"r{k}"] == pytest.approx(theirs.hit_rate[f"HitRate@{k}"], abs=ROUNDED)
            assert theirs.mrr[f"MRR@{k}"] <= ours["mrr"] <= theirs.mrr[f"MRR@{k}"] + 1 / (k + 1)
            share = mask.gather(1, found.topk(k).indices).sum(1) / mask.sum(1)
            assert theirs.recall[f"Recall@{k}"] == pytest.approx(share.mean().item(), abs=ROUNDED)
            assert theirs.recall[f"Recall@{k}"] <= ours[f"r{k}"] + ROUNDED  # equal where one item is right
        assert 0 < ours["r1"] < 1


def test_pairs_are_told_apart_as_mteb_counts_them():
    cosines = torch.randn(300, 2, 2, generator=torch.Generator().manual_seed(0))  # caption (row) with image
    cosines += torch.tensor([1.0, 0.0])[:, None]  # so that the two directions differ
    ours = {name: hits.double().mean().item() for name, hits in winoground_hits(cosines).items()}
    theirs = LocalPairs()._compute_metrics([one.T for one in cosines], 2, 2)
    found = [theirs[name] for name in ("text_acc", "image_acc", "accuracy")]
    assert found == pytest.approx([ours["text"], ours["image"], ours["group"]], abs=ROUNDED)
    assert abs(ours["text"] - ours["image"]) > 0.02


# --- a model, pictures and words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [ImagesToTexts, TextsToImages])
def test_retrieval_of_a_model_is_that_of_mteb(model, task):
    ours = values(Retrieval(every="never", dataset=FewPictures(), max_samples=None, duplicates="wrong"), model)
    theirs, direction = scores(model, task), task.metadata.category
    assert ours[f"{direction}_ndcg10"] == pytest.approx(theirs["ndcg_at_10"], abs=ROUNDED)
    assert ours[f"{direction}_mrr"] == pytest.approx(theirs[f"mrr_at_{EVERYTHING}"], abs=ROUNDED)
    assert theirs["mrr_at_10"] <= ours[f"{direction}_mrr"] <= theirs["mrr_at_10"] + 1 / 11
    for k in (1, 5, 10):
        assert ours[f"{direction}_r{k}"] == pytest.approx(theirs[f"hit_rate_at_{k}"], abs=ROUNDED)


def test_zero_shot_classification_of_a_model_is_that_of_mteb(model):
    ours = values(ZeroShot(every="never", dataset=FewPictures(), templates=[TEMPLATE], class_names=None), model)
    theirs = scores(model, LocalZeroShot)
    assert ours["top1"] == pytest.approx(theirs["accuracy"], abs=ROUNDED)
    assert ours["mean_per_class"] == pytest.approx(theirs["recall"], abs=ROUNDED)
    assert theirs["accuracy"] > 0


def test_similarity_of_texts_of_a_model_is_that_of_mteb(model, tmp_path):
    lines = ["\t".join(("", "", "", str(place), str(score), a, b)) for place, (score, a, b) in enumerate(PAIRS)]
    (tmp_path / "sts.csv").write_text("\n".join(lines))
    ours = values(TextSimilarity(every="never", path="sts.csv", member=None), model, tmp_path)
    theirs = scores(model, LocalSTS)
    for name in ("spearman", "pearson"):
        assert ours[name] == pytest.approx(theirs[name], abs=ROUNDED)
        assert ours[name] == pytest.approx(theirs[f"cosine_{name}"], abs=ROUNDED)


def test_pairs_of_images_and_captions_are_told_apart_as_in_mteb(model):
    source = FewPictures().build(Path())
    texts = model.encode_text([source.captions(index)[0] for index in range(len(source))]).view(-1, 2, 16)
    images = model.encode_image(pictures(source)).view(-1, 2, 16)
    ours = {name: hits.double().mean().item() for name, hits in winoground_hits(texts @ images.mT).items()}
    theirs = scores(model, LocalPairs)
    found = [theirs[name] for name in ("text_acc", "image_acc", "accuracy")]
    assert found == pytest.approx([ours["text"], ours["image"], ours["group"]], abs=ROUNDED)
    assert ours["text"] > 0 < ours["image"]


def test_the_example_of_the_readme_runs(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes_tiny").symlink_to(tiny_run)
    named, evaluate = mteb.get_tasks, mteb.evaluate
    asked = []

    def local(tasks):
        asked.extend(task.metadata.name for task in named(tasks=tasks))
        return [LocalSTS(), LocalZeroShot(), TextsToImages()]

    monkeypatch.setattr(mteb, "get_tasks", local)
    monkeypatch.setattr(mteb, "evaluate", lambda model, tasks: evaluate(model, tasks, cache=None, co2_tracker=False))
    monkeypatch.chdir(tmp_path)
    exec(readme_block("MTEBEncoder"), {})
    assert len(asked) == 3
    assert {"LocalSTS", "LocalZeroShot", "LocalT2I"} <= set(capsys.readouterr().out.split())
