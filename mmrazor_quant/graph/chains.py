"""Finding pairs of layers between which a factor per channel can be moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.fx import Node

from mmrazor_quant.tracing.island import Island, islands_of

from .calls import QuantizedCall, quantized_calls
from .channel_clip import ChannelClip, is_clip
from .homogeneous import is_flatten, is_homogeneous, reads_size_only
from .layers import is_linear_in_weight
from .rescale import input_channels, is_linear_in_input, output_channels


@dataclass(frozen=True)
class Link:
    """Two layers with nothing between them but operations that work channel by channel.

    Args:
        first: layer whose output channels can be scaled.
        norm: batch norm folded into it, or None.
        second: layer whose input channels can be scaled inversely.
        clips: paths, below the model, of the clipping activations between them, whose bounds scale too.
    """

    first: nn.Module
    norm: nn.Module | None
    second: nn.Module
    clips: tuple[str, ...] = ()


@dataclass
class Chains:
    """What was found in a model.

    Args:
        links: the pairs, in execution order.
        norms: the batch norm folded into each layer with a quantized weight, or None.
        reasons: for each of these layers that is first of no pair, why not.
    """

    links: list[Link] = field(default_factory=list)
    norms: dict[nn.Module, nn.Module | None] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _End:
    """Where the output of one call goes: to a second layer, or nowhere for a reason."""

    reason: str = ''
    call: QuantizedCall | None = None
    clips: tuple[str, ...] = ()


def find_chains(model: nn.Module, scale_clips: bool = True) -> Chains:
    """Finds all pairs of layers with quantized weights that qualify in every graph of every island.

    A pair qualifies where each output of the first layer is read by nothing but the second layer, through operations
    of :func:`.homogeneous.is_homogeneous` and clips, and the second layer reads nothing else. The parameters must
    belong to these layers alone.

    Args:
        model: prepared model.
        scale_clips: whether ReLU6 and its kind may stand between, to be given bounds per channel.
    """
    search = _Search(model, scale_clips)
    for path, module in islands_of(model).items():
        for graph in Island.of(module).graphs():
            search.add(graph, module, path)
    return search.result()


class _Search:
    def __init__(self, model: nn.Module, scale_clips: bool) -> None:
        self.scale_clips = scale_clips
        self.ends: dict[nn.Module, list[_End]] = defaultdict(list)
        self.norms: dict[nn.Module, nn.Module | None] = {}
        self.sources: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        # By path of a clip, the layers whose outputs it was found behind, and how often it is called at all.
        self.clip_calls: dict[str, list[nn.Module]] = defaultdict(list)
        self.clip_counts: Counter[str] = Counter()
        self.read: set[int] = set()
        self.places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self.owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def add(self, graph: fx.Graph, root: nn.Module, prefix: str) -> None:
        """Follows all outputs of layers in one graph."""
        calls = quantized_calls(graph, root)
        by_source = {call.source: call for call in calls}
        reached = set()
        for call in calls:
            end = self._follow(call, root, prefix, by_source)
            self.ends[call.layer].append(end)
            self.norms[call.layer] = call.norm
            if end.call is not None:
                self.sources[end.call.layer].add(call.layer)
                reached.add(end.call.node)
        for call in calls:
            if call.node not in reached:
                self.sources[call.layer].add(None)
        self._add_reads(graph, root, prefix)

    def _follow(self, call: QuantizedCall, root: nn.Module, prefix: str, calls: dict[Node, QuantizedCall]) -> _End:
        """Goes from the output of a call to the layer that reads it."""
        node, axis = call.node, _channel_dimension(call.layer, call.node)
        clips: list[str] = []
        while True:
            readers = [user for user in node.users if not reads_size_only(user)]
            if len(readers) != 1:
                return _End('its output is read in several places' if readers else 'its output is not read')
            reader = readers[0]
            if node in calls and calls[node].node is reader:
                return self._arrive(calls[node], node, axis, clips)
            if [each for each in reader.all_input_nodes if each.meta.get('shape') is not None] != [node]:
                return _End(f'{_describe(reader, root)} comes behind it')
            if axis == 1 and self._is_scalable_clip(reader, root):
                clips.append(f'{prefix}.{reader.target}'.strip('.'))
                self.clip_calls[clips[-1]].append(call.layer)
            elif not (axis == 1 and is_flatten(reader, root)) and not is_homogeneous(reader, root, axis):
                return _End(f'{_describe(reader, root)} comes behind it')
            node = reader

    def _is_scalable_clip(self, node: Node, root: nn.Module) -> bool:
        return self.scale_clips and _is_clip(node, root) and self.places[id(root.get_submodule(node.target))] == 1

    @staticmethod
    def _arrive(call: QuantizedCall, node: Node, axis: int | None, clips: list[str]) -> _End:
        if axis is None or axis != _channel_dimension(call.layer, node):
            return _End('its channels are not those of the layer behind it')
        return _End('', call, tuple(clips))

    def _add_reads(self, graph: fx.Graph, root: nn.Module, prefix: str) -> None:
        """Notes the parameters that functions read, and the calls of clips."""
        for node in graph.nodes:
            if node.op == 'get_attr':
                value = _attribute(root, node.target)
                if isinstance(value, Tensor):
                    self.read.add(id(value))
            elif _is_clip(node, root):
                self.clip_counts[f'{prefix}.{node.target}'.strip('.')] += 1

    def result(self) -> Chains:
        """Returns what qualifies in all graphs added."""
        chains = Chains(norms=self.norms)
        for layer, ends in self.ends.items():
            link = self._link(layer, ends)
            if isinstance(link, Link):
                chains.links.append(link)
            else:
                chains.reasons[layer] = link
        return chains

    def _link(self, layer: nn.Module, ends: list[_End]) -> Link | str:
        """Returns the pair that a layer is the first of, or why there is none."""
        failed = next((end.reason for end in ends if end.call is None), None)
        if failed is not None:
            return failed
        second, norm = ends[0].call.layer, self.norms[layer]
        if len({(end.call.layer, end.clips) for end in ends}) > 1:
            return 'different layers come behind it'
        if self.sources[second] != {layer}:
            return 'the layer behind it reads other tensors too'
        if not all(self.clip_calls[path] == [layer] * self.clip_counts[path] for path in ends[0].clips):
            return 'the clip behind it has other inputs too'
        return self._refuse_first(layer, norm) or self._refuse_second(layer, second) or Link(
            layer, norm, second, ends[0].clips
        )  # fmt: skip

    def _refuse_first(self, layer: nn.Module, norm: nn.Module | None) -> str:
        if norm is not None:
            if norm.weight is None:
                return 'its batch norm is not affine'
            return '' if self._own(norm, 'weight', 'bias') else 'its batch norm has computed or shared parameters'
        if not self._own(layer, 'weight', 'bias'):
            return 'its parameters are computed or shared'
        return '' if is_linear_in_weight(layer) else 'it has a forward of its own'

    def _refuse_second(self, first: nn.Module, second: nn.Module) -> str:
        if not self._own(second, 'weight'):
            return 'the parameters of the layer behind it are computed or shared'
        if not is_linear_in_input(second):
            return 'the layer behind it has a forward of its own'
        fits = input_channels(second) % output_channels(first) == 0
        return '' if fits else 'its channels are not those of the layer behind it'

    def _own(self, module: nn.Module, *names: str) -> bool:
        """Tells whether parameters are plain ones that nothing else has or reads."""
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is None and (name == 'weight' or name not in module._parameters):
                return False
            if parameter is not None and (self.owners[id(parameter)] > 1 or id(parameter) in self.read):
                return False
        return True


def _channel_dimension(layer: nn.Module, node: Node) -> int | None:
    """Returns the dimension of the channels in a layer's input or output, None where the shape is not known."""
    shape = node.meta.get('shape')
    if shape is None:
        return None
    return len(shape) - 1 if isinstance(layer, nn.Linear) else len(shape) - len(layer.kernel_size) - 1


def _is_clip(node: Node, root: nn.Module) -> bool:
    if node.op != 'call_module':
        return False
    module = root.get_submodule(node.target)
    return isinstance(module, ChannelClip) or is_clip(module)


def _describe(node: Node, root: nn.Module) -> str:
    if node.op == 'output':
        return 'the end of what was captured'
    if node.op == 'call_module':
        return type(root.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, '__name__', str(node.target))


def _attribute(root: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition('.')
    return getattr(root.get_submodule(owner), name, None)
