"""The options of a conversion, and the check that they go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.convert.growth import Forget
from pipelines.log.parts import CsvOptions
from pipelines.manifest import LAYOUTS, SPLITS
from pipelines.schema import Schema
from stem_util.errors import UserError, did_you_mean

POLICIES = ("time", "hash", "random", "leave_last")
"""Values of ``split``."""
RUNNERS = ("local", "direct", "flink", "spark", "dataflow")
"""Values of ``runner``."""
FRACTIONS = (0.8, 0.1, 0.1)
"""The default shares of train, validation and test."""


@dataclass(frozen=True)
class Options:
    """The options of a conversion. Those without a line here are the flags of the same names.

    Attributes:
      schema: the log's schema.
      output: directory to create, or its URI.
      log: patterns of the log's files; "" with ``given``.
      given: patterns by split, instead of ``log`` and ``split``.
      split: time, hash, random or leave_last.
      split_group: the column whose values are the groups of leave_last; the schema's group if not given.
      validation_share: share of the given train files' rows that becomes validation, or None if validation has files.
      validation_by: how these rows are chosen: time, hash or random (default).
      fractions: shares of train, validation and test; `FRACTIONS` if not given.
      extend: converted data whose vocabularies and constants to go on from, or "".
      forget: after how long unseen values lose their ids, as `growth.Forget.parse` reads it, or None.
      refit: fit numeric constants on the new log, instead of taking those of the data that are extended.
      late: the log may end before the data that it extends.
      layouts: layouts of the records to write; none if the log itself will be read.
      processes: number of processes of the local runner.
      runner: local, or a runner of Apache Beam: direct, flink, spark or dataflow.
      beam_args: Apache Beam's pipeline options, written as on a command line.
    """

    schema: Schema
    output: str
    log: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    split_column: str | None = None
    split_group: str | None = None
    validation_share: float | None = None
    validation_by: str | None = None
    fractions: tuple[float, float, float] | None = None
    validation_from: str | None = None
    test_from: str | None = None
    extend: str = ""
    forget: str | None = None
    refit: bool = False
    late: bool = False
    layouts: tuple[str, ...] = LAYOUTS
    seed: int = 0
    processes: int = 1
    runner: str = "local"
    beam_args: str = ""
    drop_bad_rows: bool = False
    overwrite: bool = False
    csv: CsvOptions = field(default_factory=CsvOptions)
    block_rows: int = 512
    shard_rows: int = 250_000

    def check(self) -> None:
        """Refuses options that do not go together.

        Raises:
          UserError: names the flags.
        """
        given, log, split = self.given, self.log, self.split
        for name in given:
            if name not in SPLITS:
                hint = did_you_mean(name, SPLITS)
                raise UserError(f"'{name}' is no split of the log: they are {', '.join(SPLITS)}{hint}")
        if split is not None and split not in POLICIES:
            raise UserError(f"--split={split} should be one of {', '.join(POLICIES)}{did_you_mean(split, POLICIES)}")
        if given and (log or split):
            raise UserError(f"--{next(iter(given))} gives a split's files; leave out {'the log' if log else '--split'}")
        if given and "train" not in given:
            raise UserError("--train is required with --validation and --test")
        self._check_validation()
        if not given and not log:
            raise UserError("the log is required: stem-convert LOG, or --train, --validation and --test")
        if not given and not split:
            raise UserError(
                "--split is required: time, hash, random or leave_last (or give --train, --validation, --test and no "
                "LOG)"
            )
        if split in ("time", "hash", "leave_last") and not self.split_column:
            raise UserError(f"--split={split} needs --split_column")
        if split not in ("time", "hash", "leave_last") and self.validation_by in (None, "random") and self.split_column:
            raise UserError(
                "--split_column belongs to --split=time, hash and leave_last, and --validation_by=time and hash"
            )
        if split != "leave_last" and self.split_group:
            raise UserError("--split_group belongs to --split=leave_last")
        if (given or split == "leave_last") and self.fractions:
            raise UserError("--fractions belongs to --split=time, hash and random")
        if split != "time" and (self.validation_from or self.test_from):
            raise UserError("--validation_from and --test_from belong to --split=time")
        if (self.validation_from or self.test_from) and self.fractions:
            raise UserError("--fractions and --validation_from / --test_from exclude each other")
        for flag, given_too in (("forget", self.forget is not None), ("refit", self.refit), ("late", self.late)):
            if given_too and not self.extend:
                raise UserError(f"--{flag} belongs to --extend")
        if self.forget is not None:
            Forget.parse(self.forget)
        shares = self.fractions or FRACTIONS
        if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] <= 0 or abs(sum(shares) - 1) >= 1e-9:
            text = ",".join(f"{share:g}" for share in shares)
            raise UserError(f"--fractions={text}: should be three shares that add up to 1, train above 0")
        if self.runner not in RUNNERS:
            hint = did_you_mean(self.runner, RUNNERS)
            raise UserError(f"--runner={self.runner} should be one of {', '.join(RUNNERS)}{hint}")
        if self.runner == "local" and self.beam_args:
            raise UserError(f"--beam_args belongs to --runner={', '.join(RUNNERS[1:-1])} and {RUNNERS[-1]}")
        for layout in self.layouts:
            if layout not in LAYOUTS:
                hint = did_you_mean(layout, LAYOUTS)
                raise UserError(f"--layouts: '{layout}' should be one of {', '.join(LAYOUTS)}, or none alone{hint}")

    def _check_validation(self) -> None:
        """Refuses options by which validation has neither files nor a share of train, unless that share is 0."""
        share, by, given = self.validation_share, self.validation_by, self.given
        if share is None and by is not None:
            raise UserError("--validation_by needs --validation_share")
        if share is not None and ("train" not in given or "validation" in given):
            raise UserError("--validation_share belongs to --train without --validation")
        if share is not None and share >= 1:
            raise UserError(f"--validation_share={share:g}: should be below 1")
        if share and by in ("time", "hash") and not self.split_column:
            raise UserError(f"--validation_by={by} needs --split_column")
        if given and "validation" not in given and share is None:
            raise UserError(
                "there is no validation, without which nothing can be trained: give --validation=FILES, or "
                "--validation_share=0.1 to take a tenth of train for it (--validation_share=0 to go without)"
            )
