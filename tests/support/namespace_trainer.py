"""A training loop of the tests, as a program: it asks a pool for features until its standard input ends.

It writes one JSON object a line: after every tenth step how far it is, and at the end what it saw. Each answer is
compared bit for bit with the local teacher's.
"""

from __future__ import annotations

import json
import sys
import threading

import torch

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, RemoteTeacher

ROOT, ADDRESS = sys.argv[1:]
SPEC = FeatureSpec(cls=True, feature_map=True)


def images(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)


def main() -> None:
    torch.set_num_threads(1)
    local = DinoV3Teacher(DinoV3Config(ROOT))
    distinct = [images(number) for number in range(5)]
    expected = [local.extract(batch, SPEC) for batch in distinct]
    asked_to_end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), asked_to_end.set()), daemon=True).start()

    def loader() -> object:
        number = 0
        while not asked_to_end.is_set():
            yield number
            number += 1

    steps = 0
    with RemoteTeacher("dinov3", address=ADDRESS) as teacher:
        for number, features in teacher.prefetch(loader(), SPEC, images=lambda n: distinct[n % 5], depth=4):
            assert number == steps, "out of order"
            wanted = expected[number % 5]
            assert torch.equal(features.cls, wanted.cls), f"step {number} differs"
            assert torch.equal(features.feature_map, wanted.feature_map), f"step {number} differs"
            steps += 1
            if steps % 10 == 0:
                print(json.dumps({"steps": steps}), flush=True)
        print(json.dumps({"steps": steps, "resends": teacher.statistics().resends, "ended": True}), flush=True)


if __name__ == "__main__":
    main()
