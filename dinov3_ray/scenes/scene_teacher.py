"""A teacher that knows the drawn scenes: a small DINOv3 ViT, trained to segment them, as an ordinary model directory.

It is made once for each user, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import sys
import tempfile
import tokenize
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.checkpoint.load import load_model
from dinov3_ray.checkpoint.write import write_directory
from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import CheckpointError
from dinov3_ray.machine.locks import hold, lacks_locks
from dinov3_ray.network.vit import ViT
from dinov3_ray.scenes import drawing, learning_rate, scenery, segmentation
from dinov3_ray.scenes.learning_rate import rate_factor
from dinov3_ray.scenes.scenery import Scenery, draw_scenery
from dinov3_ray.scenes.segmentation import SegmentationHead

__all__ = ["FIRST_SCENE", "SceneTeaching", "cache_folder", "cached_teacher", "train_teacher"]

FIRST_SCENE = 1_000_000
"""Scenes from this number on are the teacher's own: others than a student, a probe or the demonstration sees."""

_WEIGHT_DECAY = 0.05


@dataclass(frozen=True, slots=True)
class SceneTeaching:
    """How the teacher is made: all that its weights depend on, besides the code of this folder.

    Attributes:
        variant: of the architecture.
        side: of its images in pixels.
        scenes: with labels, that it learns from.
        steps, batch: of the training.
        rate: of learning, at its highest.
        seed: of the first weights and of the order of the scenes.
    """

    variant: str = "vit-test"
    side: int = 96
    scenes: int = 3000
    steps: int = 800
    batch: int = 32
    rate: float = 1.5e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """A name that changes with these settings, with the code that draws and teaches, and with torch."""
        digest = hashlib.sha256(json.dumps(asdict(self) | {"torch": torch.__version__}, sort_keys=True).encode())
        for module in (drawing, learning_rate, scenery, segmentation, sys.modules[__name__]):
            digest.update(_without_comments(inspect.getsource(module)).encode())
        return digest.hexdigest()[:16]


def _without_comments(source: str) -> str:
    """The tokens of ``source`` that decide what it does; ``ast`` would fail where threads parse at the same time."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))


class TeachingReport(Protocol):
    """Called while a teacher is made; an exception that it raises ends the work."""

    def __call__(self, done: int, of: int) -> None: ...


def _silent(done: int, of: int) -> None:
    pass


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again: ``dinov3_ray`` in XDG_CACHE_HOME, or in ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "dinov3_ray"


def cached_teacher(teaching: SceneTeaching, report: TeachingReport = _silent, *, folder: Path | None = None) -> Path:
    """The model directory of the teacher, made by :func:`train_teacher` if this user has none yet.

    Whoever comes while another process makes it waits for that one. A directory appears when it is complete.

    Args:
        folder: of the teachers; by default :func:`cache_folder`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    place = (folder or cache_folder()) / f"scene-teacher-{teaching.key}"
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_suffix(".lock").open("w")
    except OSError as error:
        raise CheckpointError(
            f"the cache {place.parent} cannot be written: {error} (XDG_CACHE_HOME names another folder)"
        ) from error
    with lock:
        try:
            hold(lock, wait=True)
        except OSError as error:
            if not lacks_locks(error):
                raise
        if place.is_dir():
            return place
        try:
            train_teacher(place, teaching, report)
        except CheckpointError:
            # Without locks, two may make it at once; the second one finds the same weights there.
            if not place.is_dir():
                raise
    return place


def train_teacher(directory: Path, teaching: SceneTeaching, report: TeachingReport = _silent) -> None:
    """Train a teacher on labelled scenes, and write it to ``directory`` as an ordinary checkpoint.

    Equal settings give equal weights on the same machine with the same number of threads.

    Raises:
        ConfigError: the settings are invalid.
        CheckpointError: ``directory`` is in use or cannot be written.
    """
    drawn = iter(range(1, teaching.scenes + 1))
    total = teaching.scenes + teaching.steps
    scenes = draw_scenery(FIRST_SCENE, teaching.scenes, teaching.side, lambda: report(next(drawn), total))
    with tempfile.TemporaryDirectory(prefix="dinov3-ray-scenes-") as folder:
        start = init_checkpoint(teaching.variant, Path(folder) / "start", seed=teaching.seed, image_size=teaching.side)
        config = DinoV3Config(start)
        network = cast(ViT, load_model(config)).requires_grad_(True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(teaching.seed)
        head = SegmentationHead(config.hidden_size)
    _learn(network, head, scenes, config, teaching, lambda step: report(teaching.scenes + step, total))
    state = network.state_dict()
    write_directory(directory, config.architecture, config.preprocessing, state.__getitem__)


def _learn(
    network: ViT,
    head: SegmentationHead,
    scenes: Scenery,
    config: DinoV3Config,
    teaching: SceneTeaching,
    on_step: Callable[[int], None],
) -> None:
    rule, grid = config.preprocessing, config.grid_size
    mean_3, std_3 = (torch.tensor(values)[:, None, None] for values in (rule.mean, rule.std))
    generator = torch.Generator().manual_seed(teaching.seed)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=teaching.rate, weight_decay=_WEIGHT_DECAY)
    for step in range(teaching.steps):
        for group in optimizer.param_groups:
            group["lr"] = teaching.rate * rate_factor(step / teaching.steps)
        batch = scenes[torch.randint(len(scenes), (teaching.batch,), generator=generator)].turned(generator)
        tokens_BND = network((batch.pictures * rule.rescale_factor - mean_3) / std_3)
        map_BDhw = tokens_BND[:, network.num_prefix_tokens :].mT.unflatten(2, grid)
        loss = F.cross_entropy(head(map_BDhw), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        on_step(step + 1)
