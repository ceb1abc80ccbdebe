"""Worker processes: order, errors, and workers that die."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from stem_util.errors import JobError, UserError
from stem_util.workers import Pool


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


def test_children_of_others_live_on() -> None:
    others = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    others.start()
    try:
        with pytest.raises(UserError), Pool(2) as pool:
            list(pool.run(_refuse, [("task", (1,))]))
        assert others.is_alive()
    finally:
        others.kill()
        others.join()


def _touch_and_wait(path: Path) -> None:
    path.touch()
    time.sleep(60)


def test_ctrl_c_does_not_reach_workers(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Pool(2) as pool:
        for number in range(2):
            pool._executor.submit(_touch_and_wait, tmp_path / str(number))  # type: ignore[union-attr]
        for worker in pool._context.workers:  # as soon as there are processes: long before Python runs in them
            os.kill(worker.pid or 0, signal.SIGINT)
        while len(list(tmp_path.iterdir())) < 2:
            assert all(worker.is_alive() for worker in pool._context.workers)
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert not any(worker.is_alive() for worker in pool._context.workers)
