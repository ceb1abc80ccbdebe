"""A worker process of Beam's direct runner: ``python -m pipelines.convert.beam_worker PID``, for the process PID.

It ends with that process, however that one ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

import pyarrow as pa


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent ends its workers
    threading.Thread(target=_follow, args=(int(sys.argv[1]),), daemon=True).start()
    pa.set_cpu_count(1)  # the processes are the parallelism
    logging.getLogger().addHandler(logging.NullHandler())  # what is logged goes to the parent, not to stderr as well
    from apache_beam.runners.worker import sdk_worker_main  # logs at import

    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
