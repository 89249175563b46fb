"""Records small models of timm's, in its layout, with what timm computes: ``python record_timm.py`` makes timm_models/.

``python record_timm.py NAME...`` compares models of full size with this package instead, such as
vit_small_patch16_dinov3.lvd1689m. timm (1.0.31) is needed for this only, in an environment of its own. Where
torchvision is missing, an empty stand-in lets timm be imported: no operation of it is used.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "timm_models"
VIT = {"embed_dim": 64, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "vit_small_plus_patch16_dinov3.lvd1689m": VIT,
    "vit_large_patch16_dinov3_qkvb.sat493m": VIT,
    "convnext_tiny.dinov3_lvd1689m": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1)},
}
"""SwiGLU without biases of query and value; the satellites' statistics, with them; a ConvNeXt."""


class _Anything(type):
    """The type of classes with any attribute, such as an enumeration's members."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _EmptyModule(ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __getattr__ = _Anything.__getattr__


class _Torchvision(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def random_model(name: str, options: dict[str, Any]) -> Any:
    """A model of timm's whose LayerScale, biases and norms are far from 1 and 0, or mistakes in them would hide."""
    torch.manual_seed(5)
    model = importlib.import_module("timm").create_model(name, pretrained=False, **options).eval()
    for key, weight in model.named_parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 and "token" not in key else 0.05
        norm = key.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        shift = 0.4 if "gamma" in key else 1.0 if norm else 0
        weight.data = (torch.randn_like(weight) * scale + shift).half().float()
    return model


def tokens_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """CLS, registers and patches after the final norm [B, T, D]; of a ConvNeXt, its normed average and cells."""
    features: torch.Tensor = model.forward_features(pixels)
    if features.ndim == 3:
        return features
    cells = model.head.norm(features).flatten(2).transpose(1, 2)
    return torch.cat([model(pixels)[:, None], cells], 1).contiguous()


def save(model: Any, folder: Path, options: dict[str, Any]) -> None:
    """As timm saves a folder for the hub."""
    importlib.import_module("timm.models._hub").save_for_hf(model, folder, model_args=options, safe_serialization=True)


def record(name: str, options: dict[str, Any]) -> None:
    model = random_model(name, options)
    images = torch.randint(0, 256, (1, 3, 24, 40) if name.startswith("vit") else (1, 3, 64, 96), dtype=torch.uint8)
    tokens = tokens_of(model, images / 255)
    save(model.half(), FOLDER / name, options)
    save_file({"images": images, "tokens": tokens}, FOLDER / name / "expected.safetensors")


def compare(name: str) -> None:
    from dinov3_ray.checkpoint import load_model  # here, since recording does without it
    from dinov3_ray.config import DinoV3Config

    model, images = random_model(name, {}), torch.rand(2, 3, 96, 160)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), {})
        difference = load_model(DinoV3Config(folder))(images) - tokens_of(model, images)
    print(f"{name}: {difference.abs().max():.1e}")


if __name__ == "__main__":
    try:
        importlib.import_module("torchvision")
    except ImportError:
        sys.meta_path.insert(0, _Torchvision())
    with torch.no_grad():
        for wanted in sys.argv[1:]:
            compare(wanted)
        for one, its in MODELS.items() if not sys.argv[1:] else ():
            record(one, its)
