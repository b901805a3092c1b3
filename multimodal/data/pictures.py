"""Images alone, for evaluations that ask the image tower and nothing else."""

from pathlib import Path

from multimodal.batch import Sample
from multimodal.data.files import ImageFiles, open_image
from multimodal.parts import Dataset, Source


class Pictures(Dataset):
    """All images below a folder, without captions or labels."""

    path: str
    """The folder, or one image."""

    def build(self, root: Path) -> "PictureSource":
        return PictureSource(ImageFiles(root / self.path))


class PictureSource(Source):
    """The images by path, sorted."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.key(index), {"image": open_image(self.files[index], self.key(index))})

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def key(self, index: int) -> str:
        return str(self.files[index])
