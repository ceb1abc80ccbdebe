"""The one sentence that whatever is raised becomes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest

from stem_util.errors import JobError, Stopped, UserError, message, naming_full_disk


class OpError(Exception):
    """As TensorFlow's errors are."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.error_code = code


_PLACE = "{{function_node __wrapped__Mul_device_/job:localhost/replica:0/task:0/device:CPU:0}} "


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("log.csv:\n no column 'x'"), "log.csv: no column 'x'"),
        (JobError(""), "JobError"),
        (KeyboardInterrupt(), "interrupted"),
        (Stopped("stopped by SIGTERM"), "stopped by SIGTERM"),
        (OSError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (OSError("no errno"), "no errno"),
        (
            OSError(28, "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
            "No space left on device",
        ),
        (MemoryError(), "out of memory: fewer rows needs less"),
        (
            pa.ArrowMemoryError("malloc of size 7 failed"),
            "out of memory (malloc of size 7 failed): fewer rows needs less",
        ),
        (
            OpError(_PLACE + "OOM when allocating tensor with shape[24,36] and type float on x [Op:Mul] name: ", 8),
            "out of memory (a tensor of shape [24,36] did not fit): fewer rows needs less",
        ),
        (
            OpError("run/tensorboard/events; No space left on device", 8),
            "run/tensorboard/events; No space left on device",
        ),
        (
            OpError(_PLACE + "run/x; Read-only file system [Op:CreateSummaryFileWriter]", 9),
            "run/x; Read-only file system",
        ),
        (
            OpError(
                "Graph execution error:\n\nDetected at node SaveV2_2 defined at (most recent call last):\n"
                '  File "<frozen runpy>", line 198, in _run_module_as_main\n\n  File "saver.py", line 554, in save\n\n'
                "2 root error(s) found.\n  (0) RESOURCE_EXHAUSTED:  run/ckpt-3; No space left on device\n\t "
                "[[{{node SaveV2_2}}]]\nHint: If you want to see a list of allocated tensors, add x.\n\n"
                "Additional GRPC error information from remote target /job:ps/replica:0/task:1: [[]]\n"
                "  (1) CANCELLED:  Function was cancelled [Op:__inference_tf_function_save_6]",
                8,
            ),
            "run/ckpt-3; No space left on device",
        ),
        (
            pa.ArrowInvalid("Parquet magic bytes not found"),
            "ArrowInvalid: Parquet magic bytes not found. That is a bug, or a case nobody thought of: the same command "
            "with --debug shows where; please report it",
        ),
        (
            AssertionError(),
            "AssertionError: no message. That is a bug, or a case nobody thought of: the same command with "
            "--debug shows where; please report it",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_one_line(error: BaseException, line: str) -> None:
    assert message(error, "fewer rows") == line


def test_notes_are_part_of_the_sentence() -> None:
    error = Stopped("stopped by SIGTERM")
    error.add_note("nothing\nwas kept")
    assert message(error) == "stopped by SIGTERM; nothing was kept"
    assert message(MemoryError()) == "out of memory: this machine does not have enough"


def test_a_full_disk_names_the_file() -> None:
    for name, shown in ((None, Path("out.json")), ("other", "other")):
        with pytest.raises(OSError) as full, naming_full_disk(Path("out.json")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        assert message(full.value) == f"{shown}: No space left on device"
    with pytest.raises(OSError) as read, naming_full_disk(Path("out.json")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # whatever was read
    assert message(read.value) == "Input/output error"
