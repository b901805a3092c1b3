"""open_clip's architectures as configuration groups, beside the files of `conf/`.

`architecture=open_clip/ViT-B-32` is both towers and the shared space, `architecture=open_clip/ViT-B-32/openai` also the
weights to start from and their preprocessing; `tower@towers.image=open_clip/ViT-B-32/image` is one tower.
"""

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from multimodal.interop import architectures
from multimodal.interop.weights import SCHEME
from multimodal.parts import Tower
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.text import TextTower

ROOT = "open_clip"
TOWERS = ("image", "text")


class OpenClipSource(ConfigSource):
    """Makes a configuration when it is asked for; listing names imports nothing, only those of weights open_clip."""

    @staticmethod
    def scheme() -> str:
        return "openclip"

    def available(self) -> bool:
        return bool(architectures.names())

    def is_group(self, config_path: str) -> bool:
        match _words(config_path):
            case [] | ["tower" | "architecture"] | ["tower" | "architecture", "open_clip"]:
                return True
            case ["tower" | "architecture", "open_clip", name]:
                return name in architectures.names()
            case ["tower", "open_clip", name, tag]:
                return _has_tag(name, tag)
        return False

    def is_config(self, config_path: str) -> bool:
        match _words(config_path):  # unknown names too: loading them says which name is near
            case ["architecture", "open_clip", _] | ["architecture", "open_clip", _, _]:
                return True
            case ["tower", "open_clip", _, "image" | "text"] | ["tower", "open_clip", _, _, "image" | "text"]:
                return True
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        groups: list[str] = []
        configs: list[str] = []
        match _words(config_path):
            case []:
                groups = ["architecture", "tower"]
            case ["tower" | "architecture"]:
                groups = [ROOT]
            case ["tower", "open_clip"]:
                groups = architectures.names()
            case ["architecture", "open_clip"]:
                groups = configs = architectures.names()
            case ["tower", "open_clip", name] if name in architectures.names():
                groups, configs = architectures.tags(name), [*TOWERS]
            case ["architecture", "open_clip", name] if name in architectures.names():
                configs = architectures.tags(name)
            case ["tower", "open_clip", name, tag] if _has_tag(name, tag):
                configs = [*TOWERS]
        wanted = {ObjectType.GROUP: groups, ObjectType.CONFIG: configs}
        return sorted({*groups, *configs} if results_filter is None else wanted.get(results_filter, []))

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"open_clip has no {config_path}")
        package: str | None = None
        try:
            match _words(config_path):
                case ["architecture", _, name, *tag]:
                    config, package = _whole(name, *tag), "_global_"
                case ["tower", _, name, *tag, which]:
                    config = _tower(architectures.architecture(name, *tag).towers[which])
        except ValueError as error:
            raise ConfigLoadError(str(error)) from None
        header = {"package": package}
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", OmegaConf.create(config), header)


def _words(path: str) -> list[str]:
    return [word for word in path.removesuffix(".yaml").split("/") if word]


def _has_tag(name: str, tag: str) -> bool:
    return name in architectures.names() and tag in architectures.tags(name)


def _whole(name: str, tag: str | None = None) -> dict[str, Any]:
    place = f"{ROOT}/{name}" if tag is None else f"{ROOT}/{name}/{tag}"
    defaults = [{f"/tower@towers.{tower}": f"{place}/{tower}"} for tower in TOWERS]
    init = {} if tag is None else {"init": {"weights": f"{SCHEME}{name}/{tag}"}}
    return {"defaults": [*defaults, "_self_"], "model": architectures.architecture(name, tag).model, **init}


def _tower(tower: Tower) -> dict[str, Any]:
    """Knobs of a tower, with the groups that its files in `conf/tower` have."""
    values = tower.model_dump(mode="json", exclude={"tuning"})
    defaults: list[Any] = [{"/tuning@tuning": "full"}]
    if isinstance(tower, TextTower) and isinstance(tower.tokenizer, ClipBPE):
        defaults.append({"/tokenizer@tokenizer": "clip_bpe"})
        del values["tokenizer"]
    return {"defaults": [*defaults, "_self_"], **values}


class OpenClipSearchPath(SearchPathPlugin):
    """Puts the source behind the program's own files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(ROOT, f"{OpenClipSource.scheme()}://")


def register() -> None:
    """Let Hydra, in a program or by its `compose`, find open_clip's architectures."""
    for plugin in (OpenClipSource, OpenClipSearchPath):
        Plugins.instance().register(plugin)
