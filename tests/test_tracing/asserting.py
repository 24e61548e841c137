"""Forwards with assertions, in a module of their own: pytest rewrites those of the tests."""

from __future__ import annotations


def positive(net, x):
    assert (x > 0).all()
    return net.conv(x)


def positive_with_words(net, x):
    assert x.min() > 0, 'negative'
    return net.conv(x)


def not_negative(net, x):
    assert not (x < 0).any()
    return net.conv(x)


def branching(net, x):
    return net.conv(x) if (x > 0).all() else x


def raising(net, x):
    if not (x > 0).all():
        raise AssertionError('negative')
    return net.conv(x)
