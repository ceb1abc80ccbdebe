"""Worker processes: order, errors, and workers that die."""

import os
import signal

import pytest

from pipelines.errors import JobError, UserError
from pipelines.workers import Pool


def _square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def _refuse(number: int) -> None:
    raise UserError(f"{number} is bad")


def _die(number: int) -> None:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes: int) -> None:
    with Pool(processes) as pool:
        results = list(pool.run(_square, [(f"task {i}", (i,)) for i in range(20)]))
        assert list(pool.run(_square, [])) == []
        with pytest.raises(UserError, match="^0 is bad$"):
            list(pool.run(_refuse, [(f"task {i}", (i,)) for i in range(3)]))
    assert [square for square, _ in results] == [i * i for i in range(20)]
    assert (os.getpid() in {pid for _, pid in results}) == (processes == 1)


def test_a_dead_worker_is_named() -> None:
    with pytest.raises(JobError, match="a worker process died while it worked on .*task 1"), Pool(2) as pool:
        list(pool.run(_die, [(f"task {i}", (i,)) for i in range(2)]))
