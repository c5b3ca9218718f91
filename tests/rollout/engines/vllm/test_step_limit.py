"""A step that does not end ends the process, and steps that end do not."""

import threading
import time

from shardes.errors import EXIT_FAILURE
from shardes.rollout.engines.vllm.step_limit import StepLimit


def test_a_step_that_does_not_end_is_ended(capsys):
    ended, statuses = threading.Event(), []

    def end(status):
        statuses.append(status)
        ended.set()

    limit = StepLimit(1.0, end=end)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:  # many steps, each within its limit
        with limit:
            time.sleep(0.001)
    assert not ended.is_set()
    with limit:
        assert ended.wait(30)
    assert statuses == [EXIT_FAILURE]
    assert "a step of vLLM has taken more than 1.0 s (parallel.timeout_seconds)" in capsys.readouterr().err
