"""Lightning: a callback that adds a teacher's targets to every training batch.

::

    trainer = Trainer(callbacks=[TeacherTargets("dinov3", FeatureSpec(feature_map=True))])
    trainer.fit(model, train_loader)

    def training_step(self, batch, batch_idx):
        batch, targets = batch                      # targets: Features, on this rank's device
        ...

Needs the extra ``lightning`` (``pip install 'dinov3-ray[lightning]'``). Each rank finds the pool by its name, so that
a strategy may start processes in any way. Lightning's distributed sampler, its limits on batches and a stop within an
epoch work as without the callback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.integrations.loader import TargetLoader
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.prefetch import AnyTeacher, OnReload, Prefetch, Route
from dinov3_ray.training.recipes import Recipe

__all__ = ["TeacherTargets"]


class TeacherTargets(Callback):  # type: ignore[misc] # Lightning is treated as untyped
    """Makes each training batch ``(batch, targets)``, with targets computed ahead; validation batches do not change.

    With a recipe, ``training_step`` adds ``self.distiller(targets)``, of a distiller that the module made with
    ``recipe.for_student`` and has as an attribute: Lightning then trains its projectors, and its checkpoints keep its
    whole state. The callback attaches the taps of such distillers while it trains, and tells them the epoch.

    At the end of each epoch it logs ``teacher/wait_share``, ``teacher/depth`` and ``teacher/resends``.

    Args:
        teacher: the name of a pool, to which each rank then connects; or a teacher; or a dict of either by name.
        spec, images, depth, on_reload, route, recipe: as in :func:`~dinov3_ray.training.prefetch.prefetch`.
            ``images`` and ``route`` get a batch as the loader yields it, on the CPU.
        address: of the Ray that pools given by name run in; None takes the one of this process, or RAY_ADDRESS.
    """

    def __init__(
        self,
        teacher: str | AnyTeacher | Mapping[str, str | AnyTeacher],
        spec: FeatureSpec | Mapping[str, FeatureSpec] | None = None,
        *,
        images: Callable[[Any], Images] | None = None,
        depth: int | Literal["auto"] = "auto",
        on_reload: OnReload = "warn",
        route: Route[Any] | None = None,
        recipe: str | Recipe | None = None,
        address: str | None = None,
    ) -> None:
        self._teacher = teacher
        self._prefetch = functools.partial(
            Prefetch, spec=spec, images=images, depth=depth, on_reload=on_reload, route=route, recipe=recipe
        )
        self._address = address
        self._clients: list[RemoteTeacher] = []
        self._loaders: list[TargetLoader] = []
        self._distillers: list[Distiller] = []
        self._undo: Callable[[], None] | None = None

    @property
    def loaders(self) -> list[TargetLoader]:
        """The training loaders with targets of the current or last ``fit``; their ``stream.statistics()`` say more."""
        return list(self._loaders)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 - their signature
        if stage != "fit" or self._undo is not None:
            return
        # Lightning lets the strategy wrap a loader when its sampler is in place: targets must be added just then.
        strategy: Strategy = trainer.strategy
        before = strategy.process_dataloader
        teacher = self._opened()
        self._loaders = []

        def process_dataloader(dataloader: object) -> object:
            processed = before(dataloader)
            if not trainer.training:  # validation
                return processed
            stream: Prefetch[Any, Any] = self._prefetch(teacher, processed, device=strategy.root_device)
            self._loaders.append(TargetLoader(stream))
            return self._loaders[-1]

        strategy.process_dataloader = process_dataloader
        self._undo = lambda: strategy.__dict__.pop("process_dataloader", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._distillers = [module for module in pl_module.modules() if isinstance(module, Distiller)]
        for distiller in self._distillers:
            if not distiller.tap.attached:
                distiller.tap.attach()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        for distiller in self._distillers:
            distiller.set_epoch(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        statistics = [loader.stream.statistics() for loader in self._loaders]
        if statistics:
            worst = max(statistics, key=lambda each: each.wait_share)
            logged = {"wait_share": worst.wait_share, "depth": worst.depth, "resends": worst.resends}
            pl_module.log_dict({f"teacher/{name}": float(value) for name, value in logged.items()}, sync_dist=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        self._close()

    def _opened(self) -> AnyTeacher | dict[str, AnyTeacher]:
        if isinstance(self._teacher, Mapping):
            return {name: self._open(each) for name, each in self._teacher.items()}
        return self._open(self._teacher)

    def _open(self, teacher: str | AnyTeacher) -> AnyTeacher:
        if not isinstance(teacher, str):
            return teacher
        self._clients.append(RemoteTeacher(teacher, address=self._address))
        return self._clients[-1]

    def _close(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        while self._distillers:
            self._distillers.pop().tap.close()
        while self._clients:
            self._clients.pop().close()
