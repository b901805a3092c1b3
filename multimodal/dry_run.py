"""Look before training: the resolved configuration, the size of the model, and a picture of one batch."""

from multimodal import distributed
from multimodal.assemble import (
    Problems,
    assemble,
    check_precision,
    count_steps,
    device_of,
    open_evaluations,
    open_source,
)
from multimodal.config import TrainConfig
from multimodal.data.loader import training_batches
from multimodal.data.order import Batches
from multimodal.evals.figures import batch_sheet
from multimodal.kept_features import check_kept_features
from multimodal.memory import check_micro_batches
from multimodal.parts import Sources
from multimodal.run_folder import config_text
from multimodal.towers.batch_norm import check_batch_norms
from multimodal.towers.images import ImagePreprocessor
from multimodal.towers.text import TextPreprocessor

MAX_PICTURES = 16


def dry_run(config: TrainConfig) -> None:
    """Print the configuration and parameter counts; draw the first training batch as towers get it."""
    problems = Problems()
    with problems.at("precision"):
        check_precision(config.precision, device_of(config.device))
    source = open_source(config, problems)
    open_evaluations(config.evals, Sources(config.paths.datasets), problems)
    per_epoch, total, warmup = count_steps(config, source, problems)
    if source is not None:
        check_kept_features(config, source, problems)
    problems.report()
    assert source is not None
    assembled = assemble(config, source, None)
    with problems.at("micro_batch_size"):
        check_micro_batches(assembled.model, config)
    with problems.at("towers"):
        check_batch_norms(assembled.model)
    problems.report()
    order = Batches(len(source), config.seed, config.global_batch_size, 0, 1, start=0, stop=1)
    batch = next(training_batches(source, assembled.readers, order, config.seed, config.workers))
    if distributed.rank() != 0:
        return
    print(config_text(config))
    for name, count in assembled.model.num_parameters().items():
        print(f"parameters {name}: {count:,}")
    print(f"samples: {len(source):,}; steps: {total:,}, {warmup:,} of them warm-up, {per_epoch:,} in an epoch")
    preprocessors = {name: reader.preprocessor for name, reader in assembled.readers.items()}
    image = next((name for name, made in preprocessors.items() if isinstance(made, ImagePreprocessor)), None)
    texts = ((name, made) for name, made in preprocessors.items() if isinstance(made, TextPreprocessor))
    text, preprocessor = next(texts, (None, None))
    if image and text and preprocessor:
        captions = [preprocessor.encoding.decode(ids) for ids in batch.inputs[text][:MAX_PICTURES]]
        path = config.folder.with_name(f"{config.run.name}-batch.png")  # not in the folder: nothing has run
        path.parent.mkdir(parents=True, exist_ok=True)
        batch_sheet(batch.inputs[image][:MAX_PICTURES], captions).savefig(path, dpi=120)
        print(f"one batch: {path}")
