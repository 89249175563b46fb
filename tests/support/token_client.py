"""A client of a Ray that asks for a token, which nobody has told to show one; prints what it was told."""

from __future__ import annotations

import json
import logging
import os
import sys

from dinov3_ray import TeacherPool
from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import connect
from dinov3_ray.testing import FakeTeacher

heard: list[str] = []


class Heard(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        heard.append(record.getMessage())


def main(address: str) -> None:
    logging.getLogger("dinov3_ray").addHandler(Heard())
    report: dict[str, object] = {"error": ""}
    try:
        runtime = connect(address)
        with TeacherPool.start(FakeTeacher.factory(), name="token", replicas=1, threads=1) as pool:
            report["ready"] = pool.status().ready
        runtime.close()
    except PoolError as error:
        report["error"] = str(error)
    print(json.dumps({**report, "heard": heard, "mode": os.environ.get("RAY_AUTH_MODE")}))


if __name__ == "__main__":
    main(sys.argv[1])
