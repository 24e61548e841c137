"""Methods kept opaque: by decorator, by dotted path, inherited, and per tracer."""

from __future__ import annotations

import copy

import pytest
import torch
from capturing import Captured, capture
from torch import nn

from mmrazor_quant.tracing import CustomTracer, DataDependentError, UntracedMethodRegistry

X = torch.linspace(-2, 3, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


class Decoding(nn.Module):
    """A layer, and a method that branches on data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.gain = 2.0

    def decode(self, x, shift=0.0, *, keep=None):
        if x.sum() > 0:
            return x * self.gain + shift
        return x - shift if keep is None else keep

    def forward(self, x):
        return self.conv(self.decode(self.conv(x).repeat(1, 2, 1, 1)[:, :3], shift=1.0))


class Inheriting(Decoding):
    """Inherits the method."""


class Overriding(Decoding):
    """Has its own."""

    def decode(self, x, shift=0.0, *, keep=None):
        return -x if x.sum() > 1 else x


class Marked(Decoding):
    """Marks the method where it is defined."""

    @UntracedMethodRegistry.untraced
    def decode(self, x, shift=0.0, *, keep=None):
        return super().decode(x, shift)


class MarkedChild(Marked):
    """Overrides a marked method."""

    def decode(self, x, shift=0.0, *, keep=None):
        return x * 3 if x.sum() > 0 else x


class Nested(nn.Module):
    """Two instances below one root."""

    def __init__(self, kind=Decoding):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.first, self.second = kind(), nn.Sequential(kind())

    def forward(self, x):
        x = self.stem(x)
        return self.first(x) + self.second(x)


DECODE = f'{__name__}.Decoding.decode'


def path_of(cls, method='decode'):
    return f'{cls.__module__}.{cls.__qualname__}.{method}'


@pytest.mark.parametrize('kind', [Decoding, Inheriting, Overriding])
def test_a_skipped_method_is_one_call_for_the_class_and_its_subclasses(kind):
    module = kind().eval()
    with pytest.raises(DataDependentError):
        capture(module, X)

    captured = Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    for x in (X, -X * 3):
        assert torch.equal(captured(x), module(x))
    assert len(captured.targets('call_module')) == 3


@pytest.mark.parametrize('kind', [Marked, MarkedChild])
def test_the_decorator_marks_a_method_for_every_tracer(kind):
    module = kind().eval()

    captured = capture(module, X)

    for x in (X, -X * 3):
        assert torch.equal(captured(x), module(x))


def test_a_sibling_class_is_not_affected():
    with pytest.raises(DataDependentError):
        Captured(Decoding(), (X,), {}, skipped_methods=[path_of(Overriding)])


def test_every_instance_below_the_root_is_covered():
    module = Nested().eval()

    captured = Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    assert torch.equal(captured(-X), module(-X))
    assert len([t for t in captured.targets('call_module') if 'decode' in t]) == 2


def test_the_opaque_call_sees_later_changes_of_its_module():
    module = Decoding().eval()
    captured = Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    module.gain = 5.0

    assert torch.equal(captured(X.abs()), module(X.abs()))


def test_gradients_pass_an_opaque_call():
    module = Decoding()
    captured = Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    captured(X).sum().backward()

    assert module.conv.weight.grad.abs().sum() > 0


def test_opaque_calls_of_a_copy_are_calls_of_the_copy():
    module = Nested().eval()
    captured = Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])
    twin = copy.deepcopy(module)

    module.first.gain = module.second[0].gain = 50.0

    assert torch.equal(captured._function(twin, X), twin(X))
    assert not torch.equal(captured(X), captured._function(twin, X))


def test_opaque_calls_add_no_keys_and_no_parameters():
    module = Nested()
    keys, parameters = list(module.state_dict()), len(list(module.parameters()))

    Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    assert list(module.state_dict()) == keys
    assert len(list(module.parameters())) == parameters


def test_forward_itself_can_be_skipped():
    captured = Captured(Nested().eval(), (X,), {}, skipped_methods=[path_of(Decoding, 'forward')])

    assert captured.targets('call_module') == ['stem', 'first', 'second.0']


def test_nothing_is_left_on_class_or_instance():
    module = Nested().eval()
    before = dict(vars(Decoding)), sorted(vars(module.first))

    Captured(module, (X,), {}, skipped_methods=[path_of(Decoding)])

    assert (dict(vars(Decoding)), sorted(vars(module.first))) == before


def test_tracers_do_not_share_what_they_skip():
    first = CustomTracer([path_of(Decoding)])
    second = CustomTracer()

    first.capture(Decoding().eval(), (X,), {})

    with pytest.raises(DataDependentError):
        second.capture(Decoding().eval(), (X,), {})
    assert second.untraced.names_of(Decoding()) == set()
    assert first.untraced.names_of(Inheriting()) == {'decode'}


def test_the_same_name_of_another_class_is_not_skipped():
    class Other(nn.Module):
        def decode(self, x):
            return x * 2

        def forward(self, x):
            return self.decode(x)

    captured = Captured(Other(), (X,), {}, skipped_methods=[path_of(Decoding)])

    assert captured.targets('call_module') == []


UNKNOWN = {
    'no_such_package.module.Class.method': 'no_such_package',
    'torch.nn.NoSuchClass.forward': 'NoSuchClass',
    'torch.nn.Conv2d.no_such_method': 'no_such_method',
    'torch.nn.Conv2d.in_channels': 'in_channels',
    'torch.nn.functional.relu': 'relu',
    'torch.optim.SGD.step': 'SGD',
    'decode': 'decode',
    '': '',
}


@pytest.mark.parametrize('path', UNKNOWN)
def test_a_method_that_does_not_exist_is_an_error_that_names_the_field(path):
    with pytest.raises(ValueError, match='skipped_methods') as error:
        CustomTracer([path])

    assert UNKNOWN[path] in str(error.value)


def test_an_error_inside_an_imported_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / 'imports_what_is_missing.py').write_text('import no_such_dependency\n')
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match='no_such_dependency'):
        CustomTracer(['imports_what_is_missing.Class.method'])
