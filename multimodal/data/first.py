"""The first samples of a source."""

from multimodal.batch import Sample
from multimodal.parts import Source


class First(Source):
    """The first so many of another source's samples, or all if it has fewer."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.class_names, self.templates = source.class_names, source.templates

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def label(self, index: int) -> int | None:
        return self.source.label(index)

    def labels_of(self, index: int) -> tuple[int, ...] | None:
        return self.source.labels_of(index)
