"""The training loop: epochs of model.fit, an evaluation after each, checkpoints in between."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import count_batches, read_batches
from pipelines.manifest import Manifest
from stem_tf import configs, models, report, runtime
from stem_tf.evaluation import predictions, scoring
from stem_tf.models import calibrators
from stem_tf.models.ranking_model import RankingModel
from stem_tf.peers import Interrupted, Peers
from stem_tf.training import (
    assembly,
    best_weights,
    calibration,
    callbacks,
    dealing,
    early_stopping,
    gradient_shares,
    learning,
    monitor,
    servers,
    start,
)
from stem_tf.training.checkpoints import Checkpoints, RunState, held_checkpoint
from stem_tf.training.logger import Logger, by_metric
from stem_tf.training.non_finite import check_finite
from stem_tf.workdir import Workdir
from stem_util.errors import UserError
from stem_util.files import write_json

_FIRST_STEPS = 20
"""Steps after which the tasks' gradients on what they share are compared."""


class Trainer:
    """Trains a run to its end, from its newest checkpoint where it has one.

    Args:
      config: a complete, checked config.
      manifest: manifest of the data.
      workdir: the run's directory, prepared and locked.
      say: prints a line.
      warn: prints a warning.
      peers: the processes that train the run together; each of them has a trainer. Only the chief writes and prints.

    Attributes:
      choice: the weights that a finished run with ``train.best=own`` serves; None until then, and for other runs.
      calibration: what ``best/calibration.json`` of a finished run holds; None until then, and for other runs.
    """

    def __init__(
        self,
        config: Any,
        manifest: Manifest,
        workdir: Workdir,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = report.warn,
        peers: Peers | None = None,
    ) -> None:
        self.config, self.manifest, self.workdir, self.peers = config, manifest, workdir, peers or Peers()
        self.say, self.warn = (say, warn) if self.peers.is_chief else (_nothing, _nothing)
        self.monitor = monitor.monitor(config, manifest)
        self.monitors = monitor.of_tasks(config, manifest) if configs.best(config) != "together" else {}
        self._own = configs.best(config) == "own"
        self.choice: assembly.Choice | None = None
        self.calibration: dict[str, Any] | None = None
        self._reading = configs.reading(config.data)
        strategy = runtime.set_up(config)
        self._check_all_have("replicas", strategy.num_replicas_in_sync)
        self._servers = servers.connected(config, self.peers)
        self._dealer: dealing.Dealer | None = None
        self.steps = count_batches(manifest, "train", training=True, **self._reading)
        count_batches(manifest, "validation", training=False, **self._reading)  # refuses a split without rows
        self.state = RunState()
        writes, remote = self.peers.is_chief, self._servers is not None
        with self._naming_lost():
            with (self._servers or strategy).scope():
                self.model: RankingModel = models.build(config, manifest)
            self.checkpoints = Checkpoints(workdir.checkpoints, self.model, self.state, writes=writes, remote=remote)
            self._best = Checkpoints(
                workdir.best, self.model, self.state, weights_only=True, keep=1, writes=writes, remote=remote
            )
            self.resumed_from = self.checkpoints.restore()
            if starts := bool(config.start.run and self.resumed_from is None):
                for line in start.start(self.model, self.state, config, manifest, self.warn):
                    self.say(line)
        self._check_all_have("a checkpoint of steps", [self.state.epoch, self.state.step])
        self._check_parts()
        # Patience may have changed since, and epochs may have been added whose learning rate would be 0.
        self.state.stopped = "" if self.state.step else self._why_stopped()
        if starts and self.state.stopped:
            raise UserError(
                f"{self.state.stopped}, and {config.start.run} has reached it: give --config.start.schedule=restart"
            )
        if writes:
            workdir.rewind_metrics(self.state.epoch, self.global_step)
        if starts:  # from now on the run does not depend on what it went on from
            self._save()
        self._logger = Logger(workdir, self.model, config, self.steps, self.state.first_step, writes=writes)
        self._epoch_start = time.monotonic()
        self._logged_step = -1
        self._compiled = self._said_heading = False
        self._untrained = learning.untrained(config, manifest)
        self._collapsed: set[str] = set()

    @property
    def global_step(self) -> int:
        """Steps done in all epochs."""
        return self.state.epoch * self.steps + self.state.step

    @property
    def _steps_before(self) -> int:
        """Steps that schedules count before the run's first one."""
        begun = self.model.schedule_start
        return 0 if begun is None else self.state.first_step - int(begun.numpy())

    def _check_all_have(self, what: str, mine: Any) -> None:
        """Refuses a cluster in which processes differ from the chief in ``what``."""
        if (of_chief := self.peers.decide(lambda: mine)) != mine:
            raise UserError(
                f"process {self.peers.rank} has {what} {mine}, and the chief {of_chief}: all processes of a cluster "
                f"need as many GPUs, and a file system on which they find {self.workdir.path}"
            )

    def _parts(self) -> int:
        """The parts that the rows of the epoch are dealt out to: inside one, those that it began with."""
        inside = 0 < self.state.step < self.steps
        return self.state.parts if inside else self.config.data.parts or self.peers.count

    def _check_parts(self) -> None:
        """Refuses parts that the processes cannot share."""
        data, count, parts = self.config.data, self.peers.count, self._parts()
        if parts % count and parts != data.parts:
            fit = " or ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
            raise UserError(
                f"{self.workdir.path} stopped inside an epoch whose rows are dealt out to {parts} parts, which "
                f"{count} processes cannot share: go on with {fit}"
            )
        if parts % count:
            raise UserError(f"config.data.parts={parts} does not divide by the {count} processes of the cluster")
        if data.batch_size % parts:
            raise UserError(
                f"config.data.batch_size={data.batch_size} does not divide by the {parts} parts that give each a "
                "share of it (config.data.parts)"
            )

    def parameters(self) -> tuple[int, int]:
        """Number of parameters in tables and in the network."""
        embeddings, network = (
            sum(int(tf.size(weight)) for weight in part.weights) for part in (self.model.embeddings, self.model.network)
        )
        return embeddings, network

    def run(self) -> None:
        """Trains and evaluates epoch by epoch until the last one, or until patience ends.

        Raises:
          Interrupted: by SIGTERM or Ctrl-C, after a checkpoint was written.
          JobError: a loss that is not finite, a damaged record.
        """
        state, config = self.state, self.config.train
        of_learning = learning.warnings(self.config, self.manifest, self.steps, self._steps_before)
        for sentence in (self.monitor.warning, *of_learning):
            if sentence:
                self.warn(sentence)
        try:
            with self._naming_lost(), callbacks.Signals(self.peers) as signals:
                while not state.stopped and state.epoch < config.epochs:
                    self._epoch_start = time.monotonic()
                    try:
                        self._train_epoch(signals)
                        self._evaluate_epoch(signals)
                        # A signal that came while the checkpoint was written.
                        if not state.stopped and state.epoch < config.epochs:
                            signals.check()
                    except Interrupted:
                        self._save()
                        raise
                if self._own:
                    self._choose(signals)
                self._calibrate(signals)
        except tf.errors.OpError:
            self.peers.await_news()
            raise
        finally:
            self._logger.close()

    def _naming_lost(self) -> contextlib.AbstractContextManager[None]:
        """Names a parameter server that is gone, where there are any."""
        return contextlib.nullcontext() if self._servers is None else self._servers.naming_lost()

    def _train_epoch(self, signals: callbacks.Signals) -> None:
        """Makes the steps that are left in the epoch; none when only its evaluation was missing."""
        state, config = self.state, self.config
        if state.step >= self.steps:
            return
        self.model.epoch.assign(state.first_epoch + state.epoch)
        state.parts = self._parts()
        dataset = read_batches(
            self.manifest,
            "train",
            training=True,
            seed=config.seed,
            epoch=state.epoch,
            start_step=state.step,
            reader=(self.peers.rank, self.peers.count),
            parts=state.parts,
            shuffle_megabytes=config.data.shuffle_megabytes,
            run_kilobytes=config.data.run_kilobytes,
            device=None if self._servers else scoring.single_gpu(self.model),
            **self._reading | {"batch_size": config.data.batch_size // self.peers.count},
        )
        actions: list[tuple[int, Callable[[callbacks.Logs], None]]] = [(config.train.log_every, self._log)]
        if config.train.checkpoint_every:
            actions.append((config.train.checkpoint_every, self._checkpoint))
        first = min(_FIRST_STEPS, self.steps)
        if state.epoch == 0 and state.step < first and self.peers.is_chief:
            # The epoch's next batch, not that of step `first`, which could not be read without taking it from training.
            with naming_corrupt_records(self.manifest, "train", config.data.input_format):
                batch = next(iter(dataset.take(1)))
            actions.insert(0, (first, functools.partial(self._compare_tasks, batch)))
        steps = callbacks.Steps(state, config.data.batch_size, actions, signals, compiling=not self._compiled)
        self._compiled = True
        desc = f"epoch {state.epoch + 1}/{config.train.epochs}"
        display = callbacks.Display(desc, state, self.steps, config.data.batch_size)
        resumed = [callbacks.RestoredMeans(self.model)] if state.step else []
        try:
            with naming_corrupt_records(self.manifest, "train", config.data.input_format):
                self._fit(dataset, [*resumed, steps, display])
        except Interrupted:
            state.losses = steps.losses()
            raise
        finally:
            display.close()
        state.losses = steps.losses()
        check_finite(self.model)
        if self._logged_step != self.global_step:
            self._log(steps.logs)

    def _fit(self, dataset: tf.data.Dataset, calls: Sequence[callbacks.Callback]) -> None:
        """Trains on the rest of an epoch."""
        state = self.state
        if self._servers is None:
            self.model.fit(
                self._for_replicas(dataset),
                initial_epoch=state.epoch,
                epochs=state.epoch + 1,
                steps_per_epoch=self.steps - state.step,
                callbacks=calls,
                verbose=0,
            )
            return
        if self._dealer is None:
            self._dealer = dealing.Dealer(self._servers, self.model, dataset.element_spec)
        dealing.fit(
            self._dealer,
            self.model,
            dataset,
            first=state.step,
            steps=self.steps,
            offset=state.first_step + state.epoch * self.steps,
            whole_every=self.config.train.checkpoint_every,
            callbacks=calls,
        )
        for worker in self._servers.lost_workers():
            self.warn(f"{worker} is gone: the other workers have trained on its batches")

    def _for_replicas(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """This process's batches for Keras, which divides those of one process among its replicas by itself."""
        if self.peers.count == 1:
            return dataset
        strategy = self.model.distribute_strategy
        share = self.config.data.batch_size // strategy.num_replicas_in_sync
        # Of a data set that may end TensorFlow asks all processes, at every step, whether they have another batch.
        endless = dataset.rebatch(share, drop_remainder=True).apply(
            tf.data.experimental.assert_cardinality(tf.data.experimental.INFINITE_CARDINALITY)
        )
        return strategy.distribute_datasets_from_function(lambda context: endless)

    def _log(self, logs: callbacks.Logs) -> None:
        self._logged_step = self.global_step
        self._logger.train(self.state.epoch, self.global_step, callbacks.numbers(logs))

    def _save(self) -> None:
        """Writes a checkpoint, after the metrics up to it are on the disk."""
        if self.peers.is_chief:
            self.workdir.sync_metrics()
        self.checkpoints.save()
        self.workdir.publish()

    def _compare_tasks(self, batch: Any, logs: callbacks.Logs) -> None:
        """Prints, once, each task's share of the gradient on what the tasks share."""
        if self.state.step - self.config.train.steps_per_execution >= _FIRST_STEPS:
            return
        norms = gradient_shares.shared_gradients(self.model.training_step, batch)
        if not sum(norms.values()):
            return
        shares = {task: norm / sum(norms.values()) for task, norm in norms.items()}
        listed = ", ".join(f"{task} {report.percent(share)}" for task, share in shares.items())
        self.say(f"gradient on what the tasks share, after {self.state.step:,} steps: {listed}")
        task = gradient_shares.drowning(shares, self._untrained)
        if task is not None:
            self.warn(gradient_shares.warning(self.model, self.config, task, shares, self._untrained))

    def _checkpoint(self, logs: callbacks.Logs) -> None:
        self.state.losses = callbacks.numbers(logs)
        self._save()

    def _evaluate_epoch(self, signals: callbacks.Signals) -> None:
        """Evaluates on validation, keeps the best weights, and writes the checkpoint that ends the epoch."""
        state, config = self.state, self.config.train
        epoch = state.epoch
        predicted = self._predict_validation(f"epoch {epoch + 1}/{config.epochs}, validation", signals)
        results = self._measure(predicted)
        if predicted is not None:
            self._warn_of_collapse(epoch, predicted)
        score = self.monitor.value(results)
        self._logger.validation(epoch, self.global_step, {"score": score} | by_metric(results))

        state.epoch, state.step = epoch + 1, 0
        better = early_stopping.note_epoch(state, epoch, score, self.monitor)
        improved = early_stopping.note_tasks(state, epoch, results, self.monitors, config.patience)
        self._logger.best(self.global_step, state.best_score)
        if self.monitors:
            if improved or (self._own and better):
                self._keep_best_of_tasks(epoch)
        elif better:
            self._best.save()
        state.stopped = self._why_stopped()
        self._save()
        if self.monitors and self.peers.is_chief:  # only now: the last checkpoint but one names the best before these
            whole = [self._kept_as(state.best_epoch)] if self._own else []
            self._best.keep_only({*self._candidates().values(), *whole})
        self._say_epoch(epoch, results, score, "best" if better else "", improved)

    def _predict_validation(self, desc: str, signals: callbacks.Signals) -> predictions.Predictions | None:
        """Scores validation, each process its part of the rows; returns all of them to the chief, None to others."""
        mine = scoring.predict(
            self.model,
            self.manifest,
            "validation",
            self.config.data,
            desc=desc,
            signals=signals,
            reader=(self.peers.rank, self.peers.count),
        )
        parts = self.peers.gather(mine.arrays())
        return predictions.together(parts) if parts else None

    def _measure(self, predicted: predictions.Predictions | None) -> monitor.Results:
        """The metrics of the rows, which the chief has, in all processes."""

        def results() -> monitor.Results:
            assert predicted is not None
            return predictions.evaluate(predicted, self.manifest)

        return self.peers.decide(results)

    def why_ended(self) -> str:
        """Why a finished run has ended, in words."""
        return self.state.stopped or f"all {self.config.train.epochs} epochs done"

    def _why_stopped(self) -> str:
        """Why no epoch should follow, in words; "" where one should."""
        if why := early_stopping.why_stop(self.state, self.config.train.patience):
            return why
        end = learning.last_step(self.config)
        if (
            end is not None
            and self._steps_before + self.global_step >= end
            and self.state.epoch < self.config.train.epochs
        ):
            return f"the learning rate is 0 from step {end:,} on"
        return ""

    def _warn_of_collapse(self, epoch: int, predicted: predictions.Predictions) -> None:
        """Warns, once per task, of a model that gives every row the same score."""
        found = [t for t in predicted.constant() if t not in self._untrained and t not in self._collapsed]
        if found:
            self._collapsed.update(found)
            self.warn(
                f"after epoch {epoch + 1} all validation rows have the same score for {', '.join(found)}: the model "
                "does not tell rows apart. Start its tables from larger values (config.model.init_std), pull less on "
                "them (config.optimizer.l2) or lower config.optimizer.learning_rate, in a new --workdir"
            )

    def _keep_best_of_tasks(self, epoch: int) -> None:
        """Saves the weights of an epoch that is best for some task, and which checkpoint each task has now."""
        self._best.save_as(f"epoch-{epoch + 1}")
        if not self.peers.is_chief:
            return
        if self._own:  # until the end, when the parts of several epochs are evaluated together
            whole = self._kept_as(self.state.best_epoch)
            write_json(self.workdir.best_epochs, {"tasks": dict.fromkeys(self.state.by_task, whole), "rest": whole})
        else:
            write_json(self.workdir.best_epochs, {"tasks": self._candidates(), "rest": None})

    def _candidates(self) -> dict[str, str]:
        """Name of the checkpoint of each task's best epoch."""
        return {task: self._kept_as(best["best_epoch"]) for task, best in self.state.by_task.items()}

    def _kept_as(self, epoch: int) -> str:
        return self._best.newest(f"epoch-{epoch + 1}")

    def _choose(self, signals: callbacks.Signals) -> None:
        """Chooses what a finished run serves: each task's own weights from its best epoch, or the best epoch alone.

        Overwrites the model's weights. Checkpoints of the tasks' best epochs stay: the run may be continued.
        """
        if self.peers.is_chief:
            self.choice = assembly.read(self.workdir.best_epochs, self.state.epoch)

        def kept() -> tuple[str, dict[str, str]] | None:
            there = {path.stem for path in self.workdir.best.glob("*.index")}
            whole = self._kept_as(self.state.best_epoch)
            if self.choice is not None or whole not in there:
                return None  # chosen before; or somebody deleted it, and a warning said so at the start
            return whole, {task: name if name in there else whole for task, name in self._candidates().items()}

        if (names := self.peers.decide(kept)) is None:
            return
        self.choice = assembly.choose(
            self.model,
            self.workdir.best,
            names[1],
            names[0],
            lambda: self._measure(self._predict_validation("best weights, validation", signals)),
            self.monitor,
            {task: watched for task, watched in self.monitors.items() if task not in self._untrained},
        )
        if self.peers.is_chief:
            write_json(self.workdir.best_epochs, self.choice.as_json(self.state.epoch))
        self._logger.best(self.global_step, self.choice.score)

    def _calibrate(self, signals: callbacks.Signals) -> None:
        """Fits the calibrators of the weights that a finished run serves, unless they are fitted already.

        Overwrites the model's weights.
        """
        tasks, best, path = self.manifest.schema.task_names, self.workdir.best, self.workdir.calibration
        asked = calibration.asked(self.config, self.manifest.schema)
        if not asked:
            return

        def kept() -> dict[str, Any] | None:
            try:
                found = best_weights.names(self.workdir, tasks, self._own)
            except UserError:
                return None
            return found if all((best / f"{name}.index").exists() for name in best_weights.distinct(found)) else None

        if (names := self.peers.decide(kept)) is None:
            self.warn(f"scores are not calibrated: the best weights are gone from {best}")
            return
        with contextlib.ExitStack() as stack:
            held = {
                name: stack.enter_context(held_checkpoint(str(best / name), remote=self._servers is not None))
                for name in best_weights.distinct(names)
            }
            weights = calibration.identity(names, {name: one.readable for name, one in held.items()})
            self.calibration = self.peers.decide(lambda: calibration.fitted_before(path, weights, asked))
            if self.calibration is not None:
                return
            rows: calibration.Rows = {}
            for of_weights in best_weights.put(self.model, names, held, tasks):
                self.model.calibrate(dict.fromkeys(asked, calibrators.UNCALIBRATED))  # keeps their logits
                predicted = self._predict_validation("calibration, validation", signals)
                self._measure(predicted)  # refuses scores that are not finite
                if predicted is not None:
                    rows |= {
                        task: (predicted.logits[task], predicted.labels[task], predicted.weights_of(task))
                        for task in asked
                        if task in of_weights
                    }
        self.model.calibrate({})
        self.calibration = self.peers.decide(
            lambda: calibration.write(path, weights, asked, calibration.fit_tasks(asked, rows, self._untrained))
        )
        self._say_calibration(self.calibration["tasks"])

    def _say_calibration(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        lines = calibration.lines(tasks)
        if lines:
            self.say(f"calibrated on validation, before -> after:\n{report.table(calibration.HEAD, lines)}")
        for task, of_task in tasks.items():
            if "why" in of_task:
                self.warn(f"the scores of '{task}' are not calibrated: {of_task['why']}")

    def _say_epoch(
        self, epoch: int, results: monitor.Results, score: float, better: str, improved: Sequence[str]
    ) -> None:
        """A line of the table of epochs; its heading before the first one that this process finishes."""
        columns = {task if "auc" in metrics else f"{task} MSE": metrics for task, metrics in results.items()}
        cells = {
            "epoch": f"{epoch + 1}/{self.config.train.epochs}",
            "seconds": f"{time.monotonic() - self._epoch_start:.1f}",
            "mean AUC" if self.monitor.kind == "auc" else "loss": report.number(score),
            **{name: report.number(metrics["auc" if "auc" in metrics else "mse"]) for name, metrics in columns.items()},
        }
        if not self._said_heading:
            self.say("validation after each epoch, the AUC of each task:")
            self.say("  ".join(f"{name:>7}" for name in cells))
            self._said_heading = True
        line = "  ".join(f"{cell:>{max(len(name), 7)}}" for name, cell in cells.items())
        best = f"best of {', '.join(improved)}" if improved else "" if self.monitors else better
        self.say(f"{line}  {best}".rstrip())


def _nothing(line: str) -> None:
    """Prints nothing."""
