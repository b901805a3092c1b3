"""Figures show what they are given, whatever the text holds."""

from io import BytesIO

import matplotlib
import pytest
import torch
from PIL import Image

from multimodal.evals import figures, zero_shot_figures

pytestmark = pytest.mark.filterwarnings("error")  # no complaint of the drawing library

HOSTILE = ["from $_{5 to $6", "$_{", "$x$ \\frac", "100% {sure} <b>", "word " * 60, ""]


def draw(figure):
    figure.savefig(BytesIO(), format="png")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(ticks):
    return [text.get_text() for text in ticks]


def test_the_confusion_matrix_shows_percent_of_the_true_class():
    figure = figures.confusion_matrix(torch.tensor([[3, 1], [0, 10]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert texts(axes) == ["75", "25", "100"]
    assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ["cat", "dog"]
    assert axes.get_title(loc="left") == "top-1 92.9%"
    draw(figure)


def test_of_many_classes_the_most_frequent_are_shown_and_no_image_is_lost():
    counts = torch.zeros(80, 80, dtype=torch.long)
    counts[5, 5], counts[70, 70], counts[70, 3], counts[8, 8] = 40, 30, 10, 1
    figure = figures.confusion_matrix(counts, [f"class {i}" for i in range(80)], limit=2)
    axes = figure.axes[0]
    assert labels(axes.get_yticklabels()) == ["class 5", "class 70"]
    assert labels(axes.get_xticklabels()) == ["class 5", "class 70", "(any other)"]
    assert axes.images[0].get_array().tolist() == [[100, 0, 0], [0, 75, 25]]
    assert axes.get_title(loc="left") == "top-1 87.7%; the 2 most frequent of 80 classes are shown"
    draw(figure)


def test_a_class_without_images_is_an_empty_row():
    figure = figures.confusion_matrix(torch.tensor([[0, 0], [0, 4]]), ["cat", "dog"])
    assert figure.axes[0].images[0].get_array().tolist() == [[0, 0], [0, 100]]


def test_failures_show_what_an_image_was_taken_for_and_what_it_is():
    images = [Image.new("L", (8, 8)), Image.new("RGB", (20, 5))]
    figure = zero_shot_figures.failures(
        images, ["$5", "dog"], ["cat", "$6 or $7"], [0.9, 0.512], wrong=1200, total=5000
    )
    first, second, *rest = figure.axes
    assert (first.get_title(), first.get_xlabel()) == ("cat 90%", "$5")
    assert (second.get_title(), second.get_xlabel()) == ("$6 or $7 51%", "dog")
    assert not any(axes.images or axes.get_title() for axes in rest)
    assert figure.get_suptitle().startswith("wrong: 1,200 of 5,000")
    draw(figure)


def test_where_nothing_is_wrong_no_failure_is_shown():
    figure = zero_shot_figures.failures([], [], [], [], wrong=0, total=10)
    assert figure.get_suptitle().startswith("wrong: 0 of 10")
    draw(figure)


def test_the_similarity_matrix_has_captions_in_rows_and_images_in_columns():
    similarity = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    axes = figures.similarity_matrix(similarity, ["cat", "dog"]).axes[0]
    assert axes.images[0].get_array().tolist() == similarity.T.tolist()
    assert axes.get_title(loc="left") == "mean cosine: pairs 0.80, others 0.20"
    assert labels(axes.get_yticklabels()) == ["cat", "dog"]


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_retrieval_grid_frames_the_right_image_if_it_was_found(rank):
    def grey(level):
        return Image.new("L", (4, 4), level)

    found = [grey(99 if place == rank else place) for place in (1, 2, 3)]
    figure = figures.retrieval_grid([figures.Query("a cat", rank, grey(99), found)], 50)
    shown = [axes for axes in figure.axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [99, *[i.getpixel((0, 0)) for i in found]]
    framed = [axes.get_title() for axes in shown if axes.spines["left"].get_visible()]
    assert framed == ([str(rank)] if rank <= 3 else [])
    assert f"rank {rank} of 50" in texts(figure.axes[0])


@pytest.mark.parametrize("count", [1, 6])
def test_captions_are_drawn_as_they_are(count):
    captions = HOSTILE[:count]
    picture = Image.new("RGB", (8, 8))
    draw(figures.retrieval_grid([figures.Query(text, 2, picture, [picture] * 5) for text in captions], 9))
    draw(figures.similarity_matrix(torch.eye(count), captions))
    draw(figures.batch_sheet(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), captions))
    draw(figures.confusion_matrix(torch.eye(count, dtype=torch.long), captions))


def test_the_batch_sheet_shows_each_image_over_its_caption():
    images = torch.randint(256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    figure = figures.batch_sheet(images, [f"caption {i}" for i in range(5)])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in shown] == [f"caption {i}" for i in range(5)]
    for axes, image in zip(shown, images, strict=True):
        assert axes.images[0].get_array().tolist() == image.permute(1, 2, 0).tolist()


ROWS = [
    {"step": 10, "train/loss": 2.0, "train/lr": 1e-5, "time": 3.0},
    {"step": 20, "train/loss": 1.0, "train/lr": None},
    {"step": 20, "eval/x/top1": 0.5, "eval/x/chance": 0.1, "eval/x/median_rank": 7.0},
    {"step": 20, "eval_ema/x/top1": 0.6, "eval_ema/x/chance": 0.1},
    {"step": 30, "train/loss": float("nan")},
]


def test_curves_have_a_panel_for_each_training_metric_and_each_scale_of_an_evaluation():
    figure = figures.curves(ROWS)
    panels = {
        (axes.get_title(loc="left"), *(line.get_label() for line in axes.lines)): axes
        for axes in figure.axes
        if axes.lines
    }
    assert list(panels) == [
        ("train/loss", "loss"),
        ("eval/x", "top1", "chance"),
        ("eval/x", "median_rank"),
        ("eval_ema/x", "top1", "chance"),
        ("train/lr", "lr"),
    ]
    loss, fractions, _, means, lr = panels.values()
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30]
    assert loss.lines[0].get_ydata()[:2].tolist() == [2.0, 1.0]
    assert lr.lines[0].get_xdata().tolist() == [10]
    markers = [axes.lines[0].get_marker() for axes in (loss, lr, fractions, means)]
    assert markers == ["None", "o", "o", "o"]  # a curve of one point would not be seen
    draw(figure)


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"step": 0}], [{"step": 0, "train/loss": 1.0}]])
def test_curves_of_a_run_that_has_hardly_begun(rows):
    draw(figures.curves(rows))


def test_drawing_leaves_no_trace_in_the_drawing_library():
    before = dict(matplotlib.rcParams)
    draw(figures.curves(ROWS))
    assert dict(matplotlib.rcParams) == before


def test_lines_have_a_place_and_a_name_each():
    figure = figures.lines({"noise": [0.9, 0.5], "$_{": [0.9, 0.4]}, [0, 5], "title $5 or $6", ("severity", "top-1"))
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["noise", "$_{"]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.9, 0.5], [0.9, 0.4]]
    assert labels(axes.get_xticklabels()) == ["0", "5"]
    draw(figure)


def test_bars_are_in_the_order_that_is_given_and_chance_is_beside_them():
    figure = figures.bars(HOSTILE, [0.1 * i for i in range(6)], "title", [0.5] * 6)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.1 * i for i in range(6)])
    assert labels(axes.get_yticklabels())[0] == HOSTILE[0]
    assert axes.get_title(loc="left") == "title (orange: chance)"
    draw(figure)


def test_of_many_bars_the_first_and_the_last_are_shown():
    figure = figures.bars([str(i) for i in range(100)], [0.5] * 100, "title", [], limit=5)
    axes = figure.axes[0]
    assert labels(axes.get_yticklabels()) == ["0", "1", "97", "98", "99"]
    assert axes.get_title(loc="left") == "title; the first and last of 100"
    draw(figure)
