"""What a backend's table says."""

from __future__ import annotations

from dataclasses import dataclass

from mmrazor_quant.qscheme import QScheme

BOTH, RESIDUAL = 'both', 'residual'
"""Which inputs of an addition are quantized: all, or only those that no layer gives to it alone."""


@dataclass(frozen=True)
class Limits:
    """The schemes that a backend can run for weights or for activations.

    Args:
        bit: most bits.
        least_bit: fewest bits.
        is_symmetry: allowed values of the scheme's field.
        is_per_channel: allowed values of the scheme's field.
        is_signed: whether the integers may be signed, or have to be.
        is_symmetric_range: allowed values of the scheme's field.
        is_pot_scale: allowed values of the scheme's field.
    """

    bit: int = 32
    least_bit: int = 1
    is_symmetry: tuple[bool, ...] = (False, True)
    is_per_channel: tuple[bool, ...] = (False, True)
    is_signed: tuple[bool, ...] = (False, True)
    is_symmetric_range: tuple[bool, ...] = (False, True)
    is_pot_scale: tuple[bool, ...] = (False, True)

    def check(self, scheme: QScheme, field: str, backend: str) -> None:
        """Refuses a scheme that the backend cannot run.

        Args:
            scheme: the scheme.
            field: where it stands in the config, such as ``qconfig.w_qscheme``.
            backend: name of the backend.

        Raises:
            ValueError: naming the field, what it is, and what is allowed.
        """
        where = f"allowed with quantizer.backend='{backend}'"
        if not self.least_bit <= scheme.bit <= self.bit:
            allowed = f'{self.least_bit} to {self.bit}' if self.least_bit < self.bit else f'{self.bit}'
            raise ValueError(f'{field}.bit: got {scheme.bit}, {where}: {allowed}')
        values = dict(
            is_symmetry=scheme.is_symmetry, is_per_channel=scheme.is_per_channel, is_signed=scheme.signed,
            is_symmetric_range=scheme.is_symmetric_range, is_pot_scale=scheme.is_pot_scale,
        )  # fmt: skip
        for name, value in values.items():
            allowed = getattr(self, name)
            if value not in allowed:
                raise ValueError(f'{field}.{name}: got {value}, {where}: {", ".join(map(str, allowed))}')


@dataclass(frozen=True)
class Rules:
    """Where a backend takes quantized tensors, and which.

    Args:
        name: name in ``CustomQuantizer(backend=...)``.
        quantized: kinds of operation whose inputs are quantized.
        optional: kinds that the user may ask for in addition.
        add_inputs: which inputs of additions, where these are quantized.
        quantize_results: whether results of layers have to be quantized for the layers to run in integers; those that
            are the model's own stay float, and so do their layers.
        every_result: whether, beyond that, results of all operations (of kind ``other``, too) and those that are the
            model's own are quantized.
        quantize_bias: whether the backend adds biases as int32 with the product of the scales of input and weight.
        is_dynamic: whether activation quantizers may take their scales from the very tensor, or have to.
        shares: which values may share a range of a dynamic quantizer.
        any_weight_axis: whether scales of weights may run over another dimension than that of the output channels.
        weights: schemes of weights.
        activations: schemes of activations.
    """

    name: str
    quantized: tuple[str, ...]
    optional: tuple[str, ...] = ()
    add_inputs: str = BOTH
    quantize_results: bool = False
    every_result: bool = False
    quantize_bias: bool = False
    is_dynamic: tuple[bool, ...] = (False,)
    shares: tuple[str, ...] = ('tensor',)
    any_weight_axis: bool = False
    weights: Limits = Limits()
    activations: Limits = Limits()

    def limits(self, kind: str) -> Limits:
        """Returns the schemes for weights (``'w'``) or activations (``'a'``)."""
        return self.weights if kind == 'w' else self.activations
