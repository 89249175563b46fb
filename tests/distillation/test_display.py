"""Progress in lines: the loss is that of the step that is shown, and is asked for only there."""

from __future__ import annotations

import pytest

from dinov3_ray.distillation.display import Display


def test_each_line_has_the_loss_of_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []
    step = 0

    def loss() -> float:
        asked.append(step)
        return step / 10

    with Display().training(40, 3) as report:
        for step in range(4, 41):
            report(step, loss, 9.0, 0.5)
    assert asked == list(range(4, 41, 4))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"step {each}/40  loss {each / 10:.3f}  9.0 img/s  50% waiting for the teacher" for each in asked]
