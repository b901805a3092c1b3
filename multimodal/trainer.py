"""The loop: data, step, log, evaluate, save. It has no settings of its own."""

import json
import logging
import math
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from multimodal import checkpoint, distributed, provenance
from multimodal.assemble import Problems, assemble, device_of, draw, encoder, open_evaluations, open_source
from multimodal.batch import Batch
from multimodal.checkpoint import TrainerState
from multimodal.config import ConfigError, RunError, TrainConfig, changed_identity
from multimodal.data.loader import training_batches
from multimodal.data.order import Batches
from multimodal.evals import figures
from multimodal.optim import parameter_groups
from multimodal.parts import Report, RunInfo
from multimodal.step import seed_step, training_step
from multimodal.tracker import METRICS, SUMMARY, RunLog
from multimodal.units import Cadence

logger = logging.getLogger(__name__)

FIRST_BROKEN = 100
"""Before so many samples were seen, a share of broken ones says nothing."""


class Trainer:
    """Trains what a configuration describes, in the run's folder, from where the run stands."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.device = device_of(config)
        self.first = distributed.rank() == 0
        self.stop_signal: int | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end, or to a stop signal; the summary. Returns at once if the run is finished."""
        distributed.start(self.device)
        try:
            with self._stop_on_signal():
                return self._run()
        finally:
            distributed.stop()

    def _run(self) -> dict[str, Any]:
        config = self.config
        last = distributed.on_first_rank(self._open_folder)

        problems = Problems()
        source = open_source(config, problems)
        self.evaluations = open_evaluations(config.evals, config.paths.datasets, problems)
        problems.report()
        assert source is not None
        self.assembled = assemble(config, source, last)
        self.model = self.assembled.model
        self.optimizer = config.optimizer.build(parameter_groups(self.model, config.optimizer.weight_decay))
        self.state = TrainerState()
        if last is not None:
            self.state = checkpoint.load_state(last)
            checkpoint.load_model(last, self.model)
            checkpoint.load_optimizer(last, self.model, self.optimizer)
            if self.first and self.state.best_step in checkpoint.steps(self.folder):
                checkpoint.mark_best(self.folder, self.state.best_step)  # a kill may have come before it

        self.steps_per_epoch = len(source) // config.global_batch_size
        self.total_steps = config.duration.steps(config.global_batch_size, self.steps_per_epoch)
        self.warmup_steps = config.warmup.steps_of(self.total_steps, config.global_batch_size, self.steps_per_epoch)
        if self.warmup_steps > self.total_steps:
            raise ConfigError([("warmup", f"{config.warmup} is longer than duration={config.duration}")])
        if self.state.step >= self.total_steps:
            return self._already_finished()

        self.log = self._open_log() if self.first else None
        exit_code = 1
        try:
            self._loop(
                training_batches(
                    source,
                    self.assembled.readers,
                    Batches(
                        len(source),
                        config.seed,
                        config.global_batch_size,
                        distributed.rank(),
                        distributed.world_size(),
                        start=self.state.step,
                        stop=self.total_steps,
                    ),
                    config.seed,
                    config.workers,
                )
            )
            exit_code = 0
            return self._summarise("finished" if self.state.step == self.total_steps else "stopped")
        except BaseException:
            self._summarise("failed")
            raise
        finally:
            if self.log is not None:
                self.log.close(exit_code)

    # --- before -----------------------------------------------------------------------------------------------------

    def _open_folder(self) -> Path | None:
        """Make or check the run's folder; the checkpoint to continue from, if there is one."""
        config, folder = self.config, self.folder
        stored = folder / "config.yaml"
        if config.run.fresh and folder.exists():
            if any(folder.iterdir()) and not stored.exists():
                raise ConfigError([("run.fresh", f"{folder} does not look like a run: it is left as it is")])
            shutil.rmtree(folder)
        checkpoint.clean(folder)
        last = checkpoint.find(folder) if checkpoint.steps(folder) else None
        if last is not None:
            changed = changed_identity(yaml.safe_load((last / "config.yaml").read_text()), config)
            if changed:
                hint = ("run.name", "another name starts another run; run.fresh=true starts this one over")
                raise ConfigError([*changed, hint], f"way of resuming {folder}: it was computed with other values")
        folder.mkdir(parents=True, exist_ok=True)
        stored.write_text(self._config_text())
        return last

    def _config_text(self) -> str:
        return yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def _open_log(self) -> RunLog:
        log = RunLog(self.folder, self.state.log_bytes)
        summary = self.folder / SUMMARY
        self.run_id = json.loads(summary.read_text())["id"] if summary.exists() else secrets.token_hex(4)
        facts = provenance.facts()
        checkpoint.write_json(self.folder / "environment.json", facts)
        (self.folder / "uncommitted.diff").write_text(provenance.uncommitted())
        checkpoint.write_json(summary, {"id": self.run_id, "status": "running"})
        stored = {**self.config.model_dump(mode="json"), "environment": facts}
        info = RunInfo(self.config.run.name, self.run_id, self.folder, stored, log.rows)
        log.mirror = self.config.tracker.start(info)
        parameters = ", ".join(f"{name} {count:,}" for name, count in self.model.num_parameters().items())
        logger.info("run %s on %s; parameters: %s", self.folder, self.device, parameters)
        if self.state.step:
            logger.info("continues after step %d of %d", self.state.step, self.total_steps)
        return log

    def _already_finished(self) -> dict[str, Any]:
        if not self.first:
            return {}
        logger.info("run %s is finished, at step %d; run.fresh=true starts it over", self.folder, self.state.step)
        stored = self.folder / SUMMARY
        summary: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        if summary.get("status") != "finished":  # killed after its last checkpoint
            self.run_id = summary.get("id", secrets.token_hex(4))
            self.log = RunLog(self.folder, self.state.log_bytes)
            summary = self._summarise("finished")
            self.log.close(exit_code=0)
        return summary

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self, batches: Iterator[Batch]) -> None:
        config, state = self.config, self.state
        self.model.train()
        self.last_save = time.monotonic()
        self._restart_clock()
        not_finite = torch.zeros((), device=self.device)
        with self._progress() as bar:
            while state.step < self.total_steps:
                waited = time.monotonic()
                batch = self._to_device(next(batches))
                self.waited += time.monotonic() - waited
                self._count_broken(batch)

                seed_step(config.seed, state.step)
                lr = config.optimizer.lr * config.schedule(state.step, self.warmup_steps, self.total_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                measured = training_step(
                    self.model, config.loss, self.optimizer, batch, self.assembled.context, config.max_grad_norm
                )
                state.step += 1
                self.steps_since_log += 1
                not_finite += 1 - measured["finite"]
                bar.update()

                last = state.step == self.total_steps
                stopping = distributed.any_rank(self.stop_signal is not None)
                if last or self._due(config.log.every):
                    self._log_training(measured, lr, not_finite, bar)
                improved = self._evaluate(everything=last)
                if last or stopping or improved or self._due(config.checkpoint.every):
                    self._save(improved)
                if stopping and not last:
                    logger.info("stopped by a signal after step %d; the same command continues", state.step)
                    return

    def _due(self, cadence: Cadence) -> bool:
        if cadence.unit == "never":
            return False
        if cadence.unit == "minutes":
            return distributed.any_rank(time.monotonic() - self.last_save >= 60 * cadence.value)
        every = max(1, cadence.steps(self.config.global_batch_size, self.steps_per_epoch))
        return self.state.step % every == 0

    def _to_device(self, batch: Batch) -> Batch:
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in batch.inputs.items()}
        return Batch(inputs, batch.indices, batch.replaced)

    def _count_broken(self, batch: Batch) -> None:
        state, config = self.state, self.config
        for line in batch.replaced:
            logger.warning("replaced a broken sample: %s", line)
        state.broken += len(batch.replaced)
        seen = max(FIRST_BROKEN, (state.step + 1) * config.global_batch_size // distributed.world_size())
        if state.broken > config.max_broken * seen:
            raise RunError(
                f"{state.broken} of {seen} samples were broken, more than max_broken={config.max_broken}; "
                "the log names each of them"
            )

    def _restart_clock(self) -> None:
        self.clock, self.waited, self.steps_since_log = time.monotonic(), 0.0, 0

    def _log_training(self, measured: dict[str, Tensor], lr: float, not_finite: Tensor, bar: Any) -> None:
        if not_finite:
            raise RunError(
                f"the loss or a gradient was not finite in {int(not_finite)} of the steps up to {self.state.step}; "
                "the weights were left as before. A lower optimizer.lr or max_grad_norm, or precision=fp32, may help"
            )
        values = {f"train/{name}": float(value) for name, value in measured.items() if name != "finite"}
        seconds = time.monotonic() - self.clock
        values |= {
            "train/lr": lr,
            "train/epoch": self.state.step / self.steps_per_epoch,
            "train/broken_samples": self.state.broken,
            "train/samples_per_s": self.steps_since_log * self.config.global_batch_size / seconds,
            "train/data_wait": self.waited / seconds,
        }
        self._write(values)
        bar.set_postfix(loss=f"{values['train/loss']:.3f}", samples_per_s=f"{values['train/samples_per_s']:.0f}")
        if (
            bar.disable
            and self.first
            and (self.state.step * 20 // self.total_steps)
            > ((self.state.step - self.steps_since_log) * 20 // self.total_steps)
        ):
            logger.info(
                "step %d of %d: loss %.4f, %.0f samples/s",
                self.state.step,
                self.total_steps,
                values["train/loss"],
                values["train/samples_per_s"],
            )
        self._restart_clock()

    def _write(self, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.state.step, self.state.step * self.config.global_batch_size, values)

    # --- evaluate and save ------------------------------------------------------------------------------------------

    def _evaluate(self, everything: bool) -> bool:
        """Run the evaluations that are due; whether the metric that checkpoints are judged by is the best so far."""
        due = [name for name, part in self.config.evals.items() if everything or self._due(part.every)]
        if not due:
            return False
        started = time.monotonic()
        values: dict[str, float] = {}
        model = encoder(self.config, self.assembled)
        for name in due:
            report = self.evaluations[name](model)
            values |= {f"eval/{name}/{metric}": value for metric, value in report.metrics.items()}
            self._draw(name, report)
        self._write(values)
        if self.first:
            logger.info("step %d: %s", self.state.step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        self.clock += time.monotonic() - started  # the rate is that of training
        return self._improves(values)

    def _improves(self, values: dict[str, float]) -> bool:
        best, sign = self.config.checkpoint.best, 1 if self.config.checkpoint.mode == "max" else -1
        if best is None or not any(key.startswith(f"{best.rpartition('/')[0]}/") for key in values):
            return False
        if best not in values:
            raise RunError(f"checkpoint.best={best} is not among the metrics: {', '.join(values)}")
        if not math.isfinite(values[best]):
            return False
        if self.state.best is not None and sign * values[best] <= sign * self.state.best:
            return False
        self.state.best, self.state.best_step = values[best], self.state.step
        return True

    def _draw(self, name: str, report: Report) -> None:
        if self.log is None:
            return
        for figure, path in draw(name, report, self.folder / "figures"):
            self.log.figure(self.state.step, f"eval/{name}/{figure}", path)

    def _save(self, best: bool) -> None:
        started = time.monotonic()
        if self.log is not None:
            self.state.log_bytes = self.log.flush()
            checkpoint.save(
                self.folder, self.state, self.model, self.optimizer, self.assembled.readers, self._config_text()
            )
            if best:
                checkpoint.mark_best(self.folder, self.state.step)
            checkpoint.prune(self.folder, self.config.checkpoint.keep)
        self.last_save = time.monotonic()
        self.clock += self.last_save - started

    def _summarise(self, status: str) -> dict[str, Any]:
        if self.log is None:
            return {}
        settings = self.config.checkpoint
        facts = {"id": self.run_id, "status": status}
        summary = self.log.summarise(facts, settings.best, settings.mode)
        if rows := self.log.rows:
            path = self.folder / "figures" / "curves.png"
            path.parent.mkdir(exist_ok=True)
            figures.curves(rows).savefig(path, dpi=120)
            self.log.figure(self.state.step, "curves", path)
        logger.info("%s at step %d: %s", status, self.state.step, self.folder / METRICS)
        return summary

    # --- around it --------------------------------------------------------------------------------------------------

    def _progress(self) -> Any:
        hide = None if self.first else True  # None hides it where there is no terminal
        name, done = self.config.run.name, self.state.step
        return tqdm(total=self.total_steps, initial=done, desc=name, unit="step", disable=hide)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the loop after the step that is under way."""

        def note(number: int, _: FrameType | None) -> None:
            self.stop_signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
