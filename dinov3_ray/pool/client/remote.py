"""RemoteTeacher: the teacher as a training loop sees it, computed by a pool."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar, Unpack

import torch
from torch import Tensor

from dinov3_ray.config.preprocessing import Preprocessing, Size, ViewSize
from dinov3_ray.errors import ForkedProcessError, InputError, PoolClosedError, SpecError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.address import NAMESPACE, Address
from dinov3_ray.pool.client.request import Handle
from dinov3_ray.pool.client.router import Router
from dinov3_ray.pool.client.routing_table import Limits, RoutingStatistics
from dinov3_ray.pool.cluster import check_name
from dinov3_ray.pool.local import open_transport
from dinov3_ray.pool.messages import PoolView, TeacherInfo
from dinov3_ray.teacher import TeacherMixin, least_side
from dinov3_ray.training.prefetch import Prefetch, PrefetchOptions, prefetch
from dinov3_ray.watch import TeacherWatch

__all__ = ["RemoteTeacher"]

Batch = TypeVar("Batch")

_REFRESH_SECONDS = 2.0  # for what the controller knows now, before a request is refused


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a RemoteTeacher is made of: enough to make it again in another process."""

    name: str
    address: str | None
    namespace: str
    timeout: float
    max_in_flight: int
    max_bytes: int
    attempt_timeout: float


class RemoteTeacher(TeacherMixin[Images]):
    """A pool's teacher, with the local teacher's names, shapes and dtypes.

    It connects when it is first used, from any process that can reach the pool's Ray. It can be pickled into spawned
    workers, which connect by themselves. Results are ordinary tensors, on the CPU or on the device of the images.

    Args:
        name: the pool's name.
        address: ``host:port`` of the Ray that the pool runs in. None takes the one that this process is connected to,
            or the one at RAY_ADDRESS.
        namespace: the Ray namespace that the pool was started in.
        timeout: seconds to wait for a pool without a ready replica, or for a controller that does not answer.
        max_in_flight: requests that may be in flight. A batch is one request, or several of at most the pool's
            ``max_batch`` images each.
        max_bytes: bytes of images and results that may be in flight; 0 takes 30% of a node's object store.
        attempt_timeout: seconds after which an unanswered request is also sent to another replica.

    Raises:
        PoolNotFoundError: on first use, if no such pool is running.
        ForkedProcessError: on use in a process that was forked after it connected, where Ray would hang.
    """

    def __init__(
        self,
        name: str = "dinov3",
        *,
        address: str | None = None,
        namespace: str = NAMESPACE,
        timeout: float = 120.0,
        max_in_flight: int = 1024,
        max_bytes: int = 0,
        attempt_timeout: float = 120.0,
    ) -> None:
        check_name(name)
        if address is not None:
            Address.parse(address)
        self._settings = _Settings(name, address, namespace, timeout, max_in_flight, max_bytes, attempt_timeout)
        self._lock = threading.Lock()
        self._router: Router | None = None
        self._pid = os.getpid()
        self._closed = False
        self._watch = TeacherWatch()

    # The local teacher's names --------------------------------------------------------------------------------------

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        """All outputs that ``spec`` asks for, from one forward pass; waits for them.

        Raises:
            InputError, SpecError: before anything is sent.
            PoolTimeoutError: the pool had no replica for ``timeout`` seconds.
        """
        handle = self.submit(images, spec)
        try:
            features = handle.result()
        except BaseException:
            handle.cancel()  # an interrupt leaves nothing in flight
            raise
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        if device.type == "cpu":
            return features
        with torch.inference_mode(False), torch.no_grad():
            return features.to(device)

    def eval(self) -> Self:
        """Itself: the teacher is always in eval mode."""
        return self

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - the signature of nn.Module
        """Itself: the teacher stays in eval mode."""
        return self

    # Beyond it ------------------------------------------------------------------------------------------------------

    def submit(self, images: Images, spec: FeatureSpec) -> Handle:
        """Send a batch and return at once; the images are copied before it returns.

        A batch beyond the pool's ``max_batch`` is cut, spread over the replicas, and rejoined in order. Beyond what may
        be in flight, batches wait here, in order.

        Raises:
            InputError, SpecError: before anything is sent.
            PoolNotFoundError, PoolTimeoutError: the pool cannot be reached.
        """
        router = self._connected()
        view = self._view(router)
        try:
            batch = _checked(images, spec, view)
        except (InputError, SpecError):
            # What this client knows may be of the teacher before a reload that is over.
            fresh = router.refresh(_REFRESH_SECONDS)
            if fresh.info == view.info:
                raise
            batch = _checked(images, spec, fresh)
        self._watch.images(batch)
        handle = router.submit(batch, spec, self._view(router).options.max_batch)
        if not handle.done():
            handle.owner = self  # a teacher that nobody holds any more closes, and would give the batch up
        return handle

    def prefetch(
        self, loader: Iterable[Batch], spec: FeatureSpec | None = None, **options: Unpack[PrefetchOptions[Batch]]
    ) -> Prefetch[Batch, Features]:
        """Iterate over ``(batch, targets)`` for each batch of ``loader``, in order; computed ahead of the loop.

        See :func:`dinov3_ray.training.prefetch.prefetch`, which also takes several teachers at once.

        Args:
            loader: any iterable of batches, such as a DataLoader with workers.
            spec: what to compute; left out where ``recipe`` gives it.
            options: ``images``, ``depth``, ``device``, ``on_reload`` and ``recipe``; see
                :class:`~dinov3_ray.training.prefetch.PrefetchOptions`.
        """
        return prefetch(self, loader, spec, **options)

    @property
    def parallelism(self) -> int:
        """Requests that the pool can usefully have in flight from one client now: replicas times window."""
        view = self._view(self._connected())
        return max(1, len(view.replicas)) * view.options.window

    @property
    def info(self) -> TeacherInfo:
        """What the pool's newest replica reports of its teacher."""
        return self._view(self._connected()).info or TeacherInfo()

    @property
    def fingerprint(self) -> str | None:
        """Of the teacher that the pool serves now; each result carries its own."""
        return self.info.fingerprint

    @property
    def dtype(self) -> torch.dtype | None:
        """That the teacher computes in, and that ``native`` results have; None if it does not say."""
        found = getattr(torch, (self.info.dtype or "").removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else None

    @property
    def computed_in(self) -> str | None:
        """How exactly the teacher computes, such as bfloat16 or float8; None if it does not say."""
        return self.info.computed_in or self.info.dtype

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the teacher brings images to its input; None if it does not say."""
        return self.info.preprocessing

    @property
    def patch_size(self) -> int:
        return self.info.patch_size

    @property
    def hidden_size(self) -> int | None:
        return self.info.hidden_size

    @property
    def num_register_tokens(self) -> int | None:
        return self.info.num_register_tokens

    @property
    def image_size(self) -> Size | ViewSize | None:
        return self.info.image_size

    @property
    def grid_size(self) -> Size | None:
        return self.info.grid_size

    def statistics(self) -> RoutingStatistics:
        """A snapshot of this client's requests."""
        return self._connected().statistics()

    def close(self) -> None:
        """Give up what is in flight and part from the pool, which goes on. Harmless when repeated."""
        with self._lock:
            self._closed = True
            router, self._router = self._router, None
        if router is not None:
            router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        settings = self._settings
        if self._router is not None and settings.address is None:
            settings = replace(settings, address=self._router.address)
        return _rebuild, (settings,)

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self._router) if self._router else "not connected yet"
        return f"<RemoteTeacher {self._settings.name!r}: {state}>"

    def count_step(self, waited: float, seconds: float) -> None:
        """For a prefetch: a step of a loop took ``seconds``, of which it ``waited`` for this teacher."""
        router = self._router
        if router is not None:
            router.seconds.add_step(waited, seconds)

    # Connecting -----------------------------------------------------------------------------------------------------

    def _connected(self) -> Router:
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"RemoteTeacher {self._settings.name!r} was made in process {self._pid} and is used in its fork "
                f"{os.getpid()}, where Ray would hang. In a DataLoader, keep the teacher out of the workers: wrap the "
                "loader in teacher.prefetch(...) in the trainer's process; or start workers with "
                "multiprocessing_context='spawn'"
            )
        if self._closed:
            raise PoolClosedError(f"RemoteTeacher {self._settings.name!r} is closed")
        with self._lock:
            if self._router is None:
                settings = self._settings
                transport, address = open_transport(settings.name, settings.namespace, settings.address)
                limits = Limits(
                    max_requests=settings.max_in_flight,
                    max_bytes=settings.max_bytes,
                    attempt_timeout=settings.attempt_timeout,
                )
                self._router = Router(transport, settings.name, limits, settings.timeout, address=address)
                weakref.finalize(self, self._router.close)
            return self._router

    def _view(self, router: Router) -> PoolView:
        return router.view(self._settings.timeout)


def _rebuild(settings: _Settings) -> RemoteTeacher:
    return RemoteTeacher(**asdict(settings))


def _checked(images: Images, spec: FeatureSpec, view: PoolView) -> ImageBatch:
    """``images``, if the pool of ``view`` can compute ``spec`` of them."""
    info = view.info or TeacherInfo()
    batch = ImageBatch.of(images, min_side=least_side(info))
    if info.preprocessing is not None:
        info.preprocessing.common_input_size(batch.sizes)
    check_spec(spec, info)
    return batch


def check_spec(spec: FeatureSpec, info: TeacherInfo) -> None:
    """Raise SpecError for what the pool's teacher cannot give, as far as it has reported that."""
    if not isinstance(spec, FeatureSpec):
        raise SpecError(f"spec must be a FeatureSpec; got {spec!r}")
    spec.require_outputs()
    if spec.cls and not info.has_cls:
        raise SpecError("FeatureSpec.cls: this pool's teacher has no CLS token")
    if spec.registers and info.num_register_tokens == 0:
        raise SpecError("FeatureSpec.registers: this pool's teacher has no register tokens")
    if info.depth is not None:
        spec.blocks(info.depth)
