"""Launches go to the device of the first tensor, which may be the first field of a NamedTuple."""

import functools

import torch


def on_its_device(function):
    """Triton launches on the current device, which need not be where the first tensor is."""

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        with torch.cuda.device_of(first[0] if isinstance(first, tuple) else first):
            return function(first, *args, **kwargs)

    return call
