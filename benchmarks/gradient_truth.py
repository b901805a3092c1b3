"""Whose gradient is that of the global batch? Ours and open_clip's modes beside one process with one joint backward.

    uv run python benchmarks/gradient_truth.py

Two small transformers in float64, 16 pairs. The truth is one backward through the whole batch in one process. Each row
is another way to the same gradient: several ranks (gloo), micro-batches, or both. Of the towers' gradient the ratio of
norms and the cosine to the truth are given, of logit_scale the ratio; the error is the largest difference of an entry,
as a share of the largest entry of the towers'. open_clip's gradients are averaged over ranks as its
DistributedDataParallel does; its accumulation is written here as its training loop has it (`--accum-freq`), which is no
part of the package. Ends in one line of JSON: errors and ratios by name.
"""

import json
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Batch
from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.losses.infonce import InfoNCE
from multimodal.model import Model
from multimodal.parts import Loss
from multimodal.step import training_step
from multimodal.towers.vit import ViT

ROWS, PARTS = 16, 4
TOWER = ViT(
    image_size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    patch_size=8,
    width=16,
    layers=2,
    heads=2,
    mlp_ratio=2.0,
    pool="tok",
    patch_dropout=0.0,
)
SECTION = ModelSection(embed_dim=8, logit_scale=20.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)
Gradients = dict[str, Tensor]


class Compared(NamedTuple):
    """A gradient beside the true one."""

    towers: float
    """Ratio of the norms of all towers' gradients."""
    cosine: float
    """Between them."""
    logit_scale: float
    """Ratio of the gradients of the logarithm of the scale."""
    error: float
    """Largest difference of an entry, as a share of the largest."""


def model() -> Model:
    """Two towers, both of images, with the same weights everywhere."""
    torch.manual_seed(0)
    towers = {
        name: TOWER.build(TOWER.preprocessor(list, Keep(), None), SECTION.embed_dim) for name in ("image", "text")
    }
    return Model(towers, SECTION).double()


def inputs() -> dict[str, Tensor]:
    """This rank's rows."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (2, ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    mine = whole.chunk(distributed.world_size(), dim=1)[distributed.rank()]
    return dict(zip(("image", "text"), mine, strict=True))


class Keeper(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kept = [p.grad.clone() for p in self.param_groups[0]["params"]]


def ours(micro_batch_size: int | None) -> Gradients:
    """By the training step."""
    one, given = model(), inputs()
    keeper, losses = Keeper(one.parameters(), lr=1.0), dict[str, Loss](infonce=InfoNCE())
    batch = Batch(given, torch.arange(len(given["image"])))
    context = torch.autocast("cpu", enabled=False)
    training_step(one, losses, keeper, batch, context, None, micro_batch_size, (0, 0))
    return dict(zip((name for name, _ in one.named_parameters()), keeper.kept, strict=True))


def truth() -> Gradients:
    """The formula of the paper, in one process."""
    one, given = model(), inputs()
    x, y = (one.encode(name, given[name]) for name in ("image", "text"))
    logits, labels = one.logit_scale.exp() * x @ y.T, torch.arange(ROWS)
    cross_entropy = torch.nn.functional.cross_entropy
    ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).backward()
    return averaged(one)


def averaged(one: Model) -> Gradients:
    """The gradients in a model's parameters, averaged over ranks."""
    distributed.average_gradients(one.parameters())
    return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def theirs(local_loss: bool, gather_with_grad: bool) -> Gradients:
    """By open_clip's loss."""
    one, given = model(), inputs()
    x, y = (one.encode(name, given[name]) for name in ("image", "text"))
    loss = ClipLoss(local_loss, gather_with_grad, rank=distributed.rank(), world_size=distributed.world_size())
    loss(x, y, one.logit_scale.exp()).backward()
    return averaged(one)


def plain_accumulation() -> Gradients:
    """The mean of the gradients of micro-batches, each with negatives of its own only."""
    one, given = model(), inputs()
    for rows in torch.arange(ROWS).chunk(PARTS):
        x, y = (one.encode(name, given[name][rows]) for name in ("image", "text"))
        (ClipLoss()(x, y, one.logit_scale.exp()) / PARTS).backward()
    return averaged(one)


def their_accumulation() -> Gradients:
    """As open_clip's `--accum-freq`: features of all parts are kept, those of one part at a time computed again."""
    one, given = model(), inputs()
    parts = torch.arange(ROWS).chunk(PARTS)
    with torch.no_grad():
        kept = [[one.encode(name, given[name][rows]) for rows in parts] for name in ("image", "text")]
    for number, rows in enumerate(parts):
        again = (one.encode(name, given[name][rows]) for name in ("image", "text"))
        x, y = (torch.cat([*side[:number], part, *side[number + 1 :]]) for side, part in zip(kept, again, strict=True))
        ClipLoss()(x, y, one.logit_scale.exp()).backward()
    return averaged(one)


ROWS_OF_TABLE: dict[str, tuple[int, Callable[..., Gradients], tuple[Any, ...]]] = {
    "ours": (1, ours, (None,)),
    "ours, micro-batches of 4": (1, ours, (4,)),
    "ours, micro-batches of 5, the last of 1": (1, ours, (5,)),
    "ours, 2 ranks": (2, ours, (None,)),
    "ours, 4 ranks": (4, ours, (None,)),
    "ours, 2 ranks, micro-batches of 3": (2, ours, (3,)),
    "open_clip, 1 rank": (1, theirs, (False, False)),
    "open_clip, 2 ranks, default": (2, theirs, (False, False)),
    "open_clip, 4 ranks, default": (4, theirs, (False, False)),
    "open_clip, 2 ranks, --local-loss": (2, theirs, (True, False)),
    "open_clip, 2 ranks, --gather-with-grad": (2, theirs, (False, True)),
    "open_clip, 2 ranks, --local-loss --gather-with-grad": (2, theirs, (True, True)),
    "open_clip, --accum-freq 4": (1, their_accumulation, ()),
    "plain accumulation over 4 micro-batches": (1, plain_accumulation, ()),
}


def compare(found: Gradients, true: Gradients) -> Compared:
    """A gradient with the truth."""
    names = [name for name in true if name.startswith("towers.")]
    a, b = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, true))
    scale = float(found["logit_scale"] / true["logit_scale"])
    error = max((found[name] - true[name]).abs().max() / b.abs().max() for name in true)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    return Compared(float(a.norm() / b.norm()), float(cosine), scale, float(error))


def work(rank: int, ranks: int, meeting: str, names: list[str], results: Any) -> None:
    """One of several processes, through all rows of the table that are of so many; all should find the same."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for name in names:
        _, function, arguments = ROWS_OF_TABLE[name]
        results[name, rank] = function(*arguments)
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    true, found = truth(), dict[str, Gradients]()
    for ranks in (1, 2, 4):
        names = [name for name, (wanted, *_) in ROWS_OF_TABLE.items() if wanted == ranks]
        if ranks == 1:
            found |= {name: ROWS_OF_TABLE[name][1](*ROWS_OF_TABLE[name][2]) for name in names}
            continue
        with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
            results = manager.dict()
            mp.spawn(work, (ranks, f"{folder}/meeting", names, results), nprocs=ranks)
            for name in names:
                found[name], *others = (results[name, rank] for rank in range(ranks))
                assert all(torch.equal(found[name][key], other[key]) for other in others for key in found[name]), name
    print("| gradient by | towers / truth | cosine | logit_scale / truth | error |\n|---|---|---|---|---|")
    compared = {name: compare(found[name], true) for name in ROWS_OF_TABLE}
    for name, row in compared.items():
        print(f"| {name} | {row.towers:.3f} | {row.cosine:.4f} | {row.logit_scale:.3f} | {row.error:.0e} |")
    print(
        json.dumps(
            {
                "ours_error": max(row.error for name, row in compared.items() if name.startswith("ours")),
                "default_2_ranks_towers": compared["open_clip, 2 ranks, default"].towers,
                "default_4_ranks_towers": compared["open_clip, 4 ranks, default"].towers,
                "local_loss_cosine": compared["open_clip, 2 ranks, --local-loss"].cosine,
                "accum_freq_4_logit_scale": compared["open_clip, --accum-freq 4"].logit_scale,
                "plain_accumulation_cosine": compared["plain accumulation over 4 micro-batches"].cosine,
            }
        )
    )


if __name__ == "__main__":
    main()
