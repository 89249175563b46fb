"""How many bytes a result is going to have, before it is there: what the byte budget needs to know."""

from __future__ import annotations

from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.messages import TeacherInfo

__all__ = ["ResultSizes"]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_UNKNOWN_ROW_BYTES = 2**20


class ResultSizes:
    """Bytes a row for each spec: computed from the teacher's shapes at first, measured from the first answer on."""

    def __init__(self) -> None:
        self._info: TeacherInfo | None = None
        self._row_bytes: dict[FeatureSpec, float] = {}

    def learn_teacher(self, info: TeacherInfo | None) -> None:
        if info != self._info:
            self._info = info
            self._row_bytes.clear()  # another teacher, other sizes

    def learn(self, spec: FeatureSpec, rows: int, nbytes: int) -> None:
        self._row_bytes[spec] = nbytes / rows

    def expect(self, spec: FeatureSpec, rows: int) -> int:
        """Bytes that the result of ``rows`` images is expected to have."""
        known = self._row_bytes.get(spec)
        return int(rows * (known if known is not None else self._guess(spec)))

    def _guess(self, spec: FeatureSpec) -> int:
        info = self._info
        if info is None or info.hidden_size is None or info.grid_size is None:
            return _UNKNOWN_ROW_BYTES
        height, width = spec.map_size or info.grid_size
        maps = int(spec.feature_map) + len(spec.layers)
        tokens = int(spec.cls) + int(spec.registers) * (info.num_register_tokens or 0) + maps * height * width
        scale = _ITEM_BYTES["float32"] if spec.dtype == "int8" else 0  # one a token
        return tokens * (info.hidden_size * _item_bytes(spec.dtype, info.dtype) + scale)


def _item_bytes(wanted: str, computed: str | None) -> int:
    native = _ITEM_BYTES.get((computed or "float32").removeprefix("torch."), 4)
    return min(native, _ITEM_BYTES.get(wanted, native))
