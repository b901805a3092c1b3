"""A folder that sentence-transformers loads: CLIPModel where that can express the model, else open_clip's form."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch

from multimodal.export import shipped
from multimodal.export.exported import TEXTS, Exported, largest, pictures
from multimodal.export.huggingface import HuggingFace
from multimodal.export.open_clip import OpenClip
from multimodal.parts import Format

PROGRAM = "open_clip_module.py"
MODULES = "modules.json"
CLIP = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
        "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
    },
    "module_output_name": "sentence_embedding",
    "processor_kwargs": {"backend": "pil"},  # resizes images as in training
}

USAGE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER"{arguments})
images, texts = model.encode([Image.open("a.jpg")]), model.encode(["a photo of a cat", "a photo of a dog"])
cosines = model.similarity(images, texts)"""


class SentenceTransformers(Format):
    """Transformers' CLIPModel, which runs no code of the folder's, or a module of our own around open_clip's form."""

    library: ClassVar[str] = "sentence-transformers"

    def write(self, exported: Exported, folder: Path) -> str:
        try:
            HuggingFace().write(exported, folder)
        except ValueError:  # it says so before it writes
            OpenClip().write(exported, folder)
            shutil.copy(Path(shipped.__path__[0]) / PROGRAM, folder / PROGRAM)
            modules = [f"{Path(PROGRAM).stem}.OpenClipModule"]
        else:
            (folder / "sentence_bert_config.json").write_text(json.dumps(CLIP, indent=2))
            modules = [
                "sentence_transformers.base.modules.transformer.Transformer",
                "sentence_transformers.base.modules.normalize.Normalize",
            ]
        listed = [
            {"idx": place, "name": str(place), "path": "" if place == 0 else f"{place}_Normalize", "type": kind}
            for place, kind in enumerate(modules)
        ]
        (folder / MODULES).write_text(json.dumps(listed, indent=2))
        trust = ", trust_remote_code=True" if _runs_code(folder) else ""
        return "from PIL import Image\n" + USAGE.replace("{arguments}", trust)

    def differences(self, exported: Exported, folder: Path) -> dict[str, float]:
        from sentence_transformers import SentenceTransformer

        trust = _runs_code(folder)
        model: Any = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust, local_files_only=True)
        images, texts = exported.features()
        return {
            "image features": largest(images, torch.from_numpy(model.encode(pictures(), show_progress_bar=False))),
            "text features": largest(texts, torch.from_numpy(model.encode(list(TEXTS), show_progress_bar=False))),
        }


def _runs_code(folder: Path) -> bool:
    return (folder / PROGRAM).exists()
