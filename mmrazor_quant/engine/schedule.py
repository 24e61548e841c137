"""When observers, fake quantizers and batch-norm statistics are on during QAT: a pure function of the step."""

from dataclasses import dataclass, fields

NEVER = -1


@dataclass(frozen=True)
class QATState:
    """What is switched on at one step of training.

    Attributes:
        observe: Weights and activations are observed.
        weight_quant: Weights are fake-quantized.
        act_quant: Activations are fake-quantized.
        bn_frozen: Batch normalization keeps its running statistics.
    """

    observe: bool
    weight_quant: bool
    act_quant: bool
    bn_frozen: bool

    def __str__(self) -> str:
        """Describe the state in a line of a log."""
        return ', '.join(
            (
                f'observers {"on" if self.observe else "off"}',
                f'weights {"quantized" if self.weight_quant else "float"}',
                f'activations {"quantized" if self.act_quant else "float"}',
                f'batch norm {"frozen" if self.bn_frozen else "learning"}',
            )
        )


@dataclass(frozen=True)
class QATSchedule:
    """The steps at which the state changes, in epochs or iterations.

    Because the state is a function of the step alone, a resumed run is in the state that the interrupted one was in.

    Attributes:
        observe_begin: First step that is observed.
        observe_end: First step that is no longer observed; -1: observed to the end. Equal to ``observe_begin``:
            nothing is observed, which asks for ranges from calibration or from a quantized checkpoint.
        weight_quant_begin: First step with fake-quantized weights.
        act_quant_begin: First step with fake-quantized activations: the delay of Jacob et al. 2018 (IAO), section
            3.1, in which ranges settle before activations are quantized.
        freeze_bn_begin: First step with frozen batch-norm statistics; -1: never.
    """

    observe_begin: int = 0
    observe_end: int = NEVER
    weight_quant_begin: int = 0
    act_quant_begin: int = 0
    freeze_bn_begin: int = NEVER

    def check(self, total: int, unit: str, field: str) -> None:
        """Refuse values that cannot be meant.

        Args:
            total: Number of steps of the training.
            unit: What a step is, ``'epochs'`` or ``'iterations'``, for the error.
            field: Config field of the loop, for the error.

        Raises:
            ValueError: Naming the field, what was given and what is allowed.
        """
        for name in (f.name for f in fields(self)):
            self._check_value(name, total, unit, field)
        if self.observe_end != NEVER and self.observe_end < self.observe_begin:
            raise ValueError(
                f'{field}.observe_end={self.observe_end} is before '
                f'{field}.observe_begin={self.observe_begin}: give a later one, or -1 for no end'
            )

    def _check_value(self, name: str, total: int, unit: str, field: str) -> None:
        """Check one field by itself; see :meth:`check`."""
        value = getattr(self, name)
        lowest = NEVER if name in ('observe_end', 'freeze_bn_begin') else 0
        if type(value) is not int or value < lowest:
            allowed = 'an int >= 0, or -1 for never' if lowest == NEVER else 'an int >= 0'
            raise ValueError(f'{field}.{name} must be {allowed} ({unit}), but got {value!r}')
        if name in ('observe_begin', 'weight_quant_begin', 'act_quant_begin') and value >= total:
            raise ValueError(f'{field}.{name}={value} is never reached: training ends after {total} {unit}')

    def needs_calibration(self) -> bool:
        """Tell whether activations would be quantized before anything of them was observed."""
        return self.observe_end == self.observe_begin or self.observe_begin > self.act_quant_begin

    def has_observed_only_before(self, step: int) -> bool:
        """Tell whether ranges were observed before a step and are no longer at it."""
        return self.observe_begin < self.observe_end <= step

    def state_at(self, step: int) -> QATState:
        """Look up the state of one step.

        Args:
            step: Epoch or iteration, from 0.

        Returns:
            The state to train this step in.
        """
        return QATState(
            observe=self.observe_begin <= step and (self.observe_end == NEVER or step < self.observe_end),
            weight_quant=step >= self.weight_quant_begin,
            act_quant=step >= self.act_quant_begin,
            bn_frozen=self.freeze_bn_begin != NEVER and step >= self.freeze_bn_begin,
        )
