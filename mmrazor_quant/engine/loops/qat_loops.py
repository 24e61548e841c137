"""Quantization-aware training as mmengine's two training loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dataset import DefaultSampler
from mmengine.dist import get_rank
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.engine.calibration import calibrate
from mmrazor_quant.engine.checkpoint import make_checkpoints_atomic
from mmrazor_quant.engine.hooks import BatchAugmentsHook, CompiledWorkHook, EMABuffersHook, QuantEvalHook
from mmrazor_quant.engine.loops.arguments import refuse_unknown
from mmrazor_quant.engine.memory import keep_freed_memory
from mmrazor_quant.engine.quant_model import QuantModel, check_matched, unwrap_quant_model
from mmrazor_quant.engine.randomness import (
    CALIBRATION,
    EPOCH,
    ITERATION,
    WorkerInit,
    preserved_randomness,
    seed_everything,
)
from mmrazor_quant.engine.schedule import QATSchedule, QATState
from mmrazor_quant.registry import LOOPS


def _check_trained(model: QuantModel) -> None:
    """Refuse a model that learns in modules which only training runs, and not in the quantized ones.

    Args:
        model: Model.

    Raises:
        ValueError: All quantized weights are frozen, as those of a teacher are, and modules stay float that only
            training runs, as its student does.
    """
    findings = getattr(model, 'findings', None)
    if findings is None or not findings.training_only:
        return
    weights = [model.architecture.get_submodule(site.layer) for site in model.inserted.weights]
    if weights and not any(p.requires_grad for layer in weights for p in layer.parameters(recurse=False)):
        raise ValueError(
            f'model.architecture: got a {type(model.architecture).__name__} that trains '
            f'{", ".join(findings.training_only)}, which is not quantized since only training runs it, while all '
            'quantized weights are frozen: quantization-aware training would train a float model. Train it in float, '
            'and quantize the trained detector (its config as model.architecture, its weights as '
            'model.float_checkpoint); the whole model can be quantized after training (mmrazor.PTQLoop)'
        )


class _QATLoop(BaseLoop):
    """What the two loops share: the schedule, the start of training, and randomness that survives a resume."""

    dataloader: DataLoader
    _iter: int
    _epoch: int

    def _set_up(self, schedule: QATSchedule, by_epoch: bool, total: int, calibrate_steps: int) -> None:
        """Take over the quantization side of the arguments and register what the loop needs in the runner."""
        _check_trained(self.model)
        schedule.check(total, 'epochs' if by_epoch else 'iterations', 'train_cfg')
        self.schedule = schedule
        self._schedule_by_epoch = by_epoch
        self.calibrate_steps = check_integer('train_cfg.calibrate_steps', calibrate_steps, 0)
        self._state: QATState | None = None
        self.runner.register_hook(QuantEvalHook(after_val=self._restore_state))
        self.runner.register_hook(EMABuffersHook())
        self.runner.register_hook(CompiledWorkHook())
        self.runner.register_hook(BatchAugmentsHook())
        make_checkpoints_atomic(self.runner)
        if isinstance(self.runner.model, DistributedDataParallel):
            # The statistics of batch norms, and of torch's own observers, are those of each rank's data: all go on from
            # those of rank 0, which are the ones that are saved.
            self.runner.model.broadcast_buffers = True

    @property
    def model(self) -> QuantModel:
        """The model being trained, without data-parallel wrapper."""
        return unwrap_quant_model(self.runner, 'train_cfg')

    @property
    def _seed(self) -> int:
        """Seed of the run, the same on all ranks."""
        differs = self.runner._randomness_cfg.get('diff_rank_seed', False)
        return self.runner.seed - get_rank() if differs else self.runner.seed

    def run(self) -> nn.Module:
        """Train.

        Returns:
            The trained model, calibrated and with its observers off.

        Raises:
            ValueError: If activations would be quantized before anything is known of them.
        """
        keep_freed_memory()
        self._follow_resumed_seed()
        self._prepare_model()
        model = super().run()
        self.model.set_quant_state(weight_observer=False, act_observer=False)
        return model

    def _prepare_model(self) -> None:
        """See to it that every quantizer has a range before it is used for the first time."""
        model, logger = self.model, self.runner.logger
        if self._iter > 0:
            check_matched(model, 'resume')
            return
        if model.is_calibrated:
            logger.info('The model is calibrated already: training begins with its ranges')
        elif self.calibrate_steps > 0:
            logger.info(f'Calibrating on train_dataloader, up to {self.calibrate_steps} batches')
            with preserved_randomness():
                seed_everything(CALIBRATION, self._seed)
                calibrate(model, self._calibration_data(), self.calibrate_steps, 'train_dataloader')
        elif self.schedule.needs_calibration():
            raise ValueError(
                f'train_cfg.observe_begin={self.schedule.observe_begin}, '
                f'train_cfg.observe_end={self.schedule.observe_end}, '
                f'train_cfg.act_quant_begin={self.schedule.act_quant_begin}: activations would be quantized before '
                'any were observed. Observe from act_quant_begin or earlier, set train_cfg.calibrate_steps, or '
                'start from a quantized checkpoint (load_from)'
            )
        else:
            model.observe_weights()

    def _calibration_data(self) -> DataLoader:
        """Make a second loader over the training data: the first one's sampler must not be advanced."""
        loader = self.dataloader
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size or loader.batch_sampler.batch_size,
            sampler=DefaultSampler(loader.dataset, shuffle=True, seed=self._seed),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=WorkerInit((CALIBRATION, self._seed, get_rank())),
        )

    def _build_dataloader(self, runner: Runner, dataloader: DataLoader | dict, may_persist: bool) -> DataLoader:
        """Build the dataloader of training from its config.

        Args:
            runner: Runner.
            dataloader: Config, or a built one, which is taken as it is.
            may_persist: Allow workers that live longer than an epoch, whose random state nothing restores.

        Returns:
            The dataloader.
        """
        self._runner = runner
        self._built_with_seed = self._seed
        self._dataloader_config = dataloader
        if isinstance(dataloader, dict):
            if dataloader.get('persistent_workers') and not may_persist:
                runner.logger.info(
                    'train_dataloader.persistent_workers is switched off: workers start anew in each '
                    'epoch, with seeds of their own, so that a resumed run sees the same data'
                )
                dataloader = dict(dataloader, persistent_workers=False)
            dataloader = runner.build_dataloader(dataloader, seed=self._seed)
        elif dataloader.persistent_workers and not may_persist:
            runner.logger.warning(
                'train_dataloader is built with persistent_workers: a resumed run will see other '
                'random augmentations than the uninterrupted one'
            )
        self._config_worker_init = dataloader.worker_init_fn
        self._seed_workers(dataloader, epoch=0)
        return dataloader

    def _seed_workers(self, dataloader: DataLoader, epoch: int) -> None:
        """Give the workers that the loader starts next the seeds of an epoch."""
        dataloader.worker_init_fn = WorkerInit((EPOCH, self._seed, get_rank(), epoch), self._config_worker_init)

    def _follow_resumed_seed(self) -> None:
        """Order the data as the interrupted run did: without a seed in the config, resuming has changed the seed."""
        if self._seed != self._built_with_seed and isinstance(self._dataloader_config, dict):
            config = dict(self._dataloader_config, dataset=self.dataloader.dataset)
            may_persist = self.dataloader.persistent_workers
            self.dataloader = self._build_dataloader(self.runner, config, may_persist)
            self._restart_batches()

    def _restart_batches(self) -> None:
        """Take over a new dataloader."""

    def _enter_state(self) -> None:
        """Switch to the state that the schedule has for the current step."""
        step = self._epoch if self._schedule_by_epoch else self._iter
        state = self.schedule.state_at(step)
        if state.bn_frozen:
            # In every iteration: each call of model.train() sets batch norm learning again.
            self.model.freeze_bn(True)
        if state == self._state:
            return
        if self._starts_act_quant(step) and self.schedule.has_observed_only_before(step):
            self.model.compute_act_qparams()
        self._state = state
        self._restore_state()
        if state.weight_quant and state.act_quant:
            # Now, not at the end: a checkpoint of the middle of training is a quantized model, too.
            self.model.mark_calibrated()
        unit = 'epoch' if self._schedule_by_epoch else 'iteration'
        self.runner.logger.info(f'QAT from {unit} {step}: {state}')

    def _starts_act_quant(self, step: int) -> bool:
        """Tell whether activations are quantized from this very iteration on."""
        per_step = len(self.dataloader) if self._schedule_by_epoch else 1
        return step == self.schedule.act_quant_begin and self._iter == step * per_step

    def _restore_state(self) -> None:
        """Switch the model to the current state, for instance after a validation."""
        state = self._state
        if state is not None:
            self.model.set_quant_state(
                weight_observer=state.observe,
                act_observer=state.observe,
                weight_fake_quant=state.weight_quant,
                act_fake_quant=state.act_quant,
            )


@LOOPS.register_module()
class QATEpochBasedLoop(_QATLoop, EpochBasedTrainLoop):
    """Epoch-based training with a schedule of quantization; killed and resumed, it ends in the same weights.

    The schedule counts epochs or, with ``schedule_by_epoch=False``, iterations. It decides alone what is switched on,
    so resuming needs nothing else. Validation runs with the observers off.

    All random generators are seeded anew before each iteration, and in each worker in each epoch, from the seed of
    the run (``randomness.seed``) and the place in training.

    Args:
        runner: Runner of a :class:`mmrazor_quant.algorithms.GeneralQuant`.
        dataloader: Training data.
        max_epochs: Number of epochs.
        val_begin: First epoch to validate after.
        val_interval: Epochs between validations.
        dynamic_intervals: Later validation intervals, as in mmengine's loop.
        observe_begin: First epoch in which ranges are observed.
        observe_end: First epoch in which they no longer are; -1: observed to the end.
        weight_quant_begin: First epoch with quantized weights.
        act_quant_begin: First epoch with quantized activations (the delay of IAO).
        freeze_bn_begin: First epoch with frozen batch-norm statistics; -1: never.
        schedule_by_epoch: The five fields above count epochs; False: iterations.
        calibrate_steps: Batches of training data to calibrate on before the first epoch, so that ranges and learned
            scales have good starting values; 0: none. Not done when resuming or starting from a quantized checkpoint.

    Example:
        >>> train_cfg = dict(type='mmrazor.QATEpochBasedLoop', max_epochs=10, calibrate_steps=32, freeze_bn_begin=7)
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: list[tuple[int, int]] | None = None,
        observe_begin: int = 0,
        observe_end: int = -1,
        weight_quant_begin: int = 0,
        act_quant_begin: int = 0,
        freeze_bn_begin: int = -1,
        schedule_by_epoch: bool = True,
        calibrate_steps: int = 0,
        **unknown: Any,
    ) -> None:
        refuse_unknown('train_cfg', QATEpochBasedLoop, unknown)
        unwrap_quant_model(runner, "train_cfg.type='mmrazor.QATEpochBasedLoop'")
        loader = self._build_dataloader(runner, dataloader, may_persist=False)
        super().__init__(runner, loader, max_epochs, val_begin, val_interval, dynamic_intervals)
        schedule = QATSchedule(observe_begin, observe_end, weight_quant_begin, act_quant_begin, freeze_bn_begin)
        total = self.max_epochs if schedule_by_epoch else self.max_iters
        self._set_up(schedule, schedule_by_epoch, total, calibrate_steps)

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of it where a checkpoint of its middle was resumed."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        seed_everything(EPOCH, self.runner.seed, self._epoch)
        self._seed_workers(self.dataloader, self._epoch)
        already_done = self._iter - self._epoch * len(self.dataloader)
        batches = iter(self.dataloader)
        for idx in range(len(self.dataloader)):
            # Seeded before the batch is made: without workers, its random augmentations are drawn here.
            seed_everything(ITERATION, self.runner.seed, self._iter)
            data_batch = next(batches)
            if idx >= already_done:
                self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train one iteration.

        Args:
            idx: Number of the batch in the epoch.
            data_batch: The batch.
        """
        self._enter_state()
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class QATIterBasedLoop(_QATLoop, IterBasedTrainLoop):
    """Iteration-based training with a schedule of quantization; killed and resumed, it ends in the same weights.

    As :class:`QATEpochBasedLoop`, with everything counted in iterations. As in mmengine, resuming reads again all
    data that were used already, which brings sampler and workers to where they were.

    Args:
        runner: Runner of a :class:`mmrazor_quant.algorithms.GeneralQuant`.
        dataloader: Training data, with ``sampler=dict(type='InfiniteSampler')`` best.
        max_iters: Number of iterations.
        val_begin: First iteration to validate after.
        val_interval: Iterations between validations.
        dynamic_intervals: Later validation intervals, as in mmengine's loop.
        observe_begin: First iteration in which ranges are observed.
        observe_end: First iteration in which they no longer are; -1: observed to the end.
        weight_quant_begin: First iteration with quantized weights.
        act_quant_begin: First iteration with quantized activations (the delay of IAO).
        freeze_bn_begin: First iteration with frozen batch-norm statistics; -1: never.
        calibrate_steps: Batches of training data to calibrate on before the first iteration; 0: none. Not done when
            resuming or starting from a quantized checkpoint.

    Example:
        >>> train_cfg = dict(type='mmrazor.QATIterBasedLoop', max_iters=2000, act_quant_begin=500)
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
        observe_begin: int = 0,
        observe_end: int = -1,
        weight_quant_begin: int = 0,
        act_quant_begin: int = 0,
        freeze_bn_begin: int = -1,
        calibrate_steps: int = 0,
        **unknown: Any,
    ) -> None:
        refuse_unknown('train_cfg', QATIterBasedLoop, unknown)
        unwrap_quant_model(runner, "train_cfg.type='mmrazor.QATIterBasedLoop'")
        loader = self._build_dataloader(runner, dataloader, may_persist=True)
        with self._seeded_start():
            super().__init__(runner, loader, max_iters, val_begin, val_interval, dynamic_intervals)
        self.dataloader_iterator = _SeededBatches(self.dataloader_iterator, runner)
        schedule = QATSchedule(observe_begin, observe_end, weight_quant_begin, act_quant_begin, freeze_bn_begin)
        self._set_up(schedule, False, self.max_iters, calibrate_steps)

    @contextmanager
    def _seeded_start(self) -> Iterator[None]:
        """Begin an iteration over the data: some samplers draw their seed from the global generator then."""
        with preserved_randomness():
            seed_everything(EPOCH, self.runner.seed, 0)
            yield

    def _restart_batches(self) -> None:
        with self._seeded_start():
            self.dataloader_iterator = _SeededBatches(_InfiniteDataloaderIterator(self.dataloader), self.runner)

    def run_iter(self, data_batch: Any) -> None:
        """Train one iteration.

        Args:
            data_batch: The batch.
        """
        self._enter_state()
        super().run_iter(data_batch)


class _SeededBatches:
    """Seed all generators before each batch is made, from the number of the iteration that it is for."""

    def __init__(self, batches: Iterator[Any], runner: Runner) -> None:
        self._batches = batches
        self._runner = runner
        self._iteration = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        seed_everything(ITERATION, self._runner.seed, self._iteration)
        self._iteration += 1
        return next(self._batches)
