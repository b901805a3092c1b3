"""The loop: data, step, log, evaluate, save. It has no settings of its own."""

import logging
import math
import secrets
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal import checkpoint, distributed, run_folder
from multimodal.assemble import (
    Evaluation,
    Problems,
    assemble,
    be_deterministic,
    check_precision,
    count_steps,
    device_of,
    evaluate,
    open_evaluations,
    open_source,
)
from multimodal.batch import Batch
from multimodal.checkpoint import TrainerState
from multimodal.clock import Clock
from multimodal.compiling import compile_towers, failing_is_explained, graph_breaks
from multimodal.config import TrainConfig
from multimodal.data.fingerprint import fingerprint
from multimodal.data.loader import training_batches
from multimodal.data.order import Batches
from multimodal.ema import Ema
from multimodal.endings import StopSignal, losses_are_explained, require_few_broken, require_replayed
from multimodal.interop.weights import Report as Initialised
from multimodal.interop.weights import checkpoint_of, initialise
from multimodal.journal import Journal
from multimodal.kept_features import check_kept_features, keep_features
from multimodal.losses.targets import share_of_duplicates
from multimodal.memory import check_micro_batches, kept_micro_batch, running_out_is_explained
from multimodal.not_finite import NotFinite
from multimodal.optim import parameter_groups
from multimodal.parts import Report, Sources
from multimodal.patience import Patience
from multimodal.profiling import profiled, span
from multimodal.progress import Progress
from multimodal.run_lock import RunLock
from multimodal.saving import Saver
from multimodal.sharding import is_sharded
from multimodal.step import replay_tolerance, training_step
from multimodal.towers.batch_norm import check_batch_norms
from multimodal.units import Cadence

logger = logging.getLogger(__name__)


class Trainer:
    """Trains what a configuration describes, in the run's folder, from where the run stands."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.device = device_of(config.device)
        be_deterministic(config.deterministic)
        self.first = distributed.rank() == 0
        self.lock: RunLock | None = None  # on the first rank
        self.initialised: Initialised | None = None  # what became of init.weights, in a new run
        self.journal = Journal(config)
        self.clock = Clock()
        self.stop_signal = StopSignal()
        self.not_finite = NotFinite(config.global_batch_size // distributed.world_size(), self.device)
        self.replay_error = torch.zeros((), device=self.device)  # the largest so far
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.skipped = torch.zeros((), device=self.device)  # updates that were left out since the last log entry
        self.micro_batch_size = config.micro_batch_size

    def run(self) -> dict[str, Any]:
        """Train to the end, or to a stop signal; the summary. Returns at once if the run is finished."""
        distributed.start(self.device, self.config.timeout.seconds)
        try:
            with losses_are_explained(self.config.timeout):
                self._assemble(distributed.on_first_rank(run_folder.opening(self.folder)(self._open_folder)))
            if self.state.is_over:
                return distributed.on_first_rank(
                    lambda: self.journal.already_over(self.state, self.model.num_parameters())
                )
            return self._train()
        finally:
            if self.lock is not None:
                self.lock.release()
            distributed.stop()

    def _train(self) -> dict[str, Any]:
        exit_code = 1
        try:
            with losses_are_explained(self.config.timeout):
                distributed.on_first_rank(run_folder.opening(self.folder)(self._open_log))
                self.kept = keep_features(self.config, self.assembled, self.source)
            self.saver = Saver(self.config, self.assembled.readers, self.lock)
            with (
                self.stop_signal.heeded(),
                closing(self.saver),
                losses_are_explained(self.config.timeout),
                closing(self._batches()) as batches,
            ):
                self._loop(batches)
            summary = distributed.on_first_rank(lambda: self.journal.summarise(self.state, self.state.status))
            exit_code = 0
            return summary
        except BaseException:
            self.journal.failed(self.state)
            raise
        finally:
            self.journal.close(exit_code)

    # --- before -----------------------------------------------------------------------------------------------------

    def _open_folder(self) -> Path | None:
        self.lock = RunLock(self.folder)
        checkpoint.clean(self.folder)
        return run_folder.find_last(self.config)

    def _assemble(self, last: Path | None) -> None:
        """Build everything, as it stands in the `last` checkpoint."""
        config = self.config
        problems = Problems()
        with problems.at("precision"):
            check_precision(config.precision, self.device)
        source = open_source(config, problems)
        self.evaluations = open_evaluations(config.evals, Sources(config.paths.datasets), problems)
        self.steps_per_epoch, total_steps, self.warmup_steps = count_steps(config, source, problems)
        if source is not None:
            check_kept_features(config, source, problems)
        problems.report()
        assert source is not None
        self.source = source
        with problems.at("dataset"):
            self.fingerprint = fingerprint(source)
        problems.report()
        started_from = None
        if last is None and config.init.weights is not None:
            with problems.at("init.weights"):
                started_from = checkpoint_of(config.init.weights, Path(config.paths.runs))
            problems.report()
        self.assembled = assemble(config, source, last, started_from)
        self.model = self.assembled.model
        self.encoder = self.assembled.encoder(config.workers)
        if config.compile:
            compile_towers(self.model)
        tunings = {name: tower.tuning for name, tower in config.towers.items()}
        with problems.at("micro_batch_size"):
            check_micro_batches(self.model, config)
        with problems.at("towers"):
            check_batch_norms(self.model)
        with problems.at("towers"):
            self.optimizer = config.optimizer.build(parameter_groups(self.model, config.optimizer, tunings))
        problems.report()
        self.state = TrainerState(
            run_id=secrets.token_hex(4),
            num_samples=len(source),
            precision=self.assembled.precision,
            total_steps=total_steps,
            best_of=f"{config.checkpoint.best} {config.checkpoint.mode}",
            patience=Patience(of=config.early_stop.of),
        )
        if last is not None:
            self.state = run_folder.continued(config, checkpoint.load_state(last), self.state)
            checkpoint.load_optimizer(last, self.model, self.optimizer)
            self.skipped += self.state.skipped_updates
            if self.scaler is not None and self.state.grad_scaler is not None:
                self.scaler.load_state_dict(self.state.grad_scaler)
        elif config.init.weights is not None:
            with problems.at("init.weights"):
                self.initialised = initialise(self.model, config.init.weights, Path(config.paths.runs))
            problems.report()
        self.ema = Ema(self.model, config.ema.decay)
        if last is not None:
            for weights in self.ema.kinds:
                with self.ema.in_place(weights):
                    checkpoint.load_model(last, self.model, weights)

    def _batches(self) -> Generator[Batch, None, None]:
        config, state = self.config, self.state
        ranks = distributed.rank(), distributed.world_size()
        order = Batches(
            state.num_samples, config.seed, config.global_batch_size, *ranks, start=state.step, stop=state.total_steps
        )
        timeout, pinned = config.timeout.seconds, self.device.type == "cuda"
        return training_batches(
            self.source, self.assembled.readers, order, config.seed, config.workers, self.kept, timeout, pinned
        )

    def _open_log(self) -> None:
        ranks = distributed.world_size()
        where = f"{self.device} in {self.state.precision}" + (f", {ranks} processes" if ranks > 1 else "")
        facts = {  # what may be otherwise at another start
            "device": self.device.type,
            "precision": self.state.precision,
            "ranks": ranks,
            "data": self.fingerprint,
        }
        self.journal.open(self.state, self.model.num_parameters(), where, facts, self.initialised)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self, batches: Iterator[Batch]) -> None:
        config, state = self.config, self.state
        self.model.train()
        self.clock = Clock()
        wanted = config.profile and self.first
        progress = Progress(config.run.name, state.step, state.total_steps, self.first)
        with progress, profiled(wanted, self.folder, self.device) as profile:
            if not state.evaluated:
                self._evaluate_and_save(save_is_due=False)
            while not state.is_last:
                with span("data"), self.clock.waiting():
                    batch = next(batches)
                    batch = replace(batch, lengths=self._lengths(batch)).to(self.device)
                lr = self._set_lr()
                measured = self._step(batch)
                self.replay_error = torch.maximum(self.replay_error, measured.get("replay_error", self.replay_error))
                state.step, state.evaluated = state.step + 1, False
                self.not_finite.note(state.step, batch, measured["finite"], measured.pop("finite_rows"))
                with span("ema"):
                    self.ema.update(measured["updated"])
                self.skipped += 1 - measured.pop("updated")
                self.clock.steps += 1
                progress.advance()

                with span("vote"):
                    stopping, save_is_due = self._vote(batch)
                if self.state.is_last or self._due(config.log.every):
                    with span("log"):
                        measured["duplicate_captions"] = share_of_duplicates(distributed.gather(batch.ids["caption"]))
                        self._log_training(measured, lr, progress)
                if stopping:
                    self._save(best=False)
                    self.saver.wait()  # evaluating may take longer than one is given
                    save_is_due = bool(self._due_evaluations())
                self._evaluate_and_save(save_is_due)
                profile.step()
                if stopping:
                    break
        self.saver.wait()
        if not state.is_last:
            logger.info("stopped by a signal after step %d; the same command continues", state.step)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        config, state, context = self.config, self.state, self.assembled.context
        rows = len(batch.indices), config.global_batch_size
        if self.micro_batch_size == "auto":
            with running_out_is_explained("auto", *rows):
                self.micro_batch_size = kept_micro_batch(config, self.model, batch, context)
        size = self.micro_batch_size
        with running_out_is_explained(size, *rows), failing_is_explained():
            return training_step(
                self.model,
                config.loss,
                self.optimizer,
                batch,
                context,
                config.max_grad_norm,
                size,
                (config.seed, state.step),
                self.scaler,
            )

    def _lengths(self, batch: Batch) -> dict[str, Tensor]:
        """By tower; empty if weights are sharded: ranks gather them for every chunk, and have not as many chunks."""
        return {} if is_sharded(self.model) else self.model.lengths(batch.inputs)

    def _set_lr(self) -> float:
        factor = self.config.schedule(self.state.step, self.warmup_steps, self.state.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.config.optimizer.lr * factor

    def _vote(self, batch: Batch) -> tuple[bool, bool]:
        """What the ranks decide together: whether to stop, and whether to save; broken and cut samples are counted."""
        for line in batch.replaced:
            logger.warning("replaced a broken sample: %s", line)
        mine = self.stop_signal.came is not None, self.saver.late, len(batch.replaced), batch.truncated
        stop, save, broken, truncated, failed = distributed.total(*mine, self.saver.failed)
        if failed:
            self.saver.wait()

        state = self.state
        state.broken += broken
        state.truncated += truncated
        require_few_broken(state.broken, state.step * self.config.global_batch_size, self.config.max_broken)
        return stop > 0, save > 0 or self._due(self.config.checkpoint.every)

    def _due(self, cadence: Cadence) -> bool:
        return cadence.is_due(self.state.step, self.config.global_batch_size, self.steps_per_epoch)

    def _require_sound(self) -> None:
        """RunError if an update was left out; asked where the device is waited for anyway."""
        require_replayed(self.replay_error, replay_tolerance(self.assembled.context))
        self.not_finite.require_none(self.state.step, self.source, self.folder)

    def _log_training(self, measured: dict[str, Tensor], lr: float, progress: Progress) -> None:
        self._require_sound()
        state, clock = self.state, self.clock
        values = {f"train/{name}": float(value) for name, value in measured.items() if name != "finite"}
        values |= {
            "train/lr": lr,
            "train/epoch": state.step / self.steps_per_epoch,
            "train/broken_samples": state.broken,
            "train/truncated_captions": state.truncated,
            "train/samples_per_s": clock.steps * self.config.global_batch_size / clock.seconds,
            "train/data_wait": clock.waited / clock.seconds,
        }
        if self.config.compile:
            values["train/graph_breaks"] = graph_breaks()
        if self.scaler is not None:
            values["train/skipped_updates"] = float(self.skipped)
            self.skipped.zero_()
        self.journal.write(state.step, values)
        progress.tell(values["train/loss"], values["train/samples_per_s"])
        self.clock = Clock()

    # --- evaluate and save ------------------------------------------------------------------------------------------

    def _due_evaluations(self) -> dict[str, Evaluation]:
        parts = self.config.evals
        return {
            name: run for name, run in self.evaluations.items() if self.state.is_last or self._due(parts[name].every)
        }

    def _evaluate_and_save(self, save_is_due: bool) -> None:
        """The end of a step; a run continues here if it was saved before it came to its evaluations."""
        due = self._due_evaluations()
        improved = False
        if due:
            self._require_sound()
            before = self._stored_state()
            improved = self._evaluate(due, before)
            if rest := self._due_evaluations().keys() - due.keys():  # it has just become the last step
                improved |= self._evaluate({name: self.evaluations[name] for name in rest}, before)
        self.state.evaluated = True
        if improved or save_is_due or self.state.is_last:
            self._save(improved)

    def _evaluate(
        self,
        due: dict[str, Evaluation],
        before: TrainerState,  # as the step's first evaluation found it, where a run continues if one of them fails
    ) -> bool:
        """Whether the metric that checkpoints are judged by is the best so far."""
        best, mode = self.config.checkpoint.best, self.config.checkpoint.mode
        with self.clock.paused():
            reports: dict[str, Report] = {}
            try:
                for weights in self.ema.kinds:
                    with self.ema.in_place(weights):
                        reports |= evaluate(due, self.encoder, weights)
            except Exception:
                if self.journal.log is not None and not is_sharded(self.model):  # to gather takes all ranks
                    self.saver.save_alone(before, self.ema, self.optimizer, self.journal.log)
                raise
            values = self.journal.evaluated(self.state.step, reports)
        self._wait_no_longer(values)
        improved = best is not None and self.state.improves(values.get(best, math.nan), mode)
        return distributed.total(improved)[0] > 0

    def _wait_no_longer(self, values: dict[str, float]) -> None:
        """Note, on all ranks together, whether the run stops early."""
        asked, state = self.config.early_stop, self.state
        if asked.metric in values:
            state.patience = state.patience.after(values[asked.metric], asked.mode, asked.min_delta)
        enough = asked.metric is not None and state.patience.waited >= asked.patience
        before, state.stopped_early = state.stopped_early, distributed.total(enough)[0] > 0
        if state.stopped_early and not before:
            told = "step %d: %s was not better than %s for %d evaluations: the run stops early"
            logger.info(told, state.step, asked.metric, state.patience.best, state.patience.waited)

    def _save(self, best: bool) -> None:
        self._require_sound()
        with span("save"), self.clock.paused():
            self.saver.save(self._stored_state(), self.ema, self.optimizer, self.journal.log, best)

    def _stored_state(self) -> TrainerState:
        """With what is kept elsewhere while training."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        kept = {"skipped_updates": int(self.skipped), "grad_scaler": scaler, "log_bytes": self.journal.length}
        return self.state.model_copy(update=kept)
